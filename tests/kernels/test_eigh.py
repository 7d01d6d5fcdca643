import logging
import math
import sys

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels.eigh import eigh, eigh_ref, library

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def symmetric(values, dtype=torch.float64, seed=0):
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    A = ((Q * torch.as_tensor(values, dtype=torch.float64)) @ Q.mT).to(dtype)
    return (A + A.mT) / 2


SPECTRA = {
    "spread": [1 + i / 3 for i in range(12)],
    "repeated": [3.0] * 4 + [1.0] * 4 + [0.0] * 3,  # and an odd number of rows
    "both signs": [1.0, -1.0] * 5,  # of A A these would be one
    "graded": [10.0**-i for i in range(11)],
    "rank one": [1.0] + [0.0] * 9,
    "zero": [0.0] * 6,
    "small": [1e-30 * i for i in range(1, 7)],
    "large": [1e30 * i for i in range(1, 7)],
}


def assert_solves(values, vectors, A, orthogonality=16):
    """Residual, orthogonality and values in units of eps, and the order."""
    n, eps = A.shape[-1], EPS[A.dtype]
    V, S, A64 = vectors.double().cpu(), values.double().cpu(), A.double().cpu()
    norm = torch.linalg.matrix_norm(A64, 2)[..., None].clamp(min=1e-300)
    assert values.shape == A.shape[:-1] and vectors.shape == A.shape and values.dtype == vectors.dtype == A.dtype
    assert ((V @ A64 - S[..., None] * V).norm(dim=-1) <= 4 * n * eps * norm).all()
    assert ((V @ V.mT - torch.eye(n)).abs() <= orthogonality * eps).all()
    assert ((S - torch.linalg.eigvalsh(A64).flip(-1)).abs() <= (4 + n) * eps * norm).all()
    assert (values[..., :-1] >= values[..., 1:]).all()


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(device, name, dtype):
    A = symmetric(SPECTRA[name], dtype).to(device)
    before = A.clone()
    assert_solves(*eigh(A), A)
    assert torch.equal(A, before)


@pytest.mark.parametrize("n", [1, 2, 3, 17])  # 17: two blocks of columns
def test_sizes(device, n, monkeypatch):
    module = sys.modules["sosd_fast.kernels.eigh"]
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "WARPS", min(module.WARPS, module.PAIRS * 16 // 128))  # no row is held by two warps
    A = symmetric([(-1.1) ** (i % 7) * (1 + i) for i in range(n)], torch.float32).to(device)
    assert_solves(*eigh(A), A)


def test_more_pairs_than_are_turned_at_once(device, monkeypatch):
    A = symmetric(list(range(11)), torch.float32).to(device)
    module = sys.modules["sosd_fast.kernels.eigh"]
    for name, value in {"PAIRS": 4, "ROWS": 8, "WARPS": 1}.items():
        monkeypatch.setattr(module, name, value)
    assert_solves(*eigh(A), A)


def test_no_row_is_held_by_two_warps():
    module = sys.modules["sosd_fast.kernels.eigh"]
    assert 4 * module.PAIRS * module.BLOCK >= 16 * 32 * module.WARPS


def test_a_nearly_diagonal_matrix_takes_few_sweeps(device, monkeypatch):
    A = torch.diag(torch.linspace(1, 2, 12)) + 1e-4 * symmetric(range(12), torch.float32)
    A = A.to(device)
    monkeypatch.setattr(sys.modules["sosd_fast.kernels.eigh"], "SWEEPS", 3)
    assert_solves(*eigh(A), A)


def test_batches_strides_and_nan(device):
    A = torch.stack([symmetric(range(4), torch.float32, seed) for seed in range(4)]).reshape(2, 2, 4, 4).to(device)
    values, vectors = eigh(A)
    assert_solves(values, vectors, A)
    for view in (A.mT, torch.stack([A, A], -1)[..., 0]):
        found = eigh(view)
        assert torch.equal(found[0], values) and torch.equal(found[1], vectors)
    A[0, 1, 1, 3] = A[0, 1, 3, 1] = torch.nan
    A[1, 0, 0, 2] = A[1, 0, 2, 0] = torch.inf
    broken = eigh(A)
    for i, j in ((0, 1), (1, 0)):
        assert broken[0][i, j].isnan().all() and broken[1][i, j].isnan().all()
        assert torch.equal(broken[0][i, 1 - j], values[i, 1 - j])
        assert torch.equal(broken[1][i, 1 - j], vectors[i, 1 - j])
    assert eigh(A[:0])[1].shape == (0, 2, 4, 4)


def test_the_reference():
    A = torch.stack([symmetric(range(9), torch.float64, seed) for seed in range(2)])
    # LAPACK promises a modest multiple of n eps (its tests take 60): 12 to 18 at n = 9, depending on the CPU
    assert_solves(*eigh_ref(A), A, orthogonality=4 * 9)
    assert torch.equal(library("eigvalsh", A), torch.linalg.eigvalsh(A))


def test_larger_ones_go_to_the_library(device, monkeypatch):
    A = symmetric(range(9), torch.float32).to(device)
    monkeypatch.setattr(sys.modules["sosd_fast.kernels.eigh"], "LARGEST", 8)
    monkeypatch.setattr(sys.modules["sosd_fast.kernels.eigh"], "triton", None)
    assert_solves(*eigh(A), A)


def test_a_loop_over_matrices_is_said_once(monkeypatch, caplog):
    module = sys.modules["sosd_fast.kernels.eigh"]

    class Cuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    monkeypatch.setattr(module, "_cupy", lambda: None)
    module._warn_loop.cache_clear()
    A = torch.eye(3).expand(2, 3, 3).contiguous().as_subclass(Cuda)
    for _ in range(2):
        library("eigvalsh", A)
    assert sum("torch >= 2.12" in message for message in caplog.messages) == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    module._warn_loop.cache_clear()
    assert kernels.interpreted is False


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_reference_leaves_the_others_alone(value):
    A = torch.stack([symmetric(range(9), torch.float64, seed) for seed in range(3)])
    expected = eigh_ref(A)
    A[1, 2, 3] = A[1, 3, 2] = value
    values, vectors = eigh_ref(A)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert torch.equal(values[[0, 2]], expected[0][[0, 2]]) and torch.equal(vectors[[0, 2]], expected[1][[0, 2]])


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_an_iteration_that_does_not_converge(monkeypatch, failures):
    """The library's first calls fail, as LAPACK's may; then each matrix is tried in float64 and by its SVD."""
    A = torch.stack([symmetric(range(9), torch.float32, seed) for seed in range(2)])
    solve, calls = torch.linalg.eigh, []

    def fail(A, **options):
        calls.append(A.shape)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(A, **options)

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = eigh_ref(A)
    torch.testing.assert_close(vectors @ A @ vectors.mT, torch.diag_embed(values), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, torch.arange(8.0, -1, -1).expand(2, 9), atol=1e-5, rtol=0)
