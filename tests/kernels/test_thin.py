"""Few and long rows have Gram matrices of their own in C++: every rest of a chunk, block and vector, every layout."""

import pytest
import torch

from sosd_fast.spectra.svdvals import spectra


def layouts(W):
    """W (m, n) as it lies in memory in six ways; NaN is all around those that are views."""
    m, n = W.shape
    around = torch.full((m + 3, n + 5), torch.nan, dtype=W.dtype)
    around[1:-2, 2:-3] = W
    apart = torch.full((m, 2 * n), torch.nan, dtype=W.dtype)
    apart[:, ::2] = W
    return [W, W.mT.contiguous().mT, around[1:-2, 2:-3], around.mT.contiguous().mT[1:-2, 2:-3], apart[:, ::2], W.mT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 3, 8, 15, 16, 31, 32, 33])
def test_values_of_any_layout(r, dtype):
    for K in (8 * r - 1, 8 * r, 8 * r + 5, 1024, 1037, 9001):
        W = torch.randn(r, K, generator=torch.Generator().manual_seed(K)).to(dtype)
        truth = torch.linalg.svdvals(W.double())
        for method in ("gram32", "gram64"):
            for view in layouts(W):
                found = spectra([view], method)
                assert (found.S[0].double() - truth).abs().le(found.bound[0]).all(), (K, method, view.stride())
                assert (found.S[0] / found.S[0].sum() - truth / truth.sum()).norm() <= found.sd_error[0]


@pytest.mark.parametrize("shape", [(16, 300_000), (32, 16_411), (8, 70_000)], ids=str)
def test_long_sums_keep_what_rounding_loses(shape):
    """In float32, where all terms are equal and those of the diagonal alone do not tell."""
    W = 0.37 * torch.ones(shape[0], 1) @ torch.ones(1, shape[1])
    W[1::2, ::2] *= -1  # rows of two kinds, nearly orthogonal
    found, truth = spectra([W], "gram32"), torch.linalg.svdvals(W.double())
    assert (found.S[0].double() - truth).abs().le(found.bound[0]).all()
    assert (found.S[0] / found.S[0].sum() - truth / truth.sum()).norm() <= found.sd_error[0]
