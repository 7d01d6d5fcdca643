"""The hooks on optimizer steps, one pair for the whole process, and what happens to probes when it forks or ends.

The hooks are registered once and stay: torch's registry must not change while a thread iterates over it, that is while
it steps, and a compiled step is compiled for the hooks that are there. They pass each step on to the probes that live.
"""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import atexit
import inspect
import itertools
import logging
import os
import threading
import types
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sosd_fast.probe.compiled import Mailbox, compilable

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
_wrapper: Any = Optimizer.profile_hook_step(len)  # of any function
_WRAPPER: types.CodeType = _wrapper.__code__
_forked = False  # whether this process came from one with live probes, and has not said so


def new_key() -> int:
    """Returns a key for `add` and `remove`."""
    return next(_keys)


def add(key: int, probe: "Probe"):
    """Passes every optimizer step on to a probe from now on, and does not keep it alive."""
    global _registered
    with _registering:
        if not _registered:
            register_optimizer_step_pre_hook(compilable(_before, _calls_hooks))
            register_optimizer_step_post_hook(compilable(_after, _calls_hooks, Mailbox(_after_graph)))
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
        outer = _outer_optimizers()
        for probe in live():
            probe.before_step(optimizer, outer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any):  # noqa: ARG001
    if _live and not _capturing():
        outer = _outer_optimizers()
        for probe in live():
            probe.after_step(optimizer, outer)
    elif _forked:
        _say_forked()


def _outer_optimizers() -> list[Optimizer]:
    """Returns the optimizers inside of whose `step` the one steps whose hook calls this, the innermost first.

    They are read off the stack of this thread, where torch's wrapper of `step` has a frame for each. So an error in a
    step leaves nothing behind, and threads do not meet. What steps inside of a hook of ours, such as a model that
    `on_record` trains, steps for itself. Each frame costs 0.1 us.
    """
    before, after, name = _before.__code__, _after.__code__, _WRAPPER.co_name
    found: list[Optimizer] = []
    frame = inspect.currentframe()
    assert frame is not None
    frame = frame.f_back and frame.f_back.f_back  # the hook itself is one of ours
    while frame is not None:
        code = frame.f_code
        if code is before or code is after:
            break
        if name in code.co_name and _calls_hooks(code) and "self" in (names := frame.f_locals):
            found.append(names["self"])
        frame = frame.f_back
    return found[1:]  # the first is the hook's own


def _calls_hooks(code: types.CodeType) -> bool:
    """Whether code is torch's wrapper of `step`, also as dynamo resumes it, with "wrapper" in its name still."""
    return code.co_filename == _WRAPPER.co_filename and _WRAPPER.co_name in code.co_name


def _after_graph(optimizer: Optimizer, outer: Sequence[Optimizer]):
    """Is called after each run of a whole graph in which an optimizer stepped."""
    for probe in live():
        probe.before_step(optimizer, outer)
        probe.after_step(optimizer, outer, hold=True)


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
