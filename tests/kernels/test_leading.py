import math
import sys

import pytest
import torch
from every import EVERY

from sosd_fast.kernels import thin
from sosd_fast.kernels.leading import leading_step, leading_step_ref
from sosd_fast.spectra import topk
from sosd_fast.spectra.products import cold_state
from sosd_fast.testing import matrix

B = 5  # directions
SIDES = [45, 64, 200, 531] if EVERY else [45, 64, 200]  # the interpreter takes half a minute for the last


def matrices(r, dtype=torch.float32):
    """Upright and lying, by rows and by columns, and one whose entries lie apart."""
    wide = [matrix("power", r, r + 10 * i, seed=i) for i in range(4)]
    found = [wide[0], wide[1], wide[2].mT, wide[3].mT.contiguous()]
    return [W.to(dtype) for W in found] + [matrix("gaussian", r, 2 * r).to(dtype)[:, ::2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", SIDES)
def test_products(device, r, dtype, monkeypatch):
    monkeypatch.setattr(thin, "PART", 128)  # several of one matrix
    W = [A.to(device) for A in matrices(r, dtype)]
    X = torch.randn(len(W), B, r, generator=torch.Generator().manual_seed(0)).to(device)
    scale = torch.tensor([[0.5, 0.25, 1, 0]] * len(W), device=device)
    scale[3, 2] = 0  # acts as zero
    thin._plan.cache_clear()
    thin._placed.clear()
    products = thin.Thin(W, B, scale)
    Z, G = products.gram_applied(X), products.inner_gram(X)
    thin._plan.cache_clear()
    thin._placed.clear()
    for i, A in enumerate(W):
        A = A.double() / 8 * (i != 3)
        Y = X[i].double() @ (A if A.shape[0] >= A.shape[1] else A.mT).mT
        image = Y @ (A if A.shape[0] >= A.shape[1] else A.mT)
        assert (Z[i] - image).norm() <= 2e-6 * image.norm() and (G[i] - Y @ Y.mT).norm() <= 2e-6 * (Y @ Y.mT).norm()


@pytest.mark.parametrize("rows", [16, 17, 33, 49])
def test_products_of_more_rows_than_a_tile_holds(device, rows):
    """One tile, two of the same and of another height."""
    W = [matrix("gaussian", 50, 66).to(device)]
    X = torch.randn(1, rows, 50, generator=torch.Generator().manual_seed(0)).to(device)
    products = thin.Thin(W, rows, torch.tensor([[1.0, 1, 1, 0]], device=device))
    truth = X.double() @ W[0].double() @ W[0].double().mT
    assert (products.gram_applied(X) - truth).norm() <= 2e-6 * truth.norm()
    truth = (X.double() @ W[0].double()) @ (X.double() @ W[0].double()).mT
    assert (products.inner_gram(X) - truth).norm() <= 2e-6 * truth.norm()


def test_tables_stay_while_matrices_do(device):
    """Matrices that are where they were, with new values, take the same table; others, and copies, do not."""
    W = [matrix("power", 20, 30, seed=i).to(device) for i in range(2)]
    apart = matrix("gaussian", 20, 60).to(device)
    X = torch.randn(2, B, 20, generator=torch.Generator().manual_seed(0)).to(device)
    scale = torch.tensor([[1.0, 1, 1, 0]] * 2, device=device)

    def products(matrices):
        found = thin.Thin(matrices, B, scale)
        for z, x, A in zip(found.gram_applied(X), X, matrices, strict=True):
            truth = x.double() @ A.double() @ A.double().mT
            assert (z - truth).norm() <= 2e-6 * truth.norm()
        return found._where

    first = products(W)
    W[0] += 1
    assert products(W) is first
    assert products(W[::-1]) is not first and products([W[0], W[1].clone()]) is not first
    for _ in range(2):  # a matrix without a stride of 1 is copied each time
        products([W[0], apart[:, ::2]])
        apart += 1


@pytest.mark.parametrize("r", SIDES)
def test_a_step(device, r):
    """Of a subspace that is warm: of a cold one other rows may be left out."""
    W = [A.to(device) for A in matrices(r)]
    norms = torch.stack([A.double().norm() for A in W])
    upright = [A if A.shape[0] >= A.shape[1] else A.mT for A in W]
    start = torch.stack([torch.linalg.svd(A.double(), full_matrices=False).Vh[:B] for A in upright])
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    start = torch.linalg.qr((start + 0.1 * noise / r**0.5).mT).Q.mT.float().contiguous()
    before = [A.clone() for A in W]
    S, residual, V, P = leading_step(W, start, torch.zeros_like(start), start[0], norms, 4.0)
    truth = leading_step_ref(W, start.double(), torch.zeros_like(start).double(), start[0].double(), norms, 4.0)
    torch.testing.assert_close(S.double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual.double(), truth[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(V @ V.mT, torch.eye(B, device=device).expand(len(W), B, B), atol=1e-3, rtol=0)
    assert all(map(torch.equal, W, before)) and (S[:, :-1] >= S[:, 1:]).all() and P.isfinite().all()


def test_faults_in_a_state_and_a_matrix_stay_where_they_are(device):
    W = [matrix("power", 45, 60, seed=i).to(device) for i in range(4)]
    norms = torch.stack([A.double().norm() for A in W])
    norms[2] = math.nan
    start = cold_state(torch, 4, B, 45, torch.float32, W[0].device).V
    V = start.clone()
    V[0, 1], V[1, 1] = V[0, 0], math.nan
    S, residual, V, P = leading_step(W, V, torch.zeros_like(V), start[0], norms, 4.0)
    whole = leading_step(W, start.contiguous(), torch.zeros_like(V), start[0], norms, 4.0)
    for found, expected in zip((S, residual, V, P), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert S[2].isnan().all() and not S[[0, 1, 3]].isnan().any() and torch.equal(V[2], start[2])


def test_rows_that_depend_on_others_are_left_out(device):
    """Of a matrix of rank 2, and where the subspace has everything."""
    for W, b in ((matrix("rank_one", 12, 20), 4), (matrix("power", 6, 9), 6)):
        r = min(W.shape)
        state, norms = (
            cold_state(torch, 1, b, r, torch.float32, torch.device(device)),
            W.double().norm()[None].to(device),
        )
        V, P = state.V.contiguous(), state.P
        for _ in range(3):
            S, residual, V, P = leading_step([W.to(device)], V, P, state.V[0], norms, 4.0)
            assert S.isfinite().all() and residual.isfinite().all()
        truth = torch.linalg.svdvals(W.double())[:b].to(device)
        assert (S[0].double().square() - truth.square()).abs().max() <= 20 * 2.0**-23 * truth[0] ** 2


def test_the_way_of_a_gpu_is_taken(device, monkeypatch):
    """One step in place of the operations one by one, without a copy of the matrices."""
    if device == "cpu":
        monkeypatch.setattr(topk, "on_host", lambda _: False)
    taken = []
    step = topk.leading_step
    monkeypatch.setattr(topk, "leading_step", lambda W, *rest: taken.append(W) or step(W, *rest))
    monkeypatch.setattr(topk, "_COLD_STEPS", 0)
    W = [matrix("power", 12, 20).to(device) for _ in range(2)]
    topk.topk_svdvals(W, 2, n_oversamples=1)
    assert len(taken) == 1 and all(A is B for A, B in zip(taken[0], W, strict=True))
    topk.topk_svdvals([A.double() for A in W], 2, n_oversamples=1)
    assert len(taken) == 1
    assert "sosd_fast.kernels.leading" in sys.modules
