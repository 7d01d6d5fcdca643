"""The QL algorithm of the C++ kernels, with a tridiagonal matrix in each lane of a vector."""

import pytest
import torch

from sosd_fast import kernels

pytestmark = pytest.mark.skipif(kernels._C is None, reason="the extension is not built")

EPS = 2.0**-53


def values(d, e, tolerance=2.0**-54, sweeps=30):
    """Of matrices (B, n): eigenvalues, those below zero as zero; the sweeps are for each eigenvalue."""
    padded = torch.cat([e, torch.full_like(d[:, :1], torch.nan)], 1)  # the last column is nobody's
    out = torch.full_like(d, torch.nan)
    kernels._C.tridiagonal_eigenvalues(d=d, e=padded, values=out, tolerance=tolerance, sweeps=sweeps * d.shape[1])
    return out


def truth(d, e):
    T = torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    return torch.linalg.eigvalsh(T).clamp(min=0)


def drawn(name, n, seed=0):
    """(d, e) of a matrix whose eigenvalues are not negative, unless its name says so."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(k, dtype=torch.float64, generator=generator) for k in (n, n - 1))
    i = torch.arange(n).double()
    if name == "graded up":
        a, b = 10.0 ** -i.flip(0).clamp(max=30), 0.3 * 10.0 ** -i.flip(0)[1:].clamp(max=30)
    elif name == "graded down":
        a, b = 10.0 ** -i.clamp(max=30), 0.3 * 10.0 ** -i[1:].clamp(max=30)
    elif name == "deficient":
        a, b = torch.where(i < n // 3, a, 0.0), torch.where(i[1:] < n // 3, b, 0.0)
    elif name == "one":
        a, b = torch.where(i == n // 2, a, 0.0), 0 * b
    d, e = a.square() + torch.cat([torch.zeros(1), b.square()]), a[:-1] * b  # B^T B
    match name:
        case "toeplitz":
            return torch.full_like(d, 2.0), torch.full_like(e, -1.0)
        case "zero":
            return 0 * d, 0 * e
        case "diagonal":
            return d, 0 * e
        case "equal":
            return torch.ones_like(d), 0 * e
        case "split":
            return d, torch.where(torch.arange(n - 1) % 5 == 3, 0.0, e)
        case "close":
            return torch.ones_like(d), torch.where(torch.arange(n - 1) % 3 == 0, 1e-3, 1e-9).double()
        case "wilkinson":
            return (i - n // 2).abs() + 2, torch.ones_like(e)
        case "swapped":
            return torch.ones_like(d), torch.ones_like(e)  # zero diagonal of the shifted one; half are negative
        case "negative":
            return -d, e
        case "small":
            return d * 2.0**-900, e * 2.0**-900
        case "large":
            return d * 2.0**1000, e * 2.0**1000
    return d, e


NAMES = ["gaussian", "graded up", "graded down", "deficient", "one", "toeplitz", "zero", "diagonal", "equal", "split"]
NAMES += ["close", "wilkinson", "swapped", "negative", "small", "large"]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 129])
@pytest.mark.parametrize("name", NAMES)
def test_against_lapack(name, n):
    d, e = drawn(name, n)
    scale = 2.0 ** {"small": 900, "large": -1000}.get(name, 0)
    found, expected = scale * values(d[None], e[None])[0], truth(scale * d, scale * e)
    norm = truth(scale * d.abs(), scale * e.abs()).max()
    # LAPACK's own errors are like these: up to 12 and 16 units at n = 64 (against 40 digits)
    assert ((found - expected).abs() <= (12 + 4 * n**0.5) * EPS * norm).all()
    assert (found[1:] >= found[:-1]).all() and (found >= 0).all()


@pytest.mark.parametrize("n", [2, 5, 40])
def test_a_matrix_keeps_its_bits_whatever_its_neighbours_are(n):
    pairs = [drawn(name, n, seed) for seed in range(4) for name in NAMES]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(n)).tolist()
    d, e = (torch.stack([pairs[i][k] for i in order]) for k in (0, 1))
    together = values(d, e)
    for i in range(len(pairs)):
        for others in (slice(i, i + 1), slice(i, i + 3), slice(max(0, i - 6), i + 1)):
            assert torch.equal(values(d[others], e[others])[i - (others.start or 0)], together[i]), order[i]


def test_a_coarser_tolerance_is_kept():
    for tolerance in (2.0**-30, 2.0**-12):
        d, e = drawn("gaussian", 60)
        found, expected = values(d[None], e[None], tolerance)[0], truth(d, e)
        assert 0 < (found - expected).abs().max() <= 2 * tolerance * expected[-1]


def test_what_has_not_converged_is_bisected_alone():
    d, e = (
        torch.stack(t) for t in zip(*(drawn(name, 24) for name in ("gaussian", "diagonal", "toeplitz")), strict=True)
    )
    whole = values(d, e)
    for sweeps in (0, 1):
        found = values(d, e, sweeps=sweeps)
        assert ((found - truth(d, e)).abs() <= 16 * EPS * found.amax(1, keepdim=True)).all()
        assert torch.equal(found[1], whole[1])  # which needs none
        assert not torch.equal(found[0], whole[0])


def test_a_shift_that_is_an_eigenvalue_of_another_block_needs_no_bisection():
    """The first shift is 1, and so is the last entry, which is apart: the sweep starts from exactly zero."""
    d, e = drawn("gaussian", 24)
    d[:2], d[-1], e[0], e[1], e[-1] = 2, 1, 1, 0, 0
    found, bisected = values(d[None], e[None]), values(d[None], e[None], sweeps=0)
    assert ((found - truth(d, e)).abs() <= 32 * EPS * found.max()).all()
    assert not torch.equal(found, bisected)
