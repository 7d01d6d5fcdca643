"""The guard of a probe: one thread at a time, no error gets out, and the first error detaches the probe."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Self = TypeVar("Self", bound="Guarded")


class _Lock:
    """A lock that its thread may take again, which counts how often it did."""

    def __init__(self):
        self._lock, self.depth = threading.RLock(), 0

    def acquire(self, timeout: float) -> bool:
        taken = self._lock.acquire(timeout=timeout)
        self.depth += taken
        return taken

    def release(self):
        self.depth -= 1
        self._lock.release()

    def __enter__(self):
        self._lock.acquire()
        self.depth += 1

    def __exit__(self, *error: object):
        self.depth -= 1
        self._lock.release()


class Guarded:
    """Base of an object whose methods marked `guarded` may fail without harm to their caller.

    Args:
        detach: called once with `arguments`: when the object is gone, at `detach`, or after an error.
        arguments: they must not keep the object alive.
    """

    def __init__(self, detach: Callable[..., None], *arguments: object):
        self._lock = _Lock()  # several threads may step optimizers of one model
        self._finalizer = weakref.finalize(self, detach, *arguments)
        self._finalizer.atexit = False  # the hooks see to the end of the process, after what is pending

    @property
    def alive(self) -> bool:
        """Whether steps are measured: until `close`, the end of the model, or an error inside the probe."""
        return self._finalizer.alive

    def detach(self, seconds: float = -1):
        """Keeps what is under way and ends; the hooks call it when the process ends. Detaching twice is fine.

        Args:
            seconds: to wait for another thread's action, at most; without end by default.
        """
        if self.alive and self._lock.acquire(timeout=seconds):
            try:
                self._settle()
                self._finalizer()
            finally:
                self._lock.release()

    def close(self):
        """Detaches; closing twice is fine."""
        self.detach()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object):
        self.close()

    def leave_to_parent(self):
        """Detaches in a forked process, whose parent goes on; `detach` of the arguments is not called."""
        self._lock = _Lock()  # another thread of the parent may have held it
        self._finalizer.detach()

    def guard(self, action: Callable[[], None]):
        """Runs an action, one thread at a time, as long as the object is alive; no error leaves it."""
        if not self.alive:
            return
        with self._lock:
            try:
                if self.alive and self._takes_up():
                    action()
                    self._lays_down()
            except Exception:
                with contextlib.suppress(Exception):  # the log's handlers are the user's
                    self._failed()
                self._finalizer()
        try:  # suppress() would take as long as all the rest
            self._afterwards()
        except Exception:  # of the log
            pass

    def rest(self):
        """Lays down what only actions need, unless one runs, which will do so; never waits."""
        if self._lock.acquire(timeout=0):
            try:
                if self._lock.depth == 1:
                    self._lays_down()
            finally:
                self._lock.release()

    def _takes_up(self) -> bool:
        """What is done before an action; whether it is to be done at all."""
        return True

    def _lays_down(self):
        """What is done after an action."""

    def _settle(self):
        """What is done before the object is detached."""

    def _failed(self):
        """What is done, in the handler of the error, when a guarded method raised one."""

    def _afterwards(self):
        """What is done after a guarded method, when other threads may enter."""


def guarded(method: Callable[Concatenate[Self, P], None]) -> Callable[Concatenate[Self, P], None]:
    """Runs a method under the guard of its object."""

    @functools.wraps(method)
    def run(self: Self, *args: P.args, **kwargs: P.kwargs):
        self.guard(lambda: method(self, *args, **kwargs))

    return run
