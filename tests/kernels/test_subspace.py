"""The C++ step of the leading singular values against the same step in torch's operations, and against float64."""

import math
import platform

import pytest
import torch
from prepared import run

from sosd_fast import kernels
from sosd_fast.kernels.subspace import advance_subspaces
from sosd_fast.spectra import topk
from sosd_fast.spectra.topk import topk_svdvals
from sosd_fast.testing import matrix

# (m, n, k): square, tall, primes, no room for as many new directions as carried ones, whole vectors and not
SHAPES = [(64, 64, 8), (300, 64, 16), (509, 127, 16), (97, 50, 20), (41, 41, 32), (256, 96, 24), (1100, 48, 8)]
SHIFT = 4 * 64 * 2**-23  # of the Cholesky factor, whose effect is divided out to first order


def orthonormal(b, n, seed=0):
    return torch.linalg.qr(torch.randn(n, b, generator=torch.Generator().manual_seed(seed))).Q.mT.contiguous()


def views(W):
    """The same matrix by rows, by columns, inside a larger one, and with no stride of 1."""
    padded = torch.full((W.shape[0] + 1, W.shape[1] + 3), math.nan)
    padded[1:, 2:-1] = W
    spread = torch.full((*W.shape, 2), math.nan)
    spread[..., 1] = W
    return [W, W.mT.contiguous().mT, padded[1:, 2:-1], spread[..., 1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gaussian", "power", "repeated", "log4"])
def test_against_the_reference(name, shape, monkeypatch):
    m, n, k = shape
    W = matrix(name, m, n)
    drift = 1e-3 * matrix("gaussian", m, n, seed=9)
    fast, slow = None, None
    for step in range(4):
        A = W + step * drift
        before = A.clone()
        S, residual, fast = topk_svdvals(A, k, state=fast)
        with monkeypatch.context() as without:
            without.setattr(kernels, "_C", None)
            S_ref, residual_ref, slow = topk_svdvals(A, k, state=slow)
        assert torch.equal(A, before)
        size = float(S_ref[0])
        # of the squares; a smaller value is known to sqrt(eps) sigma_1
        torch.testing.assert_close(S**2, S_ref**2, rtol=2e-5, atol=1e-5 * size**2)
        if name in ("gaussian", "power"):  # elsewhere single vectors, and so their residuals, are arbitrary
            torch.testing.assert_close(residual, residual_ref, rtol=0.05, atol=1e-3 * size)
    assert fast.V.shape == (k + min(8, n - k), n)


# not 41: nine random directions in the nine dimensions that are left are nearly dependent, which multiplies SHIFT
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] != 41], ids=str)
def test_one_step(shape):
    m, n, k = shape
    W, V = matrix("gaussian", m, n), orthonormal(k, n)[None]
    P = 0.1 * torch.randn(1, k, n, generator=torch.Generator().manual_seed(1))
    for previous in (0 * P, P):
        results = [advance_subspaces([A], V, previous, 4.0) for A in views(W)]
        assert all(result.done == [True] for result in results), "the kernel was not used"
        for result in results:
            torch.testing.assert_close(result.squares, results[0].squares, rtol=SHIFT, atol=SHIFT)
        result = results[0]
        torch.testing.assert_close(result.V[0] @ result.V[0].mT, torch.eye(k), atol=SHIFT, rtol=0)
        Y = W.double() @ result.V[0].double().mT  # Ritz values of the next V, whose residual part P belongs to it
        torch.testing.assert_close(
            Y.mT @ Y, result.squares[0].double().diag(), atol=2e-5 * float(Y.square().max()) * m, rtol=0
        )
        inside = V[0].double().mT @ (V[0].double() @ (result.V[0] - result.P[0]).double().mT)
        torch.testing.assert_close(inside, (result.V[0] - result.P[0]).double().mT, atol=1e-5, rtol=0)
        assert (result.squares.sqrt().sort(descending=True).values[0] <= torch.linalg.svdvals(W)[:k] * 1.00001).all()


def test_a_list_of_matrices_on_any_number_of_threads():
    W = [matrix("gaussian", 300, 200, seed=i) for i in range(5)]
    V = orthonormal(24, 200).expand(5, 24, 200)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(advance_subspaces(W, V, torch.zeros_like(V), 4.0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:4], other[:4], strict=True))
    for i in range(5):
        alone = advance_subspaces([W[i]], V[:1], torch.zeros_like(V[:1]), 4.0)
        assert torch.equal(alone.V[0], found[0].V[i])


def start(b, n, count=1):
    V = orthonormal(b, n).expand(count, b, n)
    return V, torch.zeros_like(V)


@pytest.mark.parametrize(
    "odd",
    [torch.full((30, 20), math.nan), torch.zeros(30, 20), torch.ones(30, 20), 1e-20 * torch.ones(30, 20)],
    ids=["nan", "zero", "rank one", "tiny"],
)
def test_it_declines_single_matrices(odd):
    W = [matrix("gaussian", 30, 20, seed=i) for i in range(3)]
    whole = advance_subspaces(W, *start(6, 20, 3), 4.0)
    part = advance_subspaces([W[0], odd, W[2]], *start(6, 20, 3), 4.0)
    assert whole.done == [True] * 3 and part.done == [True, False, True]
    for i in (0, 2):
        assert all(torch.equal(a[i], b[i]) for a, b in zip(whole[:4], part[:4], strict=True))


@pytest.mark.parametrize("fault", [math.nan, 2.0, "twice"])
def test_it_declines_directions_that_are_not_orthonormal(fault):
    V, P = start(6, 20, 2)
    V = V.clone()
    V[1, 0] = V[1, 1] if fault == "twice" else V[1, 0] * fault
    assert advance_subspaces([matrix("gaussian", 30, 20)] * 2, V, P, 4.0).done == [True, False]


def test_only_what_it_declines_is_done_again(monkeypatch):
    asked = []
    step = topk.subspace_step
    monkeypatch.setattr(topk, "subspace_step", lambda p, V, P: asked.append(len(V)) or step(p, V, P))
    W = [matrix("gaussian", 60, 40, seed=i) for i in range(3)]
    state = topk_svdvals(W, 4).state
    assert not asked
    found = topk_svdvals([W[0], torch.ones(60, 40), W[2]], 4, state=state)
    assert asked and set(asked) == {1}
    torch.testing.assert_close(found.S[1, 0], torch.tensor(2400.0).sqrt(), rtol=1e-5, atol=0)
    assert found.state.V.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    assert advance_subspaces([torch.ones(30, 20, dtype=dtype)], *start(6, 20), 4.0) is None


def test_no_room():
    assert advance_subspaces([matrix("gaussian", 9, 6)], *start(6, 6), 4.0) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """In a process of its own, for the choice is made once; a machine without the set takes the next lower one."""
    done = run(
        "import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))",
        *("-q", "-x", "-p", "no:cacheprovider", "-k", "one_step or threads", __file__),
        SOSD_ISA=isa,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # none is needed, and their imports take time
    )
    assert done.returncode == 0, done.stdout[-2000:]
