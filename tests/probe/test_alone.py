"""What a measurement beside training is said to take: no more than alone, as some of them run. No GPU is needed."""

import contextlib
import dataclasses
import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from sosd_fast.distributed.share import share
from sosd_fast.matrices import find_matrices
from sosd_fast.probe.executor import HostExecutor, StreamExecutor
from sosd_fast.probe.followed import FollowedMatrices, Found
from sosd_fast.probe.measurer import Measurer
from sosd_fast.probe.planner import Plan


class Stream:
    """A stream that has done everything at `time`, in seconds."""

    def __init__(self, *_):
        self.time = 0.0

    def wait_stream(self, other):
        self.time = max(self.time, other.time)

    def wait_event(self, event):
        self.time = max(self.time, event.time)


class Device:
    """What the executor asks of torch.cuda: streams with clocks of their own, and events that read them."""

    def __init__(self):
        self.training = self.current = Stream()
        self.host_waits = 0

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def event(device, enable_timing=False):  # noqa: N805
        class Event:
            def record(self):
                self.time = device.current.time

            def synchronize(self):
                device.host_waits += 1

            def elapsed_time(self, other):
                assert enable_timing
                return 1e3 * (other.time - self.time)

        return Event()


@pytest.fixture
def device(monkeypatch):
    made = Device()
    asked = {"Stream": Stream, "Event": made.event, "stream": made.stream, "current_stream": lambda _: made.current}
    for name, value in asked.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def measure(device, executor, work, seconds, training=0.0):
    """Queues `seconds` of a measurement after those of training; returns its results, and whether training waits."""
    device.training.time += training
    begun = device.training.time
    with executor.measuring([]):
        device.current.time += seconds
        results = executor.fetch([None], lambda: work)
    return results, device.training.time > begun


def test_the_first_two_of_a_kind_run_alone_and_then_each_64th(device):
    executor = StreamExecutor("cuda")
    alone = {"a": [], "b": []}
    for i in range(1, 200):
        for work in "ab" if i % 2 else "a":  # each kind is counted for itself
            alone[work].append(measure(device, executor, work, 1.0, training=5.0)[1])
    assert [i for i, waits in enumerate(alone["a"], 1) if waits] == [1, 2, 66, 130, 194]
    assert [i for i, waits in enumerate(alone["b"], 1) if waits] == [1, 2, 66]
    assert device.host_waits == 0


def test_training_waits_for_one_that_runs_alone_until_it_has_ended(device):
    executor = StreamExecutor("cuda")
    for seconds, waits in ((9.0, 9.0), (3.0, 3.0), (3.0, 0.0)):
        before = device.training.time = device.training.time + 10.0  # what ran beside the last one has ended
        measure(device, executor, "a", seconds)
        assert device.training.time == before + waits
    executor.hold()
    assert device.training.time == before + 3.0
    executor.hold()
    assert device.training.time == before + 3.0, "once is enough"


def test_seconds_are_the_lesser_of_those_alone_and_those_beside_training(device):
    executor = StreamExecutor("cuda")

    def seconds(work, elapsed):
        results, _ = measure(device, executor, work, elapsed, training=100.0)
        assert results.get() == [None] and results.device_seconds == results.seconds
        return pytest.approx(results.seconds)

    assert seconds("a", 9.0) == 9.0, "alone, while kernels are compiled"
    assert seconds("a", 2.0) == 2.0, "alone"
    assert seconds("a", 9.0) == 2.0
    assert seconds("a", 1.0) == 1.0
    assert seconds("b", 9.0) == 9.0, "of another kind"
    assert seconds("a", 9.0) == 2.0


def test_the_least_of_the_last_three_alone_counts(device):
    executor, said = StreamExecutor("cuda"), []
    alone = iter([8.0, 4.0, 2.0, 5.0, 3.0, 6.0])
    for i in range(1, 2 + 64 * 4 + 2):
        results, _ = measure(device, executor, "a", next(alone) if i == 1 or i % 64 == 2 else 9.0, training=100.0)
        results.get()
        if i % 64 == 3:
            said.append(pytest.approx(results.seconds))
    assert said == [4.0, 2.0, 2.0, 2.0, 3.0]


def test_seconds_alone_are_known_when_its_results_are_read(device):
    executor = StreamExecutor("cuda")
    first, second, third, fourth = (
        measure(device, executor, "a", seconds, training=100.0)[0] for seconds in (9.0, 2.0, 8.0, 7.0)
    )
    assert device.host_waits == 0
    third.get()
    assert third.seconds == pytest.approx(8.0), "read before those alone"
    second.get()
    fourth.get()
    first.get()
    assert [r.seconds for r in (first, second, fourth)] == pytest.approx([2.0, 2.0, 2.0])


def test_an_error_lets_nothing_run_alone_and_the_next_goes_on(device):
    executor = StreamExecutor("cuda")
    measure(device, executor, "a", 1.0)
    with pytest.raises(MemoryError), executor.measuring([]):
        device.current.time += 1.0
        raise MemoryError
    assert device.training.time == 1.0
    assert measure(device, executor, "a", 1.0)[1], "the second that was queued"
    results, waits = measure(device, executor, "a", 4.0)
    assert not waits

    def broken():
        raise RuntimeError("CUDA error")

    results._done.synchronize = broken
    with pytest.raises(RuntimeError):
        results.get()
    assert results.seconds == results.device_seconds == 0.0


def test_kinds_of_work_that_are_seldom_measured_are_forgotten(device):
    class Work:
        pass

    executor, kept = StreamExecutor("cuda"), weakref.WeakSet()
    early = [measure(device, executor, "a", 1.0) for _ in range(3)]
    assert [waits for _, waits in early] == [True, True, False]
    often = []
    for i in range(2000):
        kept.add(work := Work())
        measure(device, executor, work, 1.0)
        if i % 3 == 0:
            often.append(measure(device, executor, "often", 1.0)[1])
    del work
    gc.collect()
    assert len(kept) < 500
    assert [i for i, waits in enumerate(often, 1) if waits] == [1, *range(2, 2000 // 3, 64)], "one often measured stays"
    assert measure(device, executor, "a", 1.0)[1], "it counts as the first of its kind"
    early[2][0].get()
    assert early[2][0].seconds == pytest.approx(1.0)


def test_an_alone_time_that_is_read_after_its_kind_was_forgotten_is_lost(device):
    executor = StreamExecutor("cuda")
    measure(device, executor, "a", 1.0)
    alone, waits = measure(device, executor, "a", 1.0)
    for i in range(2000):
        measure(device, executor, i, 1.0)
    alone.get()
    assert waits and alone.seconds == pytest.approx(1.0)


def works_of(net, plans, change=lambda _: None):
    """The kinds of work of the measurements of each plan, one after another."""

    class Noting(HostExecutor):
        def fetch(self, tensors, work):
            found[-1].append(work())
            return super().fetch(tensors, work)

    found = []
    matrices = FollowedMatrices(weakref.ref(net), lambda: Found(share(net, find_matrices(net))))
    measurer = Measurer(matrices, every=1, k=4, executor_of=lambda _: Noting())
    for step, plan in enumerate(plans, 1):
        found.append([])
        matrices.update(measurer.launch(plan, step).result())
        change(matrices.states)
    return found


def network(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes)).to(dtype)


@pytest.mark.parametrize("kind", ["full", "leading"])
def test_measurements_that_take_equally_long_are_of_one_kind(kind):
    net, plan = network((40, 40), (40, 40), (160, 40), (40, 160)), Plan([0, 1, 2, 3], [])
    first, *rest = works_of(net, [plan if kind == "full" else Plan([], plan.full)] * 4)
    assert rest[0] == rest[1] == rest[2] and not set(rest[0]) & set(first), "the first has nothing to go on from"


@pytest.mark.parametrize("kind", ["full", "leading"])
def test_measurements_that_may_take_longer_are_of_other_kinds(kind):
    """One and two matrices, longer ones, a shorter side, both kinds."""
    places = [[0], [1], [0, 1], [2], [3]]
    plans = [Plan(p, []) if kind == "full" else Plan([], p) for p in places]
    net = network((40, 40), (40, 40), (40, 80), (20, 80))
    _, (one,), (same,), *others = works_of(net, [Plan([0, 1, 2, 3], [0, 1, 2, 3]), *plans])
    assert one == same and len({one, *(work for (work,) in others)}) == 4
    *_, (both, other) = works_of(net, [Plan([0], [0])] * 2)
    assert both != other


def test_another_dtype_makes_another_kind():
    works = [works_of(network((40, 40), dtype=t), [Plan([], [0])])[0][0] for t in (torch.float32, torch.float64)]
    assert works[0] != works[1]


def test_a_precision_that_is_chosen_makes_another_kind():
    def rank_deficient(_):
        with torch.no_grad():
            net[2].weight[:, 20:] = net[2].weight[:, :20]

    net, plans = network((40, 40), (40, 40), (160, 40)), [Plan([2], [])] * 3
    *_, usual = works_of(net, plans)
    *_, careful = works_of(net, plans, rank_deficient)
    assert usual != careful


@pytest.mark.parametrize(("others", "alike"), [(1, True), (4, False)])
def test_a_few_of_another_precision_make_no_other_kind(monkeypatch, others, alike):
    """Which come and go from step to step, on a GPU: one of sixteen, or a quarter."""
    module = sys.modules["sosd_fast.probe.full"]

    def some(found, count):
        return found._replace(methods=("gram64",) * count + ("gram32",) * (16 - count))

    net, works = network(*[(20, 40)] * 16), []
    for count in (0, others):
        with monkeypatch.context() as m:
            m.setattr(module, "spectra", lambda *a, do=module.spectra, n=count: some(do(*a), n))
            works.append(works_of(net, [Plan([*range(16)], [])] * 2)[-1])
    assert (works[0] == works[1]) == alike


def test_each_matrix_whose_values_are_converted_is_a_kind_of_its_own():
    """Of a stack that is converted at once, the first matrix waits for them all."""

    def converted(states):
        for t in states:
            t.matrix = dataclasses.replace(t.matrix, read=lambda parameter, _: parameter.detach())

    plans = [Plan([0, 1], [])] * 3
    assert len(works_of(network((40, 40), (40, 40)), plans)[-1]) == 1
    *_, second, third = works_of(network((40, 40), (40, 40)), plans, converted)
    assert len(set(second)) == 2 and sorted(second, key=str) == sorted(third, key=str)
