"""Bounds hold for matrices of few distinct values, whose sums do not average rounding out."""

import math

import pytest
import torch

from bench.bounds import batches, check, few_values
from sosd_fast.spectra.svdvals import spectra


@pytest.mark.parametrize("ordinary", [False, True], ids=["few values", "ordinary"])
def test_no_bound_is_broken(ordinary):
    """A small part of what `python -m bench.bounds` draws."""
    count = 0
    for seed, dtype, kinds, matrices in batches(600, ordinary, seed=20_000_000):
        for kind, (method, error, sd, value) in zip(kinds, check(matrices), strict=True):
            assert error <= 1e-6 and sd <= 1 and value <= 1, (seed, dtype, kind, method, error, sd, value)
            count += 1
    assert count == 600


@pytest.mark.parametrize("shape", [(256, 256), (256, 1300), (500, 500)], ids=str)
def test_larger_ones_of_few_values(path, shape):
    g = torch.Generator().manual_seed(0)
    matrices = few_values(*shape, g)
    for kind, row in zip(matrices, check(list(matrices.values())), strict=True):
        assert row[1] <= 1e-6 and row[2] <= 1 and row[3] <= 1, (kind, *row)


def test_signs_at_a_thousand():
    """Their SD erred by 1.0e-6 where `sd_error` said 6.9e-8: the diagonal of the Gram matrix drifted."""
    W = 0.0137 * torch.sign(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    ((_, error, sd, value),) = check([W])
    assert error < 3e-7 and sd <= 1 and value <= 1
    quick = spectra([W], "gram32")
    truth = torch.linalg.svdvals(W.double())
    assert (quick.S[0] / quick.S[0].sum() - truth / truth.sum()).norm() <= quick.sd_error[0]


@pytest.mark.parametrize("method", ["gram32", "gram64", "auto", "exact"])
@pytest.mark.parametrize("r", [2, 4, 10, 16, 40])
def test_values_that_nearly_repeat(path, method, r):
    """LAPACK's erred by 118 units of rounding, twice their bound, and SD by 6 times `sd_error`."""
    g, own = torch.Generator().manual_seed(r), 160 * 2.0**-53  # of the truth, which is LAPACK's, too
    for _ in range(15):
        Q = torch.linalg.qr(torch.randn(4, r + 1, r, generator=g, dtype=torch.float64))[0]
        apart = 10.0 ** (-5 * torch.rand(4, 1, 1, generator=g, dtype=torch.float64))
        W = (Q * (1 + apart * torch.randn(4, 1, r, generator=g, dtype=torch.float64))).float()
        found, truth = spectra(list(W), method), torch.linalg.svdvals(W.double())
        error = (found.S / found.S.sum(-1, keepdim=True) - truth / truth.sum(-1, keepdim=True)).norm(dim=-1)
        assert (error <= found.sd_error + own).all() and ((found.S - truth).abs() <= found.bound + own).all()


@pytest.mark.parametrize("method", ["gram32", "gram64", "auto"])
@pytest.mark.parametrize("shape", [(1, 1_000_000), (16, 300_000), (12, 396), (700, 700)], ids=str)
def test_a_million_equal_terms(shape, method):
    """Values of constant matrices erred by up to 5.9 times their bound."""
    for c in (0.0137, 0.77, 1 / 3):
        W = torch.full(shape, c)
        found = spectra([W], method)
        true = float(W[0, 0].double()) * math.sqrt(W.numel())
        assert abs(float(found.S[0, 0]) - true) <= float(found.bound[0, 0])
        assert (found.S[0, 1:] <= found.bound[0, 1:]).all(), "the others are zero"
