"""What several ranks leave in one run directory: pipeline stages, copies, ranks that are missing, killed or failing."""

import json
from pathlib import Path

import numpy as np
import pytest
from prepared import run, run_ranks

import sosd_fast
from sosd_fast.runs.report import write_report

WORKER = Path(__file__).with_name("ranks_worker.py")
NAMES = [f"layers.{i}.weight" for i in range(4)]


def ranks(count, case, folder, *more):
    folder.mkdir(exist_ok=True)
    return run_ranks(count, WORKER, case, folder, *more)


def went_well(done, count):
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") == count, done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    went_well(run(WORKER, "whole", folder), 1)
    return sosd_fast.load(folder)


@pytest.mark.parametrize(
    ("count", "kind", "names"),
    [(2, "gpipe", "own"), (4, "1f1b", "own"), (2, "interleaved", "list"), (2, "gpipe", "hand-cut")],
)
def test_pipeline_stages_share_a_run_directory(count, kind, names, whole, tmp_path, caplog):
    went_well(ranks(count, "pipeline", tmp_path / "run", kind, names), count)
    found = sosd_fast.load(tmp_path / "run")
    expected = {
        "own": NAMES,
        "list": [f"{c}.{NAMES[rank + 2 * c]}" for rank in range(2) for c in range(2)],
        "hand-cut": [f"{i}.weight[rank {rank}]" for rank in range(2) for i in (0, 2)],
    }[names]
    assert found.names == expected == found.meta["matrices"] and found.missing_ranks == []
    in_whole = [NAMES[rank + 2 * c] for rank in range(2) for c in range(2)] if names == "list" else NAMES
    if names == "hand-cut":
        assert caplog.text.count("told apart") == 1 and "0.weight[rank 0], 2.weight[rank 0]" in caplog.text
    else:
        assert caplog.text == ""
    assert len(found.records) == len(whole.records) == len(found.columns("step")["step"]) == 5 * 4
    for name, same in zip(found.names, in_whole, strict=True):
        steps, S = found.spectra(name)
        assert list(steps) == list(range(5))
        SD, SD_ref = (V / np.linalg.norm(V, axis=1, keepdims=True) for V in (S, whole.spectra(same)[1]))
        assert np.linalg.norm(SD - SD_ref, axis=1).max() <= 1e-6, name
    assert set(found.columns("name")["name"]) == set(expected)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    found.to_parquet(tmp_path / "all.parquet")
    assert set(pyarrow.read_table(tmp_path / "all.parquet")["name"].to_pylist()) == set(expected)


def test_what_is_around_copies_is_looked_through(tmp_path):
    went_well(ranks(2, "wrapped", tmp_path), 2)


@pytest.mark.parametrize(("tracking", "steps"), [("0", 3), ("0,2", 30)])
def test_copies_that_some_ranks_do_not_track(tracking, steps, tmp_path, caplog):
    done = ranks(4, "only_some", tmp_path / "run", "ddp", tracking, steps)
    went_well(done, 4)
    absent = sorted(set(range(4)) - set(map(int, tracking.split(","))))
    listed = ", ".join(map(str, absent))
    assert done.stdout.count("WARNING") == 1 and f"was not tracked on ranks {listed}, and a share" in done.stdout
    found = sosd_fast.load(tmp_path / "run")
    assert found.missing_ranks == absent and len(found.names) == 4 - len(absent)
    assert caplog.text.count("are missing in") == 1 and f"the records of ranks {listed} are" in caplog.text
    report = write_report([tmp_path / "run"], tmp_path / "report.html")
    assert f"without those of ranks {listed}" in report.read_text()
    meta = json.loads((tmp_path / "run/rank-00000/meta.json").read_text())
    assert meta["rank"] == 0 and meta["shared_by"] == [0, 1, 2, 3]
    caplog.clear()
    assert sosd_fast.load(tmp_path / "run/rank-00000").missing_ranks == [1, 2, 3] and caplog.text == ""


def test_shards_that_a_rank_does_not_track(tmp_path):
    done = ranks(2, "only_some", tmp_path / "run", "fsdp", "0", 3)
    went_well(done, 2)
    assert done.stdout.count("refused") == 1 and not (tmp_path / "run/rank-00000").exists()


@pytest.mark.parametrize(("kind", "count"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_a_rank_is_killed(kind, count, tmp_path):
    done = ranks(count, "killed", tmp_path, kind)
    assert done.returncode != 0 and done.stdout.count("ended by: ") == count - 1, done.stdout + done.stderr
    flushed = [int((tmp_path / f"flushed-{rank}").read_text()) for rank in range(count)]
    assert max(flushed) == 5 and flushed[1] == 5
    found = sosd_fast.load(tmp_path)
    assert found.missing_ranks == [] and sorted(found.names) == NAMES
    for rank in range(count):
        own = sosd_fast.load(tmp_path / f"rank-{rank:05d}")
        for name in own.names:
            steps = [r.step for r in own.records if r.name == name]
            assert steps == list(range(len(steps))) and len(steps) > flushed[rank]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["always", "thrice"])
def test_on_record_raises_on_one_rank(kind, how, tmp_path):
    done = ranks(2, "raising", tmp_path, kind, how)
    went_well(done, 2)
    assert done.stdout.count("on_record failed at") == 1
    assert done.stdout.count("on_record failed 10 times in a row") == (how == "always")
    found = sosd_fast.load(tmp_path)
    for name in NAMES:
        assert [r.step for r in found.records if r.name == name] == list(range(13))
