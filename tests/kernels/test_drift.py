import sys

import pytest
import torch

from sosd_fast.kernels.drift import MOST_DRIFT, PAIRS, Products, correct, correct_ref, products, products_ref

module = sys.modules["sosd_fast.kernels.drift"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def powers(B, device):
    """Scales."""
    return 2.0 ** torch.arange(-B, B, 2, dtype=torch.float64, device=device)


def assert_close(W, scale=None):
    """To the rounding of sums in float64, whatever their order."""
    found, truth = products(W, scale), products_ref(W.double(), scale)
    assert found.squares.shape == W.shape[:-1]
    assert found.cross.shape == (*W.shape[:-2], min(W.shape[-2] - 1, PAIRS))
    largest = truth.squares.amax(-1, keepdim=True)  # a product of two rows is not larger
    for t, true in zip(found, truth, strict=True):
        assert t.dtype == torch.float64 and ((t - true).abs() <= 32 * 2.0**-53 * largest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 48, 80), (2, 33, 65), (1, 1, 7), (1, 2, 1), (3, 17, 16)], ids=str)
def test_products_of_every_shape(device, dtype, shape):
    W = normal(*shape, dtype=dtype, device=device)
    before = W.clone()
    assert_close(W)
    assert_close(W, powers(len(W), device))
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_any_strides(device, dtype):
    W = normal(3, 32, 96, dtype=dtype, device=device)
    for view in (W.mT, W[:, ::2, 1::3], W.transpose(0, 1), W[1:, :, :70], W[:1].expand(2, -1, -1), W[:, 1:], W[0].mT):
        assert_close(view)
        assert_close(view, powers(len(view), device) if view.ndim == 3 else None)
    for scale in (powers(6, device)[::2], powers(1, device).expand(3)):
        assert_close(W, scale)
    G = W.float() @ W.float().mT
    expected = correct_ref(G.clone(), products(W), powers(6, device)[1::2])
    torch.testing.assert_close(correct(G, products(W), powers(6, device)[1::2]), expected, rtol=1e-9, atol=1e-18)


def test_long_rows_are_shared(device, monkeypatch):
    """By programs that take some columns each, the last ones of them fewer."""
    monkeypatch.setattr(module, "LONGEST", 64)
    for shape in ((2, 5, 64), (2, 5, 65), (1, 40, 200)):
        assert_close(normal(*shape, device=device), powers(shape[0], device))


def test_products_beyond_the_first_pairs_are_left_out(device, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 5)
    for r in (5, 6, 7, 70):
        W = normal(2, r, 20, device=device)
        found = products(W)
        assert found.cross.shape == (2, min(5, r - 1)) and found.squares.shape == (2, r)
        torch.testing.assert_close(found.cross, products_ref(W).cross, rtol=0, atol=1e-13)


def test_entries_of_any_size(device):
    for size in (2.0**-700, 2.0**700):
        W = size * normal(1, 20, 30, dtype=torch.float64, device=device)
        assert_close(W, torch.full((1,), 1 / size, dtype=torch.float64, device=device))
    W = normal(3, 9, 9, device=device)
    W[1, 3, 4] = torch.nan
    found = products(W)
    assert found.squares.isnan().sum() == 1 and found.cross.isnan().sum() == 2
    for i in (0, 2):
        assert torch.equal(found.squares[i], products(W[i : i + 1]).squares[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("r", [1, 2, 40, 300])
def test_what_is_known_sets_the_diagonal_right(device, monkeypatch, dtype, r):
    """Of a Gram matrix all of whose elements beside the diagonal have moved by a factor, and of one without a drift."""
    monkeypatch.setitem(module.CORRECT, "BLOCK", 64)  # several turns
    W = normal(3, r, 50, dtype=torch.float64, device=device)
    moved = torch.tensor([1e-6, 0.0, -3e-6], dtype=torch.float64, device=device)
    G = (W @ W.mT * (1 + moved[:, None, None])).to(dtype)
    known, inner = products(W), torch.tensor([50.0, 60.0, 70.0], dtype=torch.float64, device=device)
    for K in (50, inner):
        found, expected = G.clone(), G.clone()
        drift, true = correct(found, known, K), correct_ref(expected, known, K)
        torch.testing.assert_close(drift, true, rtol=1e-9, atol=1e-18)
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        beside = ~torch.eye(r, dtype=torch.bool, device=device)
        assert torch.equal(found[:, beside], G[:, beside])
        if r >= 40:
            assert ((drift - moved).abs() <= 0.1 * moved.abs() + 1e-8).all()


def test_a_drift_has_its_limits(device):
    W = normal(4, 30, 40, dtype=torch.float64, device=device)
    G = W @ W.mT
    G[0] *= 2
    G[1] /= 2
    W[2], G[2] = 0, 0
    G[3, 7, 6] = torch.nan
    drift = correct(G, products(W), 40)
    assert drift.tolist() == [MOST_DRIFT, -MOST_DRIFT, 0.0, 0.0]
    assert not G[2].any() and G[3].isnan().sum() == 1


def test_what_lies_apart_is_not_written_elsewhere(device):
    W = normal(2, 20, 30, dtype=torch.float64, device=device)
    whole = (W @ W.mT).repeat(1, 1, 2)
    some = whole[:, :, ::2][:, :10]
    before = whole.clone()
    known = products(W)
    drift = correct(some, Products(known.squares[:, :10], known.cross[:, :9]), 30)
    assert drift.shape == (2,) and (whole != before).sum() <= 20
