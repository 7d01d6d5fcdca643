"""Probe: measures a model's spectra after each optimizer step; `track` makes it."""

# What ranks agree on may be anything.
# pyright: reportUnknownMemberType=false

import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sosd_fast.probe import hooks
from sosd_fast.probe.account import Account
from sosd_fast.probe.audit import Auditor
from sosd_fast.probe.executor import ExecutorOf, executor_of
from sosd_fast.probe.followed import FollowedMatrices, Found
from sosd_fast.probe.guard import guarded
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.measurer import Measurer, PendingStep
from sosd_fast.probe.planner import Plan, Planner
from sosd_fast.probe.recorder import close_quietly, open_recorder
from sosd_fast.probe.settings import Settings
from sosd_fast.probe.steps import StepDetector
from sosd_fast.probe.view import View
from sosd_fast.runs.records import Record, RunWriter

log = logging.getLogger("sosd_fast")
probes_of: "weakref.WeakKeyDictionary[nn.Module, list[Probe]]" = weakref.WeakKeyDictionary()


class Probe(View):
    """Measures this rank's matrices; made by `track`.

    Attributes:
        step_count: training steps so far.
        clock: returns the seconds that budgets, `overhead` and the search for onsets are fractions of.
    """

    def __init__(
        self,
        model: "weakref.ref[nn.Module]",
        find: Callable[[], Found | None],
        optimizers: Iterable[Optimizer] | None,
        settings: Settings,
        *,
        executor_of: ExecutorOf = executor_of,
    ):
        self.clock = time.perf_counter
        self._matrices = FollowedMatrices(model, find, settings.method, settings.theory_bound)
        self._planner = Planner(settings.method, settings.k, settings.every, settings.budget)
        self._measurer = Measurer(self._matrices, settings.every, settings.k, executor_of)
        self._auditor = Auditor() if settings.audit and settings.method != "exact" else None
        self._account, self._pending = Account(), deque[PendingStep]()
        share = self._matrices.share
        self._recorder = open_recorder(settings, [t.name for t in self._matrices.states], share)
        written = (writer := self._recorder.writer) and writer.step
        self.step_count = settings.step if settings.step is not None else written or 0
        self._steps = StepDetector(share.parameters, optimizers, self.step_count)
        super().__init__(_detach, key := hooks.new_key(), self._steps, writer)
        self.rest_after(model())
        try:
            with self._lock:  # steps of other threads wait
                hooks.add(key, self)
                if shards := self._matrices.shards:
                    self.step_count = shards.broadcast_object(self.step_count)
                self._start(settings.reference, written)
            self._recorder.tell()
        except BaseException:
            self._finalizer()
            raise

    @guarded
    def step(self, *, hold: bool = True):
        """Counts a step and measures it; for loops without a torch optimizer.

        Args:
            hold: on a GPU, lets what is queued from here on wait until the weights have been read. False where only
                optimizers of torch.optim change the weights: they wait themselves, and less.
        """
        self._finish_step(by_hand=True)
        if hold:  # no hook tells when the weights change next
            self._measurer.hold()

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        self._settle()
        return self._recorder.records()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs for its records to go on as if it had not stopped; see `load_state_dict`."""
        self._settle()
        auditor = self._auditor and self._auditor.state_dict()
        return {"step": self.step_count, "matrices": self._matrices.state_dict(), "auditor": auditor}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Takes up what `state_dict` returned for the same model at the same step.

        With "auto" the choice of what to measure begins anew, for it follows the clock.

        Raises:
            ValueError: another step or other matrices.
        """
        self._matrices.load_state_dict(state["matrices"], state["step"], now=self.step_count)
        if self._auditor and state.get("auditor"):
            self._auditor.load_state_dict(state["auditor"])

    @guarded
    def flush(self):
        """Measures a step that is pending, waits for what is under way and forces all records to disk."""
        if self._steps.pending:
            self._finish_step()
        self._collect(wait=True)
        self._recorder.flush(self.step_count)

    def close(self):
        """Flushes and detaches; closing twice is fine."""
        self.flush()
        self._look_once_more()
        self.detach()
        if (model := self._matrices.model()) is not None:
            with contextlib.suppress(ValueError):  # closed before, or by another thread
                probes_of.get(model, []).remove(self)

    def detach(self, seconds: float = -1):
        """Keeps what is under way and ends; says so where the weights moved and no step was seen for it."""
        if self.alive and not self._steps.pending:
            self._look_for_moves()
        super().detach(seconds)

    @guarded
    def _look_once_more(self):
        self._recorder.finish()

    @guarded
    def _look_for_moves(self):
        self._steps.moves = self._matrices.moves()

    @guarded
    def before_step(self, optimizer: Optimizer, outer: Sequence[Optimizer] = ()):
        """Is told by the hooks that an optimizer is about to step, inside of the `step` of others."""
        if self._steps.ends_before(optimizer, outer):
            self._finish_step()
        if self._steps.may_have_changed(optimizer, outer):
            self._follow_changes()
        self._measurer.hold()

    @guarded
    def after_step(self, optimizer: Optimizer, outer: Sequence[Optimizer] = (), hold: bool = False):
        """Is told by the hooks that an optimizer has stepped; `hold` as of `step`."""
        self._recorder.see(optimizer)
        if self._steps.ends_after(optimizer, outer):
            self._finish_step()
        if hold:
            self._measurer.hold()

    @guarded
    def _settle(self):
        self._collect(wait=True)

    def _failed(self):
        log.exception("sosd_fast: the probe failed at step %d and stops here; training goes on.", self.step_count)

    def _afterwards(self):
        self._recorder.tell()

    def _finish_step(self, by_hand: bool = False):
        """Counts a training step, launches what is planned for it, and keeps the results that are there."""
        began, optimizers_changed = self.clock(), self._steps.finish(by_hand)
        changed = self._matrices.changed(self.step_count) or optimizers_changed
        changed = changed and self._take_up_changes() is not None
        self.step_count += 1
        if plan := self._planner.plan(began, self.step_count):
            if any(plan):  # what is begun and never measured would add up
                self._recorder.begin(self.step_count, self._matrices.states)
                self._pending.append(self._measurer.launch(plan, self.step_count))
            self._collect()
            self._planner.charge(self._account.add_step(began, self.clock()))
        if not self._steps.by_hand:  # else moves are not told
            self._matrices.note_weights()
        if changed:  # after the step's own measurement, which is compared with the one of the step before
            self._calibrate()

    def _collect(self, wait: bool = False):
        """Keeps the records of measurements that are there, in the order of steps."""
        while self._pending and (wait or self._pending[0].ready()):
            measurements = self._keep(pending := self._pending.popleft())
            if self._auditor and not pending.late:  # the weights change before late results are there
                self._auditor.audit(measurements, self._matrices.states)
            self._recorder.add(measurements, self.clock)

    def _keep(self, pending: PendingStep) -> list[Measurement]:
        """Returns the results of a step, after the planner and the states have taken note; waits where it must."""
        measurements = pending.result()
        for cost in pending.costs:
            self._planner.update_cost(cost)
            self._account.add_device(cost.device_seconds)
        self._planner.heed(*self._matrices.update(measurements))
        return measurements

    def _measure(self, plan: Plan) -> tuple[list[Measurement], dict[int, float]]:
        """Measures at once; returns what was found, and the seconds that each matrix took."""
        return self._keep(pending := self._measurer.launch(plan, self.step_count)), pending.seconds

    def _start(self, reference: Any, written: int | None):
        """Measures the matrices as they are: the first spectra, and what the planner must know."""
        self._planner.follow(self._matrices.shapes, self._matrices.shards)
        if len(self._matrices):  # there may be more ranks than matrices
            measurements, _ = self._measure(self._planner.everything)
            self._matrices.check_measurable(measurements)
            if written is None or written < self.step_count:
                self._recorder.add(measurements, self.clock)
            if self._recorder.writer and reference == "initial" and written is not None:
                reference = self._recorder.writer.first_spectra()
        self._matrices.refer(reference)
        self._calibrate()

    def _calibrate(self):
        self._collect(wait=True)
        self._planner.calibrate(lambda plan: self._measure(plan)[1], self._matrices.on_gpu)

    def _follow_changes(self):
        """Takes up changes of the model before the weights change."""
        if (new := self._take_up_changes()) is not None:
            self._recorder.add(self._measure(Plan(new, []))[0], self.clock)
            self._calibrate()

    def _take_up_changes(self) -> list[int] | None:
        """Follows what the model has gained or put in the place of other matrices; None where nothing has changed.

        Returns:
            The places of the new ones, which are not measured yet; `_calibrate` must follow.
        """
        if (found := self._matrices.search(self.step_count)) is None:
            return None
        self._collect(wait=True)  # pending results count the matrices as they were
        new = self._matrices.take(found, self.step_count)
        self._steps.follow(self._matrices.share.parameters)
        self._planner.follow(self._matrices.shapes, self._matrices.shards)
        return new


def _detach(key: int, steps: StepDetector, writer: RunWriter | None):
    hooks.remove(key)
    steps.say_unseen()
    close_quietly(writer)
