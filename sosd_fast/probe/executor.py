"""Where measurements run: at once on the host, or beside training on a stream of their own on a CUDA device.

On a device results go to pinned memory and are fetched when they are there; nothing in a step waits for it. What reads
weights must be done before the next optimizer step changes them, which `hold` sees to, on the device alone.
"""

import contextlib
import time
from typing import NamedTuple

import torch
from torch import Tensor


class Fetched(NamedTuple):
    """Results on the host."""

    tensors: dict[str, Tensor]
    seconds: float

    def ready(self) -> bool:
        """Whether `get` need not wait."""
        return True

    def get(self) -> dict[str, Tensor]:
        """Returns the results."""
        return self.tensors

    @property
    def device_seconds(self) -> float:
        """What they took on a device."""
        return 0.0


class Host:
    """Measures at once."""

    @contextlib.contextmanager
    def measuring(self, weights: list[Tensor]):  # noqa: ARG002
        """Surrounds what reads weights."""
        self._began = time.perf_counter()
        yield

    def fetch(self, tensors: dict[str, Tensor]) -> Fetched:
        """Returns the results, copied to the host where they are not."""
        return Fetched({name: t.cpu() for name, t in tensors.items()}, time.perf_counter() - self._began)

    def hold(self):
        """Nothing is under way."""


class OnDevice:
    """Results on their way from a device."""

    def __init__(self, tensors: dict[str, Tensor], began: torch.cuda.Event, done: torch.cuda.Event):
        self._tensors, self._began, self._done = tensors, began, done

    def ready(self) -> bool:
        """Whether `get` need not wait."""
        return self._done.query()

    def get(self) -> dict[str, Tensor]:
        """Returns the results, once they are there."""
        self._done.synchronize()
        return self._tensors

    @property
    def seconds(self) -> float:
        """What they took, once they are there; other streams' work beside them included."""
        return 1e-3 * self._began.elapsed_time(self._done)

    device_seconds = seconds


class Side:
    """Measures on a stream of its own."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._done = None

    @contextlib.contextmanager
    def measuring(self, weights: list[Tensor]):
        """Surrounds what reads weights, which are as the current stream leaves them."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for W in weights:
            W.record_stream(self._stream)  # were they freed now, their memory would be waited for
        with torch.cuda.stream(self._stream):
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
            try:
                yield
            except Exception:  # what was queued before still reads weights
                self._done = torch.cuda.Event()
                self._done.record()
                raise

    def fetch(self, tensors: dict[str, Tensor]) -> OnDevice:
        """Queues the copies to the host; called inside `measuring`."""
        host = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
            for name, t in tensors.items()
        }
        self._done = torch.cuda.Event(enable_timing=True)
        self._done.record()
        return OnDevice(host, self._began, self._done)

    def hold(self):
        """Lets the current stream wait, on the device, until all weights have been read."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


def lane(device: torch.device) -> Host | Side:
    """Returns where tensors of a device are measured."""
    return Side(device) if device.type == "cuda" else Host()
