"""Derivatives of `svdvals`, backward and forward, alone and under transforms."""

import pytest
import torch

import sosd_fast


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_it_is_differentiable(shape, method):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda W: sosd_fast.svdvals(W, method=method), W)
    assert torch.autograd.gradgradcheck(lambda W: sosd_fast.svdvals(W, method=method), W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_is_that_of_torch(dtype):
    given = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    given[1, 2, 3] = torch.nan
    ours, theirs = given.clone().requires_grad_(), given[::2].double().requires_grad_()
    S, bound = sosd_fast.svdvals(ours, return_bound=True)
    assert S.requires_grad and not bound.requires_grad
    weights = torch.linspace(-1, 1, 20)
    (S * weights).sum().backward()
    (torch.linalg.svdvals(theirs) * weights).sum().backward()
    assert ours.grad.dtype == dtype and ours.grad[1].isnan().all()
    torch.testing.assert_close(
        ours.grad[::2].double(), theirs.grad, rtol=0, atol=16 * max(torch.finfo(dtype).eps, 1e-7)
    )
    assert not sosd_fast.svdvals(given).requires_grad
    with torch.no_grad():
        assert not sosd_fast.svdvals(ours).requires_grad


def test_a_function_transform_differentiates_it():
    W = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(torch.func.grad(lambda W: sosd_fast.svdvals(W).sum())(W), U @ Vh)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, loaded by jvp
def test_forward_derivatives_without_a_transform():
    W, dW = (torch.randn(2, 5, 7, dtype=torch.float64) for _ in range(2))
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(sosd_fast.svdvals(torch.autograd.forward_ad.make_dual(W, dW)))
        assert torch.equal(found.primal, sosd_fast.svdvals(W))  # inside, without a tangent
    expected = torch.func.jvp(torch.linalg.svdvals, (W,), (dW,))[1]
    torch.testing.assert_close(found.tangent, expected, rtol=1e-9, atol=1e-12)


def test_nothing_is_recorded_where_nothing_asks():
    W = torch.randn(4, 6, requires_grad=True)
    assert sosd_fast.svdvals(W).requires_grad
    with torch.no_grad():
        assert not sosd_fast.svdvals(W).requires_grad
    with torch.inference_mode():
        assert torch.equal(sosd_fast.svdvals(W), sosd_fast.svdvals(W.detach()))


def test_vmap_and_the_gradients_of_each_matrix():
    W = torch.randn(5, 4, 3, dtype=torch.float64)
    assert torch.equal(torch.func.vmap(sosd_fast.svdvals, in_dims=1)(W), sosd_fast.svdvals(W.movedim(1, 0)))
    found = torch.func.vmap(torch.func.grad(lambda A: sosd_fast.svdvals(A).sum()))(W)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(found, U @ Vh)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (9, 2), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, loaded by jvp
def test_the_derivative_forward(shape, method):
    """dS_i = u_i^T dW v_i, also of each matrix of a batch, in half precision, and beside NaN."""

    def ours(W):
        return sosd_fast.svdvals(W, method=method)

    own = torch.Generator().manual_seed(0)
    W, dW = (torch.randn(shape, dtype=torch.float64, generator=own) for _ in range(2))
    expected = torch.func.jvp(torch.linalg.svdvals, (W,), (dW,))[1]
    torch.testing.assert_close(torch.func.jvp(ours, (W,), (dW,))[1], expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(ours, W.clone().requires_grad_(), check_forward_ad=True)
    batch, tangents = torch.stack([W, W.flip(-1), W * torch.nan]), torch.stack([dW, dW.flip(-1), dW])
    (_, bound), (S, of_bound) = torch.func.jvp(lambda W: sosd_fast.svdvals(W, return_bound=True), (batch,), (tangents,))
    torch.testing.assert_close(S[0], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(S[1], expected, rtol=1e-9, atol=1e-12)
    assert S[2].isnan().all() and not of_bound.nan_to_num().any()
    by_vmap = torch.func.vmap(lambda W, dW: torch.func.jvp(ours, (W,), (dW,))[1])(batch[:2], tangents[:2])
    torch.testing.assert_close(by_vmap, S[:2])
    half = torch.func.jvp(ours, (W.bfloat16(),), (dW.bfloat16(),))[1]
    assert half.dtype == torch.float32 and (half - expected).norm() < 0.1 * expected.norm()
