"""Launches that take turns, since their programs wait for one another, and launches that run beside others.

All programs that wait for one another run at once, and two such launches one after the other.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sosd_fast import kernels

_lock = threading.Lock()
_launched: dict[torch.device, Any] = {}  # events, recorded behind the last launch whose programs wait


def places(per_sm: int, device: torch.device) -> int:
    """How many programs that wait for one another are certain to run at once, of which a multiprocessor takes some."""
    if torch.cuda.is_current_stream_capturing():
        return 1  # a graph's launches cannot take their turn
    together = kernels.multiprocessors(device)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        # Kernels of two groups of ranks that wait for the same kernels on other GPUs, of 32 programs at most each, find
        # room beside: else they could wait for each other by way of the reductions that keep them from starting.
        return together // 2
    return together * per_sm


def cooperative(launch: Callable, arguments: dict[str, Any], device: torch.device) -> bool:
    """Launches a kernel with COOPERATIVE; false, with a warning, if the GPU has no room for all programs at once.

    The driver refuses what could not run all at once, instead of waiting for ever.
    """
    with _in_turn(device):
        try:
            launch(**arguments, COOPERATIVE=True, launch_cooperative_grid=True)
        except RuntimeError as error:
            _warn_alone(str(error))
            return False
    return True


def at_once(calls: Sequence[Callable[[], Tensor]], sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Calls functions that launch much and leave most of a GPU idle, the largest first, the others on further streams.

    What is queued afterwards waits for them all. While a graph is captured they go one after the other.

    Args:
        calls: independent of one another; each returns what it computes.
        sizes: how much each computes. The largest has the device from the start, while the host queues the others.
        device: where they launch.

    Returns:
        What each returned.
    """
    if len(calls) == 1 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    ready = current.record_event()
    largest, *others = sorted(range(len(calls)), key=lambda i: -sizes[i])
    found = {largest: calls[largest]()}
    for number, i in enumerate(others):
        stream = _beside(device, number)
        stream.wait_event(ready)
        try:
            with torch.cuda.stream(stream):
                found[i] = calls[i]()
        finally:  # what it read may be freed from here on
            current.wait_stream(stream)
        found[i].record_stream(current)
    return [found[i] for i in range(len(calls))]


@functools.cache
def _beside(device: torch.device, number: int) -> torch.cuda.Stream:  # noqa: ARG001
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _in_turn(device: torch.device) -> Iterator[None]:
    """Lets a launch begin when the last one on the device has ended, whatever their streams; the host does not wait.

    Two at once, each with a part of its programs on the device, could wait for ever for the rest.
    """
    with _lock:
        stream = torch.cuda.current_stream(device)
        if device in _launched:
            stream.wait_event(_launched[device])
        yield
        _launched[device] = stream.record_event()


@functools.cache
def _warn_alone(error: str):
    kernels.log.warning(
        "sosd_fast: the GPU did not take several programs to a matrix (%s), so one has to do, more slowly. "
        "Leave it more of the GPU.",
        error,
    )
