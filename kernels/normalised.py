r"""Matrices divided by their Frobenius norms, in float16, and a fast way back from there: X = G / max(|G|_F, eps).

Two passes over G, where torch takes five and two copies in float32. The first adds up squares in float64, whose range
holds those of every float32; the second multiplies by 2^-e and by 2^e / |G|_F, both of which float32 holds. And, by
torch's operations, what other devices and dtypes take.
"""

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import tl, triton

BLOCK = 4096  # entries at once
NUM_WARPS = 8
ALIGNED = 16  # entries, so that accesses are 16 bytes wide
MOST_PARTS = 512  # sums of squares of a matrix, which each program of the second pass adds up
TILES = 4  # that a program of the first pass takes, at least, where the matrix has as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if triton is not None:

    @triton.jit(do_not_specialize=["size", "stride", "parts"])
    def _squares_kernel(
        G_ptr,  # (B, size), by strides
        sums_ptr,  # (B, parts) float64
        size,
        stride,
        parts,
        GRAIN: tl.constexpr,  # of which size and stride are multiples, and in which they are given
        BLOCK: tl.constexpr,
    ):
        size *= GRAIN
        part = tl.program_id(0)
        batch = tl.program_id(1).to(tl.int64)
        G_ptr += batch * stride * GRAIN
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(part.to(tl.int64) * BLOCK, size, parts.to(tl.int64) * BLOCK):
            x = tl.load(G_ptr + first + lanes, mask=lanes < size - first, other=0.0).to(tl.float32).to(tl.float64)
            total += x * x
        tl.store(sums_ptr + batch * parts + part, tl.sum(total, axis=0))

    @triton.jit(do_not_specialize=["size", "stride", "parts", "eps"])
    def _divide_kernel(
        G_ptr,  # (B, size), by strides
        sums_ptr,  # (B, parts) float64
        out_ptr,  # (B, size) float16, contiguous
        size,
        stride,
        parts,
        eps,
        GRAIN: tl.constexpr,
        MOST_PARTS: tl.constexpr,  # a power of two
        BLOCK: tl.constexpr,
    ):
        size *= GRAIN
        # The last tiles first: the pass before has left them in the cache.
        first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
        batch = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        inside = lanes < size - first
        x = tl.load(G_ptr + batch * stride * GRAIN + first + lanes, mask=inside, other=0.0).to(tl.float32)
        some = tl.arange(0, MOST_PARTS)
        total = tl.sum(tl.load(sums_ptr + batch * parts + some, mask=some < parts, other=0.0), axis=0)
        finite = total < float("inf")
        least = tl.full([], eps, tl.float64)
        least *= least
        total = tl.where(total < least, least, total)
        total = tl.where((total > 0) & finite, total, 1.0)
        exponent = ((total.to(tl.int64, bitcast=True) >> 52) - 1023) >> 1  # 4^exponent <= total < 4^(exponent + 1)
        fraction = total * ((1023 - 2 * exponent) << 52).to(tl.float64, bitcast=True)
        # From subnormal norms to those beyond float32, -exponent goes from 149 to -145: what no normal power of two
        # holds goes into the other factor.
        held = tl.minimum(tl.maximum(-exponent, -126), 127)
        power = ((127 + held) << 23).to(tl.int32).to(tl.float32, bitcast=True)
        rest = ((127 - exponent - held) << 23).to(tl.int32).to(tl.float32, bitcast=True)
        factor = tl.where(finite, rest / tl.sqrt(fraction.to(tl.float32)), float("nan"))
        x = x * power * factor
        tl.store(out_ptr + batch * size + first + lanes, x.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["size"])
    def _convert_kernel(
        X_ptr,  # (size,)
        out_ptr,  # (size,), which may lie where X does
        size,
        GRAIN: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        size *= GRAIN
        first = tl.program_id(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        inside = lanes < size - first
        x = tl.load(X_ptr + first + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + first + lanes, x.to(out_ptr.dtype.element_ty), mask=inside)


def takes(G: Tensor) -> bool:
    """Whether `normalised` and `converted` have a kernel for G; that of Newton-Schulz's products is float16 then."""
    return G.dtype in DTYPES and kernels.backend_of("newton_schulz", G) is kernels.Backend.TRITON


def normalised(G: Tensor, eps: float) -> Tensor:
    """Divides each matrix by its Frobenius norm, or by eps where that is larger.

    Args:
        G: (..., m, n), float32, bfloat16 or float16, any strides. Not modified.
        eps: at least 0, rounded to float32. A zero matrix stays zero with 0, too.

    Returns:
        (..., m, n) float16, each matrix dense: by columns where G is, else by rows. A matrix that holds NaN or Inf is
        NaN everywhere, and leaves the others as they are.

    Accuracy:
        Each entry is that of the real quotient to float16's rounding and 3e-7 of itself, whatever the scale of G. The
        same every time: sums are added up in one order.
    """
    *batch, m, n = G.shape
    G = G.detach().reshape(-1, m, n)
    columns = G.stride(1) == 1 and G.stride(2) == m and G.stride(2) != 1
    if not columns and (G.stride(2) != 1 or G.stride(1) != n):
        G = G.contiguous()
    out = torch.empty(len(G), n if columns else m, m if columns else n, dtype=torch.float16, device=G.device)
    size, stride = m * n, G.stride(0)
    grain = ALIGNED if not (size % ALIGNED or stride % ALIGNED) else 1
    tiles = triton.cdiv(size, BLOCK)
    parts = min(triton.cdiv(tiles, TILES), MOST_PARTS)
    sums = torch.empty(len(G), parts, dtype=torch.float64, device=G.device)
    eps = min(float(eps), torch.finfo(torch.float32).max)
    with torch.cuda.device_of(G):
        # the batch is the second dimension of the grid, which ends at 65535
        for begin in range(0, len(G), 65535):
            some = slice(begin, begin + 65535)
            X = G[some]
            same = {"GRAIN": grain, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
            size_stride = size // grain, stride // grain
            _squares_kernel[(parts, len(X))](X, sums[some], *size_stride, parts, **same)
            _divide_kernel[(tiles, len(X))](
                X, sums[some], out[some], *size_stride, parts, eps, MOST_PARTS=MOST_PARTS, **same
            )
    return (out.mT if columns else out).view(*batch, m, n)


def normalised_ref(G: Tensor, eps: float) -> Tensor:
    """`normalised` in plain torch, in float64."""
    norm = torch.linalg.matrix_norm(G.detach(), keepdim=True, dtype=torch.float64)
    norm = torch.where(norm.isfinite(), norm, torch.nan).clamp(min=eps)
    return (G.detach().double() / torch.where(norm > 0, norm, 1 + norm)).half()


def normalised_by_torch(X: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Returns X / max(|X|_F, eps), in float32 for half precision, and then rounded to `out_dtype`.

    The sum of squares overflows beyond 1.8e19 in float32 and bfloat16 and beyond 1.3e154 in float64, hence the division
    by the power of two at the largest entry. It is exact, so an ordinary matrix keeps every bit of its result. A CPU,
    where a norm is read at no cost, leaves it out where no square can leave the range.
    """
    dtype = torch.promote_types(X.dtype, torch.float32)
    if X.device.type == "cpu":
        norm = norm_of(X, dtype)
        values = norm.flatten().tolist()
        if all(1e-9 < value < 1e15 for value in values):
            return (X / norm.clamp_(min=eps)).to(out_dtype)
    X, power = in_range(X)
    norm = norm_of(X, dtype)
    norm = torch.maximum(norm, (eps / power).clamp(min=torch.finfo(dtype).tiny))  # a zero matrix stays zero
    return (X.div_(norm) if X.dtype == dtype else X / norm).to(out_dtype)


def in_range(X: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each matrix over the power of two at its largest entry, which is exact, and that power, (..., 1, 1)."""
    power = kernels.power_of_two(kernels.largest_entry(X).to(torch.promote_types(X.dtype, torch.float32)))
    return X / power if X.dtype == torch.float16 else X / power.to(X.dtype), power  # float16 holds few powers


def norm_of(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns |X|_F, (..., 1, 1). On a CPU of its rows first, which takes half the time of `matrix_norm`."""
    if X.device.type != "cpu":
        return torch.linalg.matrix_norm(X, keepdim=True, dtype=dtype)  # one launch
    rows = torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=dtype)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def converted(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a float16 tensor that nobody needs afterwards: torch's copy to bfloat16 runs at half the memory's rate.

    Args:
        X: float16, contiguous. Overwritten where `dtype` is as wide.
        dtype: float32, bfloat16 or float16, of the result.

    Returns:
        The shape of X, rounded to nearest.
    """
    if X.dtype == dtype:
        return X
    assert X.dtype == torch.float16 and X.is_contiguous()
    out = X.view(dtype) if dtype.itemsize == X.dtype.itemsize else torch.empty_like(X, dtype=dtype)
    size = X.numel()
    grain = ALIGNED if not size % ALIGNED else 1
    with torch.cuda.device_of(X):
        _convert_kernel[(triton.cdiv(size, BLOCK),)](
            X, out, size // grain, GRAIN=grain, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def converted_ref(X: Tensor, dtype: torch.dtype) -> Tensor:
    """`converted` in plain torch; X is not used up."""
    return X.to(dtype)
