"""The time that a probe takes, and the time that it is a part of."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

_FIRST = 2  # measurements of a kind of work that run alone, for the very first may compile kernels
_AGAIN = 64  # from one that runs alone to the next, afterwards
_FIGURES = 3  # that are kept: launches that came late lengthen one of them
_KINDS = 256  # of work that are known: matrices that take turns make many


class Account:
    """Adds up the seconds that a probe takes since the end of the first step that it measured.

    Attributes:
        seconds: taken so far, on the host and on devices.
    """

    def __init__(self):
        self.seconds = 0.0
        self._began = 0.0
        self._ended: float | None = None

    def add_step(self, began: float, ended: float) -> float:
        """Adds the host's part of a step, from one time to another.

        Returns:
            The seconds added: none of the first step, which has no step before it to be a fraction of.
        """
        first = self._ended is None
        if first:
            self._began = ended
        self._ended = ended
        taken = 0.0 if first else ended - began
        self.seconds += taken
        return taken

    def add_device(self, seconds: float):
        """Adds what a device took for a measurement."""
        if self._ended is not None:
            self.seconds += seconds

    @property
    def overhead(self) -> float:
        """The fraction of the time that was taken."""
        if self._ended is None or not self.seconds:
            return 0.0
        return self.seconds / (self._ended - self._began)


@dataclass(slots=True)
class _Seen:
    """Of one kind of work: how often it was measured, and the seconds that the last ones took alone."""

    times: int = 0
    alone: deque[float] = field(default_factory=lambda: deque(maxlen=_FIGURES))


class AloneTimes:
    """What measurements on a device take while nothing of training's runs beside them, by kind of work.

    Beside training a measurement takes long and lengthens the step by less: it fills what training leaves. By the time
    from its first to its last kernel, a probe that made steps 3.8 % longer took 18.6 % of them (LOG.md#account-alone).
    So some measurements run alone, and no other of their kind is said to take longer.
    """

    def __init__(self):
        self._seen: dict[Hashable, _Seen] = {}  # the one that was measured last comes last

    def next_alone(self, work: Hashable) -> bool:
        """Counts a measurement of a kind of work, and returns whether it is to run alone."""
        seen = self._seen[work] = self._seen.pop(work, None) or _Seen()
        if len(self._seen) > _KINDS:
            del self._seen[next(iter(self._seen))]
        seen.times += 1
        return seen.times <= _FIRST or seen.times % _AGAIN == _FIRST

    def note(self, work: Hashable, seconds: float):
        """Takes the seconds of a measurement that ran alone."""
        if seen := self._seen.get(work):
            seen.alone.append(seconds)

    def least(self, work: Hashable, elapsed: float) -> float:
        """Returns the seconds that a measurement is said to take, which ended `elapsed` seconds after it began."""
        seen = self._seen.get(work)
        return min(elapsed, *seen.alone) if seen and seen.alone else elapsed
