r"""Which precision a spectrum needs: one planner and one error model for C++, Triton, torch and row shards.

The eigenvalues of a Gram matrix G = W W^T err by dl = units * u * max(a, (4 mean(sigma^2))^2 / a), a = sigma_1^2,
in root mean square (flat spectra, those of long matrices, err by more of their largest eigenvalue than square ones),
u = eps / 2, so a singular value errs by about dl / (2 sigma), or by up to sqrt(dl) where it is lost in the noise.
What rounding did to all eigenvalues together (equal products, as those of signs or quantised weights, round alike) is
measured for each matrix and added (`sosd_fast.kernels.drift`).

n eigenvalues that lie closer together than rounding moves them are moved as those of a random matrix, by sqrt(n) of
what one of its rows is: dl >= sqrt(n) u x, where x is the norm of what is left of G at each step of a reduction,

    x = sqrt(16 |G|^2 + sum_k |T[k:, k:]|^2) / r      (T tridiagonal, Frobenius norms; LOG.md#clusters)

and, as far as values tell, min(r, 3 i + 11) + 16 times the i-th square is summed, i from 0. A lone value errs by up to
three times the root mean square, so

    sd_error = |errors at 3 dl|_2 / sum(S) + (5 + 0.1 sqrt(r)) u |SD|_2      a bound on |SD - SD_true|_2

and what values at the noise floor add to the sum: they err upwards only. A method stands up to 1e-6.

The C++ kernels know T of a Gram matrix in float32 that they reduce in one stage, and that dl is there at most
(3 + 32 / r) u x, a quarter of the above for a trained matrix, whose few large directions are taken out first. It counts
where the bound then meets the tolerance. A guess, by an earlier spectrum, takes eigenvalues for the norms
(kernels/cpu/error_model.hpp, LOG.md#reduction-noise).

The constants of SD are the same for all backends, whichever errs most; C++ is handed them. So the same spectrum gets
the same method on every path, but for C++, which may stay with a cheaper one. Only the bound on single values has a
constant of each backend. All were calibrated against float64 (LOG.md#gram-error, LOG.md#sd-error-float64,
LOG.md#one-planner) and are tested; they are no proof.
"""

# The extension has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateUsage=false

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, power_of_two

ALONE = 2**15 - 1  # elements that torch leaves to one thread
SD_TOLERANCE = 1e-6  # on |SD - SD_true|_2; published variations settle near 1e-5


class Method(StrEnum):
    """How a spectrum is computed, from the cheapest to the most accurate."""

    GRAM32 = "gram32"  # Gram matrix, float32
    BIDIAG32 = "bidiag32"  # no Gram matrix: bidiagonalisation, float32
    GRAM64 = "gram64"  # Gram matrix, float64
    BIDIAG64 = "bidiag64"  # no Gram matrix: bidiagonalisation, float64
    EXACT = "exact"  # torch.linalg.svdvals in the dtype of W, at least float32

    @property
    def squares(self) -> bool:
        """Whether it takes the square roots of the eigenvalues of a Gram matrix."""
        return self in (Method.GRAM32, Method.GRAM64)

    def dtype(self, given: torch.dtype) -> torch.dtype:
        """The dtype it computes in, for weights of dtype `given`."""
        if self is Method.EXACT:
            return torch.promote_types(given, torch.float32)
        return torch.float32 if self in (Method.GRAM32, Method.BIDIAG32) else torch.float64

    @classmethod
    def _missing_(cls, value: object) -> "Method | None":  # the name in records of version 0.1.0
        return cls.BIDIAG64 if value == "direct64" else None


LADDER = (Method.GRAM32, Method.GRAM64, Method.BIDIAG64)  # C++ takes BIDIAG32 before GRAM64


class ErrorModel(NamedTuple):
    """The constants of one backend, in units of u = eps / 2."""

    value_root: float  # of sqrt(r) in the bound on a value of a Gram matrix
    value_base: float = 32.0
    value_linear: float = 1 / 12  # of r, instead of the root where larger: equal terms drift in the reduction
    value_inner: float = 1 / 8  # of sqrt(K)
    value_float64: float = 4.0  # times as much in float64: bisection errs by up to 108 units where values repeat
    spread: float = 6.0  # over sqrt(r): root mean square error of a small eigenvalue of a Gram matrix
    spread_least: float = 0.2  # degenerate spectra, whose errors do not shrink with r
    spread_float64: float = 4.0  # times as much in float64 (LOG.md#float64-drift)
    reduced: float = 3.0  # of x above, by a reduction in C++
    reduced_small: float = 32.0  # over r, added to it: fewer values average less
    reduced_first: float = 16.0  # times that the whole Gram matrix counts, which is rounded when it is formed as well
    near: float = 4.0  # of u x, nearer than which neighbouring eigenvalues are moved together
    nearest: float = 1 / 4  # of the largest one, at least: bisection finds equal ones up to an eighth apart
    direct_root: float = 1 / 4  # of sqrt(r): root mean square error of a value found without a Gram matrix, 1 +
    direct_inner: float = 1 / 8  # of sqrt(K)
    direct_bidiag32: float = 0.2  # times as much; what rounding does to all values alike is in `common`
    safety: float = 3.0  # the largest error over its root mean square: 2.5 (LOG.md#one-planner)
    common: float = 5.0  # of |SD|: an error common to all values, 2, and those of flat spectra, 3.1 at r = 256
    common_root: float = 0.1  # of sqrt(r) |SD|: 4.4 at r = 1280
    tolerance: float = SD_TOLERANCE


MODELS = {
    Backend.CPP: ErrorModel(value_root=2.0),
    Backend.TRITON: ErrorModel(value_root=4.0),
    Backend.TORCH: ErrorModel(value_root=16.0),  # LAPACK's largest eigenvalues err by 93 units at 1024 x 1024
}
_SD = MODELS[Backend.TORCH]  # any: only value_root differs


def unit_of(dtype: torch.dtype) -> float:
    """The unit u = eps / 2 of rounding."""
    return torch.finfo(dtype).eps / 2


def _unit(dtype: torch.dtype | Tensor) -> float | Tensor:
    """The unit of a dtype; units (B,), one for each matrix, become a column (B, 1)."""
    return dtype[:, None] if isinstance(dtype, Tensor) else unit_of(dtype)


def _in_float64(u: float | Tensor, factor: float) -> float | Tensor:
    """A factor where u is that of float64, else 1."""
    if isinstance(u, Tensor):
        return 1 + (factor - 1) * (u < 2.0**-40).to(u.dtype)  # numbers alone would be float32
    return factor if u < 2.0**-40 else 1.0


def sd_error(
    S: Tensor, method: Method, inner: int | Tensor, *, dtype: torch.dtype | Tensor, drift: Tensor | None = None
) -> Tensor:
    """The bound on |SD - SD_true|_2 that records carry.

    Args:
        S: (B, r) float64, singular values, descending.
        method: that found them, or that is to find them.
        inner: the long side K; (B,) float64 where it differs, for methods that square.
        dtype: that the method computes in; for methods that square also (B,) float64, the units of their dtypes.
        drift: (B,) float64, by how much the eigenvalues of the Gram matrix were seen to move together, relative to
            their mean; None for no more than usual.

    Returns:
        (B,) float64; NaN for a spectrum of zeros, which has no distribution, or that is not finite.
    """
    r, u, model = S.shape[-1], _unit(dtype), _SD
    x = S / power_of_two(S[:, :1])
    squares, total = x.square(), x.sum(-1)
    if method.squares:
        dl = _moved(squares, u)
        if drift is not None:
            dl = torch.hypot(dl, drift[:, None] * squares.mean(-1, keepdim=True))
        error = torch.maximum(model.safety * _roots(x, dl), _roots(x, model.safety * dl))
        lost = squares < 4 * dl
    else:
        units = 1 + model.direct_root * math.sqrt(r) + model.direct_inner * math.sqrt(inner)
        units *= model.direct_bidiag32 if method is Method.BIDIAG32 else 1
        error = (model.safety * units * u * x[:, :1]).expand_as(x)
        lost = x < 4 / model.safety * error
    sd_norm = _norm(x) / total
    common = (model.common + model.common_root * math.sqrt(r)) * sd_norm * (u[:, 0] if isinstance(u, Tensor) else u)
    # Values at the noise floor err upwards only, so their errors add up in the sum instead of averaging out.
    return (_norm(error) + sd_norm * (error * lost).sum(-1)) / total + common


def _moved(squares: Tensor, u: float | Tensor) -> Tensor:
    """The root mean square error of eigenvalues (B, r) of Gram matrices, descending, from the noise about them."""
    r, model, a, mean = squares.shape[-1], _SD, squares[:, :1], squares.mean(-1, keepdim=True)
    apart = max(model.spread / math.sqrt(r), model.spread_least) * u * torch.maximum(a, 16 * mean.square() / a)
    apart = apart * _in_float64(u, model.spread_float64)
    i = torch.arange(r, dtype=squares.dtype, device=squares.device)
    steps = (3 * i + 11).clamp(max=r) + model.reduced_first
    noise = u * (squares.square() @ steps)[:, None].sqrt() / r
    # Eigenvalues whose neighbours are nearer than noise moves them are moved as those of a random matrix.
    new = squares[:, :-1] - squares[:, 1:] > torch.maximum(model.near * noise, model.nearest * u * a)
    none = new.new_ones(len(new), 1)
    at = torch.arange(r, device=squares.device).expand_as(squares)
    first = torch.where(torch.cat([none, new], -1), at, 0).cummax(-1).values
    last = torch.where(torch.cat([new, none], -1), at, r).flip(-1).cummin(-1).values.flip(-1)
    return torch.maximum(apart, noise * (last - first + 1).to(noise.dtype).sqrt())


def lapack_error(S: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How far values of LAPACK (B, r) err beyond rounding: any of them, (B, 1), and of |SD - SD_true|_2, (B,).

    Where values lie close together a few of them err by up to 118 u S[0] (LOG.md#nearly-equal-values).
    """
    most = 128 * torch.finfo(dtype).eps / 2 * S[:, :1]
    return most, 2 * most[:, 0] / S.sum(-1)


def value_bound(
    S: Tensor, method: Method, inner: int | Tensor, backend: Backend, *, dtype: torch.dtype | Tensor
) -> Tensor:
    """The bound on |S - S_true| of each value, (B, r); arguments as of `sd_error`."""
    r, u, model = S.shape[-1], _unit(dtype), MODELS[backend]
    top = S[:, :1]
    if not method.squares:
        return ((model.value_base + 8 * math.sqrt(r) + math.sqrt(inner)) * u * top).expand_as(S)
    units = model.value_base + max(model.value_root * math.sqrt(r), model.value_linear * r)
    root = inner.sqrt()[:, None] if isinstance(inner, Tensor) else math.sqrt(inner)
    units = (units + model.value_inner * root) * _in_float64(u, model.value_float64)
    return _roots(S, units * u * top.square())


def finished(
    S: Tensor,
    method: Method,
    inner: int | Tensor,
    backend: Backend,
    dtype: torch.dtype | Tensor,
    drift: Tensor | None,
    scale: Tensor,
    finite: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """S, bound and sd_error of matrices as they are, from the values S (B, r) of scaled ones; NaN where not finite.

    Where `dtype` holds units, as in `sd_error`, `method` may be any method that squares.
    """
    bound = value_bound(S, method, inner, backend, dtype=dtype)
    error = sd_error(S, method, inner, dtype=dtype, drift=drift)
    if not method.squares:
        assert not isinstance(dtype, Tensor)
        more, more_sd = lapack_error(S, dtype=dtype)
        bound, error = bound + more, error + more_sd
    values, bound = (torch.where(finite[:, None], t / scale[:, None], torch.nan) for t in (S, bound))
    return values, bound, torch.where(finite, error, torch.nan)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


def _roots(S: Tensor, dl: Tensor) -> Tensor:
    """How far S may be off, where S^2 may be off by dl."""
    squares = S.square()
    upwards = dl / ((squares + dl).sqrt() + S)
    downwards = torch.minimum(squares, dl) / (S + (squares - dl).clamp(min=0).sqrt())
    return torch.maximum(upwards.nan_to_num(0.0), downwards.nan_to_num(0.0))  # 0/0 where the value is zero


def choose(previous: Tensor | None, count: int, dtype: torch.dtype, *, on_host: bool) -> list[Method]:
    """Chooses the methods that matrices start from.

    Args:
        previous: (B, r) float64, spectra of the same matrices a little earlier, or None. Read on the host.
        count: B.
        dtype: of the matrices; what comes in float64 is expected in float64.
        on_host: whether `climb` may redo them. Where that would have to wait for a device, a matrix without an earlier
            spectrum starts from float64.

    Returns:
        For each the cheapest method whose sd_error on the earlier spectrum meets the tolerance.
    """
    lowest = Method.GRAM64 if dtype == torch.float64 else Method.GRAM32
    chosen = [lowest if on_host else Method.GRAM64] * count
    if previous is None:
        return chosen
    previous = previous.cpu()
    largest: list[float] = previous[:, 0].tolist()
    todo = [i for i, value in enumerate(largest) if value > 0]
    for method in LADDER[LADDER.index(lowest) :]:
        errors = [SD_TOLERANCE] * len(todo)
        if method != LADDER[-1]:
            some = previous if len(todo) == len(previous) else previous[todo]
            errors = _foretold(some, method, method.dtype(dtype))
        for i, error in zip(todo, errors, strict=True):
            if error <= SD_TOLERANCE:
                chosen[i] = method
        todo = [i for i, error in zip(todo, errors, strict=True) if SD_TOLERANCE < error < math.inf]
    return chosen


def _foretold(S: Tensor, method: Method, dtype: torch.dtype) -> list[float]:
    """`sd_error` on the host, by the function of C++ where it is there: a third of the time, between two steps."""
    if kernels._C is not None:
        found: list[float] = kernels._C.sd_error(S.contiguous(), method.value, 0, 0.0, math.inf, MODELS[Backend.CPP])
        return found
    # some at a time: torch gives more elements to several threads, which take milliseconds to wake between two steps
    some = max(1, ALONE // S.shape[1])
    parts = (S[first : first + some] for first in range(0, len(S), some))
    return [float(e) for part in parts for e in sd_error(part, method, 0, dtype=dtype)]


def climb(
    compute: Callable[[dict[Method, list[int]]], Sequence[float]], methods: Sequence[Method]
) -> tuple[Method, ...]:
    """Measures matrices, and again by the next method those whose sd_error is above the tolerance.

    Args:
        compute: measures some of the matrices, given by their positions, each by its method, and returns the sd_error
            of every matrix. NaN stands.
        methods: that they start from.

    Returns:
        The methods that the results are from.
    """
    methods = list(methods)
    todo: list[int] = [*range(len(methods))]
    while todo:
        errors = compute({m: [i for i in todo if methods[i] == m] for m in sorted({methods[i] for i in todo})})
        todo = [i for i in todo if errors[i] > SD_TOLERANCE and methods[i] in LADDER[:-1]]
        for i in todo:
            methods[i] = LADDER[LADDER.index(methods[i]) + 1]
    return tuple(methods)
