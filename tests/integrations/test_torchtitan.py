"""torchtitan's own Trainer with one line added, on a CPU."""

import json
from pathlib import Path

import pytest
from torchrun import torchrun

import sosd_fast

pytest.importorskip("torchtitan")
WORKER = Path(__file__).with_name("torchtitan_worker.py")

LAYOUTS = {  # by the number of ranks: a process imports torchtitan once for all of its layouts
    2: {
        "fsdp": ("debugmodel", {"data_parallel_shard_degree": 2}),
        "tp": ("debugmodel", {"tensor_parallel_degree": 2}),
        "ep": ("debugmodel_moe", {"expert_parallel_degree": 2, "data_parallel_shard_degree": 2}),
    },
    4: {
        "fsdp+tp": ("debugmodel", {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2}),
        "hsdp": ("debugmodel", {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}),
    },
}
MATRICES = {"debugmodel": 2 * 7 + 2, "debugmodel_moe": 2 * (5 + 3 * 64) + 2}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_one_line_in_torchtitan(ranks, tmp_path):
    done = torchrun(ranks, WORKER, tmp_path, json.dumps(LAYOUTS[ranks]), timeout=500, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:]
    for layout, (model, _) in LAYOUTS[ranks].items():
        alone, tracked = (json.loads((tmp_path / f"{layout} {each}.json").read_text()) for each in (False, True))
        assert all(r["sums"] == alone[0]["sums"] for r in (*alone, *tracked)), (
            "the same bits with the probe and without"
        )
        names = [name for r in tracked for name in r["names"]]
        assert len(names) == len(set(names)) == MATRICES[model]
        assert all(r["steps"] == 4 for r in tracked)
        errors = {name: error for r in tracked for name, error in r["errors"].items()}
        assert sum("wqkv" in name for name in errors) == 6 and max(errors.values()) <= 1e-6, errors
        run = sosd_fast.load(tmp_path / layout / "run")
        assert sorted({r.name for r in run.records}) == sorted(names) and not run.missing_ranks
