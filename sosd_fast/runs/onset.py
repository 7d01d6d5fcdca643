"""The detector of the onset of stability, step by step; `phases` defines what it finds, and searches whole runs."""

import math
import statistics
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs.piecewise import Kink, PiecewiseFit

BINS = 8  # per doubling of the step
BIN_VALUES = 64  # kept of a bin at most
LEAST_FALL = math.log(1.5)
DEVIATIONS = 4
AFTER = math.log(1.25)


class Bin(NamedTuple):
    """What is kept of the steps of an eighth of a doubling."""

    log_step: float
    median: float  # of log(variation / lr)
    values: int
    deviation: float
    log_rate: float


class OnsetDetector:
    """Finds the onset of stability of one matrix or kind while training goes on.

    Memory is bounded: one median for each eighth of a doubling (160 over a million steps) and the values of the bin
    that is being filled, thinned evenly to `BIN_VALUES`. `onset` feeds a whole curve to it, so both agree exactly.
    """

    def __init__(self):
        self.bins: list[Bin] = []  # the closed ones
        self._open: list[tuple[int, float, float]] = []
        self._step = 0

    def update(self, step: int, variation: float | None, lr: float = 1.0):
        """Takes the SD variation of one step; steps increase. None, NaN, zero, or a zero rate: not measured."""
        if variation is None or not (0 < variation < math.inf and 0 < lr < math.inf) or step < 1:
            return
        if step <= self._step:
            raise ValueError(
                f"OnsetDetector.update: expected a step after {self._step}, got step={step}. Sort the steps."
            )
        self._step = step
        if self._open and _bin(step) != _bin(self._open[-1][0]):
            self.bins.append(_close(self._open))
            self._open = []
        if not self._open or _is_taken(step, self._open[-1][0]):
            self._open.append((step, math.log(variation / lr), math.log(lr)))

    def onset(self) -> Kink | None:
        """Returns the onset as the values so far show it, or None; later values may put it off."""
        fit = self.fit()
        return None if fit is None else _first_floor(fit)

    def fit(self, axes: str = "log") -> PiecewiseFit | None:
        """Returns the smoothed curve so far, ready to be fitted, or None below 8 bins."""
        bins = self.bins + ([_close(self._open)] if self._open else [])
        if len(bins) < 8:
            return None
        x, y, n, spread, rate = np.array(bins).T
        if axes == "linear":
            return PiecewiseFit(np.exp(x), np.exp(y), n, spread, rate, unit=float)
        return PiecewiseFit(x, _median3(y), np.minimum(n, 4), spread, rate)


def thinned(steps: list[int]) -> list[int]:
    """Returns the steps, of one bin that is being filled, whose values a detector keeps."""
    taken = steps[:1]
    for step in steps:
        if _is_taken(step, taken[-1]):
            taken.append(step)
    return taken


def _is_taken(step: int, last: int) -> bool:
    stride = max(1, int(step * (2 ** (1 / BINS) - 1)) // BIN_VALUES)
    return step - last >= stride


def _bin(step: int) -> int:
    return math.floor(BINS * math.log2(step) + 1e-9)


def _close(values: list[tuple[int, float, float]]) -> Bin:
    steps, y, rate = zip(*values, strict=True)  # without NumPy, which takes 100 us for a few values, at most steps
    median, n = statistics.median(y), len(values)
    deviation = 1.4826 * statistics.median(abs(each - median) for each in y)
    return Bin(math.fsum(map(math.log, steps)) / n, median, n, deviation, math.fsum(rate) / n)


def _median3(y: NDArray[np.float64]) -> NDArray[np.float64]:
    inner = np.sort(np.lib.stride_tricks.sliding_window_view(y, 3), axis=-1)[:, 1]
    # Tukey's rule for the ends: the median with the straight continuation of the next two
    first = statistics.median([y[0], inner[0], 3 * inner[0] - 2 * inner[1]])
    last = statistics.median([y[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]])
    return np.concatenate([[first], inner, [last]])


def _first_floor(fit: PiecewiseFit) -> Kink | None:
    knots = fit.choose_knots()
    heights, slopes, errors = fit.pieces(knots)
    top, ends = 0, []
    for i, knot in enumerate(knots):
        if slopes[i] >= 0:
            top = i + 1
            if ends:
                break
        left = fit.x[-1] - fit.grid[knot]
        if slopes[i] + 2 * errors[i] >= 0 or left < AFTER:
            continue
        fall = heights[top] - heights[i + 1]
        climb = fit.climb_after(heights, knots, i)
        drift = (heights[-1] - heights[i + 1]) / left
        lasted = fit.grid[knot] - (fit.grid[knots[top - 1]] if top else fit.x[0])
        excess = fall + min(drift, 0) * lasted
        large = excess >= max(LEAST_FALL, DEVIATIONS * fit.deviation_after(knot))
        if large and climb <= fall / 2 and drift >= slopes[i] / 2:
            ends.append((slopes[i + 1] - slopes[i], i, fall))
    return fit.kink(knots, *max(ends)[1:]) if ends else None
