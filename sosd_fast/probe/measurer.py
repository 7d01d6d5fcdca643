"""Launches measurements of matrices, those that belong together at once, and reads their results."""

import functools
from collections.abc import Hashable, Sequence

import torch

from sosd_fast.probe.executor import Executor, ExecutorOf, HostExecutor, Results, executor_of
from sosd_fast.probe.followed import FollowedMatrices
from sosd_fast.probe.full import FullGroup
from sosd_fast.probe.leading import LeadingGroup
from sosd_fast.probe.measurement import FullValues, Kind, LeadingValues, Measurement
from sosd_fast.probe.planner import Cost, Plan
from sosd_fast.probe.state import MatrixState
from sosd_fast.spectra.precision import Method
from sosd_fast.stored import keeping_stack

_NAMES = {"auto": "gram32", "exact64": "exact"}  # of methods, in the records of matrices that cannot be measured


class PendingStep:
    """The measurements of one step that were launched.

    Attributes:
        costs: of each group of matrices; there after `result`.
    """

    def __init__(self, step: int, plan: Plan, states: list[MatrixState], k: int):
        self.costs: list[Cost] = []
        self._step, self._plan, self._states, self._k = step, plan, states, k
        self._groups: list[tuple[FullGroup | LeadingGroup, Results]] = []
        self._failures: dict[int, Exception] = {}  # by the place of the matrix that raised

    def add(self, group: FullGroup | LeadingGroup, results: Results):
        """Takes a group of matrices whose measurement was launched."""
        self._groups.append((group, results))

    def lose(self, kind: Kind, state: MatrixState, error: Exception):
        """Takes a matrix whose measurement raised an error."""
        self._failures[state.place] = error
        state.lose(kind, self._step, error)

    @property
    def late(self) -> bool:
        """Whether results come when the weights may have changed."""
        return any(results.late for _, results in self._groups)

    def ready(self) -> bool:
        """Whether `result` need not wait."""
        return all(results.ready() for _, results in self._groups)

    @property
    def seconds(self) -> dict[int, float]:
        """The seconds that each matrix took, by its place, where it could be measured; there after `result`."""
        found: dict[int, float] = {}
        for cost in self.costs:  # a group's by the number of operations, for its matrices may be of different shapes
            shapes = [sorted(self._states[place].shape) for place in cost.places]
            work = [r * r * (K + 2 * r) if cost.kind == "full" else r * K for r, K in shapes]
            found |= {place: cost.seconds * w / sum(work) for place, w in zip(cost.places, work, strict=True)}
        return {place: seconds for place, seconds in found.items() if place not in self._failures}

    def result(self) -> list[Measurement]:
        """Returns what was found of each matrix, in the order of places; waits where it must."""
        found: dict[int, Measurement] = {}
        for group, results in self._groups:
            for state, values in zip(group.states, self._read(group, results), strict=True):
                if isinstance(values, Exception):
                    self.lose(group.kind, state, values)
                    continue
                if (measurement := found.get(state.place)) is None:
                    measurement = found[state.place] = self._measurement(state)
                if isinstance(values, FullValues):
                    measurement.full = values
                else:
                    measurement.leading = values
            places = [state.place for state in group.states]
            self.costs.append(Cost(group.kind, places, results.seconds, results.device_seconds))
        for place, error in self._failures.items():
            if place in found:
                found[place].failure = error
            else:
                found[place] = self._lost(self._states[place], error)
        return [found[place] for place in sorted(found)]

    def _measurement(self, state: MatrixState) -> Measurement:
        return Measurement(self._step, state.place, state.name, state.shape, state.mine)

    def _lost(self, state: MatrixState, error: Exception) -> Measurement:
        lost = self._measurement(state)
        lost.lost, lost.failure = True, error
        if state.place in self._plan.full:
            lost.full = FullValues.unmeasured(state.shape, self._k, _NAMES.get(state.method, state.method))
        else:
            lost.leading = LeadingValues.unmeasured(state.shape, self._k)
        return lost

    @staticmethod
    def _read(group: FullGroup | LeadingGroup, results: Results) -> Sequence[FullValues | LeadingValues | Exception]:
        try:
            return group.read(results.get())
        except Exception as error:
            if group.states[0].shards is not None:
                raise  # ranks that go on alone would wait for each other for ever
            return [error] * len(group.states)


class Measurer:
    """Measures matrices where they are.

    Args:
        matrices: that the places of plans count.
        every: steps from one that is measured to the next.
        k: how many leading values are kept.
        executor_of: returns a new executor for the matrices on a device.
    """

    def __init__(
        self,
        matrices: FollowedMatrices,
        every: int,
        k: int,
        executor_of: ExecutorOf = executor_of,
    ):
        self._matrices, self._every, self._k = matrices, every, k
        self._executor_of = executor_of
        self._executors: dict[torch.device, Executor] = {}

    def launch(self, plan: Plan, step: int) -> PendingStep:
        """Begins the measurements that a plan names."""
        states = self._matrices.states
        pending = PendingStep(step, plan, states, self._k)
        planned: tuple[tuple[Kind, Sequence[int]], ...] = ("leading", plan.leading), ("full", plan.full)
        groups: list[tuple[Kind, list[MatrixState]]] = []
        for kind, places in planned:
            groups.extend((kind, group) for group in self._groups(kind, [states[i] for i in places]))
        # Matrices of a converted stack come one after another, so that it is converted once.
        groups.sort(key=lambda item: id(matrix.parameter) if (matrix := item[1][0].matrix).read else 0)
        with keeping_stack():
            for kind, group in groups:
                self._launch_group(pending, step, kind, group)
        return pending

    def hold(self):
        """Lets what is queued from here on, on a device, wait until the measurements have read all weights."""
        for executor in self._executors.values():
            executor.hold()

    def _launch_group(self, pending: PendingStep, step: int, kind: Kind, states: list[MatrixState]):
        """Begins the measurement of matrices that belong together; where that raises, of each of them alone."""
        try:
            executor, fresh = self._executor(states[0]), _fresh(kind, states[0])
            with executor.measuring(t.matrix.parameter.detach() for t in states if t.matrix.read is None):
                launch = FullGroup.launch if kind == "full" else LeadingGroup.launch
                group = launch(states, step, self._every, self._k)
                results = executor.fetch(group.tensors, functools.partial(_work, group, fresh))
            pending.add(group, results)
        except Exception as error:
            if states[0].shards is not None:
                raise  # ranks that go on alone would wait for each other for ever
            if len(states) == 1:
                pending.lose(kind, states[0], error)
            else:
                for state in states:
                    self._launch_group(pending, step, kind, [state])

    def _executor(self, state: MatrixState) -> Executor:
        if state.shards is not None:  # ranks measure together, and at once
            return HostExecutor()
        device = state.matrix.parameter.device
        if device not in self._executors:
            self._executors[device] = self._executor_of(device)
        return self._executors[device]

    @staticmethod
    def _groups(kind: Kind, states: list[MatrixState]) -> list[list[MatrixState]]:
        """Splits matrices into those of one shape, dtype, device and method, which are measured together.

        For all values by our kernels, and on a GPU, they need only a short side in common. A matrix that starts
        anew is measured apart from others, which go on from their last measurement. One that could not be measured last
        time is tried alone, and one whose values are converted first comes alone, lest all converted ones are there at
        once.
        """
        groups: dict[tuple[object, ...], list[MatrixState]] = {}
        sides: dict[tuple[object, ...], bool] = {}  # whether they need only a short side in common
        for t in states:
            p = t.matrix.parameter
            form = p.dtype, p.device, t.method
            if (by_side := sides.get(form)) is None:
                sides[form] = by_side = FullGroup.together(t) if kind == "full" else p.is_cuda and t.shards is None
            alone = t.place if (t.lost or t.matrix.read) and t.shards is None else None
            key = (min(t.shape) if by_side else t.shape, *form, _fresh(kind, t), alone)
            groups.setdefault(key, []).append(t)
        return [sorted(group, key=lambda t: t.shape) for group in groups.values()]


def _fresh(kind: Kind, state: MatrixState) -> bool:
    """Whether a matrix starts anew, and does not go on from its last measurement."""
    return state.last is None if kind == "full" else state.shards is None and state.subspace is None


def _work(group: FullGroup | LeadingGroup, fresh: bool) -> Hashable:
    """What tells how long a measurement takes: groups of which it is equal take equally long."""
    first = group.states[0]
    # Some full spectra are taken in float64 at one step and not at the next, so only eighths count.
    share = None  # leading values know no methods
    if isinstance(group, FullGroup):
        share = 8 * sum(m != Method.GRAM32 for m in group.methods) // len(group.states)
    # A matrix whose values are converted comes alone; the first of a stack is charged with the conversion of them all.
    converted = first.place if first.matrix.read else None
    sizes = min(first.shape), len(group.states), sum(max(t.shape) for t in group.states)
    return *sizes, first.matrix.parameter.dtype, fresh, converted, share
