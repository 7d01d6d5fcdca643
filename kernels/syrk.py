r"""Symmetric product: out = alpha s^2 A B^T + beta C + shift I, one triangle computed and mirrored.

With B = A = W or W^T it is the Gram matrix of the short side; with A = B = C = X X^T it is Newton-Schulz's b C + c C^2,
and any product of its commuting polynomials in C.

In float32 each product is three of TF32's on NVIDIA's tensor cores (Ootomo & Yokota 2022, arXiv 2203.03341). These
round their sums towards zero, which would bias a long sum of squares by 1e-5, so the partial sum of each BLOCK_K
columns is added to the total by ordinary, rounding additions.
"""

# pyright: reportPossiblyUnboundVariable=false
# Triton resolves a branch on a constexpr when it compiles: what one branch names, only its own cases use.

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton
from sosd_fast.kernels.launch import launch

# Shipped configurations, by input dtype.
CONFIGS = {
    torch.float32: {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    torch.bfloat16: {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
}

ALIGNED = 16  # elements
# Where rows do not begin at multiples of that, accesses are not 16 bytes wide, and 128 x 128 tiles spill 192 bytes.
UNALIGNED = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
AXES = {"a": "bmk", "b": "bmk", "c": "bmn"}
# Sizes, strides and factors: specialised for each, the tests of a GPU compiled 60 kernels. What matters to the code, in
# which direction entries lie side by side and whether accesses may be 16 bytes wide, is said to it by flags instead.
ALIKE = (
    "m", "k", "stride_ab", "stride_am", "stride_ak", "stride_bb", "stride_bm", "stride_bk", "stride_cb", "stride_cm",
    "stride_cn", "alpha", "beta", "shift",
)  # fmt: skip
# Programs that a multiprocessor of an H100 takes: each holds 64 or 96 of its 227 KiB of shared memory.
PER_SM = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
LEAST_PART = 1024  # columns of A, that a part of a product has at least

if triton is not None:
    from sosd_fast.kernels.split import dot
    from sosd_fast.kernels.triangle import place

    @triton.jit(do_not_specialize=ALIKE)
    def _syrk_kernel(
        A_ptr,  # (B, m, k), by strides
        B_ptr,  # (B, m, k), by strides
        C_ptr,  # (B, m, m), by strides
        scale_ptr,  # (B,)
        out_ptr,  # (B, m, m), contiguous
        m,
        k,
        stride_ab,
        stride_am,
        stride_ak,
        stride_bb,
        stride_bm,
        stride_bk,
        stride_cb,
        stride_cm,
        stride_cn,
        alpha,
        beta,
        shift,
        HAS_C: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        PRECISION: tl.constexpr,
        ROUND: tl.constexpr,
        A_UNIT: tl.constexpr,  # the dimension of A whose stride is 1, or 0
        B_UNIT: tl.constexpr,
        C_UNIT: tl.constexpr,
        GRAIN: tl.constexpr,  # of which m, k and the other strides are multiples, and in which they are given
        WHOLE: tl.constexpr,  # whether it is known that k is a multiple of BLOCK_K
        BLOCK: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        m *= GRAIN
        k *= GRAIN
        stride_am *= GRAIN
        stride_ak *= GRAIN
        stride_bm *= GRAIN
        stride_bk *= GRAIN
        stride_cm *= GRAIN
        stride_cn *= GRAIN
        if A_UNIT == 1:
            stride_am = 1
        if A_UNIT == 2:
            stride_ak = 1
        if B_UNIT == 1:
            stride_bm = 1
        if B_UNIT == 2:
            stride_bk = 1
        if C_UNIT == 1:
            stride_cm = 1
        if C_UNIT == 2:
            stride_cn = 1
        row, column = place(tl.program_id(0))
        batch = tl.program_id(1).to(tl.int64)  # its products with strides do not fit 32 bits

        rows = row * BLOCK + tl.arange(0, BLOCK)
        columns = column * BLOCK + tl.arange(0, BLOCK)
        inner = tl.arange(0, BLOCK_K)
        # rows beyond the last are others again, whose products are not stored: nothing is masked in the loop
        left_rows, right_rows = rows % m, columns % m
        if GRAIN > 1:  # where rows begin anew, too, 16 lie side by side
            left_rows = tl.max_contiguous(tl.multiple_of(left_rows, 16), 16)
            right_rows = tl.max_contiguous(tl.multiple_of(right_rows, 16), 16)
        left_rows, right_rows = left_rows.to(tl.int64)[:, None], right_rows.to(tl.int64)[None, :]
        left_ptr = A_ptr + batch * stride_ab * GRAIN + left_rows * stride_am + inner[None, :] * stride_ak
        right_ptr = B_ptr + batch * stride_bb * GRAIN + right_rows * stride_bm + inner[:, None] * stride_bk
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + batch).to(tl.float32)
        for first in range(0, k, BLOCK_K):
            if WHOLE:
                left = tl.load(left_ptr)
                right = tl.load(right_ptr)
            else:
                left = tl.load(left_ptr, mask=inner[None, :] < k - first, other=0.0)
                right = tl.load(right_ptr, mask=inner[:, None] < k - first, other=0.0)
            if HAS_SCALE:
                left = (left.to(tl.float32) * scale).to(A_ptr.dtype.element_ty)  # exact
                right = (right.to(tl.float32) * scale).to(A_ptr.dtype.element_ty)
            if ROUND:
                total += dot(left, right, PRECISION)
            else:
                total = tl.dot(left, right, total, input_precision=PRECISION)
            left_ptr += BLOCK_K * stride_ak
            right_ptr += BLOCK_K * stride_bk

        total *= alpha
        lower = rows[:, None] >= columns[None, :]  # on the diagonal tile the other half may differ in the last bit
        inside = (rows[:, None] < m) & (columns[None, :] < m) & lower
        if HAS_C:
            C_ptr += batch * stride_cb * GRAIN
            C = tl.load(
                C_ptr + rows.to(tl.int64)[:, None] * stride_cm + columns[None, :] * stride_cn, mask=inside, other=0.0
            )
            total += beta * C.to(tl.float32)
        total += tl.where(rows[:, None] == columns[None, :], shift, 0.0)
        result = total.to(out_ptr.dtype.element_ty)
        out_ptr += batch * m * m
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * m + columns[None, :], result, mask=inside)
        mirrored = (columns[:, None] < m) & (rows[None, :] < m) & (rows[None, :] > columns[:, None])
        tl.store(out_ptr + columns.to(tl.int64)[:, None] * m + rows[None, :], tl.trans(result), mask=mirrored)


def syrk(
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    shift: float = 0.0,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounded: bool = True,
) -> Tensor:
    """Computes alpha s^2 A B^T + beta C + shift I where that is symmetric; the result is so exactly.

    Args:
        A: (..., m, k), float64, float32, bfloat16 or float16, any strides. Not modified.
        B: like A, such that A B^T is symmetric; None takes A itself. Not modified.
        C: (..., m, m), symmetric, any strides. Not modified.
        alpha: factor of the product.
        beta: factor of C.
        shift: added to the diagonal.
        scale: (...), s, a power of two for each matrix, so that entries of any size neither overflow nor vanish.
        out_dtype: of the result; float64 for float64, else float32.
        rounded: add partial sums by rounding additions; Newton-Schulz in half precision does without.

    Returns:
        (..., m, m), contiguous.

    Accuracy:
        Half-precision A is widened exactly and float32 split in three, with float32 sums: entries err by
        at most about 2^-21 |a_i| |a_j|. float64 runs in float64.

    Raises:
        ValueError: other dtypes, fewer than two dimensions, a C of another shape or device.
    """
    if not isinstance(A, Tensor) or A.ndim < 2 or A.dtype not in (*CONFIGS, torch.float64):
        got = f"{tuple(A.shape)} {A.dtype}" if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(
            f"syrk: expected matrices (..., m, k) in float64, float32, bfloat16 or float16, got A={got}. Convert them."
        )
    *batch, m, k = A.shape
    if B is not None and (B.shape != A.shape or B.device != A.device or B.dtype != A.dtype):
        raise ValueError(
            f"syrk: expected B like A, {tuple(A.shape)} {A.dtype} on {A.device}, got B={tuple(B.shape)} {B.dtype} on "
            f"{B.device}. Leave it out for A A^T."
        )
    if C is not None and (C.shape != (*batch, m, m) or C.device != A.device):
        raise ValueError(
            f"syrk: expected C of shape {(*batch, m, m)} on {A.device}, got C={tuple(C.shape)} on {C.device}. "
            "Its sides are the rows of A."
        )
    out_dtype = out_dtype or (torch.float64 if A.dtype == torch.float64 else torch.float32)
    if A.dtype == torch.float64 or not A.numel() or kernels.backend_of("syrk", A) is not Backend.TRITON:
        return syrk_ref(A, B, C, alpha=alpha, beta=beta, shift=shift, scale=scale, out_dtype=out_dtype)
    A, B = A.detach().reshape(-1, m, k), (A if B is None else B).detach().reshape(-1, m, k)
    C = None if C is None else C.detach().reshape(-1, m, m)
    out = torch.empty(*batch, m, m, dtype=out_dtype, device=A.device)
    parts = 1 if C is not None or shift or out_dtype is not torch.float32 else _parts(A)
    some = None if scale is None else scale.reshape(-1).contiguous()
    with torch.cuda.device_of(A):
        if parts == 1:
            _launch(A, B, C, some, out.view(-1, m, m), alpha, beta, shift, rounded)
        else:
            width = k // parts // 16 * 16  # of a part; what is left over is another, smaller one
            sums = torch.empty(parts, m, m, dtype=out_dtype, device=A.device)
            for i, total in enumerate(out.view(-1, m, m)):
                left, right = (
                    t[i, :, : parts * width].unflatten(1, (parts, width)).movedim(1, 0) for t in (A, B)
                )  # (parts, m, width)
                its = None if some is None else some[i : i + 1].repeat(parts)
                _launch(left, right, None, its, sums, alpha, 0.0, 0.0, rounded)
                torch.sum(sums, 0, out=total)
                if parts * width < k:
                    rest = slice(i, i + 1), slice(None), slice(parts * width, None)
                    its = None if some is None else some[i : i + 1]
                    _launch(A[rest], B[rest], None, its, sums[:1], alpha, 0.0, 0.0, rounded)
                    total += sums[0]
    return out


def _parts(A: Tensor) -> int:
    """Into how many products, of some columns each, a product of few rows is split; they take up the GPU together.

    The Gram matrix of GPT-2's embedding has 78 tiles, for 132 multiprocessors, and each would take 1,572 steps. The
    matrices of a batch come one after the other then, so that a large batch fills the GPU better as it is.
    """
    B, m, k = A.shape
    tiles = triton.cdiv(m, CONFIGS[A.dtype]["BLOCK"])
    fit = PER_SM[A.dtype] * kernels.multiprocessors(A.device) // (tiles * (tiles + 1) // 2)
    parts = min(fit, k // LEAST_PART)
    return parts if parts > 2 * B else 1


def _launch(A: Tensor, B: Tensor, C: Tensor | None, scale: Tensor | None, out: Tensor, alpha, beta, shift, rounded):
    """Launches the kernel on batches; all tensors have one."""
    batch, m, k = A.shape
    strides = {"a": A.stride(), "b": B.stride(), "c": (0, 0, 0) if C is None else C.stride()}
    unit = {name: 2 if found[2] == 1 else 1 if found[1] == 1 else 0 for name, found in strides.items()}
    others = [stride for name, found in strides.items() for i, stride in enumerate(found) if not i or i != unit[name]]
    grain = ALIGNED if not any(value % ALIGNED for value in (m, k, *others)) else 1
    config = CONFIGS[A.dtype] if grain > 1 else UNALIGNED
    tiles = triton.cdiv(m, config["BLOCK"])
    # the batch is the second dimension of the grid, which ends at 65535
    for first in range(0, batch, 65535):
        some = slice(first, first + 65535)
        launch(
            _syrk_kernel,
            (tiles * (tiles + 1) // 2, A[some].shape[0]),
            A_ptr=A[some],
            B_ptr=B[some],
            C_ptr=A if C is None else C[some],
            scale_ptr=A if scale is None else scale[some],
            out_ptr=out[some],
            m=m // grain,
            k=k // grain,
            # of those that are 1 the kernel knows it
            **{f"stride_{x}{i}": n // grain for x in "abc" for i, n in zip(AXES[x], strides[x], strict=True)},
            alpha=float(alpha),
            beta=float(beta),
            shift=float(shift),
            HAS_C=C is not None,
            HAS_SCALE=scale is not None,
            PRECISION=kernels.precision_of_products(),
            ROUND=rounded,
            A_UNIT=unit["a"],
            B_UNIT=unit["b"],
            C_UNIT=unit["c"],
            GRAIN=grain,
            WHOLE=grain > 1 and k % config["BLOCK_K"] == 0,
            **config,
        )


def syrk_ref(A: Tensor, B=None, C=None, *, alpha=1.0, beta=0.0, shift=0.0, scale=None, out_dtype=None) -> Tensor:
    """`syrk` in plain torch: products in float32, or in float64 where A is."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = (t.detach().to(dtype) for t in (A, A if B is None else B))
    if scale is not None:
        A, B = (t * scale[..., None, None].to(dtype) for t in (A, B))
    with kernels.full_precision(A.device.type):
        out = alpha * (A @ B.mT)
    if C is not None:
        out += beta * C.to(A.dtype)
    out.diagonal(dim1=-2, dim2=-1).add_(shift)
    lower = out.tril()
    return (lower + out.tril(-1).mT).to(out_dtype or A.dtype)
