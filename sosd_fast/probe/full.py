"""All singular values of matrices that are measured together."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportConstantRedefinition=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sosd_fast.kernels.distribution import STATISTICS, statistics_of
from sosd_fast.probe.measurement import FullValues, Kind, of_each
from sosd_fast.probe.state import MatrixState, Row
from sosd_fast.spectra.bounds import theory_bound
from sosd_fast.spectra.precision import Method
from sosd_fast.spectra.svdvals import mixes_shapes, spectra


class FullTensors(NamedTuple):
    """What is computed of B matrices where they are, float64."""

    S: Tensor  # (B, r) descending
    sd_error: Tensor  # (B,)
    statistics: Tensor  # (B, 13), in the order of `STATISTICS`
    theory_bound: Tensor | None  # (B,), on the variation, by the size of the update


_NUCLEAR_NORM = STATISTICS.index("nuclear_norm")


@dataclass(slots=True)
class FullGroup:
    """A measurement of all singular values of B matrices that was launched."""

    states: list[MatrixState]
    k: int
    every: int
    tensors: FullTensors
    methods: tuple[str, ...]  # by which each spectrum was computed
    compared: list[bool]  # whether each matrix has a reference
    consecutive: list[bool]  # whether the last spectrum of each is that of the last step that is measured

    kind: Kind = "full"

    @staticmethod
    def together(state: MatrixState) -> bool:
        """Whether a matrix is measured with those of other shapes that have its short side."""
        exact = state.method in ("exact", "exact64")
        return state.shards is None and mixes_shapes(state.matrix.parameter, Method.EXACT if exact else state.method)

    @classmethod
    def launch(cls, states: list[MatrixState], step: int, every: int, k: int) -> "FullGroup":
        """Measures matrices of one short side, dtype, device and method, and hands their spectra on to the next step.

        They are of one shape where `together` says no. On a CUDA device nothing here waits for the device.
        """
        matrices, shards = [t.tensor() for t in states], states[0].shards
        device = matrices[0].device
        method, strict = states[0].method, states[0].method == "exact64"
        before = _together([t.last for t in states], device)
        # The precision is chosen by spectra on the host: to read them from a device would wait for it.
        known = before if device.type == "cpu" or shards else _on_host(states)
        if shards:
            result = shards.spectra([t.place for t in states], Method.BIDIAG64 if strict else method, known)
        else:
            weights = [W.double() for W in matrices] if strict else matrices
            result = spectra(weights, "exact" if strict else method, known)
        compared = [t.reference is not None for t in states]
        references = None
        if any(compared):
            missing = None if all(compared) else Row(torch.full_like(result.S[:1], torch.nan), 0)
            references = _together([t.reference or missing for t in states], device)
        statistics = statistics_of(result.S, before, references, k)
        bound = None
        earlier = [t.W for t in states if t.W is not None]
        if before is not None and len(earlier) == len(states):
            moved = torch.stack([
                torch.linalg.vector_norm(W.float() - W_before, dtype=torch.float64)
                for W, W_before in zip(matrices, earlier, strict=True)
            ])  # fmt: skip
            moved = shards.sum(moved.square()).sqrt() if shards else moved
            larger = torch.maximum(before.sum(-1), statistics[:, _NUCLEAR_NORM])
            bound = theory_bound(moved, larger, result.S.shape[1])
        consecutive = [t.S_step is not None and step - t.S_step == every for t in states]
        for i, (t, W) in enumerate(zip(states, matrices, strict=True)):
            t.hand_on_full(W, Row(result.S, i), step)
        tensors = FullTensors(result.S, result.sd_error, statistics, bound)
        return cls(states, k, every, tensors, result.methods, compared, consecutive)

    def read(self, host: Sequence[Tensor | None]) -> list[FullValues | Exception]:
        """Returns the values of each matrix, or what was raised for it, from the tensors on the host."""
        found = FullTensors._make(host)
        S = found.S.numpy().copy()  # the record's own: neither the probe's state nor pinned memory
        k = min(self.k, S.shape[1])
        leading: list[list[float]] = S[:, :k].tolist()
        errors: list[float] = found.sd_error.tolist()
        rows: list[list[float]] = found.statistics.tolist()
        bounds: list[float] | None = None if found.theory_bound is None else found.theory_bound.tolist()

        def values(j: int) -> FullValues:
            variation, _, _, cosine, *summaries, variation_topk = rows[j]
            own: list[Any] = [str(self.methods[j]), S[j], tuple(leading[j]), errors[j], *summaries]
            own.append(cosine if self.compared[j] else None)
            if self.consecutive[j]:
                own += self.every, variation, variation_topk, None if bounds is None else bounds[j]
            return FullValues(*own)

        return of_each(len(self.states), values)


def _together(rows: list[Row | None], device: torch.device) -> Tensor | None:
    """Spectra as rows, (B, r), on a device; None where one is missing."""
    known = [row for row in rows if row is not None]
    if len(known) != len(rows):
        return None
    whole = known[0].whole  # of those that were computed together, the last time
    if len(whole) == len(known) and all(row.whole is whole and row.at == i for i, row in enumerate(known)):
        return whole.to(device)
    return torch.stack([row.tensor for row in known]).to(device)


def _on_host(states: list[MatrixState]) -> Tensor | None:
    """The last spectra that have reached the host, as rows; None where one is missing."""
    known = [t.spectrum for t in states if t.spectrum is not None]
    return torch.from_numpy(np.stack(known)) if len(known) == len(states) else None
