"""All singular values of matrices that are measured together."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportConstantRedefinition=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sosd_fast.kernels.distribution import singular_distribution
from sosd_fast.probe.measurement import FullValues, Kind, of_each
from sosd_fast.probe.state import MatrixState
from sosd_fast.spectra.bounds import theory_bound
from sosd_fast.spectra.precision import Method
from sosd_fast.spectra.svdvals import spectra


class FullTensors(NamedTuple):
    """What is computed of B matrices where they are, float64."""

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
    variation: Tensor | None  # of the singular distribution since the last spectra
    variation_topk: Tensor | None  # what of it lies in the k leading values
    bound: Tensor | None  # on the variation, by the size of the update


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

    @classmethod
    def launch(cls, states: list[MatrixState], step: int, every: int, k: int) -> "FullGroup":
        """Measures matrices of one short side, dtype, device and method, and hands their spectra on to the next step.

        On the host they are also of one shape. On a CUDA device nothing here waits for the device.
        """
        matrices, rows = [t.tensor() for t in states], states[0].rows
        device = matrices[0].device
        method, strict = states[0].method, states[0].method == "exact64"
        before = _stack([t.S for t in states], device)
        # The precision is chosen by spectra on the host: to read them from a device would wait for it.
        known = before if device.type == "cpu" or rows else _stack([t.spectrum for t in states], device="cpu")
        if rows:
            result = rows.spectra([t.place for t in states], Method.BIDIAG64 if strict else method, known)
        else:
            weights = [W.double() for W in matrices] if strict else matrices
            result = spectra(weights, "exact" if strict else method, known)
        compared = [t.reference is not None for t in states]
        references = None
        if any(compared):  # NaN stands for a reference that a matrix does not have
            missing = torch.full_like(result.S[0], torch.nan)
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
                moved = rows.sum(moved.square()).sqrt() if rows else moved
                bound = theory_bound(moved, torch.maximum(sums[:, 0], d.nuclear_norm), result.S.shape[1])
        consecutive = [t.S_step is not None and step - t.S_step == every for t in states]
        for t, W, S in zip(states, matrices, result.S, strict=True):
            t.hand_on_full(W, S, step)
        tensors = FullTensors(
            result.S,
            result.sd_error,
            d.nuclear_norm,
            d.frobenius_norm,
            d.sigma_max,
            d.sigma_min,
            d.stable_rank,
            d.effective_rank,
            d.spectral_entropy,
            d.participation_ratio,
            d.cosine if references is not None else None,
            variation,
            variation_topk,
            bound,
        )
        return cls(states, k, every, tensors, result.methods, compared, consecutive)

    def read(self, host: Sequence[Tensor | None]) -> list[FullValues | Exception]:
        """Returns the values of each matrix, or what was raised for it, from the tensors on the host."""
        found = FullTensors._make(host)
        S = found.S.numpy().copy()  # the record's own: neither the probe's state nor pinned memory
        k = min(self.k, S.shape[1])
        columns: list[Any] = [None if column is None else column.tolist() for column in found[1:]]
        rows: list[tuple[float, ...]] = list(zip(*columns[:9], strict=True))  # of sd_error and the summaries
        cosine, variation, variation_topk, bound = columns[9:]

        def values(j: int) -> FullValues:
            full = FullValues(
                str(self.methods[j]),
                S[j],
                tuple(S[j, :k].tolist()),
                *rows[j],  # pyright: ignore[reportArgumentType]
                cosine=cosine[j] if cosine and self.compared[j] else None,
            )
            if self.consecutive[j] and variation and variation_topk:
                full.interval = self.every
                full.sd_variation, full.sd_variation_topk = variation[j], variation_topk[j]
                full.theory_bound = bound[j] if bound else None
            return full

        return of_each(len(self.states), values)


def _stack(spectra: list[Tensor | None], device: torch.device | str) -> Tensor | None:
    known = [S for S in spectra if S is not None]
    return torch.stack(known).to(device) if len(known) == len(spectra) else None
