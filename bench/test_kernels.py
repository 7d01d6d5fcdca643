"""One pytest-benchmark each for the operations that this project writes itself: `pytest bench --benchmark-only`."""

import pytest
import torch

import sosd_fast
from sosd_fast.testing import matrix

SHAPES = [(256, 256), (256, 1024), (768, 768)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["auto", "gram32", "gram64", "exact"])
def test_svdvals(benchmark, method, shape):
    W = matrix("gaussian", *shape)
    S = benchmark(sosd_fast.svdvals, W, method=method)
    torch.testing.assert_close(S, sosd_fast.svdvals(W, method="exact"), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_svdvals(benchmark, shape):
    W = matrix("gaussian", *shape)
    state = sosd_fast.topk_svdvals(W, 32).state
    S, _, _ = benchmark(sosd_fast.topk_svdvals, W, 32, state=state)
    torch.testing.assert_close(S, sosd_fast.svdvals(W)[:32], rtol=2e-2, atol=0)


def test_singular_distribution(benchmark):
    S = torch.rand(72, 768).sort(-1, descending=True).values
    d = benchmark(sosd_fast.singular_distribution, S, S, S)
    assert d.variation_l2.max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz(benchmark, shape):
    X = benchmark(sosd_fast.newton_schulz, matrix("gaussian", *shape))
    assert X.isfinite().all()
