"""Probe: measures a model's spectra after each optimizer step; `track` makes it."""

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosd_fast.matrices import Matrix
from sosd_fast.probe import hooks
from sosd_fast.probe.account import Account
from sosd_fast.probe.audit import Audit, Auditor
from sosd_fast.probe.executor import Executor, executor_of
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.measurer import Measurer, PendingStep
from sosd_fast.probe.planner import Plan, Planner
from sosd_fast.probe.recorder import Recorder, close_quietly, open_writer
from sosd_fast.probe.settings import Settings
from sosd_fast.probe.state import Found, Matrices
from sosd_fast.probe.steps import StepDetector
from sosd_fast.runs.records import Record, RunWriter

log = logging.getLogger("sosd_fast")
probes_of: "weakref.WeakKeyDictionary[nn.Module, list[Probe]]" = weakref.WeakKeyDictionary()


class Probe:
    """Measures this rank's matrices; made by `track`.

    Attributes:
        step_count: training steps so far.
        clock: returns seconds; what budgets and `overhead` are fractions of.
    """

    def __init__(
        self,
        model: "weakref.ref[nn.Module]",
        find: Callable[[], Found | None],
        optimizers: Iterable[Optimizer] | None = None,
        settings: Settings | None = None,
        *,
        executor_of: Callable[[torch.device], Executor] = executor_of,
    ):
        s = settings or Settings()
        self.clock = time.perf_counter
        self._lock = threading.RLock()  # several threads may step optimizers of one model
        self._matrices = Matrices(model, find, "exact" if s.method == "exact" else "auto", s.theory_bound)
        self._planner = Planner(s.method, s.k, s.every, s.budget)
        self._measurer = Measurer(self._matrices, s.every, s.k, executor_of)
        self._auditor = Auditor() if s.audit and s.method != "exact" else None
        self._account = Account()
        self._pending: deque[PendingStep] = deque()
        share, run_dir = self._matrices.share, s.run_dir
        if run_dir is not None and share.ranks > 1:
            run_dir = os.path.join(run_dir, f"rank-{share.rank:05d}")
        told: dict[str, object] = {"method": s.method, "k": s.k, "budget": s.budget, "every": s.every}
        writer = open_writer(run_dir, told, [t.name for t in self._matrices.states], s.step)
        self._recorder = Recorder(writer, s.on_record)
        written = writer.step if writer else None
        self.step_count = s.step if s.step is not None else written or 0
        self._finalizer = weakref.finalize(self, _detach, hooks.add(self), writer)
        self._finalizer.atexit = False  # `end_with_process` comes first, for what is pending
        try:
            with self._lock:  # steps of other threads wait
                if share.rows:
                    self.step_count = share.rows.agree(self.step_count)
                self._steps = StepDetector(share.parameters, optimizers)
                self._start(s.reference, written)
            self._recorder.tell()
        except BaseException:
            self._finalizer()
            raise

    def step(self, *, hold: bool = True):
        """Counts a step and measures it; for loops without a torch optimizer.

        Args:
            hold: on a GPU, lets what is queued from here on wait until the weights have been read. False where only
                optimizers of torch.optim change the weights: they wait themselves, and less.
        """

        def step():
            self._finish_step()
            if hold:  # no hook tells when the weights change next
                self._measurer.hold()

        self._guarded(step)

    def latest(self) -> dict[str, Record]:
        """Returns the last record of each matrix, by name."""
        return dict(self._recorder.latest)

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        self._guarded(lambda: self._collect(wait=True))
        return self._recorder.records()

    @property
    def audits(self) -> deque[Audit]:
        """The comparisons with float64, the last 10,000."""
        return self._auditor.audits if self._auditor else deque()

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices that this rank measures."""
        return [t.matrix for t in self._matrices.states]

    @property
    def alive(self) -> bool:
        """Whether steps are measured: until `close`, the end of the model, or an error inside the probe."""
        return self._finalizer.alive

    @property
    def seconds(self) -> float:
        """The seconds spent in the probe since the first step, on the host and on GPUs."""
        return self._account.seconds

    @property
    def overhead(self) -> float:
        """The fraction of the time since the first step that was spent in the probe, on the host and on GPUs."""
        return self._account.overhead

    def __repr__(self) -> str:
        reasons = Counter(self._matrices.left_out.values())
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        full, leading = (f"{100 * share:.3g} %" for share in self._planner.shares)
        return (
            f"Probe({len(self._matrices)} matrices, {len(self._matrices.left_out)} parameters left out"
            f"{f' ({left_out})' if left_out else ''}, {self.step_count} steps, measured each step: {full} in full, "
            f"{leading} by leading values, overhead {100 * self.overhead:.2g} %{'' if self.alive else ', closed'})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs for its records to go on as if it had not stopped; see `load_state_dict`."""
        self._guarded(lambda: self._collect(wait=True))
        matrices = {t.name: t.state_dict() for t in self._matrices.states}
        return {"step": self.step_count, "matrices": matrices, "auditor": self._auditor and self._auditor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Takes up what `state_dict` returned for the same model at the same step.

        With "auto" the choice of what to measure begins anew, for it follows the clock.

        Raises:
            ValueError: another step or other matrices.
        """
        names = [t.name for t in self._matrices.states]
        if state["step"] != self.step_count or list(state["matrices"]) != names:
            raise ValueError(
                f"Probe.load_state_dict: expected the state of {len(names)} matrices at step {self.step_count}, got "
                f"{len(state['matrices'])} at step={state['step']}. Pass that step to track, and the same model."
            )
        for t in self._matrices.states:
            t.load_state_dict(state["matrices"][t.name])
        if self._auditor and state.get("auditor"):
            self._auditor.load_state_dict(state["auditor"])

    def flush(self):
        """Measures a step that is pending, waits for what is under way and forces all records to disk."""

        def flush():
            if self._steps.pending:
                self._finish_step()
            self._collect(wait=True)
            self._recorder.flush(self.step_count)

        self._guarded(flush)

    def close(self):
        """Flushes and detaches; closing twice is fine."""
        self.flush()
        if self.alive:
            with self._lock:  # another thread's measurement comes first
                self._finalizer()
        model = self._matrices.model()
        if model is not None:
            with contextlib.suppress(ValueError):  # closed before, or by another thread
                probes_of.get(model, []).remove(self)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *error: object):
        self.close()

    def before_step(self, optimizer: Optimizer):
        """Takes note that an optimizer is about to step; the hooks call it."""

        def before():
            if self._steps.ends_before(optimizer):
                self._finish_step()
            self._measurer.hold()

        self._guarded(before)

    def after_step(self, optimizer: Optimizer):
        """Takes note that an optimizer has stepped; the hooks call it."""

        def after():
            new = self._steps.is_new(optimizer)
            ended = self._steps.ends_after(optimizer)
            if not ended and new and not self._steps.pending:  # it may hold what was put in the place of parameters
                self._follow_changes()
                ended = self._steps.ends_after(optimizer)
            if ended:
                self._finish_step()

        self._guarded(after)

    def end_with_process(self, seconds: float):
        """Keeps what is still under way when the process ends, and waits so long at most for another thread."""
        if self._lock.acquire(timeout=seconds):
            try:
                self._guarded(lambda: self._collect(wait=True))  # no pending step is measured: other ranks may be gone
                self._finalizer()
            finally:
                self._lock.release()

    def leave_to_parent(self):
        """Detaches in a forked process, whose parent goes on with the measurements; touches no file."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._finalizer.detach()

    def _guarded(self, action: Callable[[], None]):
        """Runs an action, one thread at a time; no error leaves it."""
        if not self.alive:
            return
        with self._lock:
            try:
                if self.alive:
                    action()
            except Exception:
                with contextlib.suppress(Exception):  # the log's handlers are the user's
                    log.exception(
                        "sosd_fast: the probe failed at step %d and stops here; training goes on.", self.step_count
                    )
                self._finalizer()
        with contextlib.suppress(Exception):
            self._recorder.tell()

    def _finish_step(self):
        """Counts a training step, launches what is planned for it, and keeps the results that are there."""
        optimizers_changed = self._steps.finish()
        began = self.clock()
        if self._matrices.changed or optimizers_changed:
            self._follow_changes()
        self.step_count += 1
        plan = self._planner.plan(began, self.step_count)
        if plan is None:
            return
        self._pending.append(self._measurer.launch(plan, self.step_count))
        self._collect()
        self._planner.charge(self._account.add_step(began, self.clock()))

    def _collect(self, wait: bool = False):
        """Keeps the records of measurements that are there, in the order of steps."""
        while self._pending and (wait or self._pending[0].ready()):
            measurements = self._keep(self._pending.popleft(), audit=True)
            self._record(measurements)

    def _keep(self, pending: PendingStep, audit: bool = False) -> list[Measurement]:
        """Returns the results of a step, after all who remember something of them were told; waits where it must."""
        measurements, states = pending.result(), self._matrices.states
        for cost in pending.costs:
            self._planner.update_cost(cost.kind, cost.places, cost.seconds)
            self._planner.charge(cost.device_seconds)
            self._account.add_device(cost.device_seconds)
        moved: list[int] = []
        for found in measurements:
            state = states[found.place]
            if state.lacks_spectrum(found):
                self._planner.require_full(found.place)
            if state.update(found):
                moved.append(found.place)
        if audit and self._auditor and not pending.late:  # the weights have changed by the time late results are there
            self._auditor.audit(measurements, states)
        self._planner.prioritize(moved)
        return measurements

    def _record(self, measurements: list[Measurement]):
        states = self._matrices.states
        self._recorder.add([found.record() for found in measurements if states[found.place].mine])

    def _measure(self, plan: Plan) -> tuple[list[Measurement], dict[int, float]]:
        """Measures at once; returns what was found, and the seconds that each matrix took."""
        pending = self._measurer.launch(plan, self.step_count)
        measurements = self._keep(pending)
        return measurements, {i: cost.seconds / len(cost.places) for cost in pending.costs for i in cost.places}

    def _start(self, reference: Any, written: int | None):
        """Measures the matrices as they are: the first spectra and, with "auto", what each measurement costs."""
        states, writer = self._matrices.states, self._recorder.writer
        self._planner.follow([t.shape for t in states], self._matrices.rows)
        if states:  # there may be more ranks than matrices
            measurements, _ = self._measure(Plan(list(range(len(states))), []))
            error = measurements[0].failure
            if error and self._matrices.share.ranks == 1 and all(found.lost for found in measurements):
                raise ValueError(
                    f"track: expected at least one matrix that can be measured, got {measurements[0].name}, which "
                    f"raises {type(error).__name__}: {error}. Exclude such parameters, or track the model when they "
                    "can be read."
                ) from error
            if written is None or written < self.step_count:
                self._record(measurements)
            if writer and reference == "initial" and written is not None:
                reference = writer.first_spectra()
        self._matrices.refer(reference)
        self._calibrate()

    def _calibrate(self):
        """Measures what the planner must know: whose leading values can be followed and, with "auto", the costs."""
        planner, states = self._planner, self._matrices.states
        everything = list(range(len(states)))
        leading_seconds: dict[int, float] = {}
        if planner.leading:
            self._measure(Plan([], planner.leading))  # from random subspaces, which takes longer
            planner.leading = [i for i in planner.leading if "leading" not in states[i].lost]
            _, leading_seconds = self._measure(Plan([], planner.leading))
        if planner.within_budget and states:
            if any(t.matrix.parameter.is_cuda for t in states):
                self._measure(Plan(everything, []))  # the compilation of kernels is not to be counted
            _, seconds = self._measure(Plan(everything, []))
            dearest = max(seconds.values(), default=1.0)
            planner.start([seconds.get(i, dearest) for i in everything], [leading_seconds.get(i) for i in everything])

    def _follow_changes(self):
        """Takes up matrices that the model has gained or put in the place of others since the last step."""
        found = self._matrices.search(self.step_count)
        if found is None:
            return
        self._collect(wait=True)  # pending results count the matrices as they were
        new = self._matrices.take(found, self.step_count)
        self._steps.follow(self._matrices.share.parameters)
        self._planner.follow([t.shape for t in self._matrices.states], self._matrices.rows)
        self._record(self._measure(Plan(new, []))[0])
        self._calibrate()


def _detach(key: int, writer: RunWriter | None):
    hooks.remove(key)
    close_quietly(writer)
