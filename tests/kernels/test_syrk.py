import sys

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels.syrk import CONFIGS, syrk, syrk_ref

SHAPES = [
    (1, 7),  # a row
    (7, 1),  # a column
    (1, 1),
    (64, 64),
    (67, 131),  # primes: no tile fits
    (130, 20),  # tall, more than one tile a side
    (40, 300),  # wide
    (2, 3, 40, 17),  # batch
    (0, 5, 5),
    (3, 0),
]
EPS = 2.0**-24


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(device)


def assert_close(found, A, B, extra=0.0, dtype_eps=EPS):
    """Within the documented 2^-21 |a_i| |b_j|, that is 8 EPS, and the rounding of the result."""
    truth = A.double() @ B.double().mT + extra
    scale = A.double().norm(dim=-1)[..., :, None] * B.double().norm(dim=-1)[..., None, :]
    assert ((found.double() - truth).abs() <= 8 * EPS * scale + dtype_eps * truth.abs()).all()
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(CONFIGS), ids=str)
def test_gram(device, dtype, shape):
    A = normal(*shape, dtype=dtype, device=device)
    before = A.clone()
    G = syrk(A)
    assert G.dtype == torch.float32 and G.shape == (*shape[:-1], shape[-2])
    assert_close(G, A, A)
    assert torch.equal(A, before)


@pytest.mark.parametrize("dtype", list(CONFIGS), ids=str)
def test_any_strides(device, dtype):
    A = normal(3, 20, 120, dtype=dtype, device=device)
    for view in (A.mT, A[:, ::2, 1::3], A.transpose(0, 1), A[1:, :, :70], A[:1].expand(2, -1, -1)):
        assert_close(syrk(view), view, view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_symmetric_update(device, dtype):
    """b A + c A^2 + a I, as Newton-Schulz asks for it, and a product of two polynomials in A."""
    X = normal(2, 150, 40, dtype=torch.float64, device=device)
    A = syrk(X / torch.linalg.matrix_norm(X, keepdim=True)).to(dtype)
    out = syrk(A, C=A, alpha=2.0315, beta=-4.7750, shift=3.4445, out_dtype=dtype, rounded=False)
    eye = torch.eye(150, dtype=torch.float64, device=device)
    truth = 2.0315 * A.double() @ A.double() - 4.775 * A.double() + 3.4445 * eye
    torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(out, out.mT)
    product = syrk(A, out, out_dtype=torch.float32)
    torch.testing.assert_close(product.double(), A.double() @ out.double(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("side", [32, 40], ids=["multiples of 16", "others"])
@pytest.mark.parametrize("layout", ["transposed", "apart", "columns apart"])
def test_any_strides_of_what_is_added(device, layout, side):
    """A symmetric C has the same entries either way; its strides tell whether they are read where they are."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, side, 64, generator=generator).to(device)
    C = torch.randn(2, side, side, generator=generator).to(device)
    C = C + C.mT
    if layout == "transposed":
        given = C.mT.contiguous().mT
    else:
        rows = 16 if layout == "apart" else 1
        memory = torch.full((2, side * rows, side * 16), torch.nan, device=device)
        given = memory[:, ::rows, ::16].copy_(C)
    torch.testing.assert_close(syrk(A, C=given, beta=0.5), syrk(A, C=C, beta=0.5), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scale_keeps_squares_in_range(device, size, dtype):
    A = (normal(2, 30, 50, device=device) * torch.tensor([size, 1.0], device=device)[:, None, None]).to(dtype)
    scale = torch.tensor([2.0**-100 if size > 1 else 2.0**100, 1.0], dtype=torch.float64, device=device)
    scaled = A.double() * scale[:, None, None]
    assert_close(syrk(A, scale=scale), scaled, scaled)


def test_nan_stays_in_its_matrix(device):
    A = normal(3, 70, 30, device=device)
    whole = syrk(A)
    A[1, 2, 3] = torch.nan
    G = syrk(A)
    assert G[1].isnan().any() and torch.equal(G[0], whole[0]) and torch.equal(G[2], whole[2])


def test_zero_and_float64(device):
    assert torch.equal(syrk(torch.zeros(5, 9, device=device)), torch.zeros(5, 5, device=device))
    A = normal(2, 20, 30, dtype=torch.float64, device=device)
    torch.testing.assert_close(syrk(A), A @ A.mT, rtol=1e-14, atol=1e-13)
    assert torch.equal(syrk(A), syrk(A).mT)


def test_the_reference_agrees(device):
    A = normal(40, 70, device=device)
    C = syrk_ref(A)
    options = {"alpha": 0.5, "beta": -2.0, "shift": 3.0}
    torch.testing.assert_close(syrk(A, C=C, **options), syrk_ref(A, C=C, **options), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"got A=\(3,\)"),
        ((torch.ones(3, 3, dtype=torch.int32),), "torch.int32"),
        ((torch.ones(3, 3), torch.ones(3, 4)), r"got B=\(3, 4\)"),
        ((torch.ones(3, 3), None, torch.ones(4, 4)), r"got C=\(4, 4\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="syrk: .*" + message):
        syrk(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [5 * 1024, 5 * 1040 + 7])  # in whole parts, and with a rest
def test_few_rows_are_multiplied_in_parts(device, monkeypatch, dtype, k):
    """A tall matrix's Gram matrix has too few tiles for a GPU; its parts are added up."""
    module = sys.modules["sosd_fast.kernels.syrk"]
    launched = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda A, *rest: (launched.append(tuple(A.shape)), launch(A, *rest)))
    monkeypatch.setitem(module.PER_SM, dtype, 5)
    W = normal(2, k, 5, dtype=dtype, device=device)
    before = W.clone()
    scale = torch.tensor([2.0**-3, 4.0], dtype=torch.float64, device=device)
    found = syrk(W.mT, scale=scale, alpha=0.5)
    scaled = W.mT.double() * scale[:, None, None]
    assert_close(2 * found, scaled, scaled)
    assert torch.equal(W, before)
    width = k // 5 // 16 * 16
    assert launched == 2 * [(5, 5, width), *([(1, 5, k - 5 * width)] if k > 5 * width else [])]


def test_parts_take_up_a_gpu_and_no_more(monkeypatch):
    module = sys.modules["sosd_fast.kernels.syrk"]
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 132)

    def parts(*shape):
        return module._parts(torch.empty(*shape, device="meta"))

    assert parts(1, 768, 50304) == 5  # the embedding of GPT-2
    assert parts(1, 5, 900) == 1 and parts(1, 5, 3 * 1024) == 3 and parts(2, 5, 3 * 1024) == 1  # short, and two
    assert parts(1, 4096, 50304) == 1  # enough tiles
