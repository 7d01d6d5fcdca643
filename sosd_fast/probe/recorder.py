"""Where a probe's records go: a run directory or memory, and the function that is called with each."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.optim import Optimizer

from sosd_fast.distributed.copies import Roll
from sosd_fast.distributed.group import rank_in_world
from sosd_fast.distributed.share import RankAssignment
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.settings import Settings
from sosd_fast.probe.state import MatrixState
from sosd_fast.probe.watcher import Watcher
from sosd_fast.runs import events
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Line, Record, RunWriter, load  # pyright: ignore[reportUnknownVariableType]

KEPT_RECORDS = 10_000  # in memory, where no run directory keeps them
KEPT_EVENTS = 10_000
MOST_FAILURES = 10  # of on_record or on_event in a row, before it is dropped
PATIENCE = 20  # steps before it is said that ranks are absent

log = logging.getLogger("sosd_fast")


Found = TypeVar("Found", Record, Event)
Result = TypeVar("Result")


class Listener(Generic[Found]):
    """A function of the user's that is called with what is found; it is dropped after ten failures in a row."""

    def __init__(self, name: str, function: Callable[[Found], None] | None):
        self.name, self.function, self._failures = name, function, 0

    def tell(self, found: Found):
        """Calls the function; what it raises is logged."""
        if self.function is None:
            return
        try:
            self.function(found)
            self._failures = 0
        except Exception:
            self._failures += 1
            what = found.name if isinstance(found, Record) else found.title
            if self._failures == 1:
                log.exception(
                    "sosd_fast: %s failed at %s, step %d; training and the records go on.", self.name, what, found.step
                )
            elif self._failures == MOST_FAILURES:
                self.function = None
                log.exception(
                    "sosd_fast: %s failed %d times in a row, at last at %s, step %d, and is not called again.",
                    self.name, MOST_FAILURES, what, found.step,
                )  # fmt: skip


class Recorder:
    """Keeps records and events; nothing that fails on the way ends it.

    Args:
        writer: of the run directory, or None to keep the last 10,000 records in memory.
        on_record: called with each record, or None.
        on_event: called with each event, or None.
        roll: of the ranks that share the model, where they hold copies of it.

    Attributes:
        latest: the last record of each matrix, by name.
        events: the last 10,000 that were found.
        writer: None from when the run directory could not be written on.
    """

    def __init__(
        self,
        writer: RunWriter | None,
        on_record: Callable[[Record], None] | None,
        on_event: Callable[[Event], None] | None = None,
        roll: Roll | None = None,
    ):
        self.latest: dict[str, Record] = {}
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.writer = writer
        self._run_dir: Path | None = writer and writer.run_dir
        self._memory: deque[Record] = deque(maxlen=KEPT_RECORDS)
        self._watcher: Watcher | None = Watcher()
        self._on_record, self._on_event = Listener("on_record", on_record), Listener("on_event", on_event)
        self._roll, self._steps = roll, 0
        self._untold: deque[Callable[[], None]] = deque()
        self._telling = threading.Lock()
        if writer is not None and writer.step is not None:
            self._watching(lambda watcher: watcher.resume(writer.run_dir))

    def see(self, optimizer: Optimizer):
        """Notes that an optimizer has stepped, whose learning rates count from then on."""
        self._watching(lambda watcher: watcher.rates.see(optimizer))

    def begin(self, step: int, states: Sequence[MatrixState]):
        """Notes that a step will be measured."""
        self._watching(lambda watcher: watcher.begin(step, states))

    def add(self, measurements: list[Measurement], clock: Callable[[], float]):
        """Keeps the records of one step's measurements, those that are this rank's; `tell` passes them on.

        Args:
            measurements: of one step.
            clock: returns the seconds that the search for events gets a share of.
        """
        self._steps += 1
        if self._steps > PATIENCE:
            self._say_absent()
        measurements = [found for found in measurements if found.mine]
        if not measurements:
            return
        self._watching(lambda watcher: watcher.rate(measurements))
        records = [found.record() for found in measurements]
        self.latest |= {r.name: r for r in records}
        found, lines = self._watching(lambda watcher: watcher.update(measurements, records, clock)) or ([], [])
        self._keep(found, lines)  # before the records: see `sosd_fast.runs.events`
        self._on_disk(lambda writer: writer.append(records), records[0].step)
        if self.writer is None:
            self._memory.extend(records)
        if self._on_record.function is not None:
            self._untold.extend(partial(self._on_record.tell, r) for r in records)

    def finish(self):
        """Looks for events once more, when the probe ends."""
        self._keep(self._watching(Watcher.finish) or [], [])

    def _keep(self, found: Sequence[Event], lines: Sequence[Line]):
        self.events.extend(found)
        lines = [*map(events.to_line, found), *lines]
        if lines:
            self._on_disk(lambda writer: events.append(writer.run_dir, lines), lines[0]["step"])
        if self._on_event.function is not None:
            self._untold.extend(partial(self._on_event.tell, e) for e in found)

    def _watching(self, action: Callable[[Watcher], Result]) -> Result | None:
        """What can fail alone ends alone: without events, the records go on."""
        if self._watcher is None:
            return None
        try:
            return action(self._watcher)
        except Exception:
            self._watcher = None
            log.exception("sosd_fast: the search for events failed and ends here; training and the records go on.")
            return None

    def records(self) -> list[Record]:
        """Returns the records in the order of steps: those in the run directory, or else the last 10,000."""
        if self._run_dir is None:
            return list(self._memory)
        try:
            written = load(self._run_dir).records
        except (OSError, ValueError):
            if self.writer is not None:
                raise
            written = []  # it was removed, which has been said
        known = {(r.step, r.name) for r in written}  # what failed may have failed after the lines were there
        return written + [r for r in self._memory if (r.step, r.name) not in known]

    def flush(self, step: int):
        """Forces what was written to disk."""
        self._on_disk(RunWriter.flush, step)
        self._on_disk(lambda writer: events.flush(writer.run_dir), step)
        if self._steps > 1:  # ranks take steps together: all that track the model have begun
            self._say_absent()

    def tell(self):
        """Calls on_record and on_event, which may call the probe or train other models: no probe's lock is held."""
        while self._untold:
            if not self._telling.acquire(blocking=False):
                return  # another thread, or the call that led here, passes them on
            try:
                while self._untold:
                    self._untold.popleft()()
            finally:
                self._telling.release()

    def _say_absent(self):
        roll, self._roll = self._roll, None
        if roll is not None and (absent := roll.absent()):
            log.warning(
                "sosd_fast: the model was not tracked on rank%s %s, and a share of its matrices is measured nowhere. "
                "Call track on every rank; or, to measure all on one, pass the module that is inside of the "
                "DistributedDataParallel.", "s" * (len(absent) > 1), ", ".join(map(str, absent)),
            )  # fmt: skip

    def _on_disk(self, action: Callable[[RunWriter], None], step: int):
        if self.writer is None:
            return
        try:
            action(self.writer)
        except Exception as error:
            writer, self.writer = self.writer, None
            log.error(
                "sosd_fast: run_dir=%s cannot be written at step %d (%s: %s). Training goes on; records from here on "
                "are kept in memory, the last %d, and those written before stay readable. Make room or choose another "
                "directory, and track again to go on.",
                writer.run_dir, step, type(error).__name__, error, KEPT_RECORDS,
            )  # fmt: skip
            close_quietly(writer)


def open_recorder(s: Settings, names: list[str], share: RankAssignment) -> Recorder:
    """Opens the run directory of a rank, cut off after the step of the settings, where there is to be one.

    Raises:
        ValueError: a directory that cannot be written, is another probe's, or holds something else.
    """
    copied = share.group is None and len(share.members) > 1
    roll = Roll(share.members, (p.shape for p in share.parameters)) if copied else None
    if s.run_dir is None:
        return Recorder(None, s.on_record, s.on_event, roll)
    rank, ranks = rank_in_world()
    root = run_dir = Path(s.run_dir)
    meta: dict[str, Any] = {}
    if ranks > 1:
        run_dir = root / f"rank-{rank:05d}"
        meta = {"rank": rank, "shared_by": list(share.members or [rank])}
    settings = {"method": s.method, "k": s.k, "budget": s.budget, "every": s.every}
    try:
        if s.step is not None:  # what is there of a run of more processes, or of one
            ours = {root / f"rank-{q:05d}" for q in range(ranks)} if ranks > 1 else {root}
            for folder in {path.parent for path in (*root.glob("meta.json"), *root.glob("rank-*/meta.json"))} - ours:
                RunWriter.trim(folder, s.step)
                events.trim(folder, s.step)
        writer = RunWriter(run_dir, {"settings": settings, "matrices": names} | meta, s.step)
        events.trim(run_dir, -1 if writer.step is None else writer.step)
    except OSError as error:
        raise ValueError(
            f"track: expected a directory that can be written, got run_dir={str(run_dir)!r} ({error.strerror}). "
            "Choose another, or None to keep the records in memory."
        ) from error
    except ValueError as error:  # begins with the name of a part that the user did not call
        raise ValueError(re.sub(r"^\w+:", "track:", str(error))) from error
    return Recorder(writer, s.on_record, s.on_event, roll)


def close_quietly(writer: RunWriter | None):
    """Closes a writer; what the operating system says then, when nothing is left to be written, ends nothing."""
    if writer is None:
        return
    try:
        writer.close()
    except Exception:
        log.exception("sosd_fast: the records in %s were written, but closing them failed.", writer.run_dir)
