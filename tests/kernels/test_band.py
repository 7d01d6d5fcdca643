"""Gram matrices reduced in two stages: dense to a band, and the band to tridiagonal form."""

import functools

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels import Backend
from sosd_fast.spectra.precision import MODELS
from sosd_fast.testing import SPECTRA, matrix, sd_distance

pytestmark = pytest.mark.skipif(kernels._C is None, reason="the C++ kernels are not built")

ONE_STAGE, TWO_STAGES = 2**40, 1
DTYPES = {torch.float32: "gram32", torch.float64: "gram64"}


def eigenvalues(G, band_from, threads=1):
    """Of one symmetric G (r, r), ascending."""
    r = G.shape[0]
    values = torch.empty(1, r, dtype=torch.float64)
    triangles = G[tuple(torch.triu_indices(r, r))][None]
    kernels._C.gram_eigenvalues(triangles=triangles, values=values, threads=threads, band_from=band_from)
    return values[0]


def measured(W, method, band_from, threads=1):
    """S, its bound and the sd_error of one matrix."""
    S = torch.empty(1, min(W.shape), dtype=torch.float64)
    bound, error = torch.empty_like(S), torch.empty(1, dtype=torch.float64)
    out = {"previous": None, "S": S, "bound": bound, "sd_error": error, "model": MODELS[Backend.CPP]}
    names = ("gram32", "bidiag32", "gram64", "bidiag64")
    kernels._C.svdvals(matrices=[W], method=method, methods=names, threads=threads, band_from=band_from, **out)
    return S[0], bound[0], float(error)


def gram(r, dtype, seed=0):
    W = torch.randn(r, r + 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (W @ W.mT).to(dtype)


@functools.cache
def drawn(name, r):
    return matrix(name, r, r + 30, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 2, 3, 15, 16, 17, 18, 19, 31, 32, 33, 34, 47, 48, 49, 50, 65, 130, 333])
def test_eigenvalues(r, dtype):
    """Sides around multiples of the band and of the padding, one beyond which there is nothing to chase, large ones."""
    G = gram(r, dtype)
    truth = torch.linalg.eigvalsh(G.double())
    found = eigenvalues(G, TWO_STAGES)
    assert (found - truth).abs().max() <= (8 + r**0.5) * torch.finfo(dtype).eps * truth[-1]
    if r > 30:
        assert not torch.equal(found, eigenvalues(G, ONE_STAGE)), "the other way gives the last bits otherwise"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [100, 519])
def test_threads_do_not_show(r, dtype):
    G = gram(r, dtype)
    alone = eigenvalues(G, TWO_STAGES)
    for threads in (2, 3, 8):
        assert torch.equal(eigenvalues(G, TWO_STAGES, threads), alone)


def test_the_form_follows_from_side_and_dtype():
    for r, dtype, expected in ((1024, torch.float32, TWO_STAGES), (1023, torch.float32, ONE_STAGE),
                               (768, torch.float64, TWO_STAGES), (767, torch.float64, ONE_STAGE)):  # fmt: skip
        G = gram(r, dtype)
        assert torch.equal(eigenvalues(G, 0, threads=2), eigenvalues(G, expected))


@pytest.mark.parametrize(
    "name", [*(name for name in SPECTRA if name != "zero"), "constant", "signs", "nearly rank one"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_hold(name, dtype):
    r = 200
    if name in SPECTRA:
        W = drawn(name, r)
    else:
        noise = torch.randn(r, r + 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        W = noise.sign() / 3 if name == "signs" else 0.37 + (name != "constant") * 1e-5 * noise
    W = W.to(dtype)
    truth = torch.linalg.svdvals(W.double().mT)
    S, bound, error = measured(W, DTYPES[dtype], TWO_STAGES)
    own = 64 * 2.0**-53
    assert ((S - truth).abs() <= bound + own * truth[0]).all()
    assert sd_distance(S, truth) <= error + own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_negligible_leaves_no_noise(dtype):
    """Blocks far apart in size, zero rows, and a diagonal: reflectors of columns whose squares would underflow."""
    r, eps = 96, torch.finfo(dtype).eps
    G = gram(r, dtype)
    sizes = torch.logspace(0, -30 if dtype == torch.float32 else -300, r, dtype=torch.float64)
    for H in (torch.zeros_like(G), torch.diag(sizes.to(dtype)), G * (sizes[:, None] * sizes).sqrt().to(dtype)):
        found, truth = eigenvalues(H, TWO_STAGES), torch.linalg.eigvalsh(H.double())
        assert found.isfinite().all() and (found - truth).abs().max() <= 20 * eps * truth[-1]
    H = torch.zeros_like(G)
    H[40:80, 40:80] = G[40:80, 40:80]
    found = eigenvalues(H, TWO_STAGES)
    assert (found - torch.linalg.eigvalsh(H.double())).abs().max() <= 20 * eps * found[-1]


def test_a_fault_shows():
    """One element off by a thousandth is beyond what `test_eigenvalues` allows."""
    G = gram(130, torch.float32)
    truth = torch.linalg.eigvalsh(G.double())
    G[70, 70] += 1e-3 * G[70, 70]
    error = (eigenvalues(G, TWO_STAGES) - truth).abs().max()
    assert error > (8 + 130**0.5) * torch.finfo(torch.float32).eps * truth[-1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite(bad):
    G = gram(64, torch.float32)
    G[3, 60] = G[60, 3] = bad
    assert eigenvalues(G, TWO_STAGES).isnan().all()
