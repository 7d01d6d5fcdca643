r"""The leading singular values, from a subspace carried from step to step.

With V (n, b) orthonormal, b = k + oversamples, kept from the last call, one step is

    Y = W V,  Z = W^T Y,  R = Z - V (V^T Z)

and Rayleigh-Ritz of W^T W on span[V, D]; P is the change of V at the last step, rho the Rayleigh quotients:

    "b"  D = R                     block Krylov
    "m"  D = 4 R / rho + P         with momentum: the accuracy of "c" at the cost of "b"
    "c"  D = [R, P]                LOBPCG

("a" takes the quotient on span[Y] and needs no third product.) A cold start, and a subspace that its residuals show to
have lost the matrix, repeat steps until the values stand still.

Source: Knyazev, LOBPCG (SISC 2001); Musco & Musco, block Krylov (NeurIPS 2015); Stathopoulos & Wu, an orthonormal basis
from the eigenvectors of its Gram matrix (SISC 2002).
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
    # (..., k), |W^T u - s v|_2 for the triplets of the subspace that the call started from; S where its direction was
    # in the null space of W
    residual: Any
    state: State


def topk_svdvals(
    W,
    k: int,
    *,
    n_oversamples: int = 8,
    state: State | None = None,
    variant: str = "m",
    rtol: float = 1e-3,
    norms: torch.Tensor | None = None,
) -> TopK:
    """Estimates the k leading singular values of a matrix or a batch of matrices of one shape.

    Args:
        W: (..., m, n), a torch, CuPy or NumPy array of floating point, or a list of (m, n) arrays, which are taken as
            a batch: torch tensors on a device of any shapes with one short side, those of one shape together best.
            Not modified.
        k: how many values, at most min(m, n).
        n_oversamples: more columns than k in the subspace; they speed up the k-th value.
        state: the `state` of the call for the last step, or None to start cold. Where directions in it are not of norm
            1, NaN for instance, that matrix starts cold, and the others go on.
        variant: "a" (two thin products), "b", "m" (three) or "c" (four); see the formulas above.
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
        (LOG.md).

    Raises:
        ValueError: no matrix, matrices that do not belong together, an integer dtype, k out of range, an unknown
            variant, or a state of another shape.
    """
    matrices = list(W) if isinstance(W, list | tuple) else []
    first: Any = next(iter(matrices), W)
    xp = _namespace(first)
    _check(first, k, n_oversamples, variant, rtol)
    if xp is np:  # the same memory, and the C++ kernels
        W = [_from_numpy(A) for A in matrices] if matrices else _from_numpy(W)
        state = state and State(*(None if part is None else _from_numpy(part) for part in state))
        S, residual, state = topk_svdvals(W, k, n_oversamples=n_oversamples, state=state, variant=variant, rtol=rtol)
        return TopK(S.numpy(), residual.numpy(), State(*(part if part is None else part.numpy() for part in state)))
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
                operator = _Stacks(matrices[some], None if norms is None else norms[some])
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
    host = _on_host(xp, operator.like)
    V, P = state or (_start(xp, batch, n, b, operator.like), None)
    if state is not None:
        V, P = _sound(xp, V, P, (V * V).sum(-1))
    S, residual, V, P = _step(xp, operator, V, P, k, variant)
    more, enough = _COLD_STEPS if state is None else 0, 0.01 * rtol
    if host and not more and _largest(xp, residual, S) > math.sqrt(_RESIDUAL * rtol):
        more, enough = _CATCH_UP_STEPS, rtol
    for _ in range(more):
        before = S
        S, residual, V, P = _step(xp, operator, V, P, k, variant)
        if host and _largest(xp, S - before, S) <= enough:
            break
    return S, residual, V, P


def _sound(xp, V, P, gram):
    """The state, with a cold start in place of that of each matrix whose directions are not orthonormal.

    Args:
        xp: the arrays' namespace.
        V: directions.
        P: their last change, or None.
        gram: the products of directions (..., b, b), or their squares (..., b), which take less time.
    """
    one = _eye(xp, gram) if gram.ndim == V.ndim else 1.0
    sound = (xp.abs(gram - one) < 0.01).all(-1)
    sound = sound if gram.ndim < V.ndim else sound.all(-1)
    if P is not None:
        sound = sound & ((P * P).sum(-1) < 4).all(-1)
    if _on_host(xp, V) and bool(sound.all()):
        return V, P
    sound = sound[..., None, None]
    V = xp.where(sound, V, _start(xp, V.shape[:-2], V.shape[-1], V.shape[-2], V))
    return V, None if P is None else xp.where(sound, P, xp.zeros_like(P))


def _step(xp, operator, V, P, k, variant):
    """One step on the matrices as they are where that stays in range, which the host can tell, else on scaled ones."""
    found = _rayleigh_ritz_step(xp, operator, V, P, k, variant)
    if operator.plain and not all(bool(xp.isfinite(x).all()) for x in found if x is not None):
        operator.rescale()
        found = _rayleigh_ritz_step(xp, operator, V, P, k, variant)
    return found


def _rayleigh_ritz_step(xp, operator, V, P, k, variant):
    """One Rayleigh-Ritz on the span that the variant names. Rows are directions."""
    b, before = V.shape[-2], P
    if variant == "m" and (fast := operator.advance(V, P)):
        squares, residual, new, P = fast
        S = torch.sqrt(squares.clamp_min(0)).sort(descending=True).values
        return S[..., :k], residual[..., :k], new, P
    V, P = _sound(xp, V, P, V @ _t(xp, V))
    if variant == "a":
        Y = operator.mul(V)
        Z = operator.tmul(Y)
        residual = _residual(xp, V, Z)[0]
        values, C = _rayleigh_ritz(xp, operator.gram(Y), Z @ _t(xp, Z), b, 0)  # of W W^T on span[Y], whose image is Z
        new, P = (C / xp.sqrt(_positive(xp, values))[..., None]) @ Z, None
    else:
        D, M, H, residual = _expand(xp, operator, V, P, variant)
        values, C = _rayleigh_ritz(xp, M, H, b, b)
        P = C[..., b:] @ D
        new = C[..., :b] @ V + P

    S = _descending(xp, xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values))))
    residual = xp.where(residual < 0, S, residual)
    if not operator.plain:
        finite = operator.finite[..., None]
        S, residual = (xp.where(finite, operator.unscaled(x), xp.full_like(x, math.nan)) for x in (S, residual))
        new = xp.where(finite[..., None], new, V)
        if before is not None and P is not None:
            P = xp.where(finite[..., None], P, before)
    return S[..., :k], residual[..., :k], new, P if variant in "cm" else None


def _residual(xp, V, Z):
    """Returns |W^T u - s v| of the directions V, the last step's Ritz vectors, and their Rayleigh quotients.

    It is -1 for those that W does not see: it says nothing of the value that a step finds in their place.
    """
    rayleigh = (Z * V).sum(-1)[..., None]
    length = xp.sqrt(((Z - rayleigh * V) ** 2).sum(-1))  # divided by the root: a quotient of squares could overflow
    seen = rayleigh > _rounding(xp, rayleigh)
    residual = length / xp.sqrt(_positive(xp, rayleigh)[..., 0])
    return xp.where(seen[..., 0], residual, xp.full_like(residual, -1)), rayleigh


def _rounding(xp, rayleigh):
    """The size, (..., 1, 1), below which Rayleigh quotients (..., b, 1) are rounding of the largest one."""
    largest = xp.amax(xp.where(rayleigh > 0, rayleigh, xp.zeros_like(rayleigh)), (-2, -1))
    return float(xp.finfo(rayleigh.dtype).eps) ** 2 * largest[..., None, None]


def _expand(xp, operator, V, P, variant):
    """New directions D, and the Gram matrices of [V, D] and of W [V, D]."""
    b = V.shape[-2]
    Y = operator.mul(V)
    Z = operator.tmul(Y)
    H = Z @ _t(xp, V)
    residual, rayleigh = _residual(xp, V, Z)
    R = Z - H @ V
    if variant == "m" and P is not None:
        # A quotient below the rounding of the largest one is rounding itself: R over it could be anything, Inf as well.
        seen = rayleigh > _rounding(xp, rayleigh)
        R = _PACE * R / _positive(xp, xp.where(seen, rayleigh, xp.zeros_like(rayleigh))) + P
    D = xp.concatenate([R, P], -2) if variant == "c" and P is not None else R
    D = D[..., : V.shape[-1] - b, :]  # no more directions than there is room for
    for _ in range(2):  # the first leaves rounding along V, which is all there is of D where V has everything
        D = _unit(xp, D)
        D = D - (D @ _t(xp, V)) @ V
    WD = operator.mul(D)
    M = _symmetric(xp, V @ _t(xp, V), D @ _t(xp, V), D @ _t(xp, D))
    return D, M, _symmetric(xp, H, D @ _t(xp, Z), operator.gram(WD)), residual


def _rayleigh_ritz(xp, M, H, b, old):
    """Solves H c = value M c for the b largest values, rows of C; M is the Gram matrix of the basis.

    The first `old` of the basis are orthonormal, and the others orthogonal to those, but perhaps not independent. Of
    the space of the others only what is well within it is taken: rounding in H is divided by the eigenvalues of M, by
    1000 at most.
    """
    norm = xp.sqrt(_positive(xp, (M * _eye(xp, M)).sum(-1))) if not old else xp.ones_like(M[..., 0])
    norms = norm[..., :, None] * norm[..., None, :]
    M, H = M / norms, H / norms
    lengths, U = _eigh_descending(xp, M[..., old:, old:], M.shape[-1] - old)
    taken = lengths > 1e-3
    U = (
        xp.where(taken[..., None], U, xp.zeros_like(U))
        / xp.sqrt(xp.where(taken, lengths, xp.ones_like(lengths)))[..., None]
    )
    eye = _eye(xp, M)
    T = eye + xp.zeros_like(M)
    T[..., old:, old:] = U
    last = eye + xp.zeros_like(M)  # what is not taken comes after all that is
    last[..., old:, old:] *= xp.where(taken, xp.zeros_like(lengths), xp.ones_like(lengths))[..., None]
    last[..., :old, :old] *= 0
    C = _eigh_descending(xp, T @ H @ _t(xp, T) - last, b)[1] @ T
    square = _positive(xp, (C * (C @ M)).sum(-1))
    return (C * (C @ H)).sum(-1) / square, C / (xp.sqrt(square)[..., None] * norm[..., None, :])


class _Operator:
    """Products of rows with W, taken upright (m >= n).

    On the host they are those of W itself, where that shows W V to be near 1. Elsewhere they are those of W scaled by a
    power of two, in halves: rows are divided by the first before the product, and it by the second. So neither the rows
    nor the product leave the range of the dtype, and W need not be copied. Matrices that hold NaN or Inf act as zero.
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
        self.plain: bool | None = None  # not known yet
        if not _on_host(xp, self.like):
            self.rescale()

    def rescale(self):
        """Goes over to scaled products."""
        xp = self.xp
        largest = [_largest_entry(xp, A) for A in self.matrices]
        self.finite, *self.halves = _halves(xp, xp.stack(largest) if self.is_list else largest[0])
        self.plain = False

    def unscaled(self, x):
        """Values of the scaled matrices, (..., b), as values of the matrices."""
        first, second = (half[..., None] for half in self.halves)
        return x * first * second

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
        if self.plain is None:
            Y = self._product(V, self.upside_down)
            largest = self.xp.amax(self.xp.abs(Y), (-2, -1))
            if bool(((largest > 2.0**-30) & (largest < 2.0**30)).all()):
                self.plain = True
                return Y
            self.rescale()
        return self._scaled(V, self.upside_down)

    def tmul(self, Y):
        """Returns (W^T Y^T)^T."""
        return self._scaled(Y, self.matrices)

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

    def _scaled(self, X, matrices):
        if self.plain:
            return self._product(X, matrices)
        first, second = (half[..., None, None] for half in self.halves)
        Y = self._product(X / first, matrices) / second
        return self.xp.where(self.finite[..., None, None], Y, self.xp.zeros_like(Y))


class _Stacks:
    """`_Operator` of a list of torch matrices on a device: each run of one shape is copied and multiplied at once.

    A launch for each matrix would take longer than the product.
    """

    plain = False  # to know would wait for the device

    def __init__(self, matrices: list, norms: torch.Tensor | None = None):
        runs = [list(run) for _, run in itertools.groupby(matrices, key=lambda A: A.shape)]
        dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        stacks = [torch.stack(run) if len(run) > 1 else run[0][None] for run in runs]
        stacks = [stack.detach().to(dtype) for stack in stacks]
        self.upright = [W if W.shape[1] >= W.shape[2] else W.mT for W in stacks]
        self.count, self.counts = len(matrices), [len(run) for run in runs]
        self.like = stacks[0][..., :1, :1]
        if norms is None:
            norms = torch.cat([_largest_entry(torch, stack) for stack in stacks])
        self.finite, *halves = _halves(torch, norms.double())  # a norm can be beyond float32 where entries are not
        self.halves = [half.to(dtype) for half in halves]

    def advance(self, V, P):  # noqa: ARG002
        """There is no fused step on a device."""

    def unscaled(self, x):
        """Values of the scaled matrices, (B, b), as values of the matrices."""
        return x * self.halves[0][:, None] * self.halves[1][:, None]

    def mul(self, V):
        """Returns (W V^T)^T of each run."""
        V = (V / self.halves[0][:, None, None]).split(self.counts)
        Y = [v @ W.mT for v, W in zip(V, self.upright, strict=True)]
        return [self._cleaned(*each) for each in zip(Y, *self._split(self.finite, self.halves[1]), strict=True)]

    def tmul(self, Y):
        """Returns (W^T Y^T)^T."""
        Y = [y / half[:, None, None] for y, half in zip(Y, *self._split(self.halves[0]), strict=True)]
        return self._cleaned(
            torch.cat([y @ W for y, W in zip(Y, self.upright, strict=True)]), self.finite, self.halves[1]
        )

    def gram(self, Y):
        """Returns Y Y^T."""
        return torch.cat([y @ y.mT for y in Y])

    def _split(self, *values):
        return [each.split(self.counts) for each in values]

    @staticmethod
    def _cleaned(Y, finite, half):
        return torch.where(finite[:, None, None], Y / half[:, None, None], 0.0)


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


def _largest_entry(xp, A):
    """The largest |a| of each matrix (..., m, n)."""
    return kernels.largest_entry(A)[..., 0, 0] if xp is torch else xp.amax(xp.abs(A), (-2, -1))


def _halves(xp, largest):
    """Which matrices are finite, and for each two powers of two, whose product is near its largest entry."""
    finite = xp.isfinite(largest)
    largest = xp.where(finite & (largest > 0), largest, xp.ones_like(largest))
    first = _power(xp, xp.sqrt(largest))
    return finite, first, _power(xp, largest / first)


def _power(xp, x):
    """The power of two at or below x > 0."""
    return kernels.power_of_two(x) if xp is torch else xp.ldexp(xp.ones_like(x), xp.frexp(x)[1] - 1)


def _t(xp, A):
    return xp.swapaxes(A, -1, -2)


def _positive(xp, x):
    """X where it is positive and not nearly subnormal, else 1: a divisor."""
    return xp.where(x > 64 * float(xp.finfo(x.dtype).tiny), x, xp.ones_like(x))


def _unit(xp, K):
    """Rows scaled to norm 1; those whose squares are nearly subnormal become zero, for their norm is not known."""
    squares = (K * K).sum(-1)[..., None]
    return xp.where(squares > 64 * float(xp.finfo(K.dtype).tiny), K, xp.zeros_like(K)) / xp.sqrt(_positive(xp, squares))


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


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    if min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(np.require(array, dtype, ["ALIGNED", "WRITEABLE"]))  # torch knows no others


def _eye(xp, M):
    return xp.eye(M.shape[-1], dtype=M.dtype, **_device(xp, M))


def _device(xp, array):
    return {"device": array.device} if xp is torch else {}


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


def _largest(xp, x, S):
    """The largest finite x / S, as a number: waits for a device."""
    relative = x / xp.where(S > 0, S, xp.ones_like(S))
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
