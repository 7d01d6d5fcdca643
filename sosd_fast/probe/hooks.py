"""The hooks on optimizer steps, one pair for the whole process, and what happens to probes when it forks or ends.

The hooks are registered once and stay: torch's registry must not change while a thread iterates over it, that is while
it steps, and a compiled step is compiled for the hooks that are there. They pass each step on to the probes that live.
"""

import atexit
import itertools
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from sosd_fast.probe.probe import Probe

EXIT_SECONDS = 5  # that the end of the process waits for another thread's measurement, which may never end

log = logging.getLogger("sosd_fast")

# In the order of tracking, which ranks share. A dict, for each of its operations is atomic: the garbage collector may
# remove a probe in the middle of anything, where it could not take a lock.
_live: "dict[int, weakref.ref[Probe]]" = {}
_keys = itertools.count()
_registering = threading.Lock()
_registered = False
_forked = False  # from a process with live probes, of which this one has not spoken


def add(probe: "Probe") -> int:
    """Passes every optimizer step on to a probe from now on, and does not keep it alive; returns its key."""
    global _registered
    with _registering:
        if not _registered:
            # Dynamo does not trace into a disabled function, nor guards what that function reads.
            register_optimizer_step_pre_hook(torch.compiler.disable(_before))
            register_optimizer_step_post_hook(torch.compiler.disable(_after))
            _registered = True
    key = next(_keys)
    _live[key] = weakref.ref(probe)
    return key


def remove(key: int):
    """Passes nothing on to a probe any more; removing it twice is fine."""
    _live.pop(key, None)


def live() -> "list[Probe]":
    """Returns the probes that steps are passed on to."""
    return [probe for probe in (this() for this in tuple(_live.values())) if probe is not None]


def _before(optimizer, args, kwargs):  # noqa: ARG001
    if _live and not _capturing():
        for probe in live():
            probe._guarded(lambda probe=probe: probe._before(optimizer))


def _after(optimizer, args, kwargs):  # noqa: ARG001
    if _live and not _capturing():
        for probe in live():
            probe._guarded(lambda probe=probe: probe._after(optimizer))
    elif _forked:
        _say_forked()


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which measuring would spoil; replays call no hooks."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _say_forked():
    global _forked
    _forked = False
    log.warning(
        "sosd_fast: process %d was forked from one that measures its model, and measures nothing itself. "
        "Call track in it, with a run_dir of its own, to measure what it trains.",
        os.getpid(),
    )


@atexit.register
def _close_all():
    """Keeps what is still under way on a GPU when the process ends."""
    for probe in live():  # no step that is pending is measured: other ranks may be gone
        if probe._lock.acquire(timeout=EXIT_SECONDS):
            try:
                probe._guarded(lambda probe=probe: probe._drain(wait=True))
                probe._stop()
            finally:
                probe._lock.release()


def _detach_in_child():
    global _registering, _forked
    _registering = threading.Lock()  # another thread of the parent may have held it
    probes, _forked = live(), bool(_live)
    for probe in probes:
        probe._leave()
    _live.clear()


os.register_at_fork(after_in_child=_detach_in_child)
