r"""Eigenvalues of symmetric tridiagonal matrices, by bisection on Sturm counts.

p_i = (d_i - x) p_{i-1} - e_{i-1}^2 p_{i-2}: the sign changes of p_0 .. p_r are the eigenvalues below x. In place of
LAPACK stebz's quotients q_i = p_i / p_{i-1} with their guard against zero pivots this needs neither division nor guard:
each rounding is a relative change of d_i - x or e_i^2, so the count is exact for a nearby matrix, and after p_i = 0 the
next p has the sign opposite to the one before, for e^2 is kept above a floor. The pair is rescaled by a power of two
every few steps.

All eigenvalues start from one bracket, Gershgorin's, and a count depends on x alone, so the result is sorted.

Source: Barth, Martin & Wilkinson (1967); Golub & Van Loan, Matrix Computations, 8.4.
"""

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton
from sosd_fast.kernels.launch import Launcher

# Eigenvalues to a program of one warp, four chains of products to a thread; half as many where a GPU's schedulers have
# no more than a program each, which waits for its own products then: 72 x 768 in float64 1.3 ms instead of 1.8 on an
# H100 (LOG.md#first-h100).
BLOCK = 128
SCHEDULERS = 4  # of a multiprocessor
SCALE_BLOCK = 512
# float32 goes on below its eps |T|: the half-width is an error of its own, and 2^-28 instead of 2^-24 took the error of
# a spectrum from 1.3e-7 to 2e-8 (on the CPU).
ITERATIONS = {torch.float32: 29, torch.float64: 54}
RESCALE = {torch.float32: 4, torch.float64: 8}  # steps
PADDED_TO = 8

if triton is not None:

    @triton.jit
    def _scale_kernel(
        d_ptr,  # (B, r), by strides
        e_ptr,  # (B, r - 1), by strides
        scaled_ptr,  # (B, 2, pitch): d and e^2, of T / 2^k with |T / 2^k| <= 1
        limits_ptr,  # (B, 3): Gershgorin's bracket of it, and 2^k
        r,
        pitch,
        stride_d,
        step_d,
        stride_e,
        step_e,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        dtype = d_ptr.dtype.element_ty
        d_ptr += row * stride_d
        e_ptr += row * stride_e
        scaled_ptr += row * 2 * pitch
        limits_ptr += row * 3
        lanes = tl.arange(0, BLOCK)
        lowest = tl.full([BLOCK], float("inf"), tl.float64)
        highest = tl.full([BLOCK], -float("inf"), tl.float64)
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, r, BLOCK):
            i = first + lanes
            d = tl.load(d_ptr + i * step_d, mask=i < r, other=0.0).to(tl.float64)
            left = tl.load(e_ptr + (i - 1) * step_e, mask=(i > 0) & (i < r), other=0.0).to(tl.float64)
            right = tl.load(e_ptr + i * step_e, mask=i < r - 1, other=0.0).to(tl.float64)
            radius = tl.abs(left) + tl.abs(right)
            total += d + radius
            lowest = tl.where(i < r, tl.minimum(lowest, d - radius), lowest)
            highest = tl.where(i < r, tl.maximum(highest, d + radius), highest)
        low, high, finite = tl.min(lowest, axis=0), tl.max(highest, axis=0), tl.sum(total, axis=0)
        norm = tl.maximum(tl.abs(low), tl.abs(high))
        # 2^k is the power of two above norm, by its exponent bits
        power = (norm.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True) * 2.0
        power = tl.maximum(power, 1e-36 if dtype == tl.float32 else 1e-290)
        to_unit = 1.0 / power
        for first in range(0, pitch, BLOCK):
            i = first + lanes
            d = tl.load(d_ptr + i * step_d, mask=i < r, other=0.0).to(tl.float64) * to_unit
            e = tl.load(e_ptr + (i - 1) * step_e, mask=(i > 0) & (i < r), other=0.0).to(tl.float64) * to_unit
            floor = 1e-18 if dtype == tl.float32 else 1e-36
            square = tl.where((i > 0) & (i < r), tl.maximum(e * e, floor), 0.0)
            tl.store(scaled_ptr + i, tl.where(i < r, d, 2.0).to(dtype), mask=i < pitch)
            tl.store(scaled_ptr + pitch + i, square.to(dtype), mask=i < pitch)
        slack = 1e-6 if dtype == tl.float32 else 1e-14
        tl.store(limits_ptr, (low * to_unit - slack).to(dtype))
        tl.store(limits_ptr + 1, (high * to_unit + slack).to(dtype))
        power = tl.where(norm == 0, 0.0, power)  # the values of a zero matrix are exact
        tl.store(limits_ptr + 2, (power + 0.0 * finite).to(dtype))  # NaN if T holds NaN or Inf

    @triton.jit
    def _sturm_kernel(
        scaled_ptr,  # (B, 2, pitch)
        limits_ptr,  # (B, 3)
        values_ptr,  # (B, r), ascending
        r,
        pitch,
        iterations,
        RESCALE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        wanted = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        dtype = scaled_ptr.dtype.element_ty
        word = tl.uint32 if dtype == tl.float32 else tl.uint64
        SIGN: tl.constexpr = 31 if RESCALE == 4 else 63
        MANTISSA: tl.constexpr = 23 if RESCALE == 4 else 52
        BIAS: tl.constexpr = 127 if RESCALE == 4 else 1023
        TARGET: tl.constexpr = 127 + 100 if RESCALE == 4 else 1023 + 900  # exponent after rescaling
        scaled_ptr += row * 2 * pitch
        limits_ptr += row * 3
        low = tl.zeros([BLOCK], dtype) + tl.load(limits_ptr)
        high = tl.zeros([BLOCK], dtype) + tl.load(limits_ptr + 1)
        start = (tl.full([BLOCK], TARGET, word) << MANTISSA).to(dtype, bitcast=True)
        for _ in range(iterations):
            x = 0.5 * (low + high)
            before = tl.zeros([BLOCK], dtype)
            now = start
            below = tl.zeros([BLOCK], word)
            for first in range(0, pitch, RESCALE):
                for k in tl.static_range(RESCALE):
                    d = tl.load(scaled_ptr + first + k)
                    square = tl.load(scaled_ptr + pitch + first + k)
                    following = (d - x) * now - before * square
                    below += (following.to(word, bitcast=True) ^ now.to(word, bitcast=True)) >> SIGN
                    before = now
                    now = following
                exponent = tl.maximum(tl.abs(now), tl.abs(before)).to(word, bitcast=True) >> MANTISSA
                # in float32 2^100 may shrink below 2^-27 in four steps, and the factor exceed the range
                factor = tl.minimum(TARGET + BIAS - exponent, 2 * BIAS).to(word)
                factor = (factor << MANTISSA).to(dtype, bitcast=True)
                now *= factor
                before *= factor
            left = below > wanted.to(word)
            low = tl.where(left, low, x)
            high = tl.where(left, x, high)
        value = 0.5 * (low + high) * tl.load(limits_ptr + 2)
        tl.store(values_ptr + row * r + wanted, value, mask=wanted < r)


def sturm(d: Tensor, e: Tensor) -> Tensor:
    """Computes all eigenvalues of symmetric tridiagonal matrices.

    Args:
        d: (..., r), diagonals, float32 or float64. Not modified.
        e: (..., r - 1), off-diagonals of either sign, like d. Not modified.

    Returns:
        (..., r), ascending, the dtype of d.

    Accuracy:
        Each within 2^-28 (float32: and eps / 2 of rounding) or 2^-53 (float64) of |T| plus a few eps |T|, of an
        eigenvalue of T. A matrix that holds NaN or Inf gives NaN and leaves the others as they are.

    Raises:
        ValueError: other dtypes, or shapes that do not belong together.
    """
    for name, t in (("d", d), ("e", e)):
        if not isinstance(t, Tensor) or t.dtype not in ITERATIONS or t.ndim < 1:
            got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"sturm: expected float32 or float64 of shape (..., r), got {name}={got}. Convert it.")
    if d.shape[-1] < 1 or e.shape != (*d.shape[:-1], d.shape[-1] - 1) or e.dtype != d.dtype or e.device != d.device:
        raise ValueError(
            f"sturm: expected e one shorter than d {tuple(d.shape)}, of its dtype and device, got "
            f"e={tuple(e.shape)} {e.dtype} on {e.device}. Pass the off-diagonal."
        )
    if not d.numel() or kernels.backend_of("sturm", d) is not Backend.TRITON:
        return sturm_ref(d, e)
    *batch, r = d.shape
    d = d.detach().reshape(-1, r)
    e = e.detach().reshape(-1, r - 1) if r > 1 else d
    B, pitch = d.shape[0], triton.cdiv(r, PADDED_TO) * PADDED_TO
    scaled, limits, values = d.new_empty(B, 2, pitch), d.new_empty(B, 3), d.new_empty(*batch, r)
    few = B * triton.cdiv(r, BLOCK) <= SCHEDULERS * kernels.multiprocessors(d.device)
    block = BLOCK // 2 if few else BLOCK
    with torch.cuda.device_of(d):
        launch = Launcher(d_ptr=d, e_ptr=e, scaled_ptr=scaled, limits_ptr=limits, values_ptr=values)
        sizes = {"r": r, "pitch": pitch}
        strides = {"stride_d": d.stride(0), "step_d": d.stride(1), "stride_e": e.stride(0), "step_e": e.stride(1)}
        launch(_scale_kernel, (B,), **sizes, **strides, BLOCK=SCALE_BLOCK, num_warps=4)
        search = {"iterations": ITERATIONS[d.dtype], "RESCALE": RESCALE[d.dtype], "BLOCK": block, "num_warps": 1}
        launch(_sturm_kernel, (B, triton.cdiv(r, block)), **sizes, **search)
    return values


def sturm_ref(d: Tensor, e: Tensor) -> Tensor:
    """`sturm` in plain torch: the eigenvalues of the full matrix."""
    T = torch.diag_embed(d.detach()) + torch.diag_embed(e.detach(), 1) + torch.diag_embed(e.detach(), -1)
    finite = T.isfinite().all(-1).all(-1)[..., None]
    return torch.where(finite, torch.linalg.eigvalsh(torch.where(finite[..., None], T, 0.0)), torch.nan)
