import sys

import pytest
import torch

from sosd_fast.kernels import triton
from sosd_fast.kernels.tridiagonal import tridiagonal, tridiagonal_ref
from sosd_fast.testing import matrix

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def gram(name, r, dtype=torch.float64, device="cpu", seed=0):
    W = matrix(name, r, r + 3, dtype=torch.float64, seed=seed)
    G = W @ W.mT
    return ((G + G.mT) / 2).to(device, dtype)


def eigenvalues(d, e):
    d, e = d.double(), e.double()
    return torch.linalg.eigvalsh(torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1))


def assert_same_eigenvalues(d, e, A):
    """Backward error: a few eps |A| a reflector at most, and they average out; LAPACK's stays below sqrt(r) too."""
    truth = torch.linalg.eigvalsh(A.double())
    units = (eigenvalues(d, e) - truth).abs().amax(-1) / (EPS[A.dtype] * truth.abs().amax(-1).clamp(min=1e-300))
    assert (units <= 4 + 2 * A.shape[-1] ** 0.5).all(), units


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("r", [1, 2, 3, 16, 35])  # 16 is a panel; 35 ends in the third
def test_eigenvalues_survive(device, r, dtype):
    A = gram("gaussian", r, dtype, device)
    before = A.clone()
    d, e = tridiagonal(A)
    assert d.shape == (r,) and e.shape == (r - 1,) and d.dtype == e.dtype == dtype
    assert_same_eigenvalues(d, e, A)
    assert torch.equal(A, before)
    assert_same_eigenvalues(*tridiagonal_ref(A), A)


@pytest.mark.parametrize("name", ["zero", "rank_one", "half_zeros", "repeated", "log10", "spikes"])
def test_special_spectra(device, name):
    A = gram(name, 10, torch.float32, device)
    assert_same_eigenvalues(*tridiagonal(A), A)


def test_several_programs_share_a_matrix(device):
    A = gram("gaussian", 18, torch.float32, device)  # more than one panel
    d, e = tridiagonal(A, programs=3)
    assert_same_eigenvalues(d, e, A)
    again = tridiagonal(A, programs=3)
    assert torch.equal(d, again[0]) and torch.equal(e, again[1])


def test_programs_of_an_event_do_not_depend_on_their_order(device, monkeypatch):
    """In the interpreter they run one after the other, so that a race would show as a dependence on the order."""
    if device == "cuda":
        pytest.skip("needs the interpreter")
    A = gram("gaussian", 18, torch.float64)
    expected = tridiagonal(A, programs=3)
    builder = triton.runtime.interpreter.interpreter_builder
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z, put=builder.set_grid_idx: put(x, builder.grid_dim[1] - 1 - y, z)
    )
    found = tridiagonal(A, programs=3)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_refused_cooperative_launch_is_made_alone(device, monkeypatch, caplog):
    module = sys.modules["sosd_fast.kernels.tridiagonal"]

    class Cuda(torch.Tensor):
        is_cuda = True

    class Refusing:
        def __getitem__(self, grid, kernel=module._tridiagonal_kernel):
            def launch(launch_cooperative_grid=False, **arguments):
                if launch_cooperative_grid:
                    raise RuntimeError("too many blocks in cooperative launch")
                return kernel[grid](**arguments)

            return launch

    A = gram("gaussian", 12, torch.float32, device)
    alone = tridiagonal(A, programs=1)
    monkeypatch.setattr(module, "_tridiagonal_kernel", Refusing())
    module._warn_alone.cache_clear()
    for _ in range(2):
        found = module._launch(A.clone()[None].as_subclass(Cuda), 3)
        assert torch.equal(found[0][0], alone[0]) and torch.equal(found[1][0, :-1], alone[1])
    assert sum("several programs to a matrix" in message for message in caplog.messages) == 1
    module._warn_alone.cache_clear()


def test_only_one_triangle_is_read(device):
    A = gram("gaussian", 10, torch.float32, device)
    d, e = tridiagonal(A.triu() + torch.full_like(A, torch.nan).tril(-1))
    whole = tridiagonal(A)
    assert torch.equal(d, whole[0]) and torch.equal(e, whole[1])


def test_batches_strides_and_nan(device):
    A = torch.stack([gram("gaussian", 6, torch.float32, device, seed) for seed in range(4)]).reshape(2, 2, 6, 6)
    d, e = tridiagonal(A)
    assert d.shape == (2, 2, 6) and e.shape == (2, 2, 5)
    for view in (A.mT, torch.stack([A, A], -1)[..., 0]):
        found = tridiagonal(view)
        assert torch.equal(found[0], d) and torch.equal(found[1], e)
    A[0, 1, 2, 4] = A[0, 1, 4, 2] = torch.nan
    d2, e2 = tridiagonal(A.clone(), overwrite=True)
    assert (d2[0, 1].isnan().any() or e2[0, 1].isnan().any()) and torch.equal(d2[1], d[1]) and torch.equal(e2[1], e[1])
    assert torch.equal(d2[0, 0], d[0, 0])
    assert tridiagonal(A[:0])[0].shape == (0, 2, 6)
