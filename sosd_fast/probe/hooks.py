"""The hooks on optimizer steps, one pair for the whole process, and what happens to probes when it forks or ends.

The hooks are registered once and stay: torch's registry must not change while a thread iterates over it, that is while
it steps, and a compiled step is compiled for the hooks that are there. They pass each step on to the probes that live.
"""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import atexit
import itertools
import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
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
_forked = False  # whether this process came from one with live probes, and has not said so


def new_key() -> int:
    """Returns a key for `add` and `remove`."""
    return next(_keys)


def add(key: int, probe: "Probe"):
    """Passes every optimizer step on to a probe from now on, and does not keep it alive."""
    global _registered
    with _registering:
        if not _registered:
            # Dynamo does not trace into a disabled function, nor guards what that function reads.
            disable: Any = torch.compiler.disable
            register_optimizer_step_pre_hook(disable(_before))
            register_optimizer_step_post_hook(disable(_after))
            _registered = True
    _live[key] = weakref.ref(probe)


def remove(key: int):
    """Passes nothing on to a probe any more; removing it twice is fine."""
    _live.pop(key, None)


def live() -> "list[Probe]":
    """Returns the probes that steps are passed on to."""
    return [probe for probe in (this() for this in tuple(_live.values())) if probe is not None]


def _before(optimizer: Optimizer, args: Any, kwargs: Any):  # noqa: ARG001
    if _live and not _capturing():
        for probe in live():
            probe.before_step(optimizer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any):  # noqa: ARG001
    if _live and not _capturing():
        for probe in live():
            probe.after_step(optimizer)
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


def _close_all():
    for probe in live():  # no pending step is measured: other ranks may be gone
        probe.detach(EXIT_SECONDS)


def _detach_in_child():
    global _registering, _forked
    _registering = threading.Lock()  # another thread of the parent may have held it
    probes, _forked = live(), bool(_live)
    for probe in probes:
        probe.leave_to_parent()
    _live.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_detach_in_child)
