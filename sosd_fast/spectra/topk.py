r"""The leading singular values, from a subspace carried from step to step.

With V (n, b) orthonormal, b = k + oversamples, kept from the last call, one step is

    Y = W V,  Z = W^T Y,  R = Z - V (V^T Z)

and Rayleigh-Ritz of W^T W on span[V, D]; P is the change of V at the last step, rho the Rayleigh quotients:

    "b"  D = R                     block Krylov
    "m"  D = 4 R / rho + P         with momentum: the accuracy of "c" at the cost of "b"
    "c"  D = [R, P]                LOBPCG

("a" takes the quotient on span[Y] and needs no third product.) A cold start, and a subspace that its residuals show to
have lost the matrix, repeat steps until the values stand still.

Source: Knyazev, LOBPCG (SISC 2001); Musco & Musco, block Krylov (NeurIPS 2015); Stathopoulos & Wu, whitening by
Cholesky (SISC 2002); Fukaya et al., the shift (SISC 2020).
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sosd_fast import kernels
from sosd_fast.kernels.eigh import eigh
from sosd_fast.kernels.subspace import advance_subspaces

VARIANTS = ("a", "b", "m", "c")
_PACE = 4.0  # of the residual against the last change in "m": 2 to 8 work, 4 is best with AdamW and Muon (LOG.md)
_COLD_STEPS = 12  # at most; enough for spectra that decay, and Gaussian ones gain little from more
_CATCH_UP_STEPS = 8  # at most
# A relative residual beyond sqrt(20 rtol) asks for more steps: 0.14 at 1e-3, where 200 steps of AdamW and Muon stayed
# below 0.14 once warm, and subspaces 25 steps old began at 0.25 to 6, with errors of 5e-3 and more.
_RESIDUAL = 20.0
CHUNK_BYTES = 2**30  # of copies of a list of matrices on a device, at a time


class State(NamedTuple):
    """What is carried between calls: n is the short side, b = k + oversamples."""

    V: Any  # (..., b, n) orthonormal rows, leading directions first
    P: Any  # (..., b, n) the last change of V; None but for variants "m" and "c"


def stacked(states: Sequence[State | None]) -> State | None:
    """The states of several torch matrices as one of their batch; None where one is missing."""
    warm = [state for state in states if state is not None]
    return State(*map(torch.stack, zip(*warm, strict=True))) if len(warm) == len(states) else None


class TopK(NamedTuple):
    """Leading singular values, in the array type of W."""

    S: Any  # (..., k) descending, each at most the true one
    residual: Any  # (..., k), |W^T u - s v|_2 for the triplets of the subspace that the call started from
    state: State


def topk_svdvals(
    W, k: int, *, n_oversamples: int = 8, state: State | None = None, variant: str = "m", rtol: float = 1e-3
) -> TopK:
    """Estimates the k leading singular values of a matrix or a batch of matrices of one shape.

    Args:
        W: (..., m, n), a torch, CuPy or NumPy array of floating point, or a list of (m, n) arrays, which are taken as
            a batch: torch tensors on a device of any shapes with one short side, those of one shape together best.
            Not modified.
        k: how many values, at most min(m, n).
        n_oversamples: more columns than k in the subspace; they speed up the k-th value.
        state: the `state` of the call for the last step, or None to start cold.
        variant: "a" (two thin products), "b", "m" (three) or "c" (four); see the formulas above.
        rtol: relative accuracy to aim at. Where residuals are far from it, as when a matrix jumped or the state is old,
            up to 8 more steps are taken at once (12 without a state), until none raises a value by more. On a GPU the
            count is fixed, 12 without a state and 1 with one, since looking would wait for the device. For torch
            tensors nothing else waits either, while k + n_oversamples <= 256 and Triton is there.

    Returns:
        `TopK`: S and residual (..., k) in float32 (float64 for float64 input), and the state for the next call.
        A matrix that holds NaN or Inf gives NaN and keeps its state.

    Accuracy:
        Ritz values are lower bounds, up to rounding, which squaring makes sqrt(eps) * S[0] for small values. Some
        singular value lies within residual[i] of S[i], and once the values are separated the error is about
        residual[i]**2 / gap. On real training runs, warm, the worst of 32 values errs by 1e-5 to 1e-3 of itself
        (LOG.md).

    Raises:
        ValueError: no matrix, matrices that do not belong together, an integer dtype, k out of range, an unknown
            variant, or a state of another shape.
    """
    matrices = list(W) if isinstance(W, list | tuple) else []
    first: Any = next(iter(matrices), W)
    xp = _namespace(first)
    _check(first, k, n_oversamples, variant, rtol)
    stacks = bool(matrices) and xp is torch and not _on_host(xp, first)
    if any(min(A.shape) != min(first.shape) if stacks else A.shape != first.shape for A in matrices):
        raise ValueError(
            f"topk_svdvals: expected matrices of one {'short side' if stacks else 'shape'}, got "
            f"W={[tuple(A.shape) for A in matrices]}. Call it once for each."
        )
    n = min(first.shape[-2:])
    b = min(k + n_oversamples, n)
    batch = (len(matrices),) if matrices else tuple(first.shape[:-2])
    if state is not None and tuple(state.V.shape) != (*batch, b, n):
        raise ValueError(
            f"topk_svdvals: expected a state of shape {(*batch, b, n)}, got state.V.shape={tuple(state.V.shape)}. "
            "Pass state=None when the shape, k or n_oversamples changes."
        )
    with kernels.full_precision(first.device.type) if xp is torch else contextlib.nullcontext():
        if not stacks:
            found = iterate(xp, _Operator(xp, matrices or W), batch, n, k, b, state, variant, rtol)
        else:
            parts = []
            for some in _chunks(matrices):
                was = state and State(*(None if each is None else each[some] for each in state))
                operator = _Stacks(matrices[some])
                parts.append(iterate(xp, operator, (operator.count,), n, k, b, was, variant, rtol))
            found = parts[0]
            if len(parts) > 1:
                found = (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))
    S, residual, V, P = found
    return TopK(S, residual, State(V, P))


def iterate(xp, operator, batch, n, k, b, state=None, variant="m", rtol=1e-3) -> tuple[Any, Any, Any, Any]:
    """Takes the steps of `topk_svdvals`.

    Args:
        xp: the arrays' namespace.
        operator: products with the matrices, as `_Operator` makes them.
        batch: how many matrices, leading dimensions.
        n: the short side.
        k: values to return.
        b: directions to carry.
        state: of the last step, or None.
        variant: as above.
        rtol: as above.

    Returns:
        S, residual, V, P.
    """
    V, P = state or (_start(xp, batch, n, b, operator.like), None)
    S, residual, V, P = _step(xp, operator, V, P, k, variant)
    host, more, enough = _on_host(xp, S), _COLD_STEPS if state is None else 0, 0.01 * rtol
    if host and not more and _largest(xp, residual / _positive(xp, S)) ** 2 > _RESIDUAL * rtol:
        more, enough = _CATCH_UP_STEPS, rtol
    for _ in range(more):
        before = S
        S, residual, V, P = _step(xp, operator, V, P, k, variant)
        if host and _largest(xp, (S - before) / _positive(xp, S)) <= enough:
            break
    return S, residual, V, P


def _step(xp, operator, V, P, k, variant):
    """One Rayleigh-Ritz on the span that the variant names. Rows are directions."""
    b = V.shape[-2]
    if variant == "m" and (fast := operator.advance(V, P)):
        squares, residual, new, P = fast
        S = torch.sqrt(squares.clamp_min(0)).sort(descending=True).values
        return S[..., :k], residual[..., :k], new, P
    if variant == "a":
        Y = operator.mul(V)
        Z = operator.tmul(Y)
        residual = _residual(xp, V, Z)[0]
        values, C = _rayleigh_ritz(xp, operator.gram(Y), Z @ _t(xp, Z), b)  # of W W^T on span[Y], whose image is Z
        new, P = (C / xp.sqrt(_positive(xp, values))[..., None]) @ Z, None
    else:
        D, M, H, residual = _expand(xp, operator, V, P, variant)
        values, C = _rayleigh_ritz(xp, M, H, b)
        P = C[..., b:] @ D
        new = C[..., :b] @ V + P

    S = _descending(xp, xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values))))
    if not operator.plain:
        nan = xp.full_like(S, math.nan)
        S = xp.where(operator.finite[..., None], S / operator.scale[..., None], nan)
        residual = xp.where(operator.finite[..., None], residual / operator.scale[..., None], nan)
        new = xp.where(operator.finite[..., None, None], new, V)
    return S[..., :k], residual[..., :k], new, P if variant in "cm" else None


def _residual(xp, V, Z):
    """Returns |W^T u - s v| of the directions V, the last step's Ritz vectors, and their Rayleigh quotients."""
    rayleigh = (Z * V).sum(-1)[..., None]
    return xp.sqrt(((Z - rayleigh * V) ** 2).sum(-1) / _positive(xp, rayleigh)[..., 0]), rayleigh


def _expand(xp, operator, V, P, variant):
    """New directions D, and the Gram matrices of [V, D] and of W [V, D]."""
    b = V.shape[-2]
    Y = operator.mul(V)
    Z = operator.tmul(Y)
    H = Z @ _t(xp, V)
    residual, rayleigh = _residual(xp, V, Z)
    R = Z - H @ V
    if variant == "m" and P is not None:
        R = _PACE * R / _positive(xp, rayleigh) + P
    D = xp.concatenate([R, P], -2) if variant == "c" and P is not None else R
    D = _unit(xp, D[..., : V.shape[-1] - b, :])  # no more directions than there is room for
    if P is not None and variant != "b":
        D = D - (D @ _t(xp, V)) @ V
    WD = operator.mul(D)
    M = _symmetric(xp, V @ _t(xp, V), D @ _t(xp, V), D @ _t(xp, D))
    return D, M, _symmetric(xp, H, D @ _t(xp, Z), operator.gram(WD)), residual


def _rayleigh_ritz(xp, M, H, b):
    """Solves H c = value M c for the b largest values, rows of C; the basis need not be orthonormal nor independent.

    M, the basis' Gram matrix, is whitened by a Cholesky factor with a shift, which makes dependent directions
    harmless: they come out short and low. The shift's effect on the others is divided out again.
    """
    eye = _eye(xp, M)
    norm = xp.sqrt(_positive(xp, (M * eye).sum(-1)))
    norms = norm[..., :, None] * norm[..., None, :]
    M, H = M / norms, H / norms
    shift = 4 * M.shape[-1] * float(xp.finfo(M.dtype).eps)
    L = _cholesky(xp, M + shift * eye)
    whiten = _inverse(xp, L, eye)
    H = whiten @ H @ _t(xp, whiten)
    norm = norm[..., None, :]
    if _on_host(xp, M) and bool(((L * L * eye).sum(-1) > 100 * shift).all()):  # independent, as in training
        values, C = _eigh_descending(xp, H, b)
        C = C @ whiten
        square = 1 - shift * (C * C).sum(-1)  # the length without the shift
        return values / square, C / (xp.sqrt(square)[..., None] * norm)
    # N is 1 on true directions and nearly 0 on those that the shift made up, where H is amplified rounding: damp it.
    # Where H tells nothing apart (a zero matrix), true directions go first.
    N = whiten @ M @ _t(xp, whiten)
    damp = N @ N
    damp = damp @ damp
    weight = float(xp.finfo(M.dtype).eps) * (xp.abs(H) * eye).sum((-2, -1)) + float(xp.finfo(M.dtype).tiny)
    damped = damp @ H @ _t(xp, damp)
    C = _eigh_descending(xp, damped + weight[..., None, None] * N, b)[1]
    square = (C * (C @ N)).sum(-1)
    true = square > 0.5
    square = xp.where(true, square, xp.ones_like(square))
    values = xp.where(true, (C * (C @ H)).sum(-1) / square, (C * (C @ damped)).sum(-1))
    return values, C @ whiten / (xp.sqrt(square)[..., None] * norm)


class _Operator:
    """Products of rows with W, taken upright (m >= n), scaled by the power of two that brings W V near 1.

    Matrices that hold NaN or Inf act as zero.
    """

    def __init__(self, xp, W):
        self.xp = xp
        self.is_list = isinstance(W, list)
        matrices = W if self.is_list else [W]
        dtype = xp.float64 if matrices[0].dtype == xp.float64 else xp.float32
        matrices = [_cast(xp, A, dtype) for A in matrices]
        self.matrices = [A if A.shape[-2] >= A.shape[-1] else _t(xp, A) for A in matrices]
        self.upside_down = [_t(xp, A) for A in self.matrices]
        self.like = matrices[0][..., :1, :1]
        self.scale: Any = None

    def advance(self, V, P):
        """The step of variant "m" by the C++ kernel; None where it does not apply."""
        if self.xp is not torch or not _on_host(torch, V):
            return None
        matrices = self.matrices if self.is_list else self.matrices[0].reshape(-1, *self.matrices[0].shape[-2:])
        flat = V.reshape(-1, *V.shape[-2:])
        found = advance_subspaces(list(matrices), flat, P if P is None else P.reshape(flat.shape), _PACE)
        return found and [x.reshape(*V.shape[:-2], *x.shape[1:]) for x in found]

    def mul(self, V):
        """Returns (W V^T)^T."""
        Y = self._product(V, self.upside_down)
        if self.scale is None:
            xp = self.xp
            largest = xp.amax(xp.abs(Y), (-2, -1))
            self.finite, self.scale = _scales(xp, largest)
            tame = self.finite & (largest > 2.0**-30) & (largest < 2.0**30)
            self.plain = _on_host(xp, Y) and bool(tame.all())  # then nothing needs cleaning
        return self._clean(Y)

    def tmul(self, Y):
        """Returns (W^T Y^T)^T."""
        return self._clean(self._product(Y, self.matrices))

    def gram(self, Y):
        """Returns Y Y^T."""
        return Y @ _t(self.xp, Y)

    def _product(self, X, matrices):
        if not self.is_list:
            return X @ matrices[0]
        if self.xp is not torch:
            return self.xp.stack([x @ A for x, A in zip(X, matrices, strict=True)])
        Y = X.new_empty(len(matrices), X.shape[1], matrices[0].shape[1])
        for x, A, y in zip(X, matrices, Y, strict=True):
            torch.mm(x, A, out=y)
        return Y

    def _clean(self, Y):
        if self.plain:
            return Y
        return self.xp.where(self.finite[..., None, None], Y * self.scale[..., None, None], self.xp.zeros_like(Y))


class _Stacks:
    """`_Operator` of a list of torch matrices on a device: each run of one shape is copied and multiplied at once.

    A launch for each matrix would take longer than the product.
    """

    plain = False  # to know would wait for the device

    def __init__(self, matrices: list):
        runs = [list(run) for _, run in itertools.groupby(matrices, key=lambda A: A.shape)]
        dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        stacks = [torch.stack(run) if len(run) > 1 else run[0][None] for run in runs]
        stacks = [stack.detach().to(dtype) for stack in stacks]
        self.upright = [W if W.shape[1] >= W.shape[2] else W.mT for W in stacks]
        self.count, self.counts = len(matrices), [len(run) for run in runs]
        self.like = stacks[0][..., :1, :1]
        self.scale: Any = None

    def advance(self, V, P):  # noqa: ARG002
        """There is no fused step on a device."""

    def mul(self, V):
        """Returns (W V^T)^T of each run."""
        Y = [v @ W.mT for v, W in zip(V.split(self.counts), self.upright, strict=True)]
        if self.scale is None:
            self.finite, self.scale = _scales(torch, torch.cat([y.abs().amax((-2, -1)) for y in Y]))
        return [self._clean(*each) for each in zip(Y, self._split(self.finite), self._split(self.scale), strict=True)]

    def tmul(self, Y):
        """Returns (W^T Y^T)^T."""
        return self._clean(torch.cat([y @ W for y, W in zip(Y, self.upright, strict=True)]), self.finite, self.scale)

    def gram(self, Y):
        """Returns Y Y^T."""
        return torch.cat([y @ y.mT for y in Y])

    def _split(self, values):
        return values.split(self.counts)

    @staticmethod
    def _clean(Y, finite, scale):
        return torch.where(finite[:, None, None], Y * scale[:, None, None], 0.0)


def _chunks(matrices: list):
    """Slices of a list of matrices of which no copies take more than CHUNK_BYTES, or of one matrix."""
    first, size = 0, 0
    for i, A in enumerate(matrices):
        own = max(4, A.element_size()) * A.shape[0] * A.shape[1]
        if i > first and size + own > CHUNK_BYTES:
            yield slice(first, i)
            first, size = i, 0
        size += own
    yield slice(first, len(matrices))


def _scales(xp, largest):
    """Which matrices are finite, and the powers of two that bring their largest products near 1."""
    finite = xp.isfinite(largest)
    largest = xp.where(finite & (largest > 0), largest, xp.ones_like(largest))
    return finite, xp.ldexp(xp.ones_like(largest), -xp.frexp(largest)[1])


def _t(xp, A):
    return xp.swapaxes(A, -1, -2)


def _positive(xp, x):
    """X where it is positive, else 1: a divisor."""
    return xp.where(x > 0, x, xp.ones_like(x))


def _unit(xp, K):
    """Rows scaled to norm 1, zero rows left."""
    return K / xp.sqrt(_positive(xp, (K * K).sum(-1)))[..., None]


def _symmetric(xp, A, B, C):
    """[[A, B^T], [B, C]]."""
    return xp.concatenate([xp.concatenate([A, _t(xp, B)], -1), xp.concatenate([B, C], -1)], -2)


def _eigh_descending(xp, H, b):
    """The b largest eigenvalues of a symmetric matrix, descending, and their vectors as rows."""
    H = (H + _t(xp, H)) / 2
    if xp is torch:
        values, C = eigh(H)
        return values[..., :b], C[..., :b, :]
    values, C = xp.linalg.eigh(H)
    return xp.flip(values[..., -b:], (-1,)), xp.flip(_t(xp, C[..., -b:]), (-2,))


def _descending(xp, S):
    return xp.sort(S, descending=True).values if xp is torch else xp.flip(xp.sort(S, -1), -1)


def _cholesky(xp, M):
    return xp.linalg.cholesky_ex(M).L if xp is torch else xp.linalg.cholesky(M)


def _inverse(xp, L, eye):
    return xp.linalg.solve_triangular(L, eye.expand(L.shape), upper=False) if xp is torch else xp.linalg.inv(L)


def _namespace(array):
    """The module of an array's own operations; all three name those used here alike."""
    if isinstance(array, torch.Tensor):
        return torch
    if isinstance(array, np.ndarray):
        return np
    if type(array).__module__.split(".")[0] == "cupy":
        import cupy

        return cupy
    raise ValueError(
        f"topk_svdvals: expected a torch, NumPy or CuPy array, got W={type(array).__name__}. Use torch.as_tensor(W)."
    )


def _eye(xp, M):
    kwargs = {"device": M.device} if xp is torch else {}
    return xp.eye(M.shape[-1], dtype=M.dtype, **kwargs)


def _cast(xp, array, dtype):
    return array.detach().to(dtype) if xp is torch else array.astype(dtype, copy=False)


def _start(xp, batch, n, b, like):
    """The same random orthonormal columns each time, from a generator of their own: training's is not touched."""
    V = np.linalg.qr(np.random.default_rng(0).standard_normal((n, b)))[0].T
    if xp is not torch:
        return xp.asarray(np.tile(V, (*batch, 1, 1)), dtype=like.dtype)
    V = torch.as_tensor(V.copy(), dtype=like.dtype, device="cpu")
    if like.is_cuda:
        V = V.pin_memory().to(like.device, non_blocking=True)  # a copy of other memory would wait
    return V.repeat(*batch, 1, 1)


def _on_host(xp, array):
    return xp is np or (xp is torch and array.device.type == "cpu")


def _largest(xp, relative):
    """The largest finite element, as a number: waits for a device."""
    relative = relative[xp.isfinite(relative)]
    return float(relative.max()) if len(relative) else 0.0


def _check(W, k, n_oversamples, variant, rtol):
    shape = tuple(getattr(W, "shape", ()))
    if len(shape) < 2 or 0 in shape[-2:]:
        raise ValueError(
            f"topk_svdvals: expected non-empty matrices (..., m, n), got W.shape={shape}. "
            "Leave vectors and empty matrices out."
        )
    floating = W.is_floating_point() if isinstance(W, torch.Tensor) else W.dtype.kind == "f"
    if not floating:
        raise ValueError(
            f"topk_svdvals: expected a floating-point dtype, got W.dtype={W.dtype}. Convert it to float32."
        )
    if not 1 <= k <= min(shape[-2:]):
        raise ValueError(
            f"topk_svdvals: expected 1 <= k <= min(m, n) = {min(shape[-2:])}, got k={k}. "
            "Use svdvals for all singular values."
        )
    if n_oversamples < 0:
        raise ValueError(f"topk_svdvals: expected no negative number, got n_oversamples={n_oversamples}. Use 8.")
    if variant not in VARIANTS:
        raise ValueError(f"topk_svdvals: expected one of {', '.join(VARIANTS)}, got variant={variant!r}. Use 'm'.")
    if not rtol > 0:
        raise ValueError(f"topk_svdvals: expected a positive tolerance, got rtol={rtol}. Use 1e-3.")
