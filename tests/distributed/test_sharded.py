from pathlib import Path

import numpy as np
import pytest
from prepared import run_ranks
from torch import nn

from sosd_fast.checkpoints.analyze import analyze
from sosd_fast.distributed.layout import assign, cost, shape_of
from sosd_fast.matrices import Matrix

WORKER = Path(__file__).with_name("sharded_worker.py")


def test_assignment_takes_the_longest_first():
    assert assign([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1] or assign([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 0]
    assert assign([1.0, 9.0, 1.0], 2) == [1, 0, 1]
    assert assign([], 3) == []
    assert assign([2.0], 3) == [0]


def test_gpt2_small_is_shared_equally():
    shapes = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12 + [(50304, 768)]
    costs = [cost(shape) for shape in shapes]
    for ranks in (2, 3, 4):
        parts = assign(costs, ranks)
        load = [sum(c for c, p in zip(costs, parts, strict=True) if p == part) for part in range(ranks)]
        assert max(load) <= 1.05 * sum(costs) / ranks


def test_conv_kernels_flatten():
    assert shape_of(Matrix("conv", nn.Conv2d(2, 13, 3).weight, flatten=1)) == (13, 18)


@pytest.mark.parametrize(("ranks", "kind"), [(3, "rows"), (4, "hybrid")])
def test_rows_in_a_checkpoint_and_beyond_the_usual(ranks, kind, tmp_path):
    done = run_ranks(ranks, WORKER, kind, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all as in one process") == ranks, done.stdout

    (joined,), (whole,) = (analyze([tmp_path / name]) for name in ("shards", "whole.pt"))
    assert len(list((tmp_path / "shards").glob("*.distcp"))) == ranks
    expected = {r.name: r for r in whole}
    assert sorted(expected) == sorted(r.name for r in joined) and "tall.exp_avg" not in expected
    for r in joined:
        assert r.shape == expected[r.name].shape
        assert np.array_equal(r.spectrum, expected[r.name].spectrum, equal_nan=True), r.name
