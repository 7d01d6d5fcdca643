"""Where measurements run: at once on the host, or beside training on a stream of their own on a CUDA device.

On a device the results go to pinned memory, and the probe takes them from there in a later step: nothing in a step
waits for them. A measurement must have read the weights before the next optimizer step changes them. `hold` sees to
that on the device alone. Now and then training waits, on the device too, for a measurement that is timed alone.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from sosd_fast.probe.account import AloneTimes


class Results(Protocol):
    """Tensors that were computed on a device and are on their way to the host.

    Attributes:
        late: whether a later step takes the results, when the weights may have changed.
    """

    late: bool

    def ready(self) -> bool:
        """Whether `get` need not wait."""
        ...

    def get(self) -> Sequence[Tensor | None]:
        """Returns the tensors on the host, in the order in which `fetch` took them; waits where it must."""
        ...

    @property
    def seconds(self) -> float:
        """How long the measurement took; asked for after `get`."""
        ...

    @property
    def device_seconds(self) -> float:
        """How long the measurement took on a device beside the host; 0 where the host did the work."""
        ...


class Executor(Protocol):
    """Runs measurements of the matrices on one device."""

    def measuring(self, weights: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Surrounds the operations that read weights, which are as the current stream leaves them."""
        ...

    def fetch(self, tensors: Sequence[Tensor | None], work: Callable[[], Hashable]) -> Results:
        """Sends tensors to the host; called inside `measuring`.

        Args:
            tensors: what was computed, with None for what is not known.
            work: gives what is equal for measurements that take equally long; asked for on devices only.
        """
        ...

    def hold(self) -> None:
        """Lets what is queued from here on wait until the measurements have read all weights."""
        ...


class HostResults:
    """Results that are on the host."""

    late = False
    device_seconds = 0.0

    def __init__(self, tensors: Sequence[Tensor | None], seconds: float):
        self._tensors, self.seconds = tensors, seconds

    def ready(self) -> bool:
        """Always true."""
        return True

    def get(self) -> Sequence[Tensor | None]:
        """Returns the tensors."""
        return self._tensors


class HostExecutor:
    """Measures at once."""

    def __init__(self):
        self._began = 0.0

    @contextlib.contextmanager
    def measuring(self, weights: Iterable[Tensor]) -> Generator[None]:  # noqa: ARG002
        """Surrounds the operations that read weights."""
        self._began = time.perf_counter()
        yield

    def fetch(self, tensors: Sequence[Tensor | None], work: Callable[[], Hashable]) -> HostResults:  # noqa: ARG002
        """Copies tensors to the host where they are not there."""
        return HostResults([None if t is None else t.cpu() for t in tensors], time.perf_counter() - self._began)

    def hold(self) -> None:
        """Does nothing: no measurement is under way."""


class StreamResults:
    """Results on their way from a CUDA device.

    Args:
        tensors: on the host, where their copies are not done yet.
        began: recorded before the measurement, with a time.
        done: recorded after the copies, with a time.
        times: of the measurements on the device that ran alone.
        work: the kind of work that this one is.
        alone: whether it runs alone, too.

    Attributes:
        seconds: how long the measurement took on the device, by `times`; 0 before `get`.
        device_seconds: the same.
    """

    late = True

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        began: torch.cuda.Event,
        done: torch.cuda.Event,
        times: AloneTimes,
        work: Hashable,
        alone: bool,
    ):
        self.seconds = self.device_seconds = 0.0
        self._tensors, self._began, self._done = tensors, began, done
        self._times, self._work, self._alone = times, work, alone

    def ready(self) -> bool:
        """Whether the copies to the host are done."""
        return self._done.query()

    def get(self) -> Sequence[Tensor | None]:
        """Returns the tensors, and waits for their copies."""
        self._done.synchronize()
        elapsed = 1e-3 * self._began.elapsed_time(self._done)
        if self._alone:
            self._times.note(self._work, elapsed)
        self.seconds = self.device_seconds = self._times.least(self._work, elapsed)
        return self._tensors


class StreamExecutor:
    """Measures on a CUDA stream of its own."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._began: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None
        self._times = AloneTimes()
        self._alone = False  # whether training waits for the measurement under way

    @contextlib.contextmanager
    def measuring(self, weights: Iterable[Tensor]) -> Generator[None]:
        """Surrounds the operations that read weights, which are as the current stream leaves them."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for W in weights:
            W.record_stream(self._stream)  # without it, freeing a weight would hand its memory on while it is read
        with torch.cuda.stream(self._stream):
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
            try:
                yield
            except Exception:  # operations that were queued before the error still read weights
                self._done = torch.cuda.Event()
                self._done.record()
                raise
        if self._alone:
            self.hold()

    def fetch(self, tensors: Sequence[Tensor | None], work: Callable[[], Hashable]) -> StreamResults:
        """Queues the copies to the host."""
        host = _sent(tensors)
        assert self._began is not None
        self._done = torch.cuda.Event(enable_timing=True)
        self._done.record()
        kind = work()
        self._alone = self._times.next_alone(kind)
        return StreamResults(host, self._began, self._done, self._times, kind, self._alone)

    def hold(self) -> None:
        """Lets the current stream wait, on the device, until all weights have been read."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


def _sent(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors in pinned memory, to which their copies are under way: those that are alike in one copy."""
    alike: dict[Hashable, dict[int, Tensor]] = {}
    for i, t in enumerate(tensors):
        if t is not None:
            alike.setdefault((t.dtype, t.shape), {})[i] = t
    host: list[Tensor | None] = [None] * len(tensors)
    for at in alike.values():
        some = torch.stack([*at.values()]) if len(at) > 1 else next(iter(at.values()))[None]
        pinned = torch.empty(some.shape, dtype=some.dtype, device="cpu", pin_memory=True)
        for i, t in zip(at, pinned.copy_(some, non_blocking=True), strict=True):
            host[i] = t
    return host


ExecutorOf = Callable[[torch.device], Executor]  # returns a new executor for the matrices on a device


def executor_of(device: torch.device) -> Executor:
    """Returns a new executor for the matrices on a device."""
    return StreamExecutor(device) if device.type == "cuda" else HostExecutor()
