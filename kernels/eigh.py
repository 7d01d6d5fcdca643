r"""Eigenvalues and eigenvectors of many small symmetric matrices, by one-sided Jacobi on a positive definite shift.

With A scaled so that |A| <= 1, the rows of X = A + 1.25 I are rotated in pairs until they are orthogonal:

    x, y <- c x - s y, s x + c y     with t = s / c the smaller root of t^2 + 2 zeta t = 1, zeta = (y y - x x) / (2 x y)

Then x = (lambda + 1.25) v. All norms lie in [0.25, 2.25], so v = x / |x| are orthogonal to rounding, degenerate or not,
with no other matrix to carry along; lambda = v A v. A round rotates n / 2 disjoint pairs at once, by the circle method,
and a sweep of n - 1 rounds meets every pair. Rows are read and written whole, with one barrier a round. A nearly
diagonal matrix takes 3 or 4 sweeps, that of a warm subspace 7, one with values in clusters up to 12 (n = 80, float32).

torch.linalg.eigh waits for the device, to check its result, and loops over matrices on torch < 2.12.

Source: Hestenes (1958); Luk & Park, on parallel Jacobi orderings (1989); Veselic & Hari, one-sided on positive definite
matrices (1989).
"""

import contextlib
import functools
import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton
from sosd_fast.kernels.launch import launch

LARGEST = 512  # rows; a program holds a few numbers of each
SWEEPS = 15  # at most, where NaN or rounding keeps the test from holding
# Of the cosine of two rows, in units of eps: what rounding leaves of a product of 80 to 200 terms.
TOLERANCE = {torch.float32: 4 * 2.0**-24, torch.float64: 4 * 2.0**-53}
BLOCK = 16  # columns: four threads to a row in float32, so that sums take two shuffles
# Rotated at once, eight to a warp. A tile of fewer than 16 bytes a thread would be held by several warps, each of which
# could read rows that another has turned already.
PAIRS = 64
ROWS = 64
WARPS = 8
KEPT = 768  # bytes of a row that registers hold in a round; more would spill
WIDE = 32  # columns of a product
SHIFT = 1.25  # times a bound on |A|: less makes rows shorter than the rounding of others, more costs accuracy

if triton is not None:
    from sosd_fast.kernels.rounded import divide, sqrt
    from sosd_fast.kernels.split import dot

    @triton.jit
    def _inverse_sqrt(x):
        """In float32 an approximation, one instruction: what is off is corrected once, for both of its uses."""
        return tl.rsqrt(x) if x.dtype == tl.float32 else 1.0 / tl.sqrt(x)

    @triton.jit
    def _eigh_kernel(
        A_ptr,  # (B, n, n) contiguous
        X_ptr,  # (B, n, COLUMNS), workspace
        unsorted_ptr,  # (B, n), workspace
        values_ptr,  # (B, n), descending
        vectors_ptr,  # (B, n, n), rows
        n,
        sweeps,
        tolerance,
        COLUMNS: tl.constexpr,  # n rounded up to whole blocks
        KEEP: tl.constexpr,  # whether a round reads rows only once: registers hold them
        BLOCK: tl.constexpr,
        PAIRS: tl.constexpr,
        ROWS: tl.constexpr,
        SHIFT: tl.constexpr,
        WIDE: tl.constexpr,
        STEP: tl.constexpr,  # terms of a product at a time; of float64 1
        PRECISION: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        dtype = A_ptr.dtype.element_ty
        A_ptr += matrix * n * n
        X_ptr += matrix * n * COLUMNS
        unsorted_ptr += matrix * n
        values_ptr += matrix * n
        vectors_ptr += matrix * n * n
        lanes = tl.arange(0, BLOCK)
        strip = tl.arange(0, ROWS)
        pairs = tl.arange(0, PAIRS)

        # a bound on |A|_2: the smaller of the Frobenius norm and the largest sum of a row
        squares = tl.zeros([ROWS, BLOCK], tl.float64)
        total = tl.zeros([ROWS], tl.float64)
        largest = tl.zeros([ROWS], tl.float64)
        for i0 in range(0, n, ROWS):
            i = i0 + strip
            sums = tl.zeros([ROWS, BLOCK], tl.float64)
            for j0 in range(0, COLUMNS, BLOCK):
                j = j0 + lanes
                inside = (i[:, None] < n) & (j[None, :] < n)
                a = tl.abs(tl.load(A_ptr + i[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float64))
                sums += a
                squares += a * a
            row = tl.sum(sums, axis=1)
            total += row
            largest = tl.maximum(largest, row)
        finite = tl.sum(total, axis=0) * 0.0  # NaN if A holds NaN or Inf
        norm = tl.minimum(tl.max(largest, axis=0), tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0)))
        # the power of two above norm, by its exponent bits
        power = (norm.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True) * 2.0
        power = tl.maximum(power, 1e-36 if dtype == tl.float32 else 1e-290)
        to_unit = 1.0 / power + finite
        for i0 in range(0, n, ROWS):
            i = i0 + strip
            for j0 in range(0, COLUMNS, BLOCK):
                j = j0 + lanes
                inside = (i[:, None] < n) & (j[None, :] < n)
                a = tl.load(A_ptr + i[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float64) * to_unit
                a = tl.where(i[:, None] == j[None, :], a + SHIFT, a)
                a = tl.where(j[None, :] < n, a, 0.0).to(dtype)
                tl.store(X_ptr + i[:, None] * COLUMNS + j[None, :], a, mask=i[:, None] < n)
        tl.debug_barrier()

        turns = n - 1 + n % 2  # one row stands still, the others go round; an odd number of rows leaves one out
        half = (turns + 1) // 2
        sweep = 0
        left = True
        while left:
            worst = tl.zeros([PAIRS], dtype)  # cosine, squared
            widest = tl.zeros([PAIRS], dtype)  # sine of an angle, at most 45 degrees
            for turn in range(turns):
                for i0 in range(0, half, PAIRS):
                    i = i0 + pairs
                    p = turn + i
                    p = tl.where(i == 0, turns, tl.where(p < turns, p, p - turns))
                    q = tl.where(turn < i, turn + turns - i, turn - i)
                    live = (i < half) & (p < n)
                    x_ptr = X_ptr + p[:, None] * COLUMNS
                    y_ptr = X_ptr + q[:, None] * COLUMNS
                    xx = tl.zeros([PAIRS, BLOCK], dtype)
                    yy = tl.zeros([PAIRS, BLOCK], dtype)
                    xy = tl.zeros([PAIRS, BLOCK], dtype)
                    kept = ()
                    for j0 in tl.static_range(0, COLUMNS, BLOCK):
                        j = j0 + lanes
                        x = tl.load(x_ptr + j[None, :], mask=live[:, None], other=0.0)
                        y = tl.load(y_ptr + j[None, :], mask=live[:, None], other=0.0)
                        xx += x * x
                        yy += y * y
                        xy += x * y
                        if KEEP:
                            kept += (x, y)
                    a = tl.sum(xx, axis=1)
                    b = tl.sum(yy, axis=1)
                    g = tl.sum(xy, axis=1)
                    squared = g * g / tl.where(live, a * b, 1.0)  # cosine
                    turned = g * g > tolerance * tolerance * a * b
                    # Of twice the angle the cosine is |d| / root and the sine e / root.
                    d = b - a
                    e = tl.where(d < 0, -2.0, 2.0).to(dtype) * g
                    root = _inverse_sqrt(tl.where(turned, d * d + e * e, 1.0))
                    c = tl.where(turned, 0.5 + 0.5 * tl.abs(d) * root, 1.0)  # squared
                    inverse = _inverse_sqrt(c)
                    c *= inverse
                    s = tl.where(turned, 0.5 * e * root * inverse, 0.0)
                    # The angle may be a little off: approximations do. The rotation must be one to rounding.
                    off = 0.5 * tl.fma(c, c, tl.fma(s, s, -1.0))
                    c -= off * c
                    s -= off * s
                    for j0 in tl.static_range(0, COLUMNS, BLOCK):
                        j = j0 + lanes
                        if KEEP:
                            x = kept[j0 // BLOCK * 2]
                            y = kept[j0 // BLOCK * 2 + 1]
                        else:
                            x = tl.load(x_ptr + j[None, :], mask=live[:, None], other=0.0)
                            y = tl.load(y_ptr + j[None, :], mask=live[:, None], other=0.0)
                        tl.store(x_ptr + j[None, :], c[:, None] * x - s[:, None] * y, mask=live[:, None])
                        tl.store(y_ptr + j[None, :], s[:, None] * x + c[:, None] * y, mask=live[:, None])
                    worst = tl.maximum(worst, squared)
                    widest = tl.maximum(widest, tl.abs(s))
                tl.debug_barrier()
            sweep += 1
            # what a sweep leaves is at most about n times the product of its widest angle and its largest cosine
            greatest = tl.sqrt(tl.max(worst, axis=0))
            leaves = tl.minimum(greatest, 1.5 * n * tl.max(widest, axis=0) * greatest)
            left = (leaves > tolerance) & (sweep < sweeps)

        # lambda = v A v has an error of a few eps, where |x| - SHIFT would have that of all rotations
        wide = tl.arange(0, WIDE)
        steps = tl.arange(0, STEP)
        for i0 in range(0, n, ROWS):
            i = i0 + strip
            squares_x = tl.zeros([ROWS, WIDE], dtype)
            quotients = tl.zeros([ROWS, WIDE], dtype)
            for j0 in range(0, n, WIDE):
                j = j0 + wide
                inside = (i[:, None] < n) & (j[None, :] < n)
                x = tl.load(X_ptr + i[:, None] * COLUMNS + j[None, :], mask=inside, other=0.0)
                image = tl.zeros([ROWS, WIDE], dtype)
                for k0 in range(0, n, STEP):
                    k = k0 + steps
                    known = (k[:, None] < n) & (j[None, :] < n)
                    a = tl.load(A_ptr + k[:, None] * n + j[None, :], mask=known, other=0.0)
                    a = (a.to(tl.float64) * to_unit).to(dtype)
                    filled = (i[:, None] < n) & (k[None, :] < n)
                    x_k = tl.load(X_ptr + i[:, None] * COLUMNS + k[None, :], mask=filled, other=0.0)
                    if STEP == 1:
                        image += x_k * a
                    else:
                        image += dot(x_k, a, PRECISION)
                squares_x += x * x
                quotients += x * image
            square = tl.sum(squares_x, axis=1)
            quotient = tl.sum(quotients, axis=1) / tl.where(i < n, square, 1.0)
            tl.store(unsorted_ptr + i, (quotient.to(tl.float64) * power).to(dtype), mask=i < n)
        tl.debug_barrier()

        for i0 in range(0, n, ROWS):
            i = i0 + strip
            value = tl.load(unsorted_ptr + i, mask=i < n, other=0.0)
            key = tl.where(value == value, value, -float("inf"))
            before = tl.zeros([ROWS, BLOCK], tl.int32)
            squares_x = tl.zeros([ROWS, BLOCK], dtype)
            for j0 in range(0, COLUMNS, BLOCK):
                j = j0 + lanes
                other = tl.load(unsorted_ptr + j, mask=j < n, other=0.0)
                other = tl.where(other == other, other, -float("inf"))[None, :]
                first = (other > key[:, None]) | ((other == key[:, None]) & (j[None, :] < i[:, None]))
                before += (first & (j[None, :] < n)).to(tl.int32)
                x = tl.load(X_ptr + i[:, None] * COLUMNS + j[None, :], mask=i[:, None] < n, other=0.0)
                squares_x += x * x
            place = tl.sum(before, axis=1)
            tl.store(values_ptr + place, value, mask=i < n)
            norm_x = sqrt(tl.where(i < n, tl.sum(squares_x, axis=1), 1.0))
            for j0 in range(0, COLUMNS, BLOCK):
                j = j0 + lanes
                inside = (i[:, None] < n) & (j[None, :] < n)
                x = tl.load(X_ptr + i[:, None] * COLUMNS + j[None, :], mask=inside, other=0.0)
                v = divide(x, tl.zeros([ROWS, BLOCK], dtype) + norm_x[:, None])
                tl.store(vectors_ptr + place[:, None] * n + j[None, :], v, mask=inside)


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Computes all eigenvalues and eigenvectors of symmetric matrices; on a GPU nothing waits for it.

    Args:
        A: (..., n, n), float32 or float64, symmetric: both triangles are read. Not modified.

    Returns:
        values (..., n), descending, and vectors (..., n, n), orthonormal, as rows in that order.

    Accuracy:
        Whatever the spectrum, |A v - lambda v| stays below 4 n eps |A|, errors of lambda below (4 + n) eps |A| and
        entries of V V^T - I below 16 eps (tests; eps = 2^-24 or 2^-53). A matrix that holds NaN or Inf gives NaN and
        leaves the others as they are.

    Raises:
        ValueError: another dtype, no square matrix.
    """
    if not isinstance(A, Tensor) or A.dtype not in TOLERANCE or A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        got = f"{tuple(A.shape)} {A.dtype}" if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(
            f"eigh: expected square float32 or float64 matrices (..., n, n), got A={got}. Convert it with .float()."
        )
    n = A.shape[-1]
    if not A.numel() or n > LARGEST or kernels.backend_of("eigh", A) is not Backend.TRITON:
        return eigh_ref(A)
    work = A.detach().reshape(-1, n, n).contiguous()
    B, columns = work.shape[0], -(-n // BLOCK) * BLOCK
    values, vectors = work.new_empty(B, n), work.new_empty(B, n, n)
    with torch.cuda.device_of(work):
        launch(
            _eigh_kernel,
            (B,),
            A_ptr=work,
            X_ptr=work.new_empty(B, n, columns),
            unsorted_ptr=work.new_empty(B, n),
            values_ptr=values,
            vectors_ptr=vectors,
            n=n,
            sweeps=SWEEPS,
            tolerance=TOLERANCE[A.dtype],
            COLUMNS=columns,
            KEEP=columns * A.element_size() <= KEPT,
            BLOCK=BLOCK,
            PAIRS=PAIRS,
            ROWS=ROWS,
            SHIFT=SHIFT,
            WIDE=WIDE,
            STEP=WIDE if A.dtype == torch.float32 else 1,
            PRECISION=kernels.precision_of_products(),
            **kernels.options_of({"num_warps": WARPS, "maxnreg": 255}),
        )
    return values.reshape(A.shape[:-1]), vectors.reshape(A.shape)


def eigh_ref(A: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` in plain torch. Nothing is raised: NaN stands for a matrix that is not finite."""
    A = A.detach()
    finite = A.isfinite().all(-1).all(-1)[..., None]
    A = torch.where(finite[..., None], A, 0.0)
    try:
        values, vectors = library("eigh", A)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):
        parts = [_unconverged(each) for each in A.reshape(-1, *A.shape[-2:])]
        values, vectors = (torch.stack(part) for part in zip(*parts, strict=True))
        values, vectors = values.reshape(A.shape[:-1]), vectors.reshape(A.shape)
    values, vectors = values.flip(-1), vectors.mT.flip(-2)
    return torch.where(finite, values, math.nan), torch.where(finite[..., None], vectors, math.nan)


def _unconverged(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of one matrix of a batch in which QR iteration did not converge for some."""
    n = A.shape[-1]
    bound = 2 * torch.linalg.vector_norm(A.double())
    for attempt in (
        lambda: torch.linalg.eigh(A),
        lambda: torch.linalg.eigh(A.double()),
        # another algorithm, of a positive definite matrix with the same vectors
        lambda: (lambda U, S: (S.flip(-1) - bound, U.flip(-1)))(
            *torch.linalg.svd(A.double() + bound * torch.eye(n, dtype=torch.float64, device=A.device))[:2]
        ),
    ):
        with contextlib.suppress(torch.linalg.LinAlgError):
            values, vectors = attempt()
            return values.to(A.dtype), vectors.to(A.dtype)
    return A.new_full((n,), math.nan), torch.full_like(A, math.nan)


def library(name: str, A: Tensor) -> Any:
    """`torch.linalg.eigh` or `eigvalsh` of a batch, by CuPy on CUDA where torch would loop over it (before 2.12).

    CuPy's batches are done by Jacobi's method, in minutes where n is some thousands: those torch takes one by one.
    """
    if A.is_cuda and A.ndim > 2 and A.shape[-1] <= LARGEST and torch.__version__ < (2, 12):  # pyright: ignore[reportOperatorIssue]
        cupy = _cupy()
        if cupy is not None:
            with (
                cupy.cuda.Device(A.device.index),
                cupy.cuda.ExternalStream(torch.cuda.current_stream(A.device).cuda_stream),
            ):
                found = getattr(cupy.linalg, name)(cupy.from_dlpack(A.contiguous()))
                return torch.from_dlpack(found) if name == "eigvalsh" else tuple(map(torch.from_dlpack, found))
        _warn_loop()
    return getattr(torch.linalg, name)(A)


@functools.cache
def _cupy():
    try:
        return importlib.import_module("cupy")
    except ImportError:  # also one that was built for another CUDA
        return None


@functools.cache
def _warn_loop():
    kernels.log.warning(
        "sosd_fast: this torch takes the eigenvalues of CUDA matrices one by one. Install torch >= 2.12, or CuPy with "
        "`pip install cupy-cuda12x` (13x for CUDA 13), for all at once."
    )
