import functools
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


@pytest.fixture(scope="module")
def measured():
    """What one set of processes said that went through all layouts of as many ranks."""
    return functools.cache(lambda ranks: run_ranks(ranks, WORKER, *LAYOUTS[ranks]))


@pytest.mark.parametrize(("ranks", "kind"), [(ranks, kind) for ranks, kinds in LAYOUTS.items() for kind in kinds])
def test_spectra_are_those_of_one_process(ranks, kind, measured):
    assert measured(ranks).stdout.count(f"{kind}: as in one process") == ranks, measured(ranks).stderr


def test_what_is_sent_and_held_is_bounded():
    done = run_ranks(4, Path(__file__).with_name("traffic_worker.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all within bounds") == 4, done.stdout


def test_odd_parameters(tmp_path):
    done = run_ranks(4, Path(__file__).with_name("odd_layouts_worker.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all said") == 4, done.stdout


METHODS = ("none", "full", "exact", "auto", "topk")
TRAINING = Path(__file__).with_name("training_layouts_worker.py")


KINDS = {1: ["alone"], 2: ["tp"], 4: ["fsdp+tp", "without root"]}


def trained(folder, kinds, ranks):
    """The results and the records of each method in each layout."""
    done = run_ranks(ranks, TRAINING, ",".join(kinds), ",".join(METHODS), folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == ranks
    found = {}
    for kind in kinds:
        results = {method: json.loads((folder / f"{kind}-{method}.json").read_text()) for method in METHODS}
        found[kind] = results, {m: sosd_fast.load(folder / f"{kind}-{m}") for m in METHODS if m != "none"}
    return found


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """What `trained` says of all layouts of as many ranks."""
    return functools.cache(lambda ranks: trained(tmp_path_factory.mktemp("training"), KINDS[ranks], ranks))


@pytest.mark.parametrize(("kind", "ranks"), [(kind, ranks) for ranks in (2, 4) for kind in KINDS[ranks]])
def test_records_of_a_training_run_are_those_of_one_process(kind, ranks, training):
    (results, runs), alone = training(ranks)[kind], training(1)["alone"]
    for method, run in runs.items():
        result, one, alone_run = results[method], alone[0][method], alone[1][method]
        assert result == results["none"], method  # bit for bit
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
