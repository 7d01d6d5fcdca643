"""Which optimizers step on the gradients of one backward pass, and so in one training step.

Where each optimizer steps once a batch, their order alone does not tell where a batch ends. Their gradients do: those
of an optimizer that steps second in a batch are older than the first one's step, and those of the next batch are newer.
"""

import itertools
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sosd_fast.probe.optimizers import Notes, Optimizers, parameters_of, version_of

_LOOKED_AT = 4  # parameters of an optimizer

_graph_task: Any = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # pyright: ignore[reportPrivateUsage]


class _Gradient(NamedTuple):
    """The gradient of a parameter, as it was."""

    parameter: "weakref.ref[Tensor]"
    tensor: "weakref.ref[Tensor]"
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> "_Gradient | None":
        """The gradient as it is, None where there is none."""
        grad = parameter.grad
        return None if grad is None else cls(weakref.ref(parameter), weakref.ref(grad), version_of(grad))

    def changes(self) -> float:
        """How often it has been changed in place since; infinite where there is another one, 0 where there is none."""
        parameter = self.parameter()
        grad = None if parameter is None else parameter.grad
        if grad is None:
            return 0
        return version_of(grad) - self.version if grad is self.tensor() else float("inf")

    def is_gone(self) -> bool:
        """Whether the parameter is there, and has no gradient."""
        parameter = self.parameter()
        return parameter is not None and parameter.grad is None


class Pass:
    """Optimizers that stepped on the gradients of one backward pass, as far as gradients tell.

    Args:
        optimizer: the first of them, which has just stepped.
        counts: what its step is a step of.
        counting: all optimizers that count, but for those of other threads.
        others: parameters that none of these holds.

    Only gradients of this thread are read. A backward pass of another thread may be about to replace its own, and to
    read one meanwhile is no Python error, but a crash.
    """

    def __init__(
        self, optimizer: Optimizer, counts: Sequence[Optimizer], counting: Iterable[Optimizer], others: Iterable[Tensor]
    ):
        self.optimizers = Optimizers(counts)
        self.inside = _graph_task()  # which backward pass runs meanwhile, as in a hook on gradients; -1: none
        self._thread = threading.get_ident()
        self._own = _gradients(parameters_of(optimizer))
        self._noted = Notes[list[_Gradient]]()
        for o in counting:
            self._noted[o] = self._own if o is optimizer else _gradients(parameters_of(o))
        self._others = {id(p): gradient for p in others if (gradient := _Gradient.of(p)) is not None}

    def has_any(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether one of some optimizers has stepped on it."""
        return any(o in self.optimizers for o in optimizers)

    def has_new_gradients(self) -> bool:
        """Whether a backward pass of this thread has renewed gradients of the optimizer that stepped first.

        One change in place is none: they may have been set to zero.
        """
        return self._thread == threading.get_ident() and any(gradient.changes() > 1 for gradient in self._own)

    def is_of(self, optimizers: Sequence[Optimizer]) -> bool | None:
        """Whether the gradients that optimizers are about to step on are those of this pass.

        Returns:
            False where they are newer; None where nothing tells: after this pass they may have been scaled or clipped,
            or there are none.
        """
        found = {self._is_of(o) for o in optimizers}
        return True if True in found else False if False in found else None

    def _is_of(self, optimizer: Optimizer) -> bool | None:
        inside = _graph_task()
        if -1 not in (inside, self.inside):
            return inside == self.inside
        now = _gradients(parameters_of(optimizer), 1)
        noted = self._noted.get(optimizer)
        known = noted is not None
        if noted is None:
            # Threads that train the same weights have gradients of their own.
            own = self._own if self._thread == threading.get_ident() else []
            held = set(map(id, parameters_of(optimizer)))
            noted = [g for g in (*own, *self._others.values()) if id(g.parameter()) in held]
        if not now or not (noted or known):
            return None
        changes = [gradient.changes() for gradient in noted]
        if not noted or max(changes) == float("inf") or any(gradient.is_gone() for gradient in noted):
            return False  # there are others now
        if max(changes) == 0:
            return True
        return False if self.has_new_gradients() else None


def trains_alone() -> bool:
    """Whether this is the main thread, and no other thread may be training: those of tools are daemons, or idle."""
    main = threading.main_thread()
    if threading.current_thread() is not main:
        return False
    return all(t is main or t.daemon or _is_idle(t) for t in threading.enumerate())


def _is_idle(thread: threading.Thread) -> bool:
    """Whether a thread of a ThreadPoolExecutor waits for work, as those that compiled stay for the process's life."""
    frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
    at = frame and (frame.f_globals.get("__name__"), frame.f_code.co_name)
    return at == ("concurrent.futures.thread", "_worker")


class Partners:
    """Optimizers that have stepped on the gradients of one backward pass before."""

    def __init__(self):
        self._groups: list[Optimizers] = []

    def join(self, optimizers: Sequence[Optimizer]):
        """Notes that optimizers are partners."""
        joined = [group for group in self._groups if any(o in group for o in optimizers)]
        if len(joined) == 1 and all(o in joined[0] for o in optimizers):
            return
        members = itertools.chain(optimizers, *joined)
        self._groups = [group for group in self._groups if group not in joined and len(group)]
        self._groups.append(Optimizers(members))

    def are(self, one: Optimizer, other: Optimizer) -> bool:
        """Whether two optimizers are partners."""
        return any(one in group and other in group for group in self._groups)

    def forget(self):
        """Forgets all of them."""
        self._groups = []


def _gradients(parameters: Iterable[Tensor], most: int = _LOOKED_AT) -> list[_Gradient]:
    """Some of the gradients that parameters have."""
    return list(itertools.islice((g for g in map(_Gradient.of, parameters) if g is not None), most))
