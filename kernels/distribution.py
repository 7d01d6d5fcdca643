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
        All sums are float64, and so is the subtraction: the variation is that of the given values to 1e-15. What is
        lost is the rounding of S itself, at most 3e-8 * |SD|_2 in float32. A zero spectrum has no distribution and
        gives NaN, as does one that holds NaN.

    Raises:
        ValueError: for other dtypes, an empty spectrum, or shapes that differ.
    """
    _check("S", S, S)
    for name, other in (("previous", previous), ("reference", reference)):
        if other is not None:
            _check(name, other, S)
    if S.device.type != "cpu":
        return singular_distribution_ref(S, previous, reference)
    if kernels._C is None:
        kernels.warn_no_extension()
        return singular_distribution_ref(S, previous, reference)

    rows = (t if t is None else t.detach().to(S.dtype).reshape(-1, S.shape[-1]) for t in (S, previous, reference))
    S2, previous2, reference2 = (t if t is None else t.contiguous().numpy() for t in rows)
    sd = torch.empty_like(S, memory_format=torch.contiguous_format, requires_grad=False)
    statistics = torch.empty(S2.shape[0], len(Distribution._fields) - 1, dtype=torch.float64)
    kernels._C.singular_distribution(S2, previous2, reference2, sd.view(S2.shape).numpy(), statistics.numpy())
    columns = [column.reshape(S.shape[:-1]) for column in statistics.unbind(1)]
    if previous is None:
        columns[:3] = [None] * 3
    if reference is None:
        columns[3] = None
    return Distribution(sd, *columns)


def singular_distribution_ref(S: Tensor, previous=None, reference=None) -> Distribution:
    """`singular_distribution` in plain torch, on any device."""
    x = S.detach().double()
    nuclear_norm = x.sum(-1)
    p = x / nuclear_norm.unsqueeze(-1)
    l2 = l1 = linf = cosine = None
    if previous is not None:
        q = previous.detach().double()
        d = p - q / q.sum(-1, keepdim=True)
        l2, l1, linf = d.norm(dim=-1), d.abs().sum(-1), d.abs().amax(-1)
    square = p.square().sum(-1)
    if reference is not None:
        q = reference.detach().double()
        cosine = (p * q).sum(-1) / (square * q.square().sum(-1)).sqrt()
    entropy = torch.special.entr(p).sum(-1)
    return Distribution(
        sd=p.to(S.dtype),
        variation_l2=l2,
        variation_l1=l1,
        variation_linf=linf,
        cosine=cosine,
        nuclear_norm=nuclear_norm,
        frobenius_norm=torch.where(nuclear_norm == 0, nuclear_norm, nuclear_norm * square.sqrt()),
        sigma_max=x.amax(-1),
        sigma_min=x.amin(-1),
        stable_rank=square / p.amax(-1).square(),
        effective_rank=entropy.exp(),
        spectral_entropy=entropy,
        participation_ratio=square.square() / p.pow(4).sum(-1),
    )


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
