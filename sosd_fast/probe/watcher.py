"""Finds events in the records as they come: onsets of stability, spikes, NaN, zero, audits beyond their bounds.

Measured on one core of an Intel Xeon, with 148 matrices: 1.8 us a record. The search for an onset, 2 to 11 ms, is made
at most once a step, and only where all searches together took less than `SEARCH_SHARE` of the time.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from sosd_fast.matrices import kind
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.optimizers import Optimizers, parameters_of
from sosd_fast.probe.state import MatrixState
from sosd_fast.runs import events
from sosd_fast.runs.events import QUIET, Event
from sosd_fast.runs.onset import Bin, Kink, OnsetDetector, thinned
from sosd_fast.runs.records import Line, Record, load  # pyright: ignore[reportUnknownVariableType]

WINDOW = 16  # measurements of a matrix that tell what is usual for it
LEAST_JUMP = math.log(2.5)  # above the largest of them; LOG.md#spikes
HOLD = 10  # steps for which a matrix's last value stands in the median of its kind, as in `variation_by_kind`
SEARCH_SHARE = 0.0005  # of the time, for the search for onsets
LEAST_BINS = 10
AGREEING = 3
LASTED = 1.5
LEAST_FALL = 2.0

log = logging.getLogger("sosd_fast")


class Rates:
    """The learning rate of each matrix, that of the group which holds it.

    Groups are remembered by their places, for they keep weights alive.
    """

    def __init__(self):
        self._optimizers = Optimizers()
        self._places: dict[str, tuple[int, int]] = {}  # name -> id of the optimizer, place of the group
        self._form: list[int] = []

    def see(self, optimizer: Optimizer):
        """Notes that an optimizer has stepped."""
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            self._form = []

    def now(self, states: Sequence[MatrixState]) -> dict[str, float]:
        """Returns name -> rate; without those that are not known, or lie on a device."""
        groups: dict[int, Any] = {id(o): getattr(o, "param_groups", ()) for o in self._optimizers}
        form = [len(states), *(part for key, each in groups.items() for part in (key, *map(id, each)))]
        if form != self._form:
            self._form, self._places = form, self._find(states)
        found: dict[tuple[int, int], float] = {}
        for optimizer, place in set(self._places.values()):
            lr = groups[optimizer][place].get("lr")
            if isinstance(lr, Tensor):
                lr = lr.item() if lr.device.type == "cpu" and lr.numel() == 1 else None
            if isinstance(lr, int | float):
                found[optimizer, place] = float(lr)
        return {name: found[group] for name, group in self._places.items() if group in found}

    def _find(self, states: Sequence[MatrixState]) -> dict[str, tuple[int, int]]:
        parameters = {state.name: id(state.matrix.parameter) for state in states}
        found: dict[str, tuple[int, int]] = {}
        for optimizer in self._optimizers:
            held = {id(p) for p in parameters_of(optimizer)} & set(parameters.values())
            groups: Any = getattr(optimizer, "param_groups", ()) if held else ()
            for place, group in enumerate(groups):
                of_group = held & set(map(id, group.get("params", ())))
                found |= {name: (id(optimizer), place) for name, each in parameters.items() if each in of_group}
        return found


class _Level:
    """The last values of log(variation / lr) of a matrix, which say what is usual for it."""

    __slots__ = ("per_step", "values")

    def __init__(self):
        self.values: deque[float] = deque(maxlen=WINDOW)
        self.per_step: deque[float] = deque(maxlen=WINDOW)  # the same, over the steps between two measurements

    def rise(self, y: float, interval: int) -> float:
        """Takes a value; returns by how much it is above the largest of those before it, 0 where they are too few.

        Over more steps a spectrum moves farther, but not in proportion: what counts rises as it is and by the step.
        """
        z = y - math.log(interval)
        known = len(self.values) == WINDOW
        rise = min(y - max(self.values), z - max(self.per_step)) if known else 0.0
        self.values.append(y)
        self.per_step.append(z)
        return rise


class _Curve:
    """The median SD variation of a kind, until its onset is found."""

    def __init__(self):
        self.detector, self.found = OnsetDetector(), False
        self.standing: dict[str, tuple[int, float]] = {}
        self.searched = self.written = 0  # closed bins, when it was last searched, and in the file
        self.agreeing: list[Kink] = []  # what the last searches found, as far as they agree


class Watcher:
    """Finds events in measurements, step by step."""

    def __init__(self):
        self.rates = Rates()
        self._rates_at: dict[int, dict[str, float]] = {}  # of steps that are still being measured
        self._kinds: dict[str, str] = {}
        self._curves: dict[str, _Curve] = {}
        self._levels: dict[str, _Level] = {}
        self._state: dict[str, str] = {}  # of matrices: sound, nan, zero
        self._last_over: int | None = None  # the last step at which a matrix was above its limit
        self._step = -1
        self._rated: set[str] | None = None  # the matrices whose learning rates are known
        self._began: float | None = None
        self._spent = 0.0

    def begin(self, step: int, states: Sequence[MatrixState]):
        """Notes the learning rates of a step whose measurements will come."""
        self._rates_at[step] = self.rates.now(states)

    def rate(self, measurements: Sequence[Measurement]):
        """Tells the measurements of one step the learning rates under which it was made."""
        step = measurements[0].step
        rates: Mapping[str, float] = {}
        for noted in [s for s in self._rates_at if s <= step]:
            rates = self._rates_at.pop(noted)
            self._heed(rates)
        for measurement in measurements:
            measurement.lr = rates.get(measurement.name)

    def update(
        self,
        measurements: Iterable[Measurement],
        records: Sequence[Record],
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[list[Event], list[Line]]:
        """Takes the measurements of one step.

        Args:
            measurements: that the records were made of.
            records: of the step.
            clock: returns the seconds that the search for onsets gets a share of.

        Returns:
            The events, and further lines for the events' file.
        """
        step = records[0].step
        sound = {m.name for m in measurements if m.failure is None and not m.lost}
        found = self._unsound(step, [r for r in records if r.name in sound])
        found += [
            Event(step, "audit", (r.name,), step, r.audit_error, r.sd_error)
            for r in records
            if r.audit_error is not None and r.sd_error is not None and r.audit_error > r.sd_error
        ]
        if step <= self._step:  # matrices that came between two steps
            return found, []
        self._step = step
        found += self._spike(step, records)
        self._follow(step, records)
        lines = self._bins(step)
        if (name := self._next_search(clock())) is not None:
            began = clock()
            found += self._onset(step, name)
            self._spent += clock() - began
        return found, lines

    def finish(self) -> list[Event]:
        """Looks for onsets once more, when the probe ends: what is seen then is what a report will show."""
        return [event for name in self._curves for event in self._onset(self._step, name, last=True)]

    def _heed(self, rates: Mapping[str, float]):
        """Begins anew where a learning rate has become known, or unknown: other units are no spike."""
        now = set(rates)
        changed = set[str]() if self._rated is None else self._rated ^ now
        self._rated = now
        if changed:
            kinds = set(map(self._kind, now)) ^ set(map(self._kind, now ^ changed))
            self._levels = {name: level for name, level in self._levels.items() if name not in changed}
            self._curves = {name: c for name, c in self._curves.items() if c.found or name not in kinds}

    def _unsound(self, step: int, records: Sequence[Record]) -> list[Event]:
        became: dict[str, list[str]] = {"nan": [], "zero": []}
        for r in records:
            now = "sound" if r.sigma_max else "zero"
            if r.sigma_max is None or not math.isfinite(r.sigma_max):
                now = "nan"
            before = self._state.get(r.name)
            if now != before:
                self._state[r.name] = now
                if now == "nan" or (now == "zero" and before is not None):  # zero at first is a usual start
                    became[now].append(r.name)
        found = [Event(step, "nan", tuple(became["nan"]), step)] if became["nan"] else []
        return found + ([Event(step, "zero", tuple(became["zero"]), step)] if became["zero"] else [])

    def _spike(self, step: int, records: Sequence[Record], silent: bool = False) -> list[Event]:
        over: list[tuple[float, str]] = []
        for r in records:
            v = r.sd_variation if r.sd_variation_carried is None else r.sd_variation_carried
            # below ten times its own error it is rounding, not movement
            if v is None or not (10 * (r.sd_error or 1e-8) < v < math.inf):
                continue
            lr = 1.0 if r.lr is None else r.lr
            if lr <= 0:
                continue
            if (level := self._levels.get(r.name)) is None:
                level = self._levels[r.name] = _Level()
            rise = level.rise(math.log(v / lr), r.interval or 1)
            if rise > LEAST_JUMP:
                over.append((rise, r.name))
        if not over:
            return []
        goes_on = self._last_over is not None and step - self._last_over <= QUIET
        self._last_over = step
        if goes_on or silent:
            return []
        over.sort(reverse=True)
        return [Event(step, "spike", tuple(name for _, name in over), step, math.exp(over[0][0]))]

    def _follow(self, step: int, records: Sequence[Record], since: Mapping[str, int] | None = None):
        """Gives each kind's median to its detector, as `variation_by_kind` and `rates_by_kind` make it of a run.

        On a resume the detectors know the steps before `since`, which only stand in later medians.
        """
        moved: dict[str, list[float]] = {}
        for r in records:
            v = r.sd_variation
            if v is not None and math.isfinite(v):
                name = self._kind(r.name)
                curve = self._curves.get(name)
                if curve is None:
                    curve = self._curves[name] = _Curve()
                if not curve.found:
                    curve.standing[r.name] = step, v
                    moved.setdefault(name, []).extend(() if r.lr is None else (r.lr,))
        for name, rates in moved.items():
            if since is None or step >= since.get(name, 0):
                curve = self._curves[name]
                standing = [v for at, v in curve.standing.values() if step - at <= HOLD]
                curve.detector.update(step, _median(standing), _median(rates) if rates else 1.0)

    def _bins(self, step: int) -> list[Line]:
        lines: list[Line] = []
        for name, curve in self._curves.items():
            for each in curve.detector.bins[curve.written :]:
                lines.append({"step": step, "curve": name, "bin": list(each)})
            curve.written = len(curve.detector.bins)
        return lines

    def _next_search(self, now: float) -> str | None:
        if self._began is None or now < self._began:  # at first, or by another clock
            self._began, self._spent = now, 0.0
        if self._spent > SEARCH_SHARE * (now - self._began):
            return None
        due = [(curve.searched, name) for name, curve in self._curves.items() if self._is_due(curve)]
        return min(due)[1] if due else None

    @staticmethod
    def _is_due(curve: _Curve) -> bool:
        new = len(curve.detector.bins) - curve.searched
        wait = 1 if curve.agreeing else 2
        return not curve.found and len(curve.detector.bins) >= LEAST_BINS and new >= wait

    def _onset(self, step: int, name: str, last: bool = False) -> list[Event]:
        """Looks for the onset of a kind.

        What one search finds may be put off by later values. It counts when `AGREEING` searches, a bin or more apart,
        agree, half of its step has passed since and the fall was by a factor of 2; or at the end, as a report has it.
        """
        curve = self._curves[name]
        if curve.found:
            return []
        curve.searched = len(curve.detector.bins)
        if (found := curve.detector.onset()) is None:
            curve.agreeing = []
            return []
        curve.agreeing = [k for k in curve.agreeing if found.low <= k.step <= found.high] + [found]
        sure = len(curve.agreeing) >= AGREEING and step >= LASTED * found.step and found.fall >= LEAST_FALL
        if not (last or sure):
            return []
        curve.found = True
        curve.standing.clear()
        return [Event(step, "onset", (name,), found.step, found.fall)]

    def _kind(self, name: str) -> str:
        if (found := self._kinds.get(name)) is None:
            found = self._kinds[name] = kind(name)
        return found

    def resume(self, run_dir: Path):
        """Takes up what a run directory says of the steps before, so that no event is found twice.

        The detectors go on from the bins in the events' file. Values since the last bin, and those that tell what is
        usual, are read from the last records; in those of version 0.1.0, the learning rate is that of the last bin.
        """
        told, own = events.read(run_dir)
        ends: dict[str, int] = {}
        for line in own:
            curve = self._curves.setdefault(line["curve"], _Curve())
            curve.detector.bins.append(Bin(*line["bin"]))
            curve.written = len(curve.detector.bins)
            ends[line["curve"]] = line["step"]
        for event in told:
            if event.what == "onset":
                self._curves.setdefault(event.names[0], _Curve()).found = True
            elif event.what == "spike":
                self._last_over = event.step
            elif event.what != "audit":
                self._state |= dict.fromkeys(event.names, event.what)
        rates = {name: math.exp(c.detector.bins[-1].log_rate) for name, c in self._curves.items() if c.detector.bins}
        run = load(run_dir)
        fields = ("sd_variation", "sd_variation_carried", "sd_error", "lr")
        table = run.columns("step", "name", "sigma_max", "interval", *fields)
        if not len(table["step"]):
            return
        steps = table["step"]
        last = int(steps[-1])
        wanted = np.zeros(last + 1, bool)
        wanted[max(0, last - 16 * WINDOW) :] = True
        kinds = np.array([self._kind(name) for name in table["name"]])
        for name in dict.fromkeys(kinds.tolist()):
            measured = steps[(kinds == name) & np.isfinite(table["sd_variation"]) & (steps >= ends.get(name, 0))]
            for step in thinned(np.unique(measured).tolist()):  # what the detector took, and what stood then
                wanted[max(0, step - HOLD) : step + 1] = True
        kept = np.flatnonzero(wanted[steps])
        by_step: dict[int, list[Record]] = {}
        for i in kept.tolist():
            step, name = int(steps[i]), str(table["name"][i])
            values = {f: float(table[f][i]) for f in fields}
            known: dict[str, Any] = {f: v for f, v in values.items() if not math.isnan(v)}
            if "lr" not in known:
                known["lr"] = rates.get(self._kind(name))
            if table["interval"][i] > 0:
                known["interval"] = int(table["interval"][i])
            by_step.setdefault(step, []).append(
                Record(step, name, (0, 0), "", sigma_max=float(table["sigma_max"][i]), **known)
            )
        for step, records in by_step.items():
            self._unsound(step, records)
            self._spike(step, records, silent=True)
            self._follow(step, records, ends)
        self._step = last


def _median(values: list[float]) -> float:
    values.sort()
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
