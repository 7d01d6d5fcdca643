r"""One step towards the leading singular values of many matrices, in few launches.

With Z = V W^T W, H = Z V^T and rho = diag(H), new directions are D = pace (Z - H V) / rho + P. With D' of the rows of D
without their part along V, Rayleigh-Ritz of W^T W on span[V, D'] gives the next V; its part along D' is the next P.
What comes between the products with W (thin.py) and the eigenproblems (eigh.py) is done here: as 160 operations of
torch, of 2 to 3 us each, it took as long as the products (LOG.md#topk-cuda-expected).

Programs share the columns of a matrix and leave parts of sums, as of the small products (small.py).
"""

# pyright: reportPossiblyUnboundVariable=false
# Kernels are there where Triton is, which whoever calls has asked.

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import thin, tl, triton
from sosd_fast.kernels.eigh import eigh
from sosd_fast.kernels.launch import launch

SPAN, PARTS = 128, 8  # columns of a program, at least; programs to a matrix, at most
# Columns at a time, and rows in a product: tensor cores' sums of these are added by rounding. Four programs, of the
# last two, are on an H100's multiprocessor at once, and no register spills.
BLOCK, STEP = 16, 16
WARPS = 4
# Of the squared norm 1 of a row of D, what must be left without V and the rows before it: rounding is divided by it.
LEAST = 1e-3
SMALLEST = 64 * torch.finfo(torch.float32).smallest_normal  # a square that is nearly subnormal has few digits
SUMS = 6  # V V^T, P P^T, H, D V^T, D D^T, D Z^T

if triton is not None:
    from sosd_fast.kernels.rounded import divide, sqrt
    from sosd_fast.kernels.small import (
        _basis_kernel,
        _cholesky_kernel,
        _inner_kernel,
        _put,
        _tile,
        _times,
        _total_kernel,
    )
    from sosd_fast.kernels.split import dot

    @triton.jit
    def _mend_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        start_ptr,  # (b, n), in the place of rows that are not orthonormal
        norms_ptr,  # (B,) float64; NaN or Inf of a matrix that is not finite
        sums_ptr,  # (B, SUMS, b, b)
        old_V_ptr,  # (B, b, n), out
        old_P_ptr,  # (B, b, n), out
        scale_ptr,  # (B, 4), out: two powers of two, 0 where the matrix acts as zero
        n,
        b,
        span,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        old_V_ptr += matrix * b * n
        old_P_ptr += matrix * b * n
        sums_ptr += matrix * SUMS * b * b
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        norm = tl.load(norms_ptr + matrix)
        finite = tl.abs(norm) < float("inf")
        if part == 0:
            # the product of the two is near the norm: each is in the range of float32, the norm need not be
            largest = tl.where(finite & (norm > 0), norm, 1.0)
            one = (tl.sqrt(largest).to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
            two = ((largest / one).to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
            tl.store(scale_ptr + matrix * 4, (1.0 / one).to(tl.float32))
            tl.store(scale_ptr + matrix * 4 + 1, (1.0 / two).to(tl.float32))
            tl.store(scale_ptr + matrix * 4 + 2, tl.where(finite, 1.0, 0.0))
        off = _tile(sums_ptr, b, lanes, lanes, b, b)
        off -= tl.where((lanes[:, None] == lanes[None, :]) & (lanes[:, None] < b), 1.0, 0.0)
        squares = tl.load(sums_ptr + b * b + lanes * (b + 1), mask=lanes < b, other=0.0)
        wrong = tl.sum(tl.where(tl.abs(off) < 0.01, 0, 1), axis=1) + tl.where(squares < 4, 0, 1)  # of NaN too
        sound = tl.sum(wrong, axis=0) == 0
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            p = _tile(P_ptr + k, n, lanes, columns, b, end - k)
            start = _tile(start_ptr + k, n, lanes, columns, b, end - k)
            # A step of Newton's towards orthonormal rows, or rounding would stay. What is not finite keeps its rows.
            v -= tl.where(finite, 0.5, 0.0) * dot(off, v, PRECISION)
            _put(old_V_ptr + k, n, lanes, columns, b, end - k, tl.where(sound, v, start))
            _put(old_P_ptr + k, n, lanes, columns, b, end - k, tl.where(sound, p, 0.0))

    @triton.jit
    def _seen(H_ptr, lanes, b, SMALLEST: tl.constexpr):
        """Quotients, whether W sees their direction, and divisors in their place.

        A quotient below the rounding of the largest one is rounding itself, and a residual over it could be anything.
        """
        rho = tl.load(H_ptr + lanes * (b + 1), mask=lanes < b, other=0.0)
        seen = rho > 1.4210854715202004e-14 * tl.max(tl.where(rho > 0, rho, 0.0), axis=0)  # eps^2
        return rho, seen, tl.where(seen & (rho > SMALLEST), rho, 1.0)

    @triton.jit(do_not_specialize=["parts"])
    def _directions_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        Z_ptr,  # (B, b, n)
        D_ptr,  # (B, b, n), out
        sums_ptr,  # (B, SUMS, b, b)
        squares_ptr,  # (B, parts, b), out: of residuals
        n,
        b,
        span,
        parts,
        pace,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        Z_ptr += matrix * b * n
        D_ptr += matrix * b * n
        sums_ptr += (matrix * SUMS + 2) * b * b
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        rho, _, divisor = _seen(sums_ptr, lanes, b, SMALLEST)
        H = _tile(sums_ptr, b, lanes, lanes, b, b)
        squares = tl.zeros([WIDTH], tl.float32)
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            z = _tile(Z_ptr + k, n, lanes, columns, b, end - k)
            rest = z - rho[:, None] * v
            squares += tl.sum(rest * rest, axis=1)
            d = (pace / divisor)[:, None] * (z - dot(H, v, PRECISION))
            d += _tile(P_ptr + k, n, lanes, columns, b, end - k)
            _put(D_ptr + k, n, lanes, columns, b, end - k, d)
        tl.store(squares_ptr + (matrix * parts + part) * b + lanes, squares, mask=lanes < b)

    @triton.jit(do_not_specialize=["parts"])
    def _values_kernel(
        values_ptr,  # (B, 2 b), descending
        vectors_ptr,  # (B, 2 b, 2 b), rows, of which the first b count
        change_ptr,  # (B, 5, b, b): K and L; out: what V is multiplied with, and D and V for the next P
        sums_ptr,  # (B, SUMS, b, b)
        squares_ptr,  # (B, parts, b)
        scale_ptr,  # (B, 4)
        S_ptr,  # (B, b), out
        residual_ptr,  # (B, b), out
        b,
        parts,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        STEP: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        vectors_ptr += matrix * 4 * b * b
        change_ptr += matrix * 5 * b * b
        lanes = tl.arange(0, WIDTH)
        finite = tl.load(scale_ptr + matrix * 4 + 2) > 0
        one = tl.load(scale_ptr + matrix * 4)
        two = tl.load(scale_ptr + matrix * 4 + 1)
        squares = tl.zeros([WIDTH], tl.float32)
        for part in range(parts):
            squares += tl.load(squares_ptr + (matrix * parts + part) * b + lanes, mask=lanes < b, other=0.0)
        _, seen, divisor = _seen(sums_ptr + (matrix * SUMS + 2) * b * b, lanes, b, SMALLEST)
        S = tl.load(values_ptr + matrix * 2 * b + lanes, mask=lanes < b, other=0.0)
        S = sqrt(tl.where(S > 0, S, 0.0))
        # of an unseen direction it says nothing of what took its place
        residual = tl.where(seen, divide(sqrt(squares), sqrt(divisor)), S)
        nan = float("nan")
        tl.store(S_ptr + matrix * b + lanes, tl.where(finite, S / one / two, nan), mask=lanes < b)
        tl.store(residual_ptr + matrix * b + lanes, tl.where(finite, residual / one / two, nan), mask=lanes < b)

        E_ptr = vectors_ptr + b
        new = _times(E_ptr, 2 * b, change_ptr, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(change_ptr + 3 * b * b, b, lanes, lanes, b, b, new)
        old = _times(E_ptr, 2 * b, change_ptr + b * b, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(change_ptr + 4 * b * b, b, lanes, lanes, b, b, -old)
        _put(change_ptr + 2 * b * b, b, lanes, lanes, b, b, _tile(vectors_ptr, 2 * b, lanes, lanes, b, b))

    @triton.jit
    def _advance_kernel(
        change_ptr,  # (B, 5, b, b)
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        D_ptr,  # (B, b, n)
        scale_ptr,  # (B, 4)
        next_V_ptr,  # (B, b, n), out
        next_P_ptr,  # (B, b, n), out
        n,
        b,
        span,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        STEP: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        change_ptr += (matrix * 5 + 2) * b * b
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        D_ptr += matrix * b * n
        next_V_ptr += matrix * b * n
        next_P_ptr += matrix * b * n
        finite = tl.load(scale_ptr + matrix * 4 + 2) > 0
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        end = tl.minimum(n, part * span + span)
        rows = tl.arange(0, STEP)
        for k in range(part * span, end, BLOCK):
            after = tl.zeros([WIDTH, BLOCK], tl.float32)
            change = tl.zeros([WIDTH, BLOCK], tl.float32)
            for i in range(0, b, STEP):  # as in `_times`, of which three would take three times as long
                v = _tile(V_ptr + i * n + k, n, rows, columns, b - i, end - k)
                d = _tile(D_ptr + i * n + k, n, rows, columns, b - i, end - k)
                after += dot(_tile(change_ptr + i, b, lanes, rows, b, b - i), v, PRECISION)
                change += dot(_tile(change_ptr + b * b + i, b, lanes, rows, b, b - i), d, PRECISION)
                change += dot(_tile(change_ptr + 2 * b * b + i, b, lanes, rows, b, b - i), v, PRECISION)
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            p = _tile(P_ptr + k, n, lanes, columns, b, end - k)
            _put(next_V_ptr + k, n, lanes, columns, b, end - k, tl.where(finite, after + change, v))
            _put(next_P_ptr + k, n, lanes, columns, b, end - k, tl.where(finite, change, p))


def leading_step(
    matrices: list[Tensor], V: Tensor, P: Tensor, start: Tensor, norms: Tensor, pace: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes one step towards the leading singular values; nothing waits for the GPU.

    Args:
        matrices: B tensors (m_i, n_i) on a GPU, of `thin.DTYPES`, alike, with one short side n. Not modified.
        V: (B, b, n) float32, directions as rows, b at most `thin.MOST`; those of a matrix that are not orthonormal, or
            whose last change is longer than 2, are replaced by `start`, and that change by zero. Not modified.
        P: (B, b, n) float32, their last change. Not modified.
        start: (b, n) float32, orthonormal rows.
        norms: (B,), Frobenius norms, or anything near; NaN or Inf of a matrix that is not finite.
        pace: weight of the residual against P.

    Returns:
        S (B, b), descending, residual (B, b), and V and P for the next step, float32. NaN of a matrix that is not
        finite, which keeps V and P.

    Accuracy:
        As `topk_svdvals`.
    """
    B, b, n = V.shape
    span = -(-n // (PARTS * SPAN)) * SPAN
    parts = -(-n // span)
    V, P, start, norms = V.contiguous(), P.contiguous(), start.contiguous(), norms.double().contiguous()
    old_V, old_P, D, next_V, next_P = (torch.empty_like(V) for _ in range(5))
    sums = V.new_empty(B, SUMS, b, b)
    pivots, S, residual = (V.new_empty(B, b) for _ in range(3))
    of_parts, squares = V.new_empty(B, parts, SUMS, b, b), V.new_empty(B, parts, b)
    scale, change, A = V.new_empty(B, 4), V.new_empty(B, 5, b, b), V.new_empty(B, 2 * b, 2 * b)
    width = {"b": b, "WIDTH": max(16, 1 << (b - 1).bit_length()), "PRECISION": kernels.precision_of_products()}
    wide = width | {"n": n, "span": span, "BLOCK": BLOCK, "num_warps": WARPS, "num_stages": 1}
    small = width | {"sums_ptr": sums, "SUMS": SUMS, "SMALLEST": SMALLEST}
    subspace = {"V_ptr": old_V, "P_ptr": old_P, "D_ptr": D}

    def multiply(first: int, last: int, **factors):
        """Adds up inner products of rows."""
        launch(
            _inner_kernel, (parts, B, last - first),
            parts_ptr=of_parts, parts=parts, slot=first, SUMS=SUMS, **factors, **wide | {"num_stages": 2},
        )  # fmt: skip
        launch(
            _total_kernel, (-(-(last - first) * b * b // 1024), B),
            parts_ptr=of_parts, sums_ptr=sums, first=first * b * b, last=last * b * b, size=SUMS * b * b, parts=parts,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip

    with torch.cuda.device_of(V):
        multiply(0, 2, V_ptr=V, P_ptr=P, D_ptr=D, Z_ptr=D)
        launch(
            _mend_kernel, (parts, B),
            V_ptr=V, P_ptr=P, start_ptr=start, norms_ptr=norms, old_V_ptr=old_V, old_P_ptr=old_P, scale_ptr=scale,
            sums_ptr=sums, SUMS=SUMS, **wide,
        )  # fmt: skip
        products = thin.Thin(matrices, b, scale)
        Z = products.gram_applied(old_V)
        multiply(2, 3, **subspace, Z_ptr=Z)
        residuals = {"squares_ptr": squares, "parts": parts}
        launch(_directions_kernel, (parts, B), Z_ptr=Z, pace=pace, **subspace, **residuals, **small | wide)
        multiply(3, 6, **subspace, Z_ptr=Z)
        G = products.inner_gram(D)
        small |= {"STEP": STEP, "change_ptr": change, "num_warps": 8}
        launch(_cholesky_kernel, (B,), pivots_ptr=pivots, LEAST=LEAST, **small)
        del small["SMALLEST"]
        launch(_basis_kernel, (B,), G_ptr=G, A_ptr=A, pivots_ptr=pivots, num_stages=1, **small)
        values, vectors = eigh(A)
        launch(
            _values_kernel, (B,),
            values_ptr=values, vectors_ptr=vectors, scale_ptr=scale, S_ptr=S, residual_ptr=residual,
            SMALLEST=SMALLEST, **residuals, **small,
        )  # fmt: skip
        launch(
            _advance_kernel, (parts, B),
            change_ptr=change, scale_ptr=scale, next_V_ptr=next_V, next_P_ptr=next_P, STEP=STEP, **subspace,
            **wide | {"num_stages": 2},
        )  # fmt: skip
    return S, residual, next_V, next_P


def leading_step_ref(matrices, V, P, start, norms, pace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`leading_step` in plain torch, for float64."""
    b = V.shape[1]
    finite = norms.isfinite()[:, None]
    size = torch.where(finite & (norms[:, None] > 0), norms[:, None], 1.0).to(V.dtype)
    eye = torch.eye(b, dtype=V.dtype, device=V.device)
    sound = (((V @ V.mT - eye).abs() < 0.01).all(-1).all(-1) & (P.square().sum(-1) < 4).all(-1))[:, None, None]
    V, P = torch.where(sound, V, start), torch.where(sound, P, 0.0)

    def product(X):
        """X W^T W."""
        parts = []
        for W, x, scale, is_finite in zip(matrices, X, size, finite, strict=True):
            W = torch.where(is_finite, W.detach().to(V.dtype) / scale, 0.0)
            W = W if W.shape[0] >= W.shape[1] else W.mT
            parts.append(x @ W.mT @ W)
        return torch.stack(parts)

    Z = product(V)
    rho = (Z * V).sum(-1, keepdim=True)
    seen = rho > torch.finfo(torch.float32).eps ** 2 * rho.amax(1, keepdim=True).clamp(min=0)
    divisor = torch.where(seen & (rho > SMALLEST), rho, 1.0)
    residual = ((Z - rho * V).norm(dim=-1, keepdim=True) / divisor.sqrt())[..., 0]
    D = pace * (Z - (Z @ V.mT) @ V) / divisor + P
    for _ in range(2):
        D = torch.nn.functional.normalize(D, dim=-1)
        D = D - (D @ V.mT) @ V
    lengths, U = torch.linalg.eigh(D @ D.mT)
    taken = lengths > LEAST
    D = torch.where(taken[..., None], U.mT @ D / lengths.clamp(min=LEAST).sqrt()[..., None], 0.0)
    basis = torch.cat([V, D], 1)
    left_out = torch.nn.functional.pad((~taken).to(V.dtype), (b, 0))
    squares, C = torch.linalg.eigh(basis @ product(basis).mT - torch.diag_embed(left_out))
    squares, C = squares.flip(-1)[:, :b], C.mT.flip(-2)[:, :b]
    S = squares.clamp(min=0).sqrt()
    residual = torch.where(seen[..., 0], residual, S)
    step = C[..., b:] @ D
    new_V, nan = C[..., :b] @ V + step, torch.nan
    finite = finite[..., None]
    S, residual = (torch.where(finite[..., 0], x * size, nan) for x in (S, residual))
    return S, residual, torch.where(finite, new_V, V), torch.where(finite, step, P)
