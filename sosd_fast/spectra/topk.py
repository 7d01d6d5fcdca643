r"""The leading singular values, from a subspace carried from step to step.

The state holds V (b, n), orthonormal rows, b = k + oversamples, and P, the change of V at the last step. One step is

    Y = V W^T,  Z = Y W,  H = Z V^T,  rho = diag(H),  D = 4 (Z - H V) / rho + P

and Rayleigh-Ritz of W^T W on span[V, D] yields the next V, whose part along D is the next P. D sums the residual and
the last change, which LOBPCG keeps apart: the accuracy of LOBPCG at the cost of block Krylov (LOG.md#topk-span). A cold
start, and a subspace that its residuals show to have lost the matrix, repeat steps until the values stand still.

`subspace_step` is written once, in functions of the Python array API standard that torch has by the same names. CPU
tensors in float32 take the C++ kernel (kernels/subspace.py) instead, matrix by matrix where it applies.

Source: Knyazev, LOBPCG (SISC 2001); Musco & Musco, block Krylov (NeurIPS 2015); Stathopoulos & Wu, an orthonormal basis
from the eigenvectors of its Gram matrix (SISC 2002).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch

from sosd_fast import kernels
from sosd_fast.kernels.leading import leading_step
from sosd_fast.kernels.subspace import advance_subspaces
from sosd_fast.kernels.thin import DTYPES, MOST
from sosd_fast.spectra.arrays import (
    descending,
    eigh_descending,
    from_numpy,
    is_real_floating,
    namespace,
    on_host,
    positive,
    symmetric_blocks,
    transposed,
    unit_rows,
)
from sosd_fast.spectra.products import Products, State, chunks, cold_state, stacks_of

_PACE = 4.0  # weight of the residual against P: 2 to 8 work, 4 is best with AdamW and Muon (LOG.md#topk-pace)
_COLD_STEPS = 12  # at most; enough for spectra that decay, and Gaussian ones gain little from more
_CATCH_UP_STEPS = 8  # at most
# A relative residual beyond sqrt(20 rtol) asks for more steps: 0.14 at 1e-3, where 200 steps of AdamW and Muon stayed
# below 0.14 once warm, and subspaces 25 steps old began at 0.25 to 6, with errors of 5e-3 and more.
_RESIDUAL = 20.0


class TopK(NamedTuple):
    """Leading singular values, in the array type of W."""

    S: Any  # (..., k) descending, each at most the true one
    # (..., k), |W^T u - s v|_2 for the triplets of the subspace that the call started from; S where its direction was
    # in the null space of W
    residual: Any
    state: State


def topk_svdvals(
    W: Any,
    k: int,
    *,
    n_oversamples: int = 8,
    state: State | None = None,
    rtol: float = 1e-3,
    norms: torch.Tensor | None = None,
) -> TopK:
    """Estimates the k leading singular values of a matrix or a batch of matrices of one shape.

    Args:
        W: (..., m, n), a torch, NumPy or CuPy array of floating point, or a list of (m, n) arrays, which are taken as
            a batch: torch tensors on a device of any shapes with one short side, those of one shape together best.
            Arrays of other libraries that follow the array API standard work as CuPy's do. Not modified.
        k: how many values, at most min(m, n).
        n_oversamples: more directions than k in the subspace; they speed up the k-th value.
        state: the `state` of the call for the last step, or None to start cold. Where directions in it are not of norm
            1, NaN for instance, that matrix starts cold, and the others go on.
        rtol: relative accuracy to aim at. Where residuals are far from it, as when a matrix jumped or the state is old,
            up to 8 more steps are taken at once (12 without a state), until none raises a value by more. On a GPU the
            count is fixed, 12 without a state and 1 with one, since looking would wait for the device. For torch
            tensors nothing else waits either, while k + n_oversamples <= 256 and Triton is there.
        norms: Frobenius norms (B,) of a list of torch matrices on a device, float64, where they are known already: they
            save reading the matrices once more. NaN or Inf marks one that is not finite.

    Returns:
        `TopK`: S and residual (..., k) in float32 (float64 for float64 input), and the state for the next call.
        A matrix that holds NaN or Inf gives NaN and keeps its state. Finite ones give finite values, subnormal ones
        too, unless the value itself is beyond the dtype.

    Accuracy:
        Ritz values are lower bounds, up to rounding: their squares err by 20 eps S[0]**2, at most 4000 where new
        directions are nearly dependent (eps = 2^-23 or 2^-52), so small values by sqrt(20 eps) S[0] or more. Some
        singular value lies within residual[i] of S[i], and once the values are separated the error is about
        residual[i]**2 / gap. On real training runs, warm, the worst of 32 values errs by 1e-5 to 1e-3 of itself
        (LOG.md#topk-span).

    Raises:
        ValueError: no matrix, matrices that do not belong together, an integer dtype, k out of range, or a state of
            another shape.
        ImportError: a CuPy array without the package array-api-compat.
    """
    listed = isinstance(W, list | tuple)
    matrices: list[Any] = list(W) if listed else [W]
    first = matrices[0] if matrices else W
    xp = namespace(first)
    _check(first, k, n_oversamples, rtol)
    if xp is np:  # the same memory, and the C++ kernels
        tensors = [from_numpy(A) for A in matrices]
        state = state and State(*map(from_numpy, state))
        found = topk_svdvals(tensors if listed else tensors[0], k, n_oversamples=n_oversamples, state=state, rtol=rtol)
        return TopK(found.S.numpy(), found.residual.numpy(), State(*(part.numpy() for part in found.state)))
    host = on_host(first)
    mixed = listed and xp is torch and not host
    shapes = {A.shape for A in matrices}
    if any(min(shape) != min(first.shape) if mixed else shape != first.shape for shape in shapes):
        raise ValueError(
            f"topk_svdvals: expected matrices of one {'short side' if mixed else 'shape'}, got "
            f"W={[tuple(A.shape) for A in matrices]}. Call it once for each."
        )
    *batch, m, n = (len(matrices), *first.shape) if listed else first.shape
    count, r = math.prod(batch), min(m, n)
    b = min(k + n_oversamples, r)
    if state is not None and tuple(state.V.shape) != (*batch, b, r):
        raise ValueError(
            f"topk_svdvals: expected a state of shape {(*batch, b, r)}, got state.V.shape={tuple(state.V.shape)}. "
            "Pass state=None when the shape, k or n_oversamples changes."
        )
    dtype = xp.float64 if first.dtype == xp.float64 else xp.float32
    if not count:
        nothing = xp.zeros((*batch, k), dtype=dtype, device=first.device)
        return TopK(nothing, nothing, State(*[xp.zeros((*batch, b, r), dtype=dtype, device=first.device)] * 2))
    state = state and State(*(xp.reshape(part, (count, b, r)) for part in state))
    found = []
    with kernels.full_precision(first.device.type) if xp is torch else contextlib.nullcontext():
        launched = xp is torch and not host and b <= MOST and first.dtype in DTYPES
        launched = launched and kernels.backend_of("topk_svdvals", first) is kernels.Backend.TRITON
        if launched and not listed:
            matrices = list(first.reshape(count, m, n))
        for some in _chunks(matrices, b, launched) if mixed or launched else [slice(None)]:
            if host:
                step = _HostStep(matrices if listed else list(first.reshape(count, m, n)), dtype)
            elif launched:
                step = functools.partial(_launched_step, matrices[some], None if norms is None else norms[some])
            else:
                stacks = stacks_of(xp, matrices[some]) if listed else [xp.reshape(first, (count, m, n))]
                step = functools.partial(subspace_step, Products(xp, stacks, None if norms is None else norms[some]))
            if state is None:
                start = cold_state(xp, len(range(count)[some]), b, r, dtype, first.device)
            else:
                start = State(*(part[some, ...] for part in state))
            found.append(iterate(step, *start, k, rtol, cold=state is None, look=host))
        S, residual, V, P = (each[0] if len(each) == 1 else xp.concat(each) for each in zip(*found, strict=True))
    S, residual, V, P = (xp.reshape(each, (*batch, *each.shape[1:])) for each in (S, residual, V, P))
    return TopK(S, residual, State(V, P))


def iterate(step: Callable, V, P, k: int, rtol: float = 1e-3, *, cold: bool, look: bool) -> tuple[Any, Any, Any, Any]:
    """Takes the steps of `topk_svdvals` for one batch.

    Args:
        step: (V, P) -> S, residual, V, P, such as `subspace_step` of certain `Products`.
        V: (B, b, n), directions to start from.
        P: (B, b, n), their last change.
        k: values to return.
        rtol: as above.
        cold: whether V knows nothing of the matrices yet.
        look: whether the number of steps depends on the values, torch tensors, which waits for their device.

    Returns:
        S (B, k), residual (B, k), V, P.
    """
    S, residual, V, P = step(V, P)
    more, enough = (_COLD_STEPS, 0.01 * rtol) if cold else (0, rtol)
    if look and not cold and _largest_ratio(residual[:, :k], S[:, :k]) > math.sqrt(_RESIDUAL * rtol):
        more = _CATCH_UP_STEPS
    for _ in range(more):
        before = S
        S, residual, V, P = step(V, P)
        if look and _largest_ratio((S - before)[:, :k], S[:, :k]) <= enough:
            break
    return S[:, :k], residual[:, :k], V, P


def subspace_step(products: Products, V, P) -> tuple[Any, Any, Any, Any]:
    """One step by the formulas above.

    Args:
        products: of the matrices.
        V: (B, b, n), directions as rows. Those of a matrix that are not orthonormal are replaced by a cold start.
        P: (B, b, n), their last change.

    Returns:
        S (B, b), residual (B, b), V, P.
    """
    xp, (B, b, n) = products.xp, V.shape
    eye = xp.eye(b, dtype=V.dtype, device=V.device)
    orthonormal = xp.all(xp.abs(V @ transposed(xp, V) - eye) < 0.01, axis=(-2, -1))
    sound = (orthonormal & xp.all(xp.sum(P * P, axis=-1) < 4, axis=-1))[:, None, None]
    start = cold_state(xp, B, b, n, V.dtype, V.device)
    V, P = xp.where(sound, V, start.V), xp.where(sound, P, start.P)

    Z = products.rmatmat(products.matmat(V))
    H = Z @ transposed(xp, V)
    rho = xp.sum(Z * V, axis=-1, keepdims=True)  # (B, b, 1)
    # A quotient below the rounding of the largest one is rounding itself: W does not see that direction, and its
    # residual, over rho, could be anything.
    largest = xp.linalg.vector_norm(xp.where(rho > 0, rho, 0.0), axis=1, keepdims=True, ord=math.inf)
    seen = rho > float(xp.finfo(V.dtype).eps) ** 2 * largest
    divisor = positive(xp, xp.where(seen, rho, 0.0))
    # |W^T u - s v|, divided by the root: a quotient of squares could overflow
    residual = xp.sqrt(xp.sum((Z - rho * V) ** 2, axis=-1)) / xp.sqrt(divisor[..., 0])

    D = (_PACE * (Z - H @ V) / divisor + P)[:, : min(b, n - b), :]  # no more directions than there is room for
    for _ in range(2):  # the first leaves rounding along V, which is all there is of D where V has everything
        D = unit_rows(xp, D)
        D = D - (D @ transposed(xp, V)) @ V
    M = symmetric_blocks(xp, V @ transposed(xp, V), D @ transposed(xp, V), D @ transposed(xp, D))
    H = symmetric_blocks(xp, H, D @ transposed(xp, Z), products.gram(products.matmat(D)))
    squares, C = _rayleigh_ritz(xp, M, H, b)
    S = descending(xp, xp.sqrt(xp.where(squares > 0, squares, 0.0)))
    residual = xp.where(seen[..., 0], residual, S)  # of an unseen direction it says nothing of what took its place
    new_P = C[:, :, b:] @ D
    new_V = C[:, :, :b] @ V + new_P
    finite = products.finite[..., None]
    return products.unscaled(S), products.unscaled(residual), xp.where(finite, new_V, V), xp.where(finite, new_P, P)


def _rayleigh_ritz(xp, M, H, b):
    """Solves H c = value M c for the b largest values, rows of C; M is the Gram matrix of the basis.

    The first b of the basis are orthonormal, and the others of norm 1 and orthogonal to those, but perhaps not
    independent. Of the space of the others only what is well within it is taken: rounding in H is divided by the
    eigenvalues of M, by 1000 at most.
    """
    lengths, U = eigh_descending(xp, M[:, b:, b:])
    taken = lengths > 1e-3
    U = xp.where(taken[..., None], U / xp.sqrt(xp.where(taken, lengths, 1.0))[..., None], 0.0)
    old = xp.zeros_like(M[:, :b, :b]) + xp.eye(b, dtype=M.dtype, device=M.device)
    T = symmetric_blocks(xp, old, xp.zeros_like(M[:, b:, :b]), U)
    # What is not taken gets the value -1, which comes after all others.
    last = xp.concat([xp.zeros_like(M[:, :b, 0]), xp.where(taken, 0.0, xp.ones_like(lengths))], axis=-1)
    last = last[..., None] * xp.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    C = eigh_descending(xp, T @ H @ transposed(xp, T) - last)[1][:, :b, :] @ T
    square = positive(xp, xp.sum(C * (C @ M), axis=-1))
    return xp.sum(C * (C @ H), axis=-1) / square, C / xp.sqrt(square)[..., None]


def _chunks(matrices: list[torch.Tensor], b: int, launched: bool):
    """Slices of a list, for its copies or, where kernels read it in place, for subspaces and products with these."""
    if launched:
        size = functools.cache(lambda shape: 4 * b * (max(shape) + 10 * min(shape)))
        return chunks([size(A.shape) for A in matrices])
    return chunks([max(4, A.element_size()) * A.numel() for A in matrices])


def _launched_step(matrices: list[torch.Tensor], norms: torch.Tensor | None, V, P):
    """`subspace_step` by kernels that read the matrices in place."""
    norms = torch.stack(torch._foreach_norm(matrices, math.inf)) if norms is None else norms
    return leading_step(matrices, V, P, _start_on(V.device, *V.shape[1:]), norms, _PACE)


_starts: dict[tuple, torch.Tensor] = {}


def _start_on(device: torch.device, b: int, n: int) -> torch.Tensor:
    """The rows of a cold start, copied to a device once for each stream."""
    key = (kernels.stream_of(device), b, n)
    found = _starts.get(key)
    if found is None:
        found = cold_state(torch, 1, b, n, torch.float32, device).V[0]
        if key[0] is not None:
            if len(_starts) >= 16:
                _starts.clear()
            _starts[key] = found
    return found


class _HostStep:
    """The step of matrices of one shape on the CPU: by the C++ kernel, and by `subspace_step` where that declines."""

    def __init__(self, matrices: list[torch.Tensor], dtype: torch.dtype):
        matrices = [A.detach().to(dtype) for A in matrices]
        self._upright = [A if A.shape[0] >= A.shape[1] else A.mT for A in matrices]
        self._declined: list[int] = []

    def __call__(self, V, P):
        found = advance_subspaces(self._upright, V, P, _PACE)
        if found is None:
            return self._by_torch(list(range(len(V))), V, P)
        S = found.squares.clamp_min(0).sqrt().sort(descending=True).values
        result = S, found.residual, found.V, found.P
        declined = [i for i, done in enumerate(found.done) if not done]
        if declined:
            for whole, part in zip(result, self._by_torch(declined, V[declined], P[declined]), strict=True):
                whole[declined] = part
        return result

    def _by_torch(self, at: list[int], V, P):
        if self._declined != at:
            self._declined, self._products = at, Products(torch, [self._upright[i][None] for i in at])
        return subspace_step(self._products, V, P)


def _largest_ratio(x: torch.Tensor, S: torch.Tensor) -> float:
    """The largest finite x / S, as a number: waits for a device."""
    relative = x / S.where(S > 0, 1.0)
    return float(relative.where(relative.isfinite(), 0.0).amax()) if relative.numel() else 0.0


def _check(W, k, n_oversamples, rtol):
    shape = tuple(W.shape)
    if len(shape) < 2 or 0 in shape[-2:]:
        raise ValueError(
            f"topk_svdvals: expected non-empty matrices (..., m, n), got W.shape={shape}. "
            "Leave vectors and empty matrices out."
        )
    if not is_real_floating(W):
        raise ValueError(
            f"topk_svdvals: expected a floating-point dtype, got W.dtype={W.dtype}. Convert it to float32."
        )
    if not (_is_whole(k) and 1 <= k <= min(shape[-2:])):
        raise ValueError(
            f"topk_svdvals: expected 1 <= k <= min(m, n) = {min(shape[-2:])}, got k={k!r}. "
            "Use svdvals for all singular values."
        )
    if not (_is_whole(n_oversamples) and n_oversamples >= 0):
        raise ValueError(
            f"topk_svdvals: expected a whole number of at least 0, got n_oversamples={n_oversamples!r}. Use 8."
        )
    if not (isinstance(rtol, Real) and not isinstance(rtol, bool) and float(rtol) > 0):
        raise ValueError(f"topk_svdvals: expected a positive tolerance, got rtol={rtol!r}. Use 1e-3.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
