"""What one measurement of a matrix yields: its full spectrum, its leading values, or an audit of the spectrum."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sosd_fast.distributed.sharded import RowShards, cost, shape_of
from sosd_fast.kernels import largest_entry, power_of_two
from sosd_fast.kernels.distribution import singular_distribution
from sosd_fast.matrices import Matrix
from sosd_fast.spectra.bounds import theory_bound
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.spectra.topk import State, stacked, topk_svdvals

_SUMMARIES = (
    "nuclear_norm",
    "frobenius_norm",
    "sigma_max",
    "sigma_min",
    "stable_rank",
    "effective_rank",
    "spectral_entropy",
    "participation_ratio",
)
_TINY = 1e-300  # a divisor in place of zero
_STRICTER = {"auto": "gram64", "gram64": "exact64"}


class Tracked:
    """A matrix and what is remembered of it."""

    def __init__(self, matrix: Matrix, method: str = "auto", keep_weights: bool = False):
        self.matrix = matrix
        self.name = matrix.name
        self.shape = shape_of(matrix)
        self.rows: RowShards | None = None  # where ranks have rows of it, and its place among those
        self.place = 0
        self.method = method  # auto or exact; an audit that fails makes it gram64, then exact64 (exact in float64)
        self.S: Tensor | None = None  # last full spectrum, (r,) float64, where the matrix is
        self.spectrum: Tensor | None = None  # the last that came to the host
        self.S_step: int | None = None
        self.reference: Tensor | None = None
        self.state: State | None = None  # of topk_svdvals
        # Step, leading values, and Frobenius norm of the others, at the last measurement of the leading ones.
        self.leading: tuple[int, np.ndarray, float] | None = None
        self.keep_weights = keep_weights
        self.W: Tensor | None = None  # at the last full spectrum
        self.usual: float | None = None  # SD variation, smoothed
        self.warned: str | None = None  # of what, last
        self.lost: set[str] = set()  # what of it raised when it was last measured: full, topk
        self.form: tuple | None = None  # shape, dtype and device of its parameter

    @property
    def mine(self) -> bool:
        """Whether this rank records it."""
        return self.rows is None or self.rows.mine(self.place)

    def tensor(self) -> Tensor:
        """Returns the matrix, or this rank's rows of it.

        Raises:
            ValueError: it has another shape than when it was found, which `Parameter.data` allows.
        """
        if self.rows:
            return self.rows.local(self.place)
        W = self.matrix.tensor()
        if W.shape != self.shape:
            raise ValueError(
                f"track: expected {self.name} of shape {self.shape}, got shape={tuple(W.shape)}. "
                "Replace the parameter in its module, or call track again."
            )
        return W

    def follow(self, matrix: Matrix):
        """Takes the matrix from a parameter that may be another or have changed its form."""
        self.matrix, form = matrix, form_of(matrix.parameter)
        if self.form not in (None, form):
            self.state = self.leading = self.W = None  # they fit the form that it had
        self.form = form

    def forget(self, kind: str):
        """Drops what the next measurement of a kind would start from, so that it starts anew."""
        self.lost.add(kind)
        if kind == "full":
            self.S = self.S_step = self.W = None
        else:
            self.state = self.leading = None

    @property
    def known(self) -> bool:
        """Whether the last full spectrum that came to the host has a distribution."""
        return self.spectrum is not None and math.isfinite(self.spectrum[0])

    def state_dict(self) -> dict:
        """Returns what the next measurement depends on."""
        state = {
            f: getattr(self, f) for f in ("method", "S", "spectrum", "S_step", "reference", "W", "usual", "warned")
        }
        state["W"] = None if self.W is None else self.W.clone()
        state["state"] = None if self.state is None else tuple(self.state)
        # Saved is the square, as by earlier versions; its root is the norm again, bit for bit (unless it underflows).
        state["leading"] = self.leading and (
            self.leading[0],
            self.leading[1].tolist(),
            self.leading[2] * self.leading[2],
        )
        return state

    def load_state_dict(self, state: dict):
        """Takes up what `state_dict` returned."""
        device = self.matrix.parameter.device
        for f, value in state.items():
            where = "cpu" if f == "spectrum" else device
            setattr(self, f, value.to(where) if isinstance(value, Tensor) else value)
        if self.state is not None:
            self.state = State(*(part.to(device) for part in self.state))
        if self.leading is not None:
            self.leading = (self.leading[0], np.array(self.leading[1]), math.sqrt(self.leading[2]))


class Launched(NamedTuple):
    """A measurement under way."""

    tensors: dict[str, Tensor]  # what it computes, where the matrices are
    # Those on the host -> the fields of each matrix's `Record`, or what was raised for that matrix.
    finish: Callable[[dict[str, Tensor]], list[dict | Exception]]


def form_of(parameter: Tensor) -> tuple:
    """What of a parameter its measurement depends on besides its values."""
    return parameter.shape, parameter.dtype, parameter.device


def unmeasured(t: Tracked, kind: str, k: int) -> dict:
    """The fields of a matrix that could not be measured: those of one that holds NaN."""
    r = min(t.shape)
    values = dict.fromkeys(("frobenius_norm", "sigma_max", "stable_rank"), math.nan)
    values["topk"] = (math.nan,) * min(k, r)
    if kind == "topk":
        return values | {"method": "topk", "residual": values["topk"]}
    method = {"auto": "gram32", "exact64": "exact"}.get(t.method, t.method)
    return (
        dict.fromkeys((*_SUMMARIES, "sd_error"), math.nan)
        | values
        | {"method": method, "spectrum": np.full(r, math.nan)}
    )


def _of_each(group: list[Tracked], fields: Callable[[int, Tracked], dict]) -> list[dict | Exception]:
    found: list[dict | Exception] = []
    for j, t in enumerate(group):
        try:
            found.append(fields(j, t))
        except Exception as error:  # of one matrix, and not the others'
            found.append(error)
    return found


def measure_full(group: list[Tracked], step: int, every: int, k: int) -> Launched:
    """Measures all singular values of matrices of one short side, dtype, device and method.

    On the host they are also of one shape. On a CUDA device nothing here waits for it.

    Returns:
        The measurement, to be finished in the order of steps. Its fields lack step, name and shape.
    """
    matrices, rows = [t.tensor() for t in group], group[0].rows
    device = matrices[0].device
    method, strict = group[0].method, group[0].method == "exact64"
    before = _stack([t.S for t in group], device)
    # what the precision is chosen by must be on the host
    known = before if device.type == "cpu" or rows else _stack([t.spectrum for t in group], "cpu")
    if rows:
        result = rows.spectra([t.place for t in group], "bidiag64" if strict else method, known)
    else:
        result = spectra([W.double() for W in matrices] if strict else matrices, "exact" if strict else method, known)
    compared = [t.reference is not None for t in group]
    fixed = None
    if any(compared):  # NaN stands for what has no reference
        missing = torch.full_like(result.S[0], math.nan)
        fixed = _stack([missing if t.reference is None else t.reference for t in group], device)
    d = singular_distribution(result.S, before, fixed)
    k = min(k, result.S.shape[1])
    tensors = {"S": result.S, "sd_error": result.sd_error} | {f: getattr(d, f) for f in _SUMMARIES}
    if fixed is not None:
        tensors["cosine"] = d.cosine
    if before is not None:
        sums = before.sum(-1, keepdim=True)
        tensors |= {"variation": d.variation_l2, "head": (d.sd[:, :k] - before[:, :k] / sums).norm(dim=-1)}
        weights = [t.W for t in group if t.W is not None]
        if len(weights) == len(group):
            moved = torch.stack([
                torch.linalg.vector_norm(W.float() - earlier, dtype=torch.float64)
                for W, earlier in zip(matrices, weights, strict=True)
            ])  # fmt: skip
            moved = rows.sum(moved.square()).sqrt() if rows else moved
            tensors["bound"] = theory_bound(moved, torch.maximum(sums[:, 0], d.nuclear_norm), result.S.shape[1])
    consecutive = [t.S_step is not None and step - t.S_step == every for t in group]
    for j, t in enumerate(group):
        if t.keep_weights:
            t.W = matrices[j].float().clone() if t.W is None else t.W.copy_(matrices[j])
        t.S, t.S_step = result.S[j], step

    def finish(host: dict[str, Tensor]) -> list[dict | Exception]:
        S = host["S"].numpy().copy()  # the records' own: not the probe's state, and not pinned memory
        columns = {name: t.tolist() for name, t in host.items() if name != "S"}

        def fields(j: int, t: Tracked) -> dict:
            t.spectrum = torch.from_numpy(S[j].copy())
            values = {f: columns[f][j] for f in (*_SUMMARIES, "sd_error")}
            values["cosine"] = columns["cosine"][j] if compared[j] else None
            values |= {"method": str(result.methods[j]), "topk": tuple(S[j, :k].tolist())}
            values |= {"spectrum": S[j], "residual": None}
            if consecutive[j]:
                values |= {"interval": every, "sd_variation": columns["variation"][j]}
                values |= dict.fromkeys(("sd_variation_topk", "sd_variation_floor"), columns["head"][j])
                if "bound" in columns:
                    values["theory_bound"] = columns["bound"][j]
            return values

        return _of_each(group, fields)

    return Launched(tensors, finish)


def measure_leading(group: list[Tracked], step: int, every: int, k: int) -> Launched:
    """Measures the k leading singular values of matrices of one shape, dtype and device.

    On a CUDA device they need only have a short side in common, and nothing here waits for it.

    The sum of all values is not known then. For `sd_variation_topk` and `sd_variation_carried` the others are taken to
    be as in the last full spectrum, scaled to their energy now, which is exact.

    Returns:
        As `measure_full`.
    """
    states = [t.state for t in group]
    if group[0].rows:
        leading, residual, norms, states = group[0].rows.topk([t.place for t in group], k, states)
    else:
        leading, residual, norms, states = _leading([t.tensor() for t in group], k, states)
    for t, state in zip(group, states, strict=True):
        t.state = state

    def finish(host: dict[str, Tensor]) -> list[dict | Exception]:
        S, residual, norms = host["S"].numpy(), host["residual"].tolist(), host["norms"].tolist()

        def fields(j: int, t: Tracked) -> dict:
            norm, top = norms[j], float(S[j, 0])
            # Squares of shares, which stay in range: a norm of 1e200 squared is beyond float64.
            rest = norm * math.sqrt(max(1 - float(((S[j] / norm) ** 2).sum()), 0.0)) if 0 < norm < math.inf else norm
            values = {
                "method": "topk",
                "frobenius_norm": norm,
                "sigma_max": top,
                "stable_rank": (norm / top) * (norm / top) if top > 0 else math.nan,
                "topk": tuple(S[j].tolist()),
                "residual": tuple(residual[j]),
            }
            if t.leading is not None and t.spectrum is not None and step - t.leading[0] == every:
                values |= {"interval": every} | _leading_variation(t, S[j], rest)
            t.leading = (step, S[j], rest)
            return values

        return _of_each(group, fields)

    return Launched({"S": leading.double(), "residual": residual, "norms": norms}, finish)


def _leading(matrices: list[Tensor], k: int, states: list[State | None]) -> tuple[Tensor, Tensor, Tensor, list[State]]:
    """Leading values, residuals, Frobenius norms and the states for the next step, of matrices of one group."""
    state = stacked(states)
    if state is not None:
        state = State(*(part.to(matrices[0].device) for part in state))
    norms = _norms(matrices)
    S, residual, state = topk_svdvals(matrices, k, state=state, norms=norms)
    return S, residual, norms, [State(*rows) for rows in zip(*state, strict=True)]


def _norms(matrices: list[Tensor]) -> Tensor:
    """Frobenius norms (B,), float64, on the device of the matrices; NaN where one is not finite."""
    matrices = [W.detach() for W in matrices]
    on_host = matrices[0].device.type == "cpu"
    # In float64 no square of float32 leaves the range; on the host, where it is dear, only for those that need it.
    dtype = torch.float32 if on_host and matrices[0].dtype != torch.float64 else torch.float64
    norms = torch.stack(torch._foreach_norm(matrices, 2, dtype)).double()
    if on_host or matrices[0].dtype == torch.float64:  # on a device float64 is always scaled: to look would wait for it
        for j, W in enumerate(matrices):
            if not on_host or not 1e-15 < float(norms[j]) < 1e18:
                power = power_of_two(largest_entry(W).double())
                scaled = torch.linalg.vector_norm(W.double() / power)
                norms[j] = torch.where(scaled.isfinite(), scaled * power[0, 0], torch.nan)
    return norms


def _leading_variation(t: Tracked, S: np.ndarray, rest: float) -> dict:
    """What the leading values of two steps, and the norm of the others, tell of the SD variation."""
    assert t.leading is not None and t.spectrum is not None
    _, before, rest_before = t.leading
    # Each spectrum in units of its largest value, whose squares and sums stay in range; what is returned has no unit.
    tail = t.spectrum[len(S) :].numpy()
    shape = tail / max(float(tail.max(initial=0.0)), _TINY)
    shape = shape / max(float(np.linalg.norm(shape)), _TINY)  # of the others, of norm 1
    unit, unit_before = max(float(S[0]), rest, _TINY), max(float(before[0]), rest_before, _TINY)
    S, scale = S / unit, rest / unit
    before, scale_before = before / unit_before, rest_before / unit_before
    total, total_before = S.sum() + scale * shape.sum(), before.sum() + scale_before * shape.sum()
    if not (total > 0 and total_before > 0):
        return dict.fromkeys(("sd_variation_topk", "sd_variation_carried", "sd_variation_floor"), math.nan)
    head = float(np.linalg.norm(S / total - before / total_before))
    # Whatever the sums are, one spectrum is compared with a multiple of the other: no closer than the best multiple.
    nearest = S * ((S @ before) / max(S @ S, _TINY))
    most = before.sum() + math.sqrt(len(tail)) * scale_before  # the sum, by Cauchy-Schwarz
    return {
        "sd_variation_topk": head,
        "sd_variation_carried": math.hypot(head, scale / total - scale_before / total_before),
        "sd_variation_floor": float(np.linalg.norm(nearest - before)) / most,
    }


def _stack(spectra: list[Tensor | None], device) -> Tensor | None:
    known = [S for S in spectra if S is not None]
    return torch.stack(known).to(device) if len(known) == len(spectra) else None


class Audit(NamedTuple):
    """A spectrum compared with `torch.linalg.svdvals` in float64."""

    step: int
    name: str
    error: float  # |SD - SD_true|_2
    bound: float  # what the record said of it


class Auditor:
    """Chooses what to audit: one matrix at a time, in random order, for a twentieth of what the spectra cost.

    Costs are counted in operations, not in seconds, so that a run's audits do not depend on the machine's mood.
    """

    SHARE = 0.05
    DEARER = 20.0  # an SVD in float64 against our spectra: 15 at 768 x 768, 18 at 256 x 256

    def __init__(self):
        self._earned = 0.0
        self._queue: list[int] = []
        self._cycles = 0

    def state_dict(self) -> dict:
        """Returns what the next choice depends on."""
        return {"earned": self._earned, "queue": list(self._queue), "cycles": self._cycles}

    def load_state_dict(self, state: dict):
        """Takes up what `state_dict` returned."""
        self._earned, self._queue, self._cycles = state["earned"], list(state["queue"]), state["cycles"]

    def choose(self, measured: list[int], tracked: list[Tracked]) -> int | None:
        """Returns which of the matrices just measured in full to audit, or None for now."""
        self._earned += self.SHARE * sum(cost(tracked[i].shape) for i in measured)
        if not self._queue:
            self._queue = list(range(len(tracked)))
            random.Random(self._cycles).shuffle(self._queue)
            self._cycles += 1
        allowed = set(measured)
        i = next((i for i in self._queue if i in allowed), None)
        if i is None or self._earned < self.DEARER * cost(tracked[i].shape):
            return None
        self._earned -= self.DEARER * cost(tracked[i].shape)
        self._queue.remove(i)
        return i


def audit(t: Tracked, step: int, bound: float) -> Audit | None:
    """Compares a spectrum just measured with an SVD in float64; None for a matrix without a distribution.

    An error beyond the bound makes the matrix be measured more strictly from then on.
    """
    if t.rows:
        S = t.rows.spectra([t.place], "bidiag64").S[0]
    else:
        W = t.tensor().double()
        if not W.isfinite().all():  # LAPACK raises
            return None
        S = torch.linalg.svdvals(W if W.shape[0] >= W.shape[1] else W.mT)
    if not (S.isfinite().all() and S[0] > 0 and math.isfinite(bound)):
        return None
    assert t.spectrum is not None
    error = float((t.spectrum / t.spectrum.sum() - S / S.sum()).norm())
    if error > bound:
        t.method = _STRICTER.get(t.method, t.method)
    return Audit(step, t.name, error, bound)
