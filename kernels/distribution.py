r"""Fused normalize-and-diff of singular distributions.

With p = S / sum(S), q = previous / sum(previous):  variation = p - q  (L2, L1, Linf),
entropy = -sum p log p,  effective rank = exp(entropy),  stable rank = sum p^2 / max(p)^2,
participation ratio = (sum p^2)^2 / sum p^4,  cosine = <S, reference> / (|S| |reference|).

Source: Roy & Vetterli, "The effective rank" (EUSIPCO 2007); arXiv 2605.26489 for the singular distribution.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, tl, triton

BLOCK = 2048  # values at once; longer spectra take several turns, and are read three times
PER_WARP = 128  # values to a warp; half of it for short spectra

if triton is not None:

    @triton.jit
    def _largest(a, b, c, d, e, f, g, h):
        return tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)

    @triton.jit
    def _totals(a, b, c, d, e, f):
        return a + d, b + e, c + f

    @triton.jit
    def _combined(l2, l1, linf, product, square, fourth, entropy, a, b, c, d, e, f, g):
        return l2 + a, l1 + b, tl.maximum(linf, c), product + d, square + e, fourth + f, entropy + g

    @triton.jit
    def _powers_of_two(x):
        """Half the power of two at or below a float64 x >= 0, and its inverse, a normal number: 0 for NaN and Inf."""
        EXPONENT: tl.constexpr = 0x7FF0000000000000
        power = (x.to(tl.int64, bitcast=True) & EXPONENT).to(tl.float64, bitcast=True)
        power = tl.maximum(power, 2.2250738585072014e-308)
        return 0.5 * power, (EXPONENT - power.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)

    @triton.jit
    def _quotient(x, divisor, inverse):
        """Divides by means of the rounded inverse; with what the product lacks, as a division rounds."""
        product = x * inverse
        return tl.fma(tl.fma(-product, divisor, x), inverse, product)

    @triton.jit
    def _singular_distribution_kernel(
        S_ptr,  # (B, r)
        previous_ptr,  # (B, r), S where there is none
        reference_ptr,  # (B, r), S where there is none
        sd_ptr,  # (B, r)
        statistics_ptr,  # (B, 13) float64, of which the last is not written
        r,
        LONG: tl.constexpr,  # r > BLOCK; where not, each loop is one turn, and the compiler merges their loads
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        S_ptr += row * r
        previous_ptr += row * r
        reference_ptr += row * r
        sd_ptr += row * r
        lanes = tl.arange(0, BLOCK)
        end = r if LONG else BLOCK
        zero = tl.full([], 0.0, tl.float64)

        # Each spectrum is divided by a power of two, so that no sum and no square leaves the range of float64.
        largest, negative, largest_previous, largest_reference = zero, zero - float("inf"), zero, zero
        for first in range(0, end, BLOCK):
            i = first + lanes
            x = tl.load(S_ptr + i, mask=i < r, other=0.0).to(tl.float64)
            q = tl.load(previous_ptr + i, mask=i < r, other=0.0).to(tl.float64)
            s = tl.load(reference_ptr + i, mask=i < r, other=0.0).to(tl.float64)
            a, b, c, d = tl.reduce((x, tl.where(i < r, -x, -float("inf")), q, s), 0, _largest)
            largest, negative, largest_previous, largest_reference = _largest(
                largest, negative, largest_previous, largest_reference, a, b, c, d
            )
        power, to_unit = _powers_of_two(largest)
        _, to_unit_previous = _powers_of_two(largest_previous)
        _, to_unit_reference = _powers_of_two(largest_reference)

        total, total_previous, square_reference = zero, zero, zero
        for first in range(0, end, BLOCK):
            i = first + lanes
            x = tl.load(S_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit
            q = tl.load(previous_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit_previous
            s = tl.load(reference_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit_reference
            a, b, c = tl.reduce((x, q, s * s), 0, _totals)
            total, total_previous, square_reference = _totals(total, total_previous, square_reference, a, b, c)
        inverse, inverse_previous = 1.0 / total, 1.0 / total_previous

        l2, l1, linf, product, square, fourth, entropy = zero, zero, zero, zero, zero, zero, zero
        for first in range(0, end, BLOCK):
            i = first + lanes
            x = tl.load(S_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit
            q = tl.load(previous_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit_previous
            s = tl.load(reference_ptr + i, mask=i < r, other=0.0).to(tl.float64) * to_unit_reference
            p = _quotient(x, total, inverse)
            tl.store(sd_ptr + i, p.to(sd_ptr.dtype.element_ty), mask=i < r)
            moved = tl.abs(p - _quotient(q, total_previous, inverse_previous))
            pp = p * p
            log = tl.log(tl.where(p == 0, 1.0, p))
            a, b, c, d, e, f, g = tl.reduce((moved * moved, moved, moved, p * s, pp, pp * pp, -p * log), 0, _combined)
            l2, l1, linf, product, square, fourth, entropy = _combined(
                l2, l1, linf, product, square, fourth, entropy, a, b, c, d, e, f, g
            )

        # maximum drops NaN; the sums keep it
        linf = tl.where(l1 == l1, linf, l1)
        largest = tl.where(total == total, largest, total)
        smallest = tl.where(total == total, -negative, total)
        p_max = _quotient(largest * to_unit, total, inverse)
        # By lanes: every warp issues this, and one root and one quotient of all statistics are fewer instructions.
        k = tl.arange(0, 16)
        root = tl.sqrt(tl.where(k == 0, l2, tl.where(k == 3, square * square_reference, square)))
        frobenius = tl.where(total == 0, 0.0, total * root)
        value = tl.where(k == 0, root, tl.where(k == 1, l1, tl.where(k == 2, linf, tl.where(k == 3, product, total))))
        value = tl.where(k == 5, frobenius, tl.where(k == 6, largest, tl.where(k == 7, smallest, value)))
        value = tl.where(k == 8, square, tl.where(k == 9, tl.exp(entropy), tl.where(k == 10, entropy, value)))
        value = tl.where(k == 11, square * square, value)
        divisor = tl.where(k == 3, root, tl.where(k == 8, p_max * p_max, tl.where(k == 11, fourth, 1.0)))
        value = value / divisor * tl.where((k == 4) | (k == 5), power, 1.0)
        tl.store(statistics_ptr + row * 13 + k, value, mask=k < 12)


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
    sd = torch.empty_like(S, memory_format=torch.contiguous_format, requires_grad=False)
    found = Distribution(sd, *statistics_of(S, previous, reference, sd=sd).unbind(-1)[:-1])
    if previous is None:
        found = found._replace(variation_l2=None, variation_l1=None, variation_linf=None)
    if reference is None:
        found = found._replace(cosine=None)
    return found


STATISTICS = (*Distribution._fields[1:], "variation_topk")


def statistics_of(
    S: Tensor,
    previous: Tensor | None = None,
    reference: Tensor | None = None,
    k: int = 0,
    sd: Tensor | None = None,
) -> Tensor:
    """The statistics that `singular_distribution` returns, of tensors that need no check, in one tensor.

    Args:
        S: as there, and the next two.
        previous: its variations are NaN or anything without.
        reference: its cosine is NaN or anything without.
        k: of how many leading values the part in the variation is asked for, of descending spectra.
        sd: shaped like S, contiguous, takes the distributions.

    Returns:
        (..., 13) float64, in the order of `STATISTICS`: after those of `Distribution` what of the L2 variation lies in
        the k leading values, NaN or anything where that is not asked for.
    """
    backend = kernels.backend_of("singular_distribution", S)
    if backend is Backend.CPP:
        rows = S.shape if S.ndim == 2 else (-1, S.shape[-1])
        spectra = (
            t if t is None else t.detach().to(S.dtype).reshape(rows).contiguous() for t in (S, previous, reference, sd)
        )
        statistics = torch.empty(*S.shape[:-1], len(STATISTICS), dtype=torch.float64, device="cpu")
        kernels._C.singular_distribution(*spectra, statistics.view(-1, len(STATISTICS)), k)
        return statistics
    if backend is Backend.TORCH:
        return statistics_of_ref(S, previous, reference, k, sd)
    if sd is None:
        sd = torch.empty_like(S, memory_format=torch.contiguous_format, requires_grad=False)
    statistics = torch.empty(*S.shape[:-1], len(STATISTICS), dtype=torch.float64, device=S.device)
    _launch(S, previous, reference, sd, statistics)
    if k and previous is not None:
        before = previous.detach().double()
        moved = sd[..., :k].double() - before[..., :k] / before.sum(-1, keepdim=True)
        torch.linalg.vector_norm(moved, dim=-1, out=statistics[..., -1])
    return statistics


def _launch(S: Tensor, previous: Tensor | None, reference: Tensor | None, sd: Tensor, statistics: Tensor):
    if not S.numel():
        return
    r = S.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(r))
    S = S.contiguous()
    with torch.cuda.device_of(S):
        _singular_distribution_kernel[(S.numel() // r,)](
            S,
            S if previous is None else previous.contiguous(),
            S if reference is None else reference.contiguous(),
            sd,
            statistics,
            r,
            LONG=r > BLOCK,
            BLOCK=block,
            num_warps=min(max(block // (PER_WARP if block > 256 else PER_WARP // 2), 1), 16),
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


def statistics_of_ref(S: Tensor, previous=None, reference=None, k: int = 0, sd: Tensor | None = None) -> Tensor:
    """`statistics_of` in plain torch, on any device."""
    found = singular_distribution_ref(S, previous, reference)
    if sd is not None:
        sd.copy_(found.sd)
    topk = None
    if k and previous is not None:
        (p, _), (q, _) = _near_one(S), _near_one(previous)
        moved = p / p.sum(-1, keepdim=True) - q / q.sum(-1, keepdim=True)
        topk = moved[..., :k].norm(dim=-1)
    unknown = torch.full_like(found.nuclear_norm, torch.nan)
    return torch.stack([unknown if t is None else t for t in (*found[1:], topk)], dim=-1)


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
