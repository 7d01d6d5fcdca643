import math
import sys

import numpy as np
import pytest
import torch

import sosd_fast
from sosd_fast import kernels
from sosd_fast.spectra import arrays, products, topk
from sosd_fast.spectra.products import State
from sosd_fast.spectra.topk import topk_svdvals
from sosd_fast.testing import matrix

SHAPES = [(1, 7), (7, 1), (1, 1), (2, 3), (64, 64), (127, 509), (300, 40), (40, 300)]


def truth(W, k):
    return torch.linalg.svdvals(W.double())[..., :k]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["power", "log4", "rank_one", "half_zeros", "repeated"])
def test_cold_start(name, shape):
    W = matrix(name, *shape)
    k = min(8, *shape)
    before = W.clone()
    S, residual, state = topk_svdvals(W, k)
    S_ref = truth(W, k)
    assert S.shape == residual.shape == (k,) and S.dtype == torch.float32
    assert state.V.shape == (min(k + 8, *shape), min(shape))
    assert (S[:-1] >= S[1:]).all()
    noise = (S_ref.square() + 1e-5 * S_ref[0].square()).sqrt() - S_ref  # of the squares
    assert (S <= S_ref + noise).all(), "Ritz values are lower bounds"
    assert (S_ref - S <= residual + noise).all()
    assert (S_ref - S <= 2e-2 * S_ref[0]).all()
    assert torch.equal(W, before)


def test_it_converges_on_a_matrix_that_stands_still():
    W = matrix("gaussian", 96, 128)
    S_ref = truth(W, 10)
    state = None
    for _ in range(40):
        S, residual, state = topk_svdvals(W, 10, state=state)
    assert (S / S_ref - 1).abs().max() < 2e-6
    torch.testing.assert_close(state.V @ state.V.mT, torch.eye(18), atol=2e-5, rtol=0)


def test_a_moving_matrix_is_followed():
    generator = torch.Generator().manual_seed(0)
    W = matrix("gaussian", 128, 128)
    direction = torch.randn(128, 128, generator=generator)
    state, worst = None, 0.0
    for step in range(60):
        W = W + 0.01 * direction
        direction = 0.9 * direction + 0.44 * torch.randn(128, 128, generator=generator)
        S, _, state = topk_svdvals(W, 16, state=state)
        if step >= 20:
            worst = max(worst, float((S / truth(W, 16) - 1).abs().max()))
    assert worst < 2e-3


def test_it_catches_up_after_a_jump_and_only_then(monkeypatch):
    steps = []
    step = topk.advance_subspaces
    monkeypatch.setattr(topk, "advance_subspaces", lambda *arguments: steps.append(0) or step(*arguments))
    W, other = matrix("gaussian", 96, 128), matrix("power", 96, 128, seed=1)
    state = topk_svdvals(W, 8).state
    for i in range(10):
        state = topk_svdvals(W * (1 + 1e-3 * i), 8, state=state).state
    steps.clear()
    state = topk_svdvals(W * 1.01, 8, state=state).state
    assert len(steps) == 1
    S = topk_svdvals(other, 8, state=state).S
    assert 3 <= len(steps) <= 10
    torch.testing.assert_close(S.double(), truth(other, 8), rtol=1e-3, atol=0)
    steps.clear()
    topk_svdvals(other, 8, state=state, rtol=1e6)
    assert len(steps) == 1, "nothing is asked for"


def test_momentum_beats_the_residual_alone():
    errors = {}
    for momentum in (0, 1):
        generator = torch.Generator().manual_seed(0)
        W, state, errors[momentum] = matrix("gaussian", 128, 128), None, []
        drift = torch.randn(128, 128, generator=generator)  # updates of training keep their direction for a while
        for _ in range(60):
            W = W + 0.03 * drift
            drift = 0.95 * drift + 0.3 * torch.randn(128, 128, generator=generator)
            S, _, state = topk_svdvals(W, 16, state=state)
            state = State(state.V, momentum * state.P)
            errors[momentum].append(float((S / truth(W, 16) - 1).abs().max()))
    assert max(errors[1][20:]) < 0.5 * max(errors[0][20:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    W = matrix("power", 60, 90, dtype=dtype)
    S, _, _ = topk_svdvals(W, 5)
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(S.double(), truth(W, 5), rtol=1e-5, atol=0)


def test_batches_lists_and_single_matrices_agree():
    W = torch.stack([matrix("power", 60, 90, seed=i) for i in range(6)]).reshape(2, 3, 60, 90)
    S, residual, state = topk_svdvals(W, 5)
    assert S.shape == residual.shape == (2, 3, 5) and state.V.shape == (2, 3, 13, 60)
    listed, _, _ = topk_svdvals(list(W.reshape(6, 60, 90)), 5)
    torch.testing.assert_close(listed, S.reshape(6, 5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(topk_svdvals(W.mT, 5).S, S, rtol=1e-6, atol=1e-6)


def test_numpy_and_torch_give_the_same():
    W = matrix("power", 60, 90)
    S, residual, state = topk_svdvals(W, 5)
    other = topk_svdvals(W.numpy(), 5)
    assert isinstance(other.S, np.ndarray) and other.S.dtype == np.float32
    np.testing.assert_allclose(other.S, S.numpy(), rtol=1e-5)
    S, _, _ = topk_svdvals(W * 1.001, 5, state=state)
    again = topk_svdvals((W * 1.001).numpy(), 5, state=other.state)
    np.testing.assert_allclose(again.S, S.numpy(), rtol=1e-5)
    assert topk_svdvals(W.double().numpy(), 5).S.dtype == np.float64


@pytest.mark.parametrize("library", ["array_api_strict", "array_api_compat.numpy"])
def test_arrays_of_other_libraries_need_standard_functions_alone(library, monkeypatch):
    """The way of CuPy's arrays, on a namespace that has no other function, and on NumPy's."""
    library = pytest.importorskip(library)
    monkeypatch.setattr(topk, "namespace", lambda _: library)  # NumPy's would become tensors
    W = torch.stack([matrix("power", 40, 60, seed=i) for i in range(3)])
    W[1, 3, 4] = math.nan
    theirs, state, ours = library.asarray(W.numpy()), None, None
    for step in range(3):
        S, residual, state = topk_svdvals(theirs * (1 + 1e-3 * step), 5, state=state)
        ours = steps_of_torch(W * (1 + 1e-3 * step), ours, monkeypatch)
        assert type(S) is type(theirs) and S.dtype == library.float32 and state.V.shape == (3, 13, 40)
        np.testing.assert_allclose(np.asarray(S), ours.S, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(residual), ours.residual, rtol=0.1, atol=1e-4)
    listed = topk_svdvals([theirs[0, ...], theirs[2, ...]], 5)
    np.testing.assert_allclose(np.asarray(listed.S), truth(W[[0, 2]], 5), rtol=1e-5)
    assert topk_svdvals(library.astype(theirs[0, ...], library.float64), 5).S.dtype == library.float64
    with pytest.raises(ValueError, match="got W.dtype"):
        topk_svdvals(library.asarray([[1, 2], [3, 4]]), 1)


def steps_of_torch(W, before, monkeypatch):
    with monkeypatch.context() as plain:
        plain.setattr(topk, "namespace", arrays.namespace)
        plain.setattr(topk, "on_host", lambda _: False)  # as many steps
        return topk_svdvals(W, 5, state=before and before.state)


def test_other_arrays_without_array_api_compat(monkeypatch):
    strict = pytest.importorskip("array_api_strict")
    monkeypatch.setitem(sys.modules, "array_api_compat", None)
    with pytest.raises(ImportError, match=r"topk_svdvals: .*pip install array-api-compat"):
        topk_svdvals(strict.ones((4, 5)), 2)
    assert topk_svdvals(np.ones((4, 5)), 2).S.shape == topk_svdvals(torch.ones(4, 5), 2).S.shape


def test_the_block_of_cold_starts_is_made_once(monkeypatch):
    monkeypatch.setattr(topk, "on_host", lambda _: False)
    products._start.cache_clear()
    made, generator = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or generator(seed))
    W, state = matrix("power", 30, 40), None
    for _ in range(3):  # each of which has it at hand, for a state that may be broken
        state = topk_svdvals(W, 4, state=state).state
    assert len(made) == 1


def test_an_empty_batch(path):
    S, residual, state = topk_svdvals(torch.ones(0, 5, 6), 2)
    assert S.shape == residual.shape == (0, 2) and topk_svdvals(torch.ones(0, 5, 6), 2, state=state).S.shape == (0, 2)


def test_the_steps_of_a_device(device, monkeypatch):
    """Those that look at nothing on the host; without a GPU in Triton's interpreter."""
    shapes = [(10, 12), (10, 12), (15, 10), (10, 10)]
    W = [matrix("power", *shape, seed=i) for i, shape in enumerate(shapes)]
    W[1][3, 4], W[3] = math.nan, matrix("rank_one", 10, 10)
    monkeypatch.setattr(topk, "_COLD_STEPS", 2)  # of both
    cold = [topk_svdvals(A, 2, n_oversamples=1) for A in W]
    warm = [topk_svdvals(A * 1.001, 2, n_oversamples=1, state=c.state, rtol=1e3) for A, c in zip(W, cold, strict=True)]
    monkeypatch.setattr(kernels, "_C", None)
    monkeypatch.setattr(topk, "on_host", lambda *_: False)
    W = [A.to(device) for A in W]
    S, _, state = topk_svdvals(W, 2, n_oversamples=1)
    again, residual, _ = topk_svdvals([A * 1.001 for A in W], 2, n_oversamples=1, state=state)
    for i in range(len(W)):
        size = 1e-5 * float(cold[i].S[0].nan_to_num(1.0))
        rounding = 1e5 * (20 * 2.0**-23) ** 0.5 if i == 3 else 30.0  # of the zero values, in units of size
        torch.testing.assert_close(S[i].cpu(), cold[i].S, rtol=1e-4, atol=rounding * size, equal_nan=True)
        torch.testing.assert_close(again[i].cpu(), warm[i].S, rtol=1e-4, atol=rounding * size, equal_nan=True)
        if i != 3:  # those of zeros are rounding over rounding
            torch.testing.assert_close(residual[i].cpu(), warm[i].residual, rtol=0.1, atol=100 * size, equal_nan=True)
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * 4 * 10 * 12)
    parts = topk_svdvals([A * 1.001 for A in W], 2, n_oversamples=1, state=state)
    torch.testing.assert_close(parts.S, again, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale(scale):
    W = matrix("power", 40, 160)
    torch.testing.assert_close(topk_svdvals(W * scale, 8).S / scale, topk_svdvals(W, 8).S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_matrix_leaves_the_others_alone(value):
    W = torch.stack([matrix("power", 30, 50, seed=i) for i in range(3)])
    first = topk_svdvals(W, 4)
    whole = topk_svdvals(W, 4, state=first.state)
    broken = W.clone()
    broken[1, 3, 4] = value
    S, residual, state = topk_svdvals(broken, 4, state=first.state)
    assert S[1].isnan().all() and residual[1].isnan().all()
    torch.testing.assert_close(S[[0, 2]], whole.S[[0, 2]])
    assert torch.equal(state.V[1], first.state.V[1]) and state.P.isfinite().all()
    torch.testing.assert_close(topk_svdvals(W, 4, state=state).S, whole.S, rtol=1e-4, atol=0)


def test_a_matrix_that_was_zero_is_found_when_it_grows():
    state = topk_svdvals(torch.zeros(40, 60), 4).state
    W = matrix("power", 40, 60)
    for _ in range(6):
        S, _, state = topk_svdvals(W, 4, state=state)
    torch.testing.assert_close(S.double(), truth(W, 4), rtol=1e-4, atol=0)


def test_the_global_generators_are_not_touched():
    torch.manual_seed(3)
    np.random.seed(3)
    topk_svdvals(matrix("power", 30, 40), 4)
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert (torch.rand(1), np.random.rand()) == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(5, 6), 7), "expected 1 <= k <= min.* = 5, got k=7"),
        ((torch.ones(5, 6), 0), "got k=0"),
        ((torch.ones(5), 1), r"got W.shape=\(5,\)"),
        ((torch.ones(0, 5), 1), r"got W.shape=\(0, 5\)"),
        ((torch.ones(5, 5, dtype=torch.int32), 1), "got W.dtype=torch.int32"),
        ((np.ones((5, 5), dtype=np.int32), 1), "got W.dtype=int32"),
        (("weights", 1), "got W=str"),
        (([torch.ones(5, 6), torch.ones(5, 7)], 2), r"expected matrices of one shape, got W=\[\(5, 6\), \(5, 7\)\]"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="topk_svdvals: .*" + message):
        sosd_fast.topk_svdvals(*arguments)


def test_bad_options():
    W = matrix("power", 20, 30)
    with pytest.raises(ValueError, match="got n_oversamples=-1"):
        topk_svdvals(W, 2, n_oversamples=-1)
    with pytest.raises(ValueError, match="got rtol=0"):
        topk_svdvals(W, 2, rtol=0)
    with pytest.raises(ValueError, match=r"expected a state of shape \(10, 20\), got state.V.shape=\(11, 20\)"):
        topk_svdvals(W, 2, state=topk_svdvals(W, 3).state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_matrix_that_passes_through_subnormal_values_recovers(path, dtype):  # noqa: ARG001
    W = matrix("power", 40, 60, dtype=dtype)
    state = topk_svdvals(W, 4).state
    for size in (torch.finfo(dtype).tiny / 8, torch.finfo(dtype).smallest_normal / 1e4, 0.0):
        S, _, state = topk_svdvals(W * size, 4, state=state)
        assert S.isfinite().all()
    S, _, state = topk_svdvals(W, 4, state=state)
    torch.testing.assert_close(S.double(), truth(W, 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fault", [math.nan, math.inf, 0.0, 2.0, "twice"])
def test_a_broken_state_starts_cold_for_that_matrix_alone(path, fault):  # noqa: ARG001
    W = torch.stack([matrix("power", 30, 50, seed=i) for i in range(3)])
    first = topk_svdvals(W, 4).state
    whole = topk_svdvals(W, 4, state=first)
    V = first.V.clone()
    V[1, 0] = V[1, 1] if fault == "twice" else fault
    S, residual, state = topk_svdvals(W, 4, state=State(V, first.P))
    torch.testing.assert_close(S, whole.S, rtol=1e-4, atol=0)
    assert residual.isfinite().all() and state.V.isfinite().all() and state.P.isfinite().all()
    eye = torch.eye(V.shape[1])
    torch.testing.assert_close(state.V @ state.V.mT, eye.expand(3, *eye.shape), atol=1e-3, rtol=0)


def test_norms_that_are_known(monkeypatch):
    monkeypatch.setattr(kernels, "_C", None)
    monkeypatch.setattr(topk, "on_host", lambda *_: False)
    W = [matrix("power", *shape, seed=i) for i, shape in enumerate([(14, 17), (14, 17), (21, 14)])]
    W[1] = W[1] * 1e37
    norms = torch.stack([torch.linalg.vector_norm(A, dtype=torch.float64) for A in W])
    torch.testing.assert_close(topk_svdvals(W, 2, norms=norms).S, topk_svdvals(W, 2).S, rtol=1e-4, atol=0)
    norms[0] = math.inf
    S = topk_svdvals(W, 2, norms=norms).S
    assert S[0].isnan().all() and S[1:].isfinite().all()


def test_numpy_arrays_of_every_kind():
    W = matrix("power", 40, 60).numpy()
    expected = topk_svdvals(W, 4).S
    fixed = W.copy()
    fixed.flags.writeable = False
    for array in (W[::-1, ::-1], fixed, W.astype(">f4"), W.astype(np.longdouble), np.asfortranarray(W)):
        np.testing.assert_allclose(topk_svdvals(array, 4).S.astype(np.float64), expected, rtol=1e-4)
