"""The k leading singular values of matrices that are measured together."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportConstantRedefinition=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sosd_fast.probe.measurement import Kind, LeadingValues, of_each
from sosd_fast.probe.state import MatrixState
from sosd_fast.spectra.norms import frobenius_norms
from sosd_fast.spectra.products import State, stacked
from sosd_fast.spectra.topk import topk_svdvals

_TINY = 1e-300  # a divisor in place of zero


class LeadingTensors(NamedTuple):
    """What is computed of B matrices where they are."""

    S: Tensor  # (B, k) float64, descending
    residual: Tensor  # (B, k)
    norms: Tensor  # (B,) float64, Frobenius


@dataclass(slots=True)
class LeadingGroup:
    """A measurement of the leading singular values of B matrices that was launched."""

    states: list[MatrixState]
    step: int
    every: int
    tensors: LeadingTensors

    kind: Kind = "leading"

    @classmethod
    def launch(cls, states: list[MatrixState], step: int, every: int, k: int) -> "LeadingGroup":
        """Measures matrices of one shape, dtype and device, and hands their subspaces on to the next step.

        On a CUDA device they need only have a short side in common, and nothing here waits for the device.
        """
        subspaces = [t.subspace for t in states]
        if shards := states[0].shards:
            S, residual, norms, subspaces = shards.topk([t.place for t in states], k, subspaces)
        else:
            S, residual, norms, subspaces = _topk([t.tensor() for t in states], k, subspaces)
        for t, subspace in zip(states, subspaces, strict=True):
            t.hand_on_leading(subspace)
        return cls(states, step, every, LeadingTensors(S.double(), residual, norms))

    def read(self, host: Sequence[Tensor | None]) -> list[LeadingValues | Exception]:
        """Returns the values of each matrix, or what was raised for it, from the tensors on the host.

        The sum of all singular values is not known. For `sd_variation_topk` and `sd_variation_carried` the others are
        taken to be as in the last full spectrum, scaled to their energy now, which is exact.
        """
        found = LeadingTensors._make(host)
        S: NDArray[Any] = found.S.numpy()
        residual: list[list[float]] = found.residual.tolist()
        norms: list[float] = found.norms.tolist()

        def values(j: int) -> LeadingValues:
            norm, top = norms[j], float(S[j, 0])
            # Squares of shares, which stay in range: a norm of 1e200 squared is beyond float64.
            rest = norm * math.sqrt(max(1 - float(((S[j] / norm) ** 2).sum()), 0.0)) if 0 < norm < math.inf else norm
            stable_rank = (norm / top) * (norm / top) if top > 0 else math.nan
            leading = LeadingValues(S[j], rest, norm, top, stable_rank, tuple(residual[j]))
            before, spectrum = self.states[j].leading, self.states[j].spectrum
            if before is not None and spectrum is not None and self.step - before.step == self.every:
                tail = spectrum[len(S[j]) :]
                leading.interval = self.every
                leading.sd_variation_topk, leading.sd_variation_carried, leading.sd_variation_floor = leading_variation(
                    S[j], rest, before.S, before.rest, tail
                )
            return leading

        return of_each(len(self.states), values)


def _topk(
    matrices: list[Tensor], k: int, subspaces: Sequence[State | None]
) -> tuple[Tensor, Tensor, Tensor, list[State]]:
    """Leading values, residuals, Frobenius norms and the subspaces for the next step, of matrices of one group."""
    subspace = stacked(subspaces)
    if subspace is not None:
        subspace = State(*(part.to(matrices[0].device) for part in subspace))
    norms = frobenius_norms(matrices)
    S, residual, subspace = topk_svdvals(matrices, k, state=subspace, norms=norms)
    return S, residual, norms, [State(*parts) for parts in zip(*subspace, strict=True)]


def leading_variation(
    S: NDArray[Any], rest: float, S_before: NDArray[Any], rest_before: float, tail: NDArray[Any]
) -> tuple[float, float, float]:
    """What the leading values of two steps, and the norms of the others, tell of the SD variation.

    Args:
        S: (k,) leading values.
        rest: Frobenius norm of the other values.
        S_before: (k,) leading values of the step before.
        rest_before: Frobenius norm of the other values of the step before.
        tail: (r - k,) the other values of the last full spectrum.

    Returns:
        `sd_variation_topk`, `sd_variation_carried` and `sd_variation_floor` of a `Record`.
    """
    # Each spectrum in units of its largest value, whose squares and sums stay in range; what is returned has no unit.
    shape = tail / max(float(tail.max(initial=0.0)), _TINY)
    shape = shape / max(float(np.linalg.norm(shape)), _TINY)  # of the other values, of norm 1
    unit, unit_before = max(float(S[0]), rest, _TINY), max(float(S_before[0]), rest_before, _TINY)
    S, scale = S / unit, rest / unit
    before, scale_before = S_before / unit_before, rest_before / unit_before
    total, total_before = S.sum() + scale * shape.sum(), before.sum() + scale_before * shape.sum()
    if not (total > 0 and total_before > 0):
        return math.nan, math.nan, math.nan
    head = float(np.linalg.norm(S / total - before / total_before))
    # Whatever the sums are, one spectrum is compared with a multiple of the other: no closer than the best multiple.
    nearest = S * ((S @ before) / max(S @ S, _TINY))
    most = before.sum() + math.sqrt(len(tail)) * scale_before  # the sum, by Cauchy-Schwarz
    carried = math.hypot(head, scale / total - scale_before / total_before)
    return head, carried, float(np.linalg.norm(nearest - before)) / most
