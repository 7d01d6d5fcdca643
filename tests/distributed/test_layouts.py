import json
from pathlib import Path

import numpy as np
import pytest
from prepared import run_ranks

import sosd_fast

WORKER = Path(__file__).with_name("layouts_worker.py")


LAYOUTS = {
    2: ["tp", "copies"],
    3: ["rows", "tp", "columns"],
    4: ["hybrid", "fsdp+tp", "last", "experts", "ep"],
    8: ["hsdp+tp"],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_spectra_are_those_of_one_process(ranks):
    done = run_ranks(ranks, WORKER, *LAYOUTS[ranks])
    for kind in LAYOUTS[ranks]:
        assert done.stdout.count(f"{kind}: as in one process") == ranks, (kind, done.stderr)


def test_what_is_sent_and_held_is_bounded():
    done = run_ranks(4, Path(__file__).with_name("traffic_worker.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all within bounds") == 4, done.stdout


def test_odd_parameters(tmp_path):
    done = run_ranks(4, Path(__file__).with_name("odd_layouts_worker.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all said") == 4, done.stdout


METHODS = ("none", "full", "exact", "auto", "topk")
SOME = ("none", "full", "topk")  # where plain parameters stand beside spread ones
TRAINING = Path(__file__).with_name("training_layouts_worker.py")


KINDS = {1: ["alone"], 2: ["tp"], 4: ["fsdp+tp", "without root"]}


def trained(folder, kinds, ranks):
    """The results and the records of each method in each layout."""
    methods = {kind: SOME if kind == "without root" else METHODS for kind in kinds}
    done = run_ranks(ranks, TRAINING, json.dumps(methods), folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == ranks
    found = {}
    for kind in kinds:
        results = {method: json.loads((folder / f"{kind}-{method}.json").read_text()) for method in methods[kind]}
        found[kind] = results, {m: sosd_fast.load(folder / f"{kind}-{m}") for m in methods[kind] if m != "none"}
    return found


@pytest.mark.slow
def test_records_of_a_training_run_are_those_of_one_process(tmp_path):
    found = {kind: each for ranks, kinds in KINDS.items() for kind, each in trained(tmp_path, kinds, ranks).items()}
    for kind in ("tp", "fsdp+tp", "without root"):
        compare(kind, *found[kind], found["alone"])


def compare(kind, results, runs, alone):
    for method, run in runs.items():
        result, one, alone_run = results[method], alone[0][method], alone[1][method]
        assert result == results["none"], (kind, method)  # bit for bit
        assert np.allclose(result["losses"], one["losses"], rtol=1e-5)
        expected, records = alone_run.records, run.records
        keys = [(r.step, r.name) for r in records]
        assert len(keys) == len(set(keys)) and run.names == alone_run.names
        if method != "auto":  # which the clock decides on
            assert sorted(keys) == sorted((r.step, r.name) for r in expected)
        for name in alone_run.names:
            (steps, S), (known_steps, known_S) = run.spectra(name), alone_run.spectra(name)
            both = np.intersect1d(steps, known_steps)
            assert 0 in both and (method == "auto" or len(both) == len(steps) == len(known_steps))
            for own, other in zip(S[np.isin(steps, both)], known_S[np.isin(known_steps, both)], strict=True):
                assert np.linalg.norm(own / own.sum() - other / other.sum()) < 1e-5, name
        known = {(r.step, r.name): r for r in expected}
        for r in records:
            other = known.get((r.step, r.name), r)
            assert r.shape == other.shape
            if method in ("full", "exact"):
                assert r.method == other.method
                assert (r.sd_variation is None) == (other.sd_variation is None)
                if r.sd_variation is not None:
                    assert abs(r.sd_variation - other.sd_variation) < 1e-5
            elif r.topk is not None and r.method == other.method:
                assert np.allclose(r.topk[:4], other.topk[:4], rtol=1e-3), (r, other)
