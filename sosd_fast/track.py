"""track(): the probe that measures a model's spectra after each optimizer step."""

import logging
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sosd_fast.budget import Budget
from sosd_fast.kernels.distribution import singular_distribution
from sosd_fast.matrices import DEFAULT_SPLIT, Matrix, find_matrices
from sosd_fast.records import Record, RunWriter, load
from sosd_fast.svdvals import spectra
from sosd_fast.topk import State, topk_svdvals

METHODS = ("auto", "full", "topk", "exact")
KEPT_RECORDS = 10_000  # in memory, where no run directory keeps them

log = logging.getLogger("sosd_fast")
_probes: "weakref.WeakKeyDictionary[nn.Module, list[Probe]]" = weakref.WeakKeyDictionary()


def track(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    method: str = "auto",
    k: int = 32,
    budget: float = 0.01,
    every: int = 1,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    reference: str | Mapping[str, Tensor] | None = "initial",
    run_dir: str | os.PathLike | None = None,
    on_record: Callable[[Record], None] | None = None,
    step: int | None = None,
) -> "Probe":
    """Measures the singular values of a model's matrices after every optimizer step, until the model is gone.

    The probe never writes a weight nor draws a random number: training is bit for bit what it is without it. An error
    inside it is logged, stops the probe, and leaves the run alone.

    Args:
        model: any nn.Module. Measured once right away, so that the first step has something to compare with.
        optimizers: the ones whose steps count; None takes every optimizer that holds one of the matrices, an
            empty list none: call `Probe.step`. Several that step in turn make one step.
        method: "full", all singular values every step; "topk", the k leading ones; "exact", all of them by
            `torch.linalg.svdvals`; "auto", the leading ones every step and full spectra as the budget allows, every
            step where it allows that.
        k: leading values to follow. Matrices with fewer than 3 k values are measured in full instead.
        budget: of the step time, for "auto".
        every: measure each so many steps.
        include: shell patterns of parameter names.
        exclude: shell patterns of parameter names.
        split: fused matrices; see `sosd_fast.matrices.find_matrices`.
        reference: spectra that the cosine is taken to: "initial", a mapping from names to spectra, or None.
        run_dir: where records are written; None keeps the last 10,000 in memory.
        on_record: called with each record.
        step: steps taken before now. None continues after the last step in `run_dir`, or starts at 0; a number cuts
            off what `run_dir` holds of later steps.

    Returns:
        The `Probe`; keep it to read the records, or not.

    Raises:
        ValueError: a model without matrices, or a bad argument.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"track: expected an nn.Module, got model={type(model).__name__}. Pass the model itself.")
    if method not in METHODS:
        raise ValueError(f"track: expected one of {', '.join(METHODS)}, got method={method!r}. Use 'auto'.")
    if k < 1 or every < 1:
        raise ValueError(f"track: expected k >= 1 and every >= 1, got k={k}, every={every}. Defaults are 32 and 1.")
    if not 0 < budget <= 1:
        raise ValueError(f"track: expected a fraction of the step time, got budget={budget}. 0.01 is one percent.")
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    probe = Probe(
        find_matrices(model, include, exclude, split), optimizers, method, k, budget, every, reference, run_dir,
        on_record, step,
    )  # fmt: skip
    _probes.setdefault(model, []).append(probe)  # lives as long as the model does
    return probe


class _Tracked:
    """A matrix and what is remembered of it."""

    def __init__(self, matrix: Matrix):
        self.matrix = matrix
        self.name = matrix.name
        self.shape = tuple(matrix.tensor().shape)
        self.S: Tensor | None = None  # last full spectrum, (r,) float64
        self.S_step: int | None = None
        self.reference: Tensor | None = None
        self.state: State | None = None  # of topk_svdvals
        self.leading: tuple[int, np.ndarray, float] | None = None  # step, leading values, energy of the others
        # The others' sum over sqrt(count * energy), from the last full spectrum: what "topk" takes the total from.
        self.tail_ratio = 1.0
        self.warned = False

    def state_dict(self) -> dict:
        state = {f: getattr(self, f) for f in ("S", "S_step", "reference", "tail_ratio", "warned")}
        state["state"] = None if self.state is None else tuple(self.state)
        state["leading"] = self.leading and (self.leading[0], self.leading[1].tolist(), self.leading[2])
        return state

    def load_state_dict(self, state: dict):
        device = self.matrix.parameter.device
        for f, value in state.items():
            setattr(self, f, value.to(device) if isinstance(value, Tensor) else value)
        if self.state is not None:
            self.state = State(*(part.to(device) for part in self.state))
        if self.leading is not None:
            self.leading = (self.leading[0], np.array(self.leading[1]), self.leading[2])


class _Rounds:
    """Tells when all optimizers that change the tracked parameters have stepped once."""

    def __init__(self, parameters, optimizers):
        self._parameters = parameters
        self._given = None if optimizers is None else weakref.WeakSet(optimizers)
        self._known = weakref.WeakSet()
        self._stepped = weakref.WeakSet()
        self._orphans: set[int] = set()  # parameters that a whole round passed by

    @property
    def pending(self) -> bool:
        return len(self._stepped) > 0

    def ends_before(self, optimizer) -> bool:
        """Whether this optimizer, about to step, begins a new round."""
        return optimizer in self._stepped

    def ends_after(self, optimizer) -> bool:
        """Whether this optimizer, having stepped, completes the round."""
        if self._given is not None:
            if optimizer not in self._given:
                return False
            self._stepped.add(optimizer)
            return self._given == self._stepped
        if not self._held(optimizer) & {id(p) for p in self._parameters}:
            return False
        self._stepped.add(optimizer)
        self._known.add(optimizer)
        covered = set().union(*map(self._held, self._known), self._orphans)
        return self._known == self._stepped and all(id(p) in covered or not p.requires_grad for p in self._parameters)

    def finish(self):
        """Closes the round."""
        self._known = self._stepped
        held = set().union(*map(self._held, self._known))
        self._orphans = {id(p) for p in self._parameters} - held
        self._stepped = weakref.WeakSet()

    @staticmethod
    def _held(optimizer) -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Probe:
    """Measures a list of matrices; made by `track`."""

    def __init__(self, matrices, optimizers, method, k, budget, every, reference, run_dir, on_record, step):
        self._tracked = [_Tracked(m) for m in matrices]
        self._method, self._k, self._every, self._on_record = method, k, every, on_record
        self._latest: dict[str, Record] = {}
        self._memory: deque[Record] = deque(maxlen=KEPT_RECORDS)
        self._own_seconds, self._began, self._ended = 0.0, None, None
        self._budget: Budget | None = None  # with "auto"
        self._planned = 0.0
        self._said_coverage = False
        self._clock = time.perf_counter
        settings = {"method": method, "k": k, "budget": budget, "every": every}
        self._writer = _open(run_dir, settings, [t.name for t in self._tracked], step) if run_dir is not None else None
        written = self._writer.step if self._writer else None
        self._step = step if step is not None else written or 0
        self._finalizer = weakref.finalize(self, _detach, [], self._writer)
        try:
            self._start(budget, reference, written)
        except BaseException:
            self._finalizer()
            raise
        self._rounds = _Rounds([t.matrix.parameter for t in self._tracked], optimizers)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _detach, self._attach(), self._writer)

    def step(self):
        """Counts a step and measures it; for loops without a torch optimizer."""
        self._guarded(self._count)

    def latest(self) -> dict[str, Record]:
        """Returns the last record of each matrix, by name."""
        return dict(self._latest)

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        return load(self._writer.run_dir).records if self._writer else list(self._memory)

    @property
    def overhead(self) -> float:
        """The fraction of the time since the first step that was spent in the probe."""
        return self._own_seconds / (self._ended - self._began) if self._own_seconds else 0.0

    def state_dict(self) -> dict:
        """Returns what a resumed run needs for its records to go on as if it had not stopped; see `load_state_dict`."""
        return {"step": self._step, "matrices": {t.name: t.state_dict() for t in self._tracked}}

    def load_state_dict(self, state: dict):
        """Takes up what `state_dict` returned for the same model at the same step.

        With "auto" the choice of what to measure begins anew, for it follows the clock.

        Raises:
            ValueError: another step or other matrices.
        """
        names = [t.name for t in self._tracked]
        if state["step"] != self._step or list(state["matrices"]) != names:
            raise ValueError(
                f"Probe.load_state_dict: expected the state of {len(names)} matrices at step {self._step}, got "
                f"{len(state['matrices'])} at step={state['step']}. Pass that step to track, and the same model."
            )
        for t in self._tracked:
            t.load_state_dict(state["matrices"][t.name])

    def flush(self):
        """Measures a step that is pending and forces all records to disk."""
        if self._rounds.pending:
            self._guarded(self._count)
        if self._writer and self._finalizer.alive:
            self._guarded(self._writer.flush)

    def close(self):
        """Flushes and detaches; closing twice is fine."""
        if self._finalizer.alive:
            self.flush()
            self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _attach(self):
        this = weakref.ref(self)  # torch's registry must not keep the probe alive

        def before(optimizer, args, kwargs):  # noqa: ARG001
            probe = this()
            if probe is not None and probe._rounds.ends_before(optimizer):
                probe._guarded(probe._count)

        def after(optimizer, args, kwargs):  # noqa: ARG001
            probe = this()
            if probe is not None and probe._rounds.ends_after(optimizer):
                probe._guarded(probe._count)

        return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def _guarded(self, action):
        if not self._finalizer.alive:
            return
        try:
            action()
        except Exception:
            log.exception("sosd_fast: the probe failed at step %d and stops here; training goes on.", self._step)
            self._finalizer()

    def _start(self, budget, reference, written):
        """Measures the matrices as they are: the first spectra and, for "auto", what each measurement costs."""
        everything = list(range(len(self._tracked)))
        records, full_seconds = self._measure(full=everything, topk=[])
        if written is None or written < self._step:
            self._emit(records)
        if self._writer and reference == "initial" and written is not None:
            reference = self._writer.first_spectra()
        for t in self._tracked:
            spectrum = t.S if reference == "initial" else (reference or {}).get(t.name)
            if spectrum is not None and len(spectrum) != len(t.S):
                raise ValueError(
                    f"track: expected {len(t.S)} singular values for {t.name}, got a reference with {len(spectrum)}. "
                    "Pass spectra of this model."
                )
            t.reference = None if spectrum is None else torch.as_tensor(spectrum, dtype=torch.float64)

        # Below 3 k values the leading ones cost as much as all of them.
        leading = [
            i for i in everything if self._method in ("auto", "topk") and min(self._tracked[i].shape) >= 3 * self._k
        ]
        self._leading = leading
        topk_seconds = {}
        if leading:
            self._measure(full=[], topk=leading)  # cold
            _, topk_seconds = self._measure(full=[], topk=leading)
            _, full_seconds = self._measure(full=everything, topk=[])  # anchors the tails
        if self._method == "auto":
            self._budget = Budget(
                budget, [full_seconds[i] for i in everything], [topk_seconds.get(i) for i in everything]
            )

    def _count(self):
        """Counts a step, measures it and keeps the records."""
        self._rounds.finish()
        self._step += 1
        if self._step % self._every:
            return
        began = self._clock()
        everything = list(range(len(self._tracked)))
        if self._budget:
            full, topk = everything, self._leading  # the first step: how long a step takes is not known yet
            if self._ended is not None:
                full, topk = self._budget.plan(began - self._planned)
                self._say_coverage()
            self._planned = began
        elif self._method == "topk":
            topk = self._leading
            full = sorted(set(everything) - set(topk))
        else:
            full, topk = everything, []
        records, _ = self._measure(full, topk)
        self._emit(records)
        ended = self._clock()
        if self._budget and self._ended is not None:
            self._budget.spent(ended - began)
        if self._ended is None:
            self._began = ended  # the first step has no beginning to be a fraction of
        else:
            self._own_seconds += ended - began
        self._ended = ended

    def _measure(self, full: list[int], topk: list[int]) -> tuple[list[Record], dict[int, float]]:
        """Measures matrices and returns their records, and the seconds that each took."""
        found: dict[int, dict] = {}
        seconds = {}
        for kind, indices, measure in (("topk", topk, self._measure_topk), ("full", full, self._measure_full)):
            for group in self._groups(indices):
                began = time.perf_counter()
                for i, values in zip(group, measure([self._tracked[i] for i in group]), strict=True):
                    found[i] = found.get(i, {}) | values
                took = time.perf_counter() - began
                seconds |= dict.fromkeys(group, took / len(group))
                if self._budget:
                    self._budget.learn(kind, group, took)
        records = []
        for i in sorted(found):
            t = self._tracked[i]
            records.append(Record(step=self._step, name=t.name, shape=t.shape, **found[i]))
            if not math.isfinite(found[i]["sigma_max"]) or found[i]["sigma_max"] == 0:
                self._warn_once(t, found[i]["sigma_max"])
        return records, seconds

    def _groups(self, indices: list[int]) -> list[list[int]]:
        """Splits matrices into those of one shape, dtype and device, which are measured together."""
        groups: dict[tuple, list[int]] = {}
        for i in indices:
            p = self._tracked[i].matrix.parameter
            groups.setdefault((self._tracked[i].shape, p.dtype, p.device), []).append(i)
        return list(groups.values())

    def _measure_full(self, group: list[_Tracked]) -> list[dict]:
        matrices = [t.matrix.tensor() for t in group]
        before = [t.S for t in group]
        previous = torch.stack(before).to(matrices[0].device) if all(S is not None for S in before) else None
        result = spectra(matrices, "exact" if self._method == "exact" else "auto", previous)
        reference = [t.reference for t in group]
        fixed = torch.stack(reference).to(matrices[0].device) if all(S is not None for S in reference) else None
        d = singular_distribution(result.S, previous, fixed)
        sd_error = result.sd_error.tolist()
        columns = {f: getattr(d, f).tolist() for f in _SUMMARIES}
        variation = d.variation_l2.tolist() if previous is not None else None
        cosine = d.cosine.tolist() if fixed is not None else None
        S = result.S.cpu().numpy()
        k = min(self._k, S.shape[1])
        if previous is not None:
            difference = d.sd[:, :k] - previous[:, :k] / previous.sum(-1, keepdim=True)
            leading_variation = difference.norm(dim=-1).tolist()
        found = []
        for j, t in enumerate(group):
            values = {f: column[j] for f, column in columns.items()}
            values |= {"method": result.methods[j], "sd_error": sd_error[j], "topk": tuple(S[j, :k].tolist())}
            values |= {"spectrum": S[j], "residual": None}
            if cosine is not None:
                values["cosine"] = cosine[j]
            if t.S_step is not None and self._step - t.S_step == self._every:
                values |= {"interval": self._every, "sd_variation": variation[j]}
                values["sd_variation_topk"] = leading_variation[j]
            t.S, t.S_step = result.S[j], self._step
            if k < S.shape[1] and values["sigma_max"] > 0:
                tail = S[j, k:]
                t.tail_ratio = float(tail.sum() / math.sqrt(max(len(tail) * (tail**2).sum(), 1e-300)))
            found.append(values)
        return found

    def _measure_topk(self, group: list[_Tracked]) -> list[dict]:
        matrices = [t.matrix.tensor() for t in group]
        state = None
        if all(t.state is not None for t in group):
            state = State(
                *(torch.stack(rows).to(matrices[0].device) for rows in zip(*(t.state for t in group), strict=True))
            )
        result = topk_svdvals(matrices, self._k, state=state)
        norms = torch.stack([torch.linalg.vector_norm(W, dtype=torch.float32) for W in matrices])
        S, residual = result.S.double().cpu().numpy(), result.residual.tolist()
        count = min(group[0].shape) - self._k
        found = []
        for j, (t, norm) in enumerate(zip(group, norms.tolist(), strict=True)):
            if S[j, 0] > 0 and not 0 < norm < math.inf:  # squares beyond float32, where the values are not
                norm = float(torch.linalg.vector_norm(matrices[j], dtype=torch.float64))
            tail = max(norm**2 - float((S[j] ** 2).sum()), 0.0)
            values = {
                "method": "topk",
                "frobenius_norm": norm,
                "sigma_max": float(S[j, 0]),
                "stable_rank": norm**2 / float(S[j, 0]) ** 2 if S[j, 0] > 0 else math.nan,
                "topk": tuple(S[j].tolist()),
                "residual": tuple(residual[j]),
            }
            if t.leading is not None and self._step - t.leading[0] == self._every:
                _, S_before, tail_before = t.leading
                sums = [
                    s.sum() + t.tail_ratio * math.sqrt(count * e) for s, e in ((S[j], tail), (S_before, tail_before))
                ]
                if min(sums) > 0:
                    values["sd_variation_topk"] = float(np.linalg.norm(S[j] / sums[0] - S_before / sums[1]))
                    values["interval"] = self._every
                else:
                    values |= {"sd_variation_topk": math.nan, "interval": self._every}
            t.state = State(result.state.V[j], result.state.P[j])
            t.leading = (self._step, S[j], tail)
            found.append(values)
        return found

    def _emit(self, records: list[Record]):
        self._latest |= {r.name: r for r in records}
        if self._writer:
            if records:
                self._writer.append(records)
        else:
            self._memory.extend(records)
        if self._on_record:
            for record in records:
                self._on_record(record)

    def _warn_once(self, t: _Tracked, sigma_max: float):
        if not t.warned:
            t.warned = True
            what = "is zero" if sigma_max == 0 else "holds NaN or Inf"
            log.warning("sosd_fast: %s %s at step %d, so it has no singular distribution.", t.name, what, self._step)

    def _say_coverage(self):
        if not self._said_coverage and self._budget.coverage < 0.9 and self._step > 20:
            self._said_coverage = True
            log.warning(
                "sosd_fast: budget=%.3g covers %.0f %% of the matrices each step; they take turns. "
                "budget=%.2g would cover all of them.",
                self._budget.fraction,
                100 * self._budget.coverage,
                self._budget.fraction / max(self._budget.coverage, 1e-9),
            )


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


def _open(run_dir, settings: dict, names: list[str], step: int | None) -> RunWriter:
    try:
        return RunWriter(run_dir, {"settings": settings, "matrices": names}, step)
    except OSError as error:
        raise ValueError(
            f"track: expected a directory that can be written, got run_dir={os.fspath(run_dir)!r} ({error.strerror}). "
            "Choose another, or None to keep the records in memory."
        ) from error


def _detach(handles, writer):
    for handle in handles:
        handle.remove()
    if writer:
        writer.close()
