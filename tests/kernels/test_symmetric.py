import pytest
import torch

from sosd_fast.kernels.newton_schulz import COEFFICIENTS
from sosd_fast.kernels.symmetric import (
    own_product,
    own_product_ref,
    pays,
    polynomial,
    polynomial_ref,
    symmetrised,
    symmetrised_ref,
)

SHAPES = [(1, 1), (5, 5), (64, 64), (67, 67), (3, 130, 130), (2, 2, 80, 80)]
HALF = 2.0**-11  # a unit in the last place of float16 is twice as much, at 1


def normal(*shape, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)


def half_a_unit(x):
    """In the last place of float16."""
    return HALF * x.abs().log2().floor().exp2()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_mean_of_a_matrix_and_its_transpose(device, dtype, shape):
    A = normal(*shape, dtype=dtype, device=device)
    before = A.clone()
    out = symmetrised(A)
    assert torch.equal(out, out.mT) and torch.equal(out, symmetrised_ref(A)) and torch.equal(A, before)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (40, 100), (2, 67, 131), (2, 2, 96, 48), (200, 20)], ids=str)
def test_a_matrix_times_its_transpose(device, shape):
    X = normal(*shape, device=device) / shape[-1] ** 0.5
    for view in (X, normal(*shape[:-2], shape[-1], shape[-2], device=device).mT / shape[-1] ** 0.5):
        A, truth = own_product(view), own_product_ref(view)
        half = -(-shape[-2] // 128) * 64
        assert A.is_contiguous() and torch.equal(A[..., :half, half:], A[..., half:, :half].mT)
        # float32 sums, of which a CPU's are float16's where an instruction set has these
        assert ((A.double() - truth).abs() <= 4 * HALF * truth.abs() + 2e-3).all()


@pytest.mark.parametrize("triple", [*COEFFICIENTS["muon"], *COEFFICIENTS["polar_express"]], ids=lambda t: f"{t[0]:.2f}")
@pytest.mark.parametrize("shape", [(1, 1), (67, 67), (2, 2, 80, 80)], ids=str)
def test_a_polynomial_by_a_square(device, shape, triple):
    """Every entry of the result errs by its own rounding, and by what that of A's diagonal, by which it is, does."""
    X = normal(*shape[:-1], 3 * shape[-1], dtype=torch.float64, device=device)
    X /= torch.linalg.matrix_norm(X, 2, keepdim=True)
    A = (X @ X.mT).half()
    before = A.clone()
    a, b, c = triple
    P, truth = polynomial(A, a, b, c), polynomial_ref(before, a, b, c)
    assert torch.equal(A, before), "the diagonal is put back, to the last bit"
    error = (P.double() - truth).abs()
    expected, apart = (each.diagonal(dim1=-2, dim2=-1) for each in (truth, error))
    s = b / (2 * c)
    squares = (expected - a) / c + s * s
    # It is rounded after the product, and again after the addition; without the correction 2e-3 come on top for "muon".
    rounding = half_a_unit(c * squares) + half_a_unit(expected)
    if device == "cpu":  # whose baddbmm rounds the product before its factor, too
        rounding += c * half_a_unit(squares)
    assert (apart <= rounding + 1e-4).all()
    apart.zero_()
    assert (error <= HALF * truth.abs() + 4 * c * A.double().abs() * HALF * max(abs(s), 1) + 1e-4).all()


def test_a_broken_matrix_leaves_the_others_alone(device):
    A = own_product(normal(3, 40, 60, device=device) / 30)
    a, b, c = COEFFICIENTS["muon"][0]
    expected = polynomial(A, a, b, c)
    A[1] = float("nan")
    P = polynomial(A, a, b, c)
    assert P[1].isnan().all() and torch.equal(P[[0, 2]], expected[[0, 2]])
    assert symmetrised(A)[1].isnan().all() and symmetrised(A)[[0, 2]].isfinite().all()


def test_when_it_pays():
    large, small = torch.empty(12, 768, 768, dtype=torch.float16), torch.empty(768, 768, dtype=torch.float16)
    assert all(pays(large, b, c) for triples in COEFFICIENTS.values() for _, b, c in triples)
    assert not pays(small, -4.7, 2.0) and not pays(large, -4.7, 0.0) and not pays(large, -8.1, 1.0)
