"""Probe: measures a model's spectra after each optimizer step; `track` makes it."""

import atexit
import logging
import math
import os
import time
import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sosd_fast import side
from sosd_fast.budget import Budget
from sosd_fast.measure import Audit, Auditor, Launched, Tracked, audit, measure_full, measure_leading
from sosd_fast.records import Record, RunWriter, load
from sosd_fast.rounds import Rounds
from sosd_fast.sharded import shape_of

KEPT_RECORDS = 10_000  # in memory, where no run directory keeps them
FOREIGN_STEPS = 20  # before it is said that they are

log = logging.getLogger("sosd_fast")
probes_of: "weakref.WeakKeyDictionary[nn.Module, list[Probe]]" = weakref.WeakKeyDictionary()


@atexit.register
def _flush_all():
    """Keeps what is still under way on a GPU when the process ends."""
    for probes in list(probes_of.values()):
        for probe in probes:
            probe._guarded(lambda probe=probe: probe._drain(wait=True))


class Probe:
    """Measures this rank's matrices; made by `track`.

    Attributes:
        audits: the comparisons with float64, the last 10,000.
    """

    def __init__(
        self, find, optimizers, method, k, budget, every, reference, run_dir, on_record, step, audit, theory_bound
    ):
        self._find = find
        self._make = lambda matrix: Tracked(matrix, "exact" if method == "exact" else "auto", theory_bound)
        self._tracked: list[Tracked] = []
        own = self._take(find())
        if run_dir is not None and own.ranks > 1:
            run_dir = os.path.join(run_dir, f"rank-{own.rank:05d}")
        self._method, self._k, self._every, self._on_record = method, k, every, on_record
        self._fraction = budget
        self._auditor = Auditor() if audit and method != "exact" else None
        self.audits: deque[Audit] = deque(maxlen=KEPT_RECORDS)
        self._latest: dict[str, Record] = {}
        self._memory: deque[Record] = deque(maxlen=KEPT_RECORDS)
        self._own_seconds, self._began = 0.0, 0.0
        self._ended: float | None = None
        self._budget: Budget | None = None  # with "auto"
        self._planned = 0.0
        self._said_coverage = self._said_foreign = False
        self._clock = time.perf_counter
        self._lanes: dict[torch.device, side.Host | side.Side] = {}
        self._under_way: deque[_Work] = deque()
        settings = {"method": method, "k": k, "budget": budget, "every": every}
        self._writer = _open(run_dir, settings, [t.name for t in self._tracked], step) if run_dir is not None else None
        written = self._writer.step if self._writer else None
        self._step = step if step is not None else written or 0
        if self._rows:
            self._step = self._rows.agree(self._step)
        self._finalizer = weakref.finalize(self, _detach, [], self._writer)
        try:
            self._start(reference, written)
        except BaseException:
            self._finalizer()
            raise
        self._rounds = Rounds(own.parameters, optimizers)
        self._size = 0  # of the optimizers
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _detach, self._attach(), self._writer)

    def _take(self, own):
        """Follows the matrices of a `Share`; those already known keep what is remembered of them."""
        known = {(t.name, t.shape): t for t in self._tracked}
        self._tracked = [known.get((m.name, shape_of(m))) or self._make(m) for m in own.matrices]
        for t, m in zip(self._tracked, own.matrices, strict=True):
            t.matrix = m  # its parameter may be another
        self._rows = own.rows
        for i, t in enumerate(self._tracked):
            t.rows, t.place = own.rows, i
        return own

    def step(self):
        """Counts a step and measures it; for loops without a torch optimizer."""
        self._guarded(lambda: (self._count(), self._hold()))  # no hook tells when the weights change next

    def latest(self) -> dict[str, Record]:
        """Returns the last record of each matrix, by name."""
        return dict(self._latest)

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        self._guarded(lambda: self._drain(wait=True))
        return load(self._writer.run_dir).records if self._writer else list(self._memory)

    @property
    def overhead(self) -> float:
        """The fraction of the time since the first step that was spent in the probe, on the host and on GPUs."""
        if self._ended is None or not self._own_seconds:
            return 0.0
        return self._own_seconds / (self._ended - self._began)

    def state_dict(self) -> dict:
        """Returns what a resumed run needs for its records to go on as if it had not stopped; see `load_state_dict`."""
        self._guarded(lambda: self._drain(wait=True))
        matrices = {t.name: t.state_dict() for t in self._tracked}
        return {"step": self._step, "matrices": matrices, "auditor": self._auditor and self._auditor.state_dict()}

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
        if self._auditor and state.get("auditor"):
            self._auditor.load_state_dict(state["auditor"])

    def flush(self):
        """Measures a step that is pending, waits for what is under way and forces all records to disk."""
        if self._rounds.pending:
            self._guarded(self._count)
        self._guarded(lambda: self._drain(wait=True))
        if self._writer and self._finalizer.alive:
            self._guarded(self._writer.flush)

    def close(self):
        """Flushes and detaches; closing twice is fine."""
        if self._finalizer.alive:
            self.flush()
            self._finalizer()
        for probes in list(probes_of.values()):
            if self in probes:
                probes.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _attach(self):
        this = weakref.ref(self)  # torch's registry must not keep the probe alive

        def before(optimizer, args, kwargs):  # noqa: ARG001
            probe = this()
            if probe is not None and not _capturing():
                probe._guarded(lambda: probe._before(optimizer))

        def after(optimizer, args, kwargs):  # noqa: ARG001
            probe = this()
            if probe is not None and not _capturing():
                probe._guarded(lambda: probe._after(optimizer))

        return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def _before(self, optimizer):
        if self._rounds.ends_before(optimizer):
            self._count()
        self._hold()

    def _after(self, optimizer):
        new = self._rounds.is_new(optimizer)
        ended = self._rounds.ends_after(optimizer)
        if not ended and new and not self._rounds.pending:  # it may hold what was put in the place of parameters
            self._grow()
            ended = self._rounds.ends_after(optimizer)
        if ended:
            self._count()
        elif self._rounds.foreign >= FOREIGN_STEPS:
            self._say_foreign()

    def _guarded(self, action):
        if not self._finalizer.alive:
            return
        try:
            action()
        except Exception:
            log.exception("sosd_fast: the probe failed at step %d and stops here; training goes on.", self._step)
            self._finalizer()

    def _start(self, reference, written):
        """Measures the matrices as they are: the first spectra and, for "auto", what each measurement costs."""
        everything = list(range(len(self._tracked)))
        if not everything:  # more ranks than matrices
            self._initial_reference = reference == "initial"
            return
        records, _ = self._measure_now(full=everything, topk=[])
        if written is None or written < self._step:
            self._emit(records)
        if self._writer and reference == "initial" and written is not None:
            reference = self._writer.first_spectra()
        for t in self._tracked:
            assert t.S is not None  # just measured
            spectrum = t.S if reference == "initial" else (reference or {}).get(t.name)
            if spectrum is None and reference and not t.mine:
                spectrum = t.S  # another rank's to record; measured here for the company of its shape
            if spectrum is not None and len(spectrum) != len(t.S):
                raise ValueError(
                    f"track: expected {len(t.S)} singular values for {t.name}, got a reference with {len(spectrum)}. "
                    "Pass spectra of this model."
                )
            t.reference = (
                None if spectrum is None else torch.as_tensor(spectrum, dtype=torch.float64, device=t.S.device)
            )
        self._initial_reference = reference == "initial"
        self._plan()

    def _plan(self):
        """Chooses whose leading values are followed and, with "auto", measures what that costs."""
        everything = list(range(len(self._tracked)))
        # Below 3 k values the leading ones cost as much as all of them.
        wanted = self._method in ("auto", "topk")
        self._leading = [i for i in everything if wanted and min(self._tracked[i].shape) >= 3 * self._k]
        topk_seconds = {}
        if self._leading:
            self._measure_now(full=[], topk=self._leading)  # cold
            _, topk_seconds = self._measure_now(full=[], topk=self._leading)
        if self._method == "auto":
            if any(t.matrix.parameter.is_cuda for t in self._tracked):
                self._measure_now(full=everything, topk=[])  # its kernels' compilation is not to be counted
            _, seconds = self._measure_now(full=everything, topk=[])  # warm
            full = [seconds[i] for i in everything]
            self._budget = Budget(self._fraction, full, [topk_seconds.get(i) for i in everything])

    def _grow(self):
        """Takes up matrices that the model has gained or put in the place of others since the last step."""
        own = self._find()
        followed = [(t.name, id(t.matrix.parameter)) for t in self._tracked]
        if own is None or [(m.name, id(m.parameter)) for m in own.matrices] == followed:
            return
        self._drain(wait=True)  # what is under way counts the matrices as they were
        known = set(map(id, self._tracked))
        self._take(own)
        new = [i for i, t in enumerate(self._tracked) if id(t) not in known]
        self._rounds.follow(own.parameters)
        log.info("sosd_fast: %d more matrices are measured from step %d on.", len(new), self._step)
        records, _ = self._measure_now(full=new, topk=[])
        self._emit(records)
        for i in new if self._initial_reference else []:
            self._tracked[i].reference = self._tracked[i].S
        self._budget = None
        self._plan()

    def _count(self):
        """Counts a step, measures it and keeps the records."""
        self._rounds.finish()
        began = self._clock()
        if self._rounds.size != self._size or self._rounds.lost:
            if self._size:
                self._grow()
            self._size = self._rounds.size
        self._step += 1
        if self._step % self._every or not self._tracked:
            return
        everything = list(range(len(self._tracked)))
        if self._budget:
            full, topk = everything, self._leading  # the first step: how long a step takes is not known yet
            if self._ended is not None:
                full, topk = self._budget.plan(began - self._planned)
                if self._rows:  # the first rank's clock counts
                    full, topk = self._rows.agree((full, topk))
                if not self._rows or self._rows.rank == 0:
                    self._say_coverage(self._budget)
            self._planned = began
        elif self._method == "topk":
            topk = self._leading
            full = sorted(set(everything) - set(topk))
        else:
            full, topk = everything, []
        self._under_way.append(self._launch(full, topk))
        self._drain()
        ended = self._clock()
        if self._budget and self._ended is not None:
            self._budget.spent(ended - began)
        if self._ended is None:
            self._began = ended  # the first step has no beginning to be a fraction of
        else:
            self._own_seconds += ended - began
        self._ended = ended

    def _launch(self, full: list[int], topk: list[int]) -> "_Work":
        """Begins the measurement of matrices."""
        parts = []
        for kind, indices, measure in (("topk", topk, measure_leading), ("full", full, measure_full)):
            for group in self._groups(indices, kind):
                tracked = [self._tracked[i] for i in group]
                lane = self._lane(tracked[0])
                with lane.measuring([t.tensor() for t in tracked]):
                    launched = measure(tracked, self._step, self._every, self._k)
                    parts.append((kind, group, lane.fetch(launched.tensors), launched))
        return _Work(self._step, full, parts)

    def _finish(self, work: "_Work", audits: bool = False) -> tuple[list[Record], dict[int, float]]:
        """Returns the records of a measurement, and the seconds that each matrix took; waits where it must."""
        found: dict[int, dict] = {}
        seconds = {}
        for kind, group, fetched, launched in work.parts:
            for i, values in zip(group, launched.finish(fetched.get()), strict=True):
                found[i] = found.get(i, {}) | values
            seconds |= dict.fromkeys(group, fetched.seconds / len(group))
            if self._budget:
                self._budget.learn(kind, group, fetched.seconds)
                self._budget.spent(fetched.device_seconds)
            self._own_seconds += fetched.device_seconds if self._ended is not None else 0.0
        # what comes late was measured on weights that are gone
        if audits and all(isinstance(fetched, side.Fetched) for _, _, fetched, _ in work.parts):
            self._audit(work, found)
        records = []
        for i in sorted(found):
            t = self._tracked[i]
            if not t.mine:
                continue
            records.append(Record(step=work.step, name=t.name, shape=t.shape, **found[i]))
            sigma_max = found[i]["sigma_max"]
            if not math.isfinite(sigma_max) or (sigma_max == 0 and work.step > 0):  # zero at first is a usual start
                self._warn_once(t, sigma_max, work.step)
        if self._budget:
            self._budget.urge([r for r in found if _jumped(self._tracked[r], found[r])])
        return records, seconds

    def _measure_now(self, full: list[int], topk: list[int]) -> tuple[list[Record], dict[int, float]]:
        return self._finish(self._launch(full, topk))

    def _drain(self, wait: bool = False):
        """Keeps the records of measurements that are there, in the order of steps."""
        while self._under_way and (wait or self._under_way[0].ready()):
            self._emit(self._finish(self._under_way.popleft(), audits=True)[0])

    def _lane(self, t: Tracked) -> side.Host | side.Side:
        device = t.matrix.parameter.device
        if t.rows is not None:  # what ranks do together they do at once
            return side.Host()
        if device not in self._lanes:
            self._lanes[device] = side.lane(device)
        return self._lanes[device]

    def _hold(self):
        for lane in self._lanes.values():
            lane.hold()

    def _audit(self, work: "_Work", found: dict[int, dict]):
        """Audits one of the matrices just measured in full, when it is time."""
        if self._auditor is None:
            return
        on_host = [i for i in work.full if self._tracked[i].matrix.parameter.device.type == "cpu"]
        i = self._auditor.choose(on_host, self._tracked)
        if i is None:
            return
        t = self._tracked[i]
        result = audit(t, work.step, found[i]["sd_error"])
        if result is None:
            return
        found[i]["audit_error"] = result.error
        self.audits.append(result)
        if result.error > result.bound:
            log.warning(
                "sosd_fast: audit of %s at step %d: |SD - SD_true| = %.1e is beyond its bound %.1e. "
                "It is measured in float64 from now on.", *result[1::-1], *result[2:],
            )  # fmt: skip

    def _groups(self, indices: list[int], kind: str) -> list[list[int]]:
        """Splits matrices into those of one shape, dtype, device and method, which are measured together.

        On a GPU they need only a short side in common; those of one shape come together.
        """
        groups: dict[tuple, list[int]] = {}
        for i in indices:
            t = self._tracked[i]
            by_side = t.matrix.parameter.is_cuda and t.rows is None and (kind == "topk" or t.method != "exact")
            groups.setdefault(
                (min(t.shape) if by_side else t.shape, t.matrix.parameter.dtype, t.matrix.parameter.device, t.method),
                [],
            ).append(i)
        return [sorted(group, key=lambda i: self._tracked[i].shape) for group in groups.values()]

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

    def _warn_once(self, t: Tracked, sigma_max: float, step: int):
        what = "is zero" if sigma_max == 0 else "holds NaN or Inf"
        if t.warned != what:
            t.warned = what
            log.warning("sosd_fast: %s %s at step %d, so it has no singular distribution.", t.name, what, step)

    def _say_foreign(self):
        if not self._said_foreign:
            self._said_foreign = True
            log.warning(
                "sosd_fast: %d steps of optimizers that hold none of the tracked parameters, so none was counted. "
                "Where copies of the weights are trained, pass optimizers=[] and call Probe.step after each step.",
                self._rounds.foreign,
            )

    def _say_coverage(self, budget: Budget):
        if not self._said_coverage and budget.coverage < 0.9 and self._step > 20:
            self._said_coverage = True
            enough = budget.fraction / max(budget.coverage, 1e-9)
            log.warning(
                "sosd_fast: budget=%.3g covers %.0f %% of the matrices each step; they take turns. %s would cover all.",
                budget.fraction,
                100 * budget.coverage,
                f"budget={enough:.2g}" if enough <= 1 else "A larger step, or fewer matrices (include, exclude),",
            )


class _Work(NamedTuple):
    """Measurements of one step that were begun."""

    step: int
    full: list[int]
    parts: list[tuple[str, list[int], side.Fetched | side.OnDevice, Launched]]  # kind, matrices, results, measurement

    def ready(self) -> bool:
        return all(fetched.ready() for _, _, fetched, _ in self.parts)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which measuring would spoil; replays call no hooks."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _jumped(t: Tracked, values: dict) -> bool:
    """Whether a matrix moved three times as much as it uses to; keeps the running mean of what it uses to."""
    moved = values.get("sd_variation", values.get("sd_variation_carried"))
    if moved is None or not math.isfinite(moved):
        return False
    usual, t.usual = t.usual, moved if t.usual is None else 0.9 * t.usual + 0.1 * moved
    return usual is not None and moved > 3 * usual


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
