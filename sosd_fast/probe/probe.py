"""Probe: measures a model's spectra after each optimizer step; `track` makes it."""

import contextlib
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import nn

from sosd_fast.distributed.layout import shape_of
from sosd_fast.distributed.spectra import RowShards
from sosd_fast.probe import executor as side
from sosd_fast.probe import hooks
from sosd_fast.probe.measure import (
    Audit,
    Auditor,
    Launched,
    Tracked,
    audit,
    form_of,
    measure_full,
    measure_leading,
    unmeasured,
)
from sosd_fast.probe.planner import Budget
from sosd_fast.probe.recorder import KEPT_RECORDS, Recorder, close_quietly
from sosd_fast.probe.steps import Rounds
from sosd_fast.runs.records import Record, RunWriter

FOREIGN_STEPS = 20  # before it is said that they are
_MEASURES = {"topk": measure_leading, "full": measure_full}
_WORDS = {"topk": "leading values", "full": "spectrum"}

log = logging.getLogger("sosd_fast")
probes_of: "weakref.WeakKeyDictionary[nn.Module, list[Probe]]" = weakref.WeakKeyDictionary()


class Probe:
    """Measures this rank's matrices; made by `track`.

    Attributes:
        audits: the comparisons with float64, the last 10,000.
    """

    def __init__(
        self,
        model: "weakref.ref[nn.Module]",
        find,
        optimizers,
        method,
        k,
        budget,
        every,
        reference,
        run_dir,
        on_record,
        step,
        audit,
        theory_bound,
    ):
        self._model, self._find = model, find
        self._lock = threading.RLock()  # several threads may step optimizers of one model
        self._make = lambda matrix: Tracked(matrix, "exact" if method == "exact" else "auto", theory_bound)
        self._tracked: list[Tracked] = []
        own = self._take(find())
        if run_dir is not None and own.ranks > 1:
            run_dir = os.path.join(run_dir, f"rank-{own.rank:05d}")
        self._method, self._k, self._every = method, k, every
        self._fraction = budget
        self._auditor = Auditor() if audit and method != "exact" else None
        self.audits: deque[Audit] = deque(maxlen=KEPT_RECORDS)
        self._again: set[int] = set()  # to be measured in full at the next step, whatever is planned
        self._initial_reference = False
        self._own_seconds, self._began = 0.0, 0.0
        self._ended: float | None = None
        self._budget: Budget | None = None  # with "auto"
        self._planned = 0.0
        self._said_coverage = self._said_foreign = False
        self._clock = time.perf_counter
        self._lanes: dict[torch.device, side.Host | side.Side] = {}
        self._under_way: deque[_Work] = deque()
        settings = {"method": method, "k": k, "budget": budget, "every": every}
        writer = _open(run_dir, settings, [t.name for t in self._tracked], step) if run_dir is not None else None
        self._recorder = Recorder(writer, on_record)
        written = writer.step if writer else None
        self._step = step if step is not None else written or 0
        self._key = hooks.add(self)
        self._finalizer = weakref.finalize(self, _detach, self._key, writer)
        self._finalizer.atexit = False  # sosd_fast.hooks sees to that, after what is under way
        try:
            with self._lock:  # steps of other threads wait
                if self._rows:
                    self._step = self._rows.broadcast_object(self._step)
                self._rounds = Rounds(own.parameters, optimizers)
                self._size = 0  # of the optimizers
                self._start(reference, written, alone=own.ranks == 1)
            self._recorder.tell()
        except BaseException:
            self._finalizer()
            raise

    def _take(self, own, unreadable=()):
        """Follows the matrices of a `RankAssignment`; those already known keep what is remembered of them.

        Args:
            own: the `RankAssignment`.
            unreadable: those of the known ones that it lacks for now.
        """
        known = {(t.name, t.shape): t for t in self._tracked}
        self._tracked = [known.get((m.name, shape_of(m))) or self._make(m) for m in own.matrices]
        for t, m in zip(self._tracked, own.matrices, strict=True):
            t.follow(m)
        for t in unreadable:
            t.follow(t.matrix)
        self._tracked += unreadable
        self._rows = RowShards(own.matrices, own.group) if own.group is not None else None
        for i, t in enumerate(self._tracked):
            t.rows, t.place = self._rows, i
        return own

    def step(self):
        """Counts a step and measures it; for loops without a torch optimizer."""
        self._guarded(lambda: (self._count(), self._hold()))  # no hook tells when the weights change next

    def latest(self) -> dict[str, Record]:
        """Returns the last record of each matrix, by name."""
        return dict(self._recorder.latest)

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        self._guarded(lambda: self._drain(wait=True))
        return self._recorder.records()

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

        def flush():
            if self._rounds.pending:
                self._count()
            self._drain(wait=True)
            self._recorder.flush(self._step)

        self._guarded(flush)

    def close(self):
        """Flushes and detaches; closing twice is fine."""
        self.flush()
        self._stop()
        model = self._model()
        if model is not None:
            with contextlib.suppress(ValueError):  # closed before, or by another thread
                probes_of.get(model, []).remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

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
        """Runs an action, one thread at a time; no error leaves it."""
        if not self._finalizer.alive:
            return
        with self._lock:
            try:
                if self._finalizer.alive:
                    action()
            except Exception:
                with contextlib.suppress(Exception):  # the log's handlers are the user's
                    log.exception(
                        "sosd_fast: the probe failed at step %d and stops here; training goes on.", self._step
                    )
                self._finalizer()
        with contextlib.suppress(Exception):
            self._recorder.tell()

    def _stop(self):
        if self._finalizer.alive:
            with self._lock:  # another thread's measurement comes first
                self._finalizer()

    def _leave(self):
        """Detaches in a forked process, whose parent goes on with what is measured; touches no file."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._finalizer.detach()

    def _start(self, reference, written, alone):
        """Measures the matrices as they are: the first spectra and, for "auto", what each measurement costs."""
        everything = list(range(len(self._tracked)))
        if not everything:  # more ranks than matrices
            self._initial_reference = reference == "initial"
            return
        work = self._launch(everything, [])
        records, _ = self._finish(work)
        if alone and len(work.lost) == len(everything):
            i, error = next(iter(work.lost.items()))
            raise ValueError(
                f"track: expected at least one matrix that can be measured, got {self._tracked[i].name}, which raises "
                f"{type(error).__name__}: {error}. Exclude such parameters, or track the model when they can be read."
            ) from error
        if written is None or written < self._step:
            self._recorder.add(records)
        if self._recorder.writer and reference == "initial" and written is not None:
            reference = self._recorder.writer.first_spectra()
        self._initial_reference = reference == "initial"
        for t in self._tracked:
            if self._initial_reference:
                self._refer(t)
                continue
            spectrum = (reference or {}).get(t.name)
            if spectrum is None and reference and not t.mine:
                spectrum = t.S  # another rank's to record; measured here for the company of its shape
            if spectrum is not None and len(spectrum) != min(t.shape):
                raise ValueError(
                    f"track: expected {min(t.shape)} singular values for {t.name}, got a reference with "
                    f"{len(spectrum)}. Pass spectra of this model."
                )
            device = t.matrix.parameter.device
            t.reference = None if spectrum is None else torch.as_tensor(spectrum, dtype=torch.float64, device=device)
        self._plan()

    def _refer(self, t: Tracked):
        """Takes a matrix's first spectrum that has a distribution as its reference."""
        if t.reference is None and t.known:
            t.reference = t.S

    def _plan(self):
        """Chooses whose leading values are followed and, with "auto", measures what that costs."""
        everything = list(range(len(self._tracked)))
        # Below 3 k values the leading ones cost as much as all of them.
        wanted = self._method in ("auto", "topk")
        self._leading = [i for i in everything if wanted and min(self._tracked[i].shape) >= 3 * self._k]
        topk_seconds = {}
        if self._leading:
            self._measure_now(full=[], topk=self._leading)  # cold
            self._leading = [i for i in self._leading if "topk" not in self._tracked[i].lost]
            _, topk_seconds = self._measure_now(full=[], topk=self._leading)
        if self._method == "auto":
            if any(t.matrix.parameter.is_cuda for t in self._tracked):
                self._measure_now(full=everything, topk=[])  # its kernels' compilation is not to be counted
            _, seconds = self._measure_now(full=everything, topk=[])  # warm
            full = [seconds.get(i, max(seconds.values(), default=1.0)) for i in everything]
            self._budget = Budget(self._fraction, full, [topk_seconds.get(i) for i in everything])

    def _grow(self):
        """Takes up matrices that the model has gained or put in the place of others since the last step."""
        try:
            own = self._find()
        except ValueError as error:  # no matrix is left, say; what was followed stays
            own = None
            log.warning(
                "sosd_fast: the model changed at step %d, and its matrices stay as they were: %s", self._step, error
            )
        if own is None:
            for t in self._tracked:
                t.form = form_of(t.matrix.parameter)  # it is asked once for each change
            return
        followed = [(t.name, id(t.matrix.parameter), t.form) for t in self._tracked]
        if [(m.name, id(m.parameter), form_of(m.parameter)) for m in own.matrices] == followed:
            return
        self._drain(wait=True)  # what is under way counts the matrices as they were
        known, names, model = set(map(id, self._tracked)), {m.name for m in own.matrices}, self._model()
        held = set(map(id, model.parameters())) if model is not None else set()
        alone = own.ranks == 1 and own.group is None  # ranks may swap them
        missing = [t for t in self._tracked if t.name not in names] if alone else []
        unreadable = [t for t in missing if id(t.matrix.parameter) in held]  # its data may have been taken away
        self._take(own, unreadable)
        self._again.clear()
        new = [i for i, t in enumerate(self._tracked) if id(t) not in known]
        self._rounds.follow(own.parameters)
        log.info("sosd_fast: %d more matrices are measured from step %d on.", len(new), self._step)
        gone = [t.name for t in missing if t not in unreadable]
        if gone:
            log.warning("sosd_fast: %s are no longer measured from step %d on.", ", ".join(gone), self._step)
        records, _ = self._measure_now(full=new, topk=[])
        self._recorder.add(records)
        for i in new if self._initial_reference else []:
            self._refer(self._tracked[i])
        self._budget = None
        self._plan()

    def _count(self):
        """Counts a step, measures it and keeps the records."""
        self._rounds.finish()
        began = self._clock()
        changed = any(t.form != form_of(t.matrix.parameter) for t in self._tracked)  # Parameter.data was replaced
        if changed or self._rounds.size != self._size or self._rounds.lost:
            if changed or self._size:
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
                    full, topk = self._rows.broadcast_object((full, topk))
                if not self._rows or self._rows.rank == 0:
                    self._say_coverage(self._budget)
            self._planned = began
        elif self._method == "topk":
            topk = self._leading
            full = sorted(set(everything) - set(topk))
        else:
            full, topk = everything, []
        full, self._again = sorted({*full, *self._again}), set()
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
        work = _Work(self._step, full, [], {})
        for kind, indices in (("topk", topk), ("full", full)):
            for group in self._groups(indices, kind):
                self._begin(work, kind, group)
        return work

    def _begin(self, work: "_Work", kind: str, group: list[int]):
        """Begins the measurement of matrices that belong together; where that raises, of each of them alone."""
        tracked = [self._tracked[i] for i in group]
        try:
            lane = self._lane(tracked[0])
            with lane.measuring([t.tensor() for t in tracked]):
                launched = _MEASURES[kind](tracked, work.step, self._every, self._k)
                work.parts.append((kind, group, lane.fetch(launched.tensors), launched))
        except Exception as error:
            if tracked[0].rows is not None:
                raise  # ranks that measure alone would wait for each other for ever
            if len(group) == 1:
                self._lose(work, kind, group[0], error)
            else:
                for i in group:
                    self._begin(work, kind, [i])

    def _lose(self, work: "_Work", kind: str, i: int, error: Exception):
        """Notes that a matrix could not be measured: its record is NaN, and its next measurement starts anew."""
        t = self._tracked[i]
        work.lost[i] = error
        t.forget(kind)
        self._warn_once(
            t,
            "cannot be measured",
            f"at step {work.step} (its {_WORDS[kind]}: {type(error).__name__}: {error}). "
            "Its records are NaN until it can",
        )

    def _finish(self, work: "_Work", audits: bool = False) -> tuple[list[Record], dict[int, float]]:
        """Returns the records of a measurement, and the seconds that each matrix took; waits where it must."""
        found: dict[int, dict] = {}
        seconds = {}
        for kind, group, fetched, launched in work.parts:
            for i, values in zip(group, self._results(group, fetched, launched), strict=True):
                if isinstance(values, Exception):
                    self._lose(work, kind, i, values)
                else:
                    found[i] = found.get(i, {}) | values
                    self._tracked[i].lost.discard(kind)
                    self._recover(kind, i, values)
            seconds |= dict.fromkeys(group, fetched.seconds / len(group))
            if self._budget:
                self._budget.learn(kind, group, fetched.seconds)
                self._budget.spent(fetched.device_seconds)
            self._own_seconds += fetched.device_seconds if self._ended is not None else 0.0
        # what comes late was measured on weights that are gone
        if audits and all(isinstance(fetched, side.Fetched) for _, _, fetched, _ in work.parts):
            self._audit(work, found)
        records = []
        for i in sorted({*found, *work.lost}):
            t = self._tracked[i]
            if not t.mine:
                continue
            if i not in found:
                kind = "full" if i in work.full else "topk"
                records.append(Record(step=work.step, name=t.name, shape=t.shape, **unmeasured(t, kind, self._k)))
                continue
            records.append(Record(step=work.step, name=t.name, shape=t.shape, **found[i]))
            sigma_max = found[i]["sigma_max"]
            if not math.isfinite(sigma_max) or (sigma_max == 0 and work.step > 0):  # zero at first is a usual start
                what = "is zero" if sigma_max == 0 else "holds NaN or Inf"
                self._warn_once(t, what, f"at step {work.step}, so it has no singular distribution")
        if self._budget:
            self._budget.urge([r for r in found if _jumped(self._tracked[r], found[r])])
        return records, seconds

    def _results(self, group, fetched, launched) -> list[dict | Exception]:
        try:
            return launched.finish(fetched.get())
        except Exception as error:
            if self._tracked[group[0]].rows is not None:
                raise
            return [error] * len(group)

    def _recover(self, kind: str, i: int, values: dict):
        """Restarts what a matrix lacks since it could not be measured or held NaN."""
        t = self._tracked[i]
        if not math.isfinite(values["sigma_max"]):
            return
        if kind == "topk" and not t.known and "full" not in t.lost:
            self._again.add(i)  # the other values are taken from the last full spectrum
        if kind == "full" and self._initial_reference:
            self._refer(t)

    def _measure_now(self, full: list[int], topk: list[int]) -> tuple[list[Record], dict[int, float]]:
        return self._finish(self._launch(full, topk))

    def _drain(self, wait: bool = False):
        """Keeps the records of measurements that are there, in the order of steps."""
        while self._under_way and (wait or self._under_way[0].ready()):
            self._recorder.add(self._finish(self._under_way.popleft(), audits=True)[0])

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
        i = self._auditor.choose([i for i in on_host if i not in work.lost], self._tracked)
        if i is None:
            return
        t = self._tracked[i]
        try:
            result = audit(t, work.step, found[i]["sd_error"])
        except Exception as error:
            if t.rows is not None:
                raise
            self._warn_once(t, "cannot be audited", f"at step {work.step} ({type(error).__name__}: {error})")
            return
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

        On a GPU they need only a short side in common; those of one shape come together. A matrix that starts anew does
        not take from the others what they go on from, and one that could not be measured last time is tried alone.
        """
        groups: dict[tuple, list[int]] = {}
        for i in indices:
            t = self._tracked[i]
            by_side = t.matrix.parameter.is_cuda and t.rows is None and (kind == "topk" or t.method != "exact")
            fresh = t.S is None if kind == "full" else t.rows is None and t.state is None
            alone = i if t.lost and t.rows is None else None
            p = t.matrix.parameter
            key = (min(t.shape) if by_side else t.shape, p.dtype, p.device, t.method, fresh, alone)
            groups.setdefault(key, []).append(i)
        return [sorted(group, key=lambda i: self._tracked[i].shape) for group in groups.values()]

    def _warn_once(self, t: Tracked, what: str, more: str):
        if t.warned != what:
            t.warned = what
            log.warning("sosd_fast: %s %s %s.", t.name, what, more)

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
    lost: dict[int, Exception]  # matrices of which a measurement raised

    def ready(self) -> bool:
        return all(fetched.ready() for _, _, fetched, _ in self.parts)


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


def _detach(key: int, writer: RunWriter | None):
    hooks.remove(key)
    close_quietly(writer)
