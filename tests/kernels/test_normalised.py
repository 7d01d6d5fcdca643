import sys

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels.normalised import DTYPES, converted, normalised, normalised_ref, takes

module = sys.modules["sosd_fast.kernels.normalised"]
SHAPES = [
    (1, 7),  # a row
    (7, 1),  # a column
    (1, 1),
    (64, 80),  # accesses of 16 bytes, one tile
    (127, 509),  # primes, more than one tile
    (300, 40),  # tall
    (2, 3, 20, 17),  # batch
    (70000, 1, 2),  # more matrices than a grid has rows
]


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def assert_close(X, G, eps=1e-7):
    """To half a unit in the last place, and the 3e-7 that are documented."""
    truth = G.double() / torch.linalg.matrix_norm(G.double(), keepdim=True).clamp(min=max(eps, 1e-300))
    assert X.dtype == torch.float16 and X.shape == G.shape
    assert ((X.double() - truth).abs() <= (2.0**-11 + 3e-7) * truth.abs() + 2.0**-25).all()
    assert ((X.double() - normalised_ref(G, eps).double()).abs() <= 2.0**-10 * truth.abs() + 2.0**-24).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(device, dtype, shape):
    if device == "cpu" and shape[0] > 1000:
        shape = (30, 1, 2)  # the interpreter would take minutes
    G = normal(*shape, dtype=dtype, device=device)
    before = G.clone()
    assert takes(G)
    assert_close(normalised(G, 1e-7), G)
    assert torch.equal(G, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(device, dtype):
    G = normal(3, 20, 96, dtype=dtype, device=device)
    for view in (G.mT, G[:, ::2, 1::3], G.transpose(0, 1), G[1:, :, :70], G[:1].expand(2, -1, -1), G[:, 1:], G[0].mT):
        assert_close(normalised(view, 1e-7), view)
    assert normalised(G.mT, 1e-7).mT.is_contiguous(), "a dense matrix is read as it lies"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_share_a_matrix(device, monkeypatch, dtype):
    """Each of three takes several tiles, the last one of them in part."""
    for name, value in (("BLOCK", 64), ("TILES", 1), ("MOST_PARTS", 4)):
        monkeypatch.setattr(module, name, value)
    for shape in ((2, 31, 19), (1, 48, 16), (3, 5, 5)):
        G = normal(*shape, dtype=dtype, device=device)
        assert_close(normalised(G, 1e-7), G)


EXTREMES = {
    torch.float32: (-115, -64, 64, 124),
    torch.bfloat16: (-115, -64, 64, 124),
    torch.float16: (-4, 8, 12),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_does_not_matter(device, dtype):
    """Bit for bit, for powers of two, with matrices of all scales in one batch."""
    G = normal(40, 50, dtype=dtype, device=device)
    G = torch.where(G.abs() < 2.0**-6, 2.0**-6, G)
    batch = torch.stack([(G.double() * 2.0**power).to(dtype) for power in (0, *EXTREMES[dtype])])
    assert batch.isfinite().all()
    X = normalised(batch, 0.0)
    assert_close(X, batch, 0.0)
    assert all(torch.equal(each, X[0]) for each in X)


def test_the_ends_of_the_range(device):
    """The largest numbers and subnormal ones; Triton's interpreter widens subnormal bfloat16 wrongly."""
    for dtype in DTYPES if device == "cuda" else (torch.float32, torch.float16):
        info = torch.finfo(dtype)
        values = (info.max, info.smallest_normal, info.smallest_normal / 4, info.smallest_normal * info.eps)
        G = torch.stack([torch.full((30, 50), value, dtype=dtype, device=device) for value in values])
        assert (G != 0).all()
        assert_close(normalised(G, 0.0), G, 0.0)
        alone = torch.zeros_like(G)
        alone[:, 3, 4] = G[:, 3, 4]
        X = normalised(alone, 0.0)
        assert (X[:, 3, 4] == 1).all() and X.sum() == len(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_matrix_is_nan_and_leaves_the_others_alone(device, dtype, value):
    G = normal(3, 70, 90, dtype=dtype, device=device)
    expected = normalised(G, 1e-7)
    G[1, 3, 4] = value
    X = normalised(G, 1e-7)
    assert X[1].isnan().all() and torch.equal(X[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_below_eps_is_not_divided_by(device, dtype):
    G = normal(2, 30, 40, dtype=dtype, device=device)
    for eps in (1e-7, 10.0, 100.0, 1e6):
        assert_close(normalised(G, eps), G, eps)
    for eps in (0.0, 1e-7, 1e-40, 1e300):
        assert not normalised(torch.zeros_like(G), eps).any()
    assert not normalised(G, 1e300).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64, 48), (2, 67, 131), (1, 1)], ids=str)
def test_the_way_back(device, dtype, shape):
    X = normal(*shape, dtype=torch.float16, device=device)
    X.view(-1)[0] = float("nan")
    expected = X.to(dtype)
    found = converted(X, dtype)
    assert found.dtype == dtype
    cut = 2.0**-7 if device == "cpu" and dtype == torch.bfloat16 else 0  # Triton's interpreter does not round it
    torch.testing.assert_close(found, expected, rtol=cut, atol=0, equal_nan=True)
    assert (found.data_ptr() == X.data_ptr()) == (dtype != torch.float32), "no memory more than it takes"


def test_who_takes_it(device):
    G = normal(2, 3, device=device)
    assert takes(G) and takes(G.half()) and not takes(G.double())
    if device == "cpu":
        kernels.interpreted = False
        assert not takes(G)
