r"""What Newton-Schulz does to r x r matrices between products by cuBLAS, each in one pass over memory or none.

`symmetrised` is (A + A^T) / 2 by pairs of tiles: torch reads A^T against its rows, and halves in another pass.

`own_product` is X X^T without its upper right quarter, which is mirrored.

`polynomial` is a I + b A + c A^2. As beta C + c A^2 cuBLAS would first copy C to where the result goes, but with
M = A + s I, s = b / 2c, it is c M^2 + (a - c s^2) I, whose diagonals alone are touched outside of the product. M's
diagonal is rounded coarser than A's, hence a correction of first order: of M + D, D diagonal and small, the square
is M^2 + M D + D M, and 2 c M_ii D_i is added to the diagonal of the result. What is left out, c M_ij (D_i + D_j)
elsewhere, is as small as the rounding of A_ij. Errors of five steps are no larger than without.
"""

import math

import torch
from torch import Tensor

from sosd_fast.kernels import tl, triton

BLOCK = 64
ALIGNED = 16  # elements, so that accesses are 16 bytes wide
UNALIGNED_BLOCK = 32  # else; tiles of 64 spill
LANES = 128  # entries of diagonals at once, one a thread, so that the one that read an entry also writes it
LEAST = 2**21  # entries of A; below, its copy by cuBLAS costs less than a host's two launches for its diagonal
# Entries of X X^T from which three quarters of a product take less time than the whole: of 12 matrices of 1024 rows
# they are as many rounds of 132 tiles of 128 x 256.
LEAST_BY_QUARTERS = 2**25
FARTHEST = 4.0  # |s|: beyond, the rounding of the diagonal is coarser than "polar_express", tried at 2.8, has it

if triton is not None:
    from sosd_fast.kernels.triangle import place

    @triton.jit(do_not_specialize=["m"])
    def _symmetrise_kernel(
        A_ptr,  # (B, m, m), contiguous
        out_ptr,  # (B, m, m), contiguous; A itself if not MEAN
        m,
        MEAN: tl.constexpr,  # of A and A^T; else the tiles below the diagonal are mirrored
        GRAIN: tl.constexpr,  # of which m is a multiple, and in which it is given
        BLOCK: tl.constexpr,
    ):
        m *= GRAIN
        row, column = place(tl.program_id(0))
        batch = tl.program_id(1).to(tl.int64)
        rows = row * BLOCK + tl.arange(0, BLOCK)
        columns = column * BLOCK + tl.arange(0, BLOCK)
        lower = batch * m * m + rows.to(tl.int64)[:, None] * m + columns[None, :]
        upper = batch * m * m + columns.to(tl.int64)[:, None] * m + rows[None, :]
        inside = (rows[:, None] < m) & (columns[None, :] < m)
        inside_upper = (columns[:, None] < m) & (rows[None, :] < m)
        if MEAN:
            x = tl.load(A_ptr + lower, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(A_ptr + upper, mask=inside_upper, other=0.0)
            x = (0.5 * (x + tl.trans(y).to(tl.float32))).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + lower, x, mask=inside)
            tl.store(out_ptr + upper, tl.trans(x), mask=inside_upper & (row > column))
        else:
            x = tl.load(A_ptr + lower, mask=inside & (row > column), other=0.0)
            tl.store(out_ptr + upper, tl.trans(x), mask=inside_upper & (row > column))

    @triton.jit(do_not_specialize=["m", "size", "shift"])
    def _shift_kernel(
        A_ptr,  # (B, m, m), contiguous
        kept_ptr,  # (B, m), the diagonals as they were
        m,
        size,  # B m
        shift,
        LANES: tl.constexpr,
    ):
        i = tl.program_id(0) * LANES + tl.arange(0, LANES)
        at = A_ptr + (i // m).to(tl.int64) * m * m + (i % m).to(tl.int64) * (m + 1)
        x = tl.load(at, mask=i < size, other=0.0)
        tl.store(kept_ptr + i, x, mask=i < size)
        tl.store(at, (x.to(tl.float32) + shift).to(A_ptr.dtype.element_ty), mask=i < size)

    @triton.jit(do_not_specialize=["m", "size", "shift", "c", "rest"])
    def _unshift_kernel(
        A_ptr,  # (B, m, m), contiguous, of shifted diagonals
        P_ptr,  # (B, m, m), contiguous
        kept_ptr,  # (B, m)
        m,
        size,
        shift,
        c,
        rest,  # a - c shift^2
        LANES: tl.constexpr,
    ):
        i = tl.program_id(0) * LANES + tl.arange(0, LANES)
        inside = i < size
        at = (i // m).to(tl.int64) * m * m + (i % m).to(tl.int64) * (m + 1)
        shifted = tl.load(A_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(kept_ptr + i, mask=inside, other=0.0)
        p = tl.load(P_ptr + at, mask=inside, other=0.0).to(tl.float32)
        p += rest + 2 * c * shifted * (x.to(tl.float32) + shift - shifted)
        tl.store(P_ptr + at, p.to(P_ptr.dtype.element_ty), mask=inside)
        tl.store(A_ptr + at, x, mask=inside)


def symmetrised(A: Tensor) -> Tensor:
    """Returns (A + A^T) / 2.

    Args:
        A: (..., m, m), float16, bfloat16 or float32, contiguous. Not modified.

    Returns:
        (..., m, m), symmetric to the last bit; each mean is taken in float32 and rounded once.
    """
    out = torch.empty_like(A)
    _symmetrise(A, out, True)
    return out


def _symmetrise(A: Tensor, out: Tensor, mean: bool):
    """Launches the kernel; A and out are contiguous."""
    m = A.shape[-1]
    A, out = A.view(-1, m, m), out.view(-1, m, m)
    grain, block = (ALIGNED, BLOCK) if m % ALIGNED == 0 else (1, UNALIGNED_BLOCK)
    tiles = triton.cdiv(m, block)
    with torch.cuda.device_of(A):
        # the batch is the second dimension of the grid, which ends at 65535
        for first in range(0, len(A), 65535):
            some = slice(first, first + 65535)
            _symmetrise_kernel[(tiles * (tiles + 1) // 2, len(A[some]))](
                A[some], out[some], m // grain, MEAN=mean, GRAIN=grain, BLOCK=block
            )


def symmetrised_ref(A: Tensor) -> Tensor:
    """`symmetrised` in plain torch."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    return ((A.to(dtype) + A.mT.to(dtype)) / 2).to(A.dtype)


def by_quarters(X: Tensor) -> bool:
    """Whether `own_product` is the faster way to X X^T; of a square X the mirroring takes what the product saves."""
    *batch, short, long = X.shape
    return math.prod(batch) * short**2 >= LEAST_BY_QUARTERS and long >= 2 * short


def own_product(X: Tensor) -> Tensor:
    """Returns X X^T.

    Args:
        X: (..., m, k), float16, bfloat16 or float32, any strides. Not modified.

    Returns:
        (..., m, m), the dtype of X, contiguous.
    """
    *batch, m, k = X.shape
    X = X.reshape(-1, m, k)
    A = torch.empty(len(X), m, m, dtype=X.dtype, device=X.device)
    half = -(-m // 2 // BLOCK) * BLOCK  # no tile on the diagonal holds an entry of the quarter that is left out
    for rows, done in ((slice(0, half), half), (slice(half, m), m)):
        if rows.start < m:
            torch.bmm(X[:, rows], X[:, :done].mT, out=A[:, rows, :done])
    _symmetrise(A, A, False)
    return A.view(*batch, m, m)


def own_product_ref(X: Tensor) -> Tensor:
    """`own_product` in plain torch, in float64."""
    return X.double() @ X.double().mT


def pays(A: Tensor, b: float, c: float) -> bool:
    """Whether `polynomial` is the faster way, of matrices of this size, and accurate for these coefficients."""
    return A.numel() >= LEAST and c != 0 and abs(b) <= 2 * FARTHEST * abs(c)


def polynomial(A: Tensor, a: float, b: float, c: float) -> Tensor:
    """Returns a I + b A + c A^2 of symmetric matrices.

    Args:
        A: (..., m, m), float16, contiguous. Its diagonal is changed meanwhile, and then put back.
        a: factor of I.
        b: factor of A; see `FARTHEST`.
        c: factor of A^2, not zero.

    Returns:
        (..., m, m) float16.
    """
    m, matrices = A.shape[-1], A.view(-1, *A.shape[-2:])
    shift = b / (2 * c)
    kept = torch.empty(matrices.shape[:2], dtype=A.dtype, device=A.device)
    size = kept.numel()
    grid = (triton.cdiv(size, LANES),)
    with torch.cuda.device_of(A):
        _shift_kernel[grid](A, kept, m, size, shift, LANES=LANES)
        P = torch.baddbmm(matrices, matrices, matrices, beta=0.0, alpha=c)  # which reads no matrix for beta = 0
        _unshift_kernel[grid](A, P, kept, m, size, shift, c, a - c * shift**2, LANES=LANES)
    return P.view(A.shape)


def polynomial_ref(A: Tensor, a: float, b: float, c: float) -> Tensor:
    """`polynomial` in plain torch, in float64."""
    A = A.double()
    return b * A + c * A @ A + a * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
