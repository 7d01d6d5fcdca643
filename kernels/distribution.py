r"""Fused normalize-and-diff of singular distributions.

With p = S / sum(S), q = previous / sum(previous):  variation = p - q  (L2, L1, Linf),
entropy = -sum p log p,  effective rank = exp(entropy),  stable rank = sum p^2 / max(p)^2,
participation ratio = (sum p^2)^2 / sum p^4,  cosine = <S, reference> / (|S| |reference|).

Source: Roy & Vetterli, "The effective rank" (EUSIPCO 2007); arXiv 2605.26489 for the singular distribution.
"""

# pyright: reportPossiblyUnboundVariable=false
# Triton resolves a branch on a constexpr when it compiles: what one branch names, only its own cases use.

from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton

BLOCK = 1024  # values at once; longer spectra take several turns

if triton is not None:

    @triton.jit
    def _power_of_two(x):
        """The power of two at or below a float64 x >= 0, by its exponent's bits; Inf for NaN and Inf."""
        power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        return tl.maximum(power, 2.2250738585072014e-308)

    @triton.jit
    def _largest(ptr, step, r, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        largest = tl.zeros([BLOCK], tl.float64)
        for first in range(0, r, BLOCK):
            i = first + lanes
            largest = tl.maximum(largest, tl.load(ptr + i * step, mask=i < r, other=0.0).to(tl.float64))
        return tl.max(largest, axis=0)

    @triton.jit
    def _singular_distribution_kernel(
        S_ptr,  # (B, r), by strides
        previous_ptr,
        reference_ptr,
        sd_ptr,  # (B, r)
        statistics_ptr,  # (B, 12) float64
        r,
        stride_S,
        step_S,
        stride_previous,
        step_previous,
        stride_reference,
        step_reference,
        HAS_PREVIOUS: tl.constexpr,
        HAS_REFERENCE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        S_ptr += row * stride_S
        previous_ptr += row * stride_previous
        reference_ptr += row * stride_reference
        lanes = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.float64)
        total, total_previous = zeros, zeros
        # Each spectrum is divided by a power of two, so that no sum and no square leaves the range of float64.
        sigma_max = _largest(S_ptr, step_S, r, BLOCK)
        power = _power_of_two(sigma_max)
        if HAS_PREVIOUS:
            power_previous = _power_of_two(_largest(previous_ptr, step_previous, r, BLOCK))
        if HAS_REFERENCE:
            power_reference = _power_of_two(_largest(reference_ptr, step_reference, r, BLOCK))
        smallest = tl.full([BLOCK], float("inf"), tl.float64)
        for first in range(0, r, BLOCK):
            i = first + lanes
            inside = i < r
            x = tl.load(S_ptr + i * step_S, mask=inside, other=0.0).to(tl.float64)
            total += x / power
            smallest = tl.where(inside, tl.minimum(smallest, x), smallest)
            if HAS_PREVIOUS:
                q = tl.load(previous_ptr + i * step_previous, mask=inside, other=0.0).to(tl.float64)
                total_previous += q / power_previous
        sum_S = tl.sum(total, axis=0)
        sum_previous = tl.sum(total_previous, axis=0)

        squares, fourths, entropies, l2, l1, products, squares_reference = (
            zeros,
            zeros,
            zeros,
            zeros,
            zeros,
            zeros,
            zeros,
        )
        linf = zeros
        for first in range(0, r, BLOCK):
            i = first + lanes
            inside = i < r
            x = tl.load(S_ptr + i * step_S, mask=inside, other=0.0).to(tl.float64)
            p = x / power / sum_S
            tl.store(sd_ptr + row * r + i, p.to(sd_ptr.dtype.element_ty), mask=inside)
            p = tl.where(inside, p, 0.0)  # a zero spectrum: 0 / 0 beyond its end too
            square = p * p
            squares += square
            fourths += square * square
            entropies -= tl.where(p == 0, 0.0, p * tl.log(tl.where(p == 0, 1.0, p)))
            if HAS_PREVIOUS:
                q = tl.load(previous_ptr + i * step_previous, mask=inside, other=0.0).to(tl.float64)
                d = tl.abs(p - tl.where(inside, q / power_previous / sum_previous, 0.0))
                l2 += d * d
                l1 += d
                linf = tl.maximum(linf, d)
            if HAS_REFERENCE:
                q = tl.load(reference_ptr + i * step_reference, mask=inside, other=0.0).to(tl.float64)
                q = q / power_reference
                products += p * q
                squares_reference += q * q

        # maximum and minimum drop NaN; the sums keep it
        sum_l1 = tl.sum(l1, axis=0)
        sigma_max = tl.where(sum_S == sum_S, sigma_max, sum_S)
        sigma_min = tl.where(sum_S == sum_S, tl.min(smallest, axis=0), sum_S)
        square = tl.sum(squares, axis=0)
        entropy = tl.sum(entropies, axis=0)
        p_max = sigma_max / power / sum_S
        out = statistics_ptr + row * 12
        if HAS_PREVIOUS:
            tl.store(out, tl.sqrt(tl.sum(l2, axis=0)))
            tl.store(out + 1, sum_l1)
            tl.store(out + 2, tl.where(sum_l1 == sum_l1, tl.max(linf, axis=0), sum_l1))
        if HAS_REFERENCE:
            tl.store(out + 3, tl.sum(products, axis=0) / tl.sqrt(square * tl.sum(squares_reference, axis=0)))
        tl.store(out + 4, sum_S * power)
        tl.store(out + 5, tl.where(sum_S == 0, 0.0, sum_S * tl.sqrt(square) * power))
        tl.store(out + 6, sigma_max)
        tl.store(out + 7, sigma_min)
        tl.store(out + 8, square / (p_max * p_max))
        tl.store(out + 9, tl.exp(entropy))
        tl.store(out + 10, entropy)
        tl.store(out + 11, square * square / tl.sum(fourths, axis=0))


class Distribution(NamedTuple):
    """Singular distributions and their summaries, one per spectrum; shapes follow the leading dimensions of S."""

    sd: Tensor  # (..., r), the dtype of S; everything below is (...,) float64
    variation_l2: Tensor | None
    variation_l1: Tensor | None
    variation_linf: Tensor | None
    cosine: Tensor | None
    nuclear_norm: Tensor
    frobenius_norm: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    stable_rank: Tensor
    effective_rank: Tensor
    spectral_entropy: Tensor
    participation_ratio: Tensor


def singular_distribution(S: Tensor, previous: Tensor | None = None, reference: Tensor | None = None) -> Distribution:
    """Normalises spectra to sum 1, measures their change and summarises them, in one pass.

    Args:
        S: singular values, (..., r), float32 or float64, non-negative, any order. Not modified.
        previous: spectra or distributions to take the variation from, shaped like S (the scale does not matter).
        reference: spectra or distributions to take the cosine to, shaped like S (the scale does not matter).

    Returns:
        A `Distribution`. The variations are None without `previous`, the cosine without `reference`.

    Accuracy:
        All sums are float64, and so is the subtraction: the variation is that of the given values to 1e-15, whatever
        their size. What is lost is the rounding of S itself, at most 3e-8 * |SD|_2 in float32. A zero spectrum has no
        distribution and gives NaN; one that holds NaN or Inf gives NaN everywhere. A norm beyond float64 is Inf.

    Raises:
        ValueError: for other dtypes, an empty spectrum, or shapes that differ.
    """
    _check("S", S, S)
    for name, other in (("previous", previous), ("reference", reference)):
        if other is not None:
            _check(name, other, S)
    backend = kernels.backend_of("singular_distribution", S)
    if backend is Backend.TORCH:
        return singular_distribution_ref(S, previous, reference)

    rows = S.detach().reshape(-1, S.shape[-1])
    others = [t if t is None else t.detach().reshape(rows.shape) for t in (previous, reference)]
    sd = torch.empty_like(S, memory_format=torch.contiguous_format, requires_grad=False)
    columns = len(Distribution._fields) - 1
    statistics = torch.empty(*S.shape[:-1], columns, dtype=torch.float64, device=S.device)
    if backend is Backend.TRITON:
        _launch(rows, *others, sd=sd, statistics=statistics)
    else:
        spectra = (t if t is None else t.to(S.dtype).contiguous() for t in (rows, *others))
        kernels._C.singular_distribution(*spectra, sd.view(rows.shape), statistics.view(len(rows), columns))
    found = Distribution(sd, *statistics.unbind(-1))
    if previous is None:
        found = found._replace(variation_l2=None, variation_l1=None, variation_linf=None)
    if reference is None:
        found = found._replace(cosine=None)
    return found


def _launch(S: Tensor, previous: Tensor | None, reference: Tensor | None, sd: Tensor, statistics: Tensor):
    if not S.shape[0]:
        return
    strides = {}
    for name, t in (("S", S), ("previous", previous), ("reference", reference)):
        strides[f"stride_{name}"], strides[f"step_{name}"] = (0, 0) if t is None else t.stride()
    with torch.cuda.device_of(S):
        _singular_distribution_kernel[(S.shape[0],)](
            S_ptr=S,
            previous_ptr=S if previous is None else previous,
            reference_ptr=S if reference is None else reference,
            sd_ptr=sd,
            statistics_ptr=statistics,
            r=S.shape[1],
            **strides,
            HAS_PREVIOUS=previous is not None,
            HAS_REFERENCE=reference is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(S.shape[1])),
            num_warps=4,
        )


def singular_distribution_ref(S: Tensor, previous=None, reference=None) -> Distribution:
    """`singular_distribution` in plain torch, on any device."""
    x, power = _near_one(S)
    total = x.sum(-1)
    p = x / total.unsqueeze(-1)
    l2 = l1 = linf = cosine = None
    if previous is not None:
        q = _near_one(previous)[0]
        d = p - q / q.sum(-1, keepdim=True)
        l2, l1, linf = d.norm(dim=-1), d.abs().sum(-1), d.abs().amax(-1)
    square = p.square().sum(-1)
    if reference is not None:
        q = _near_one(reference)[0]
        cosine = (p * q).sum(-1) / (square * q.square().sum(-1)).sqrt()
    entropy = torch.special.entr(p).sum(-1)
    return Distribution(
        sd=p.to(S.dtype),
        variation_l2=l2,
        variation_l1=l1,
        variation_linf=linf,
        cosine=cosine,
        nuclear_norm=total * power,
        frobenius_norm=torch.where(total == 0, total, total * square.sqrt() * power),
        sigma_max=torch.where(total.isnan(), total, S.detach().amax(-1).double()),
        sigma_min=torch.where(total.isnan(), total, S.detach().amin(-1).double()),
        stable_rank=square / p.amax(-1).square(),
        effective_rank=entropy.exp(),
        spectral_entropy=entropy,
        participation_ratio=square.square() / p.pow(4).sum(-1),
    )


def _near_one(S: Tensor) -> tuple[Tensor, Tensor]:
    """Spectra in float64 divided by powers of two, and those: no sum and no square then leaves its range."""
    x = S.detach().double()
    power = (x.amax(-1).view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp(min=2.0**-1022)
    return x / power.unsqueeze(-1), power


def _check(name: str, value: Tensor, S: Tensor):
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"singular_distribution: expected a float32 or float64 tensor, got {name}={got}. Convert it with .float()."
        )
    if value.ndim < 1 or value.shape[-1] == 0:
        raise ValueError(
            f"singular_distribution: expected at least one singular value, got {name}.shape={tuple(value.shape)}. "
            "Pass spectra of shape (..., r) with r >= 1."
        )
    if value.shape != S.shape or value.device != S.device:
        raise ValueError(
            f"singular_distribution: expected {name} shaped and placed like S, {tuple(S.shape)} on {S.device}, got "
            f"{name}.shape={tuple(value.shape)} on {value.device}. Compare spectra of matrices of one shape."
        )
