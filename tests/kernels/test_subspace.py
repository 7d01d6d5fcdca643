"""The C++ step of the leading singular values against the same step in torch's operations, and against float64."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels.subspace import advance_subspaces
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
    for previous in (None, P):
        results = [advance_subspaces([A], V, previous, 4.0) for A in views(W)]
        assert None not in results, "the kernel was not used"
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
            found.append(advance_subspaces(W, V, None, 4.0))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for i in range(5):
        alone = advance_subspaces([W[i]], V[:1], None, 4.0)
        assert torch.equal(alone.V[0], found[0].V[i])


@pytest.mark.parametrize(
    "W",
    [
        torch.full((30, 20), math.nan),
        torch.zeros(30, 20),
        torch.ones(30, 20),
        1e-20 * torch.ones(30, 20),
        torch.ones(30, 20, dtype=torch.float64),
        torch.ones(30, 20, dtype=torch.bfloat16),
    ],
    ids=["nan", "zero", "rank one", "tiny", "float64", "bfloat16"],
)
def test_what_it_leaves_to_the_reference(W):
    assert advance_subspaces([W], orthonormal(6, 20)[None], None, 4.0) is None


def test_no_room():
    assert advance_subspaces([matrix("gaussian", 9, 6)], orthonormal(6, 6)[None], None, 4.0) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """In a process of its own, for the choice is made once; a machine without the set takes the next lower one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "one_step or threads",
        __file__,
    ]
    done = subprocess.run(command, env=os.environ | {"SOSD_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
