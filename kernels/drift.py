r"""Drift of Gram matrices: what rounding did to their eigenvalues together.

The sums behind G = W W^T err at random for most matrices, but not for those of few distinct values (signs, ternary or
quantised weights), where equal products round alike, nor on tensor cores, which round towards zero: the diagonal, sums
of terms of one sign, drifts, and the other elements do by a common factor. So the diagonal and some other elements are
computed in float64. The factor follows from the latter by regression; the diagonal is set to its true value times that
factor, which leaves (1 + drift) W W^T and noise. The C++ kernels do the same (kernels/cpu/rounding.hpp).
"""

# pyright: reportPossiblyUnboundVariable=false
# Triton resolves a branch on a constexpr when it compiles: what one branch names, only its own cases use.

from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton
from sosd_fast.kernels.launch import Launcher, launch

PAIRS = 256  # of neighbouring rows, at most, whose products are taken in float64
MOST_DRIFT = 2.0**-18  # of elements beside the diagonal, relative
ALIGNED = 16  # elements, so that accesses are 16 bytes wide
LONGEST = 4096  # columns that a program takes
ROWS = {"ROWS": 32, "BLOCK": 64, "num_warps": 4}  # that a program takes, and columns at once
CORRECT = {"BLOCK": 256, "num_warps": 4}

if triton is not None:

    @triton.jit(do_not_specialize=["r", "k", "pairs", "stride_b", "stride_r", "stride_k", "length"])
    def _elements_kernel(
        W_ptr,  # (B, r, k), by strides
        scale_ptr,  # (B,) float64
        squares_ptr,  # (parts, B, r) float64
        cross_ptr,  # (parts, B, pairs) float64
        r,
        k,
        pairs,
        stride_b,
        stride_r,
        stride_k,
        length,  # columns of a part
        HAS_SCALE: tl.constexpr,
        UNIT: tl.constexpr,  # the dimension whose stride is 1: 1, 2, or 0 for none
        GRAIN: tl.constexpr,  # of which sizes and the other strides are multiples, and in which they are given
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        r *= GRAIN
        k *= GRAIN
        length *= GRAIN
        stride_r = 1 if UNIT == 1 else stride_r.to(tl.int64) * GRAIN
        stride_k = 1 if UNIT == 2 else stride_k.to(tl.int64) * GRAIN
        tiles = tl.cdiv(r, ROWS)
        batch = (tl.program_id(0) // tiles).to(tl.int64)
        first = tl.program_id(0) % tiles * ROWS
        rows = first + tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK)
        begin = tl.program_id(1) * length
        end = tl.minimum(begin + length, k)
        W_ptr += batch * stride_b * GRAIN
        W_ptr += rows[:, None].to(tl.int64) * stride_r + columns[None, :].to(tl.int64) * stride_k
        if HAS_SCALE:
            scale = tl.load(scale_ptr + batch)
        squares = tl.zeros([ROWS, BLOCK], tl.float64)
        cross = tl.zeros([ROWS, BLOCK], tl.float64)
        for at in range(begin, end, BLOCK):
            inside = columns[None, :] < end - at
            here = W_ptr + tl.full([], at, tl.int64) * stride_k
            a = tl.load(here, mask=inside & (rows[:, None] < r), other=0.0).to(tl.float64)
            if HAS_SCALE:
                a *= scale
            squares += a * a
            if first < pairs:
                b = tl.load(here + stride_r, mask=inside & (rows[:, None] < r - 1), other=0.0).to(tl.float64)
                if HAS_SCALE:
                    b *= scale
                cross += a * b
        to = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + batch
        tl.store(squares_ptr + to * r + rows, tl.sum(squares, axis=1), mask=rows < r)
        tl.store(cross_ptr + to * pairs + rows, tl.sum(cross, axis=1), mask=rows < pairs)

    @triton.jit(do_not_specialize=["r", "pairs"])
    def _correct_kernel(
        G_ptr,  # (B, r, r): the diagonal is written
        squares_ptr,  # (B, r) float64
        cross_ptr,  # (B, pairs) float64
        inner_ptr,  # (B,) float64
        drift_ptr,  # (B,) float64
        r,
        pairs,
        MOST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        batch = tl.program_id(0).to(tl.int64)
        G_ptr += batch * r * r
        squares_ptr += batch * r
        lanes = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, r, BLOCK):
            total += tl.load(squares_ptr + first + lanes, mask=lanes < r - first, other=0.0)
        mean = tl.sum(total, axis=0) / r
        above = tl.zeros([BLOCK], tl.float64)
        below = tl.zeros([BLOCK], tl.float64)
        for first in range(0, pairs, BLOCK):
            i = (first + lanes).to(tl.int64)
            true = tl.load(cross_ptr + batch * pairs + i, mask=i < pairs, other=0.0)
            found = tl.load(G_ptr + (i + 1) * r + i, mask=i < pairs, other=0.0).to(tl.float64)
            above += (found - true) * true
            below += true * true
        # Where rows are nearly orthogonal the elements say little; those of random signs are mean / sqrt(K).
        least = pairs * mean * mean / (16 * tl.load(inner_ptr + batch))
        drift = tl.sum(above, axis=0) / (tl.sum(below, axis=0) + least)
        drift = tl.where(drift == drift, tl.minimum(tl.maximum(drift, -MOST), MOST), 0.0)
        tl.store(drift_ptr + batch, drift)
        for first in range(0, r, BLOCK):
            i = (first + lanes).to(tl.int64)
            square = tl.load(squares_ptr + i, mask=i < r, other=0.0) * (1 + drift)
            tl.store(G_ptr + i * r + i, square.to(G_ptr.dtype.element_ty), mask=i < r)


class Products(NamedTuple):
    """Elements of W W^T in float64."""

    squares: Tensor  # (..., r), (i, i)
    cross: Tensor  # (..., min(r - 1, PAIRS)), (i + 1, i)


def products(W: Tensor, scale: Tensor | None = None) -> Products:
    """Computes the diagonal of W W^T and its first elements beside it in float64. Waits for no device.

    Args:
        W: (..., r, k), any floating-point dtype and strides. Not modified.
        scale: (...) float64, powers of two that W is multiplied by first; with it the squares stay in range.
    """
    if not W.numel() or kernels.backend_of("syrk", W) is not Backend.TRITON:
        return products_ref(W, scale)
    *batch, r, k = W.shape
    W = W.detach().reshape(-1, r, k)
    B, pairs, strides = len(W), min(r - 1, PAIRS), W.stride()
    unit = 2 if strides[2] == 1 else 1 if strides[1] == 1 else 0
    others = [stride for i, stride in enumerate(strides) if not i or i != unit]
    grain = ALIGNED if not any(value % ALIGNED for value in (r, k, *others)) else 1
    parts = triton.cdiv(k, LONGEST)
    squares, cross = (W.new_empty(parts, B, n, dtype=torch.float64) for n in (r, pairs))
    steps = {f"stride_{x}": n // grain for x, n in zip("brk", strides, strict=True)}
    with torch.cuda.device_of(W):
        launch(
            _elements_kernel, (B * triton.cdiv(r, ROWS["ROWS"]), parts),
            W_ptr=W, scale_ptr=squares if scale is None else scale.reshape(-1).contiguous(), squares_ptr=squares,
            cross_ptr=cross, r=r // grain, k=k // grain, pairs=pairs, length=min(k, LONGEST) // grain, **steps,
            HAS_SCALE=scale is not None, UNIT=unit, GRAIN=grain, **ROWS,
        )  # fmt: skip
    squares, cross = (t[0] if parts == 1 else t.sum(0) for t in (squares, cross))
    return Products(squares.view(*batch, r), cross.view(*batch, pairs))


def products_ref(W: Tensor, scale: Tensor | None = None) -> Products:
    """`products` in plain torch."""
    if scale is not None:
        W = W.double() * scale[..., None, None]
    if W.dtype == torch.float64:  # torch.sum adds in pairs, more accurately than a product does
        squares = W.square().sum(-1)
    elif W.device.type == "cpu" and W.stride(-1) != 1:
        # The norm's sums in float64 along what stands apart take 10 ns an entry; these take 1.3.
        squares = W.new_zeros(W.shape[:-1], dtype=torch.float64)
        for part in W.split(256, -1):
            squares += part.double().square().sum(-1)
    else:
        squares = torch.linalg.vector_norm(W, dim=-1, dtype=torch.float64).square()
    some = W[..., : PAIRS + 1, :].double()
    return Products(squares, (some[..., 1:, :] * some[..., :-1, :]).sum(-1))


def correct(G: Tensor, known: Products, inner: int | Tensor) -> Tensor:
    """Sets the diagonal of Gram matrices right.

    Args:
        G: (B, r, r); its diagonal is written, its lower triangle read.
        known: elements of W W^T, with the same leading dimension.
        inner: K, the terms of each sum; (B,) float64 where they differ.

    Returns:
        drift (B,) float64: G is now (1 + drift) W W^T and noise.
    """
    if not G.is_contiguous() or not G.numel() or kernels.backend_of("syrk", G) is not Backend.TRITON:
        return correct_ref(G, known, inner)
    B, r, _ = G.shape
    drift = torch.empty(B, dtype=torch.float64, device=G.device)
    with torch.cuda.device_of(G):
        call = Launcher(
            G_ptr=G, squares_ptr=known.squares.contiguous(), cross_ptr=known.cross.contiguous(), drift_ptr=drift,
            inner_ptr=inner.contiguous() if isinstance(inner, Tensor) else torch.full_like(drift, inner),
        )  # fmt: skip
        call(_correct_kernel, (B,), r=r, pairs=known.cross.shape[-1], MOST=MOST_DRIFT, **CORRECT)
    return drift


def correct_ref(G: Tensor, known: Products, inner: int | Tensor) -> Tensor:
    """`correct` in plain torch."""
    squares, cross = known
    mean = squares.mean(-1)
    error = G.diagonal(-1, -2, -1)[:, : cross.shape[-1]].double() - cross
    # Where rows are nearly orthogonal the elements say little; those of random signs are mean / sqrt(K).
    least = cross.shape[-1] * mean.square() / (16 * inner)
    drift = ((error * cross).sum(-1) / (cross.square().sum(-1) + least)).nan_to_num(0.0)
    drift = drift.clamp(-MOST_DRIFT, MOST_DRIFT)
    G.diagonal(0, -2, -1).copy_(squares * (1 + drift[:, None]))
    return drift
