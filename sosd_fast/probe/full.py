"""All singular values of matrices that are measured together."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportConstantRedefinition=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sosd_fast.kernels.distribution import Distribution, singular_distribution
from sosd_fast.probe.measurement import FullValues, Kind, of_each
from sosd_fast.probe.state import MatrixState
from sosd_fast.spectra.bounds import theory_bound
from sosd_fast.spectra.precision import Method
from sosd_fast.spectra.svdvals import mixes_shapes, spectra


class FullTensors(NamedTuple):
    """What is computed of B matrices where they are, float64; but for S as `FullValues` has them, in its order."""

    S: Tensor  # (B, r) descending; the others (B,)
    sd_error: Tensor
    nuclear_norm: Tensor
    frobenius_norm: Tensor
    sigma_max: Tensor
    sigma_min: Tensor
    stable_rank: Tensor
    effective_rank: Tensor
    spectral_entropy: Tensor
    participation_ratio: Tensor
    cosine: Tensor | None  # to the references
    sd_variation: Tensor | None  # since the last spectra
    sd_variation_topk: Tensor | None  # what of it lies in the k leading values
    theory_bound: Tensor | None  # on the variation, by the size of the update


_SUMMARIES = tuple(name for name in FullTensors._fields if name in Distribution._fields)
_CHANGES = 3  # the last fields: of a change since the last spectra


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
        before = _stack([t.S for t in states], device)
        # The precision is chosen by spectra on the host: to read them from a device would wait for it.
        known = before if device.type == "cpu" or shards else _stack([t.spectrum for t in states], device="cpu")
        if shards:
            result = shards.spectra([t.place for t in states], Method.BIDIAG64 if strict else method, known)
        else:
            weights = [W.double() for W in matrices] if strict else matrices
            result = spectra(weights, "exact" if strict else method, known)
        compared = [t.reference is not None for t in states]
        references = None
        if any(compared):  # NaN stands for a reference that a matrix does not have
            missing = None if all(compared) else torch.full_like(result.S[0], torch.nan)
            references = _stack([missing if t.reference is None else t.reference for t in states], device)
        d = singular_distribution(result.S, before, references)
        variation = variation_topk = bound = None
        if before is not None:
            sums, k_leading = before.sum(-1, keepdim=True), min(k, result.S.shape[1])
            variation = d.variation_l2
            variation_topk = torch.linalg.vector_norm(d.sd[:, :k_leading] - before[:, :k_leading] / sums, dim=-1)
            earlier = [t.W for t in states if t.W is not None]
            if len(earlier) == len(states):
                moved = torch.stack([
                    torch.linalg.vector_norm(W.float() - W_before, dtype=torch.float64)
                    for W, W_before in zip(matrices, earlier, strict=True)
                ])  # fmt: skip
                moved = shards.sum(moved.square()).sqrt() if shards else moved
                bound = theory_bound(moved, torch.maximum(sums[:, 0], d.nuclear_norm), result.S.shape[1])
        consecutive = [t.S_step is not None and step - t.S_step == every for t in states]
        for t, W, S in zip(states, matrices, result.S, strict=True):
            t.hand_on_full(W, S, step)
        summaries: dict[str, Any] = {name: getattr(d, name) for name in _SUMMARIES}
        tensors = FullTensors(
            S=result.S,
            sd_error=result.sd_error,
            sd_variation=variation,
            sd_variation_topk=variation_topk,
            theory_bound=bound,
            **summaries,
        )
        return cls(states, k, every, tensors, result.methods, compared, consecutive)

    def read(self, host: Sequence[Tensor | None]) -> list[FullValues | Exception]:
        """Returns the values of each matrix, or what was raised for it, from the tensors on the host."""
        found = FullTensors._make(host)
        S = found.S.numpy().copy()  # the record's own: neither the probe's state nor pinned memory
        k = min(self.k, S.shape[1])
        none: list[Any] = [None] * len(S)
        known: list[list[Any]] = [none if column is None else column.tolist() for column in found[1:]]
        rows: list[tuple[Any, ...]] = list(zip(*known, strict=True))
        leading: list[list[float]] = S[:, :k].tolist()

        def values(j: int) -> FullValues:
            *own, cosine = rows[j][:-_CHANGES]
            moved = rows[j][-_CHANGES:] if self.consecutive[j] else (None,) * _CHANGES
            interval = None if moved[0] is None else self.every
            own += [cosine if self.compared[j] else None, interval, *moved]
            return FullValues(str(self.methods[j]), S[j], tuple(leading[j]), *own)

        return of_each(len(self.states), values)


def _stack(spectra: list[Tensor | None], device: torch.device | str) -> Tensor | None:
    """Spectra as rows, (B, r), on a device; None where one is missing."""
    known = [S for S in spectra if S is not None]
    if len(known) != len(spectra):
        return None
    whole = known[0]._base  # of those that were computed together, the last time
    r = known[0].shape[-1]
    if whole is not None and whole.shape == (len(known), r) and whole.is_contiguous():
        first = whole.storage_offset()
        if all(S._base is whole and S.storage_offset() == first + i * r for i, S in enumerate(known)):
            return whole.to(device)
    return torch.stack(known).to(device)
