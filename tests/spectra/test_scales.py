"""Entries of any size: the reduction of a Gram matrix squares its entries, which are squares already."""

import numpy as np
import pytest
import torch

from sosd_fast import kernels
from sosd_fast.spectra.gram import set_diagonal, singular_values, triangles
from sosd_fast.spectra.svdvals import spectra, triangle_eigenvalues


def scaled(W, exponent):
    for part in (exponent // 2, exponent - exponent // 2):  # each of which has a power of two
        W = torch.ldexp(W, torch.tensor(part))
    return W


@pytest.mark.parametrize("exponent", [-143, -120, -60, -29, -17, 0, 15, 29, 60, 118])
@pytest.mark.parametrize("how", ["cpp", "torch", "triton", "parts"])
def test_float32_entries_of_any_size(how, exponent, monkeypatch):
    """`parts` is what ranks do that hold rows: a Gram matrix each, summed by one of them."""
    r, K = (12, 40) if how == "triton" else (48, 3000)
    signs = torch.where(torch.rand(r, K, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).double()
    W = scaled(signs, exponent).float()
    truth = torch.linalg.svdvals(signs)
    if how == "parts":
        scale, _ = kernels.scale_of(kernels.largest_entry(W)[0], torch.float32)
        T = torch.empty(1, r * (r + 1) // 2)
        squares, drift = triangles([W.mT], scale, T)
        set_diagonal(T, squares)
        S = singular_values(triangle_eigenvalues(T, r).double(), squares, drift)[0] / scale[:, None]
    else:
        if how == "torch":
            monkeypatch.setattr(kernels, "_C", None)
            monkeypatch.setattr(kernels, "warn_missing", lambda _: None)
        if how == "triton":
            if kernels.triton is None:
                pytest.skip("Triton is not installed")
            monkeypatch.setattr(kernels, "interpreted", True)
        with np.errstate(all="ignore"):  # Triton's interpreter
            S = spectra([W], "gram32").S
    S = scaled(S.cpu()[0], -exponent)
    assert (S / S.sum() - truth / truth.sum()).norm() <= 1e-6 and (S / truth - 1).abs().max() <= 1e-5


UNLIKE = [(64, 768), (300, 700), (16, 4096), (120, 150)]  # solved with others, alone, of few rows, and nearly square


@pytest.mark.parametrize("method", ["auto", "gram32", "gram64"])
@pytest.mark.parametrize("shape", UNLIKE, ids=str)
@pytest.mark.parametrize("exponent", [None, -140, -70, -30, -20, 20, 40, 60])
def test_columns_unlike_the_first(exponent, shape, method):
    """C++ scales by what a sample of them tells; None: the sample holds zeros."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    W[:, : shape[1] // 2] = 0 if exponent is None else scaled(W[:, : shape[1] // 2], exponent)
    truth = torch.linalg.svdvals(W.double())
    for view in (W, W.mT, W.mT.contiguous().mT, W.double()):
        found = spectra([view], method)
        assert (found.S[0] - truth).abs().le(found.bound[0]).all()
        assert (found.S[0] / found.S[0].sum() - truth / truth.sum()).norm() <= found.sd_error[0]


@pytest.mark.parametrize("method", ["auto", "gram32", "gram64"])
@pytest.mark.parametrize("shape", UNLIKE, ids=str)
def test_what_is_not_finite_beyond_the_first_columns(shape, method):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = spectra([W], method).S[0]
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = W.clone()
        broken[-1, -1] = value
        found = spectra([broken, W], method)
        assert found.S[0].isnan().all() and found.bound[0].isnan().all() and found.sd_error[0].isnan()
        assert torch.equal(found.S[1], whole)


def test_scales_are_powers_of_two_that_float32_holds():
    largest = torch.tensor([2.0**-149, 2.0**-126, 2.0**-17, 1.5, 2.0**17, 2.0**127, 0.0, torch.inf])
    scale, finite = kernels.scale_of(largest, torch.float32)
    assert scale.tolist() == [2.0**126, 2.0**126, 2.0**17, 1.0, 2.0**-17, 2.0**-126, 1.0, 1.0]
    assert finite.tolist() == [True] * 7 + [False]
    scale, _ = kernels.scale_of(torch.tensor([2.0**-1074, 1e300], dtype=torch.float64), torch.float64)
    assert scale.tolist() == [2.0**900, 2.0**-996]
