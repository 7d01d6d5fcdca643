"""Phases of training: where singular distributions become stable, and where the loss turns from fast to slow descent.

Both are looked for on logarithmic axes. Descent there is close to straight pieces (power laws), and a kink stays where
it is when the run gets longer; on linear axes a single power law shows a kink, at a fraction of whatever length was
run.

**Onset of stability (SoSD)**, of the SD variation v measured at steps t under learning rates lr:

1. y = log(v / lr). To first order a step moves the spectrum in proportion to lr, so this takes warm-up and decay out.
2. Medians of y over eighths of a doubling of t, then running medians of three of those: one value in a bin, or one
   bin, that is far off has no say, whatever its tail.
3. A continuous piecewise linear fit of y against log t. Its knots are chosen by the Bayesian information criterion at
   `piecewise.PENALTY` times its price, because neighbouring medians are correlated.
4. The onset is the knot at which the first fall ends that ends for good; the sharpest, where it has several. A fall is
   a run of pieces that slope down, the last by more than two standard errors. Its size beyond what the later slope
   would have made of the same time is at least `onset.LEAST_FALL` and `onset.DEVIATIONS` standard deviations of single
   values on the floor (y after the knot, about a straight line). For good means that v itself (the fit times lr)
   nowhere climbs back more than half of it, and that the mean slope of y from there to the end is at most half as steep
   as the fall's last piece. (Not zero: weights grow, and the same updates then move the spectrum less and less. And v,
   not y: under a decay to a tenth, v of embeddings and heads stays on its floor, and y rises.)
5. There is none where no fall is that large, or where `onset.AFTER` of log t has not passed since.

Measured on noise of Student's t with 3 degrees of freedom around straight lines of slope 0, -0.4 and -1, an onset is
found in 0 to 1 % of the series where values are independent, 1 to 5 % where their correlation is 0.5 a step, and 2 to
17 % where it is 0.9 and their deviation 0.5 (real floors: 0.7, deviation 0.1 to 0.2). A fall by a factor of 2 under
noise of deviation 0.1, or of 4 under 0.3, is found in 95 % or more, within a tenth of its place for most.

**Loss boundary**: in the same fit, of log loss, the knot where the slope rises most while the loss falls. A curve of
two pieces gives the knot of the two-segment fit; a standstill during warm-up or a later descent is a knot of its own
and does not move it. A loss that falls as one power law has none (1 to 2 % false ones). The steps end with the last at
half the peak learning rate, for a decay lowers the loss once more. On request, the two-segment fit on linear axes,
which is what the eye sees in a plot; it always has a knot, and moves with the length of the run (of one nano run: step
24, 32, 35 seen to step 150, 350, 500).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sosd_fast.runs.curves import filled_rates, rates_by_kind, variation_by_kind
from sosd_fast.runs.onset import OnsetDetector
from sosd_fast.runs.piecewise import Kink
from sosd_fast.runs.records import Run


def onset_of_stability(
    steps: Sequence[int], variation: Sequence[float | None], lr: Sequence[float] | None = None
) -> int | None:
    """Finds the step at which a singular distribution becomes stable; the module's docstring defines it.

    Args:
        steps: (T,) increasing training steps, from 1.
        variation: (T,) SD variation at each; None, NaN and 0 count as not measured.
        lr: (T,) learning rate at each. None takes it as constant: then leave out the steps where it was not.

    Returns:
        The step, or None where no fall has ended.
    """
    found = onset(steps, variation, lr)
    return None if found is None else found.step


def onset(steps: Sequence[int], variation: Sequence[float | None], lr: Sequence[float] | None = None) -> Kink | None:
    """As `onset_of_stability`, with the interval, the slopes and the size of the fall."""
    detector = OnsetDetector()
    for values in zip(steps, variation, np.ones(len(steps)) if lr is None else lr, strict=True):
        detector.update(*values)
    return detector.onset()


def threshold_step(steps: Sequence[int], values: Sequence[float], level: float) -> int | None:
    """Finds the first step from which on the values stay at or below a level; None where the last one is above it."""
    above = np.flatnonzero(~(np.asarray(values, dtype=float) <= level))
    first = above[-1] + 1 if len(above) else 0
    return int(steps[first]) if first < len(steps) else None


def loss_boundary(
    steps: Sequence[int], loss: Sequence[float], lr: Sequence[float] | None = None, axes: str = "log"
) -> Kink | None:
    """Finds the step at which the loss turns from fast to slow descent; the module's docstring defines it.

    Args:
        steps: (T,) increasing training steps, from 1.
        loss: (T,) positive losses, of training or validation.
        lr: (T,) learning rate at each; None takes it as constant.
        axes: "log" or "linear", of which the second is a description and no test.

    Returns:
        The kink, or None where the descent has none. Slopes and fall are those of log loss against log step, or of the
        loss against the step.
    """
    if axes not in ("log", "linear"):
        raise ValueError(f"loss_boundary: expected axes 'log' or 'linear', got axes={axes!r}. Choose one.")
    rates = np.ones(len(steps)) if lr is None else np.asarray(lr, dtype=float)
    last = max((step for step, rate in zip(steps, rates, strict=True) if rate >= 0.5 * rates.max()), default=0)
    curve = OnsetDetector()
    for step, value in zip(steps, loss, strict=True):
        if step <= last:
            curve.update(step, value)
    if (fit := curve.fit(axes)) is None:
        return None
    knots = fit.choose_knots() if axes == "log" else [int(fit.rss_with_one_more([]).argmin())]
    heights, slopes, _ = fit.pieces(knots)
    bends = np.where(slopes[:-1] < 0, np.diff(slopes), -1)
    if not (bends > 0).any():
        return None
    i = int(bends.argmax())
    return fit.kink(knots, i, heights[0] - heights[i + 1])


class Phases(NamedTuple):
    """The phases of one run; None where one is not seen."""

    kinds: dict[str, Kink | None]  # onset of each module kind, of the median over its matrices
    matrices: dict[str, Kink | None]
    loss: Kink | None
    loss_linear: Kink | None


def run_phases(run: Run) -> Phases:
    """Finds the phases of a run from its records and its log of step, loss and lr."""
    table = run.columns("step", "name", "sd_variation", "lr")
    matrices = {}
    for name in run.names:
        steps, v, lr = (table[f][table["name"] == name] for f in ("step", "sd_variation", "lr"))
        matrices[name] = onset(steps.tolist(), v.tolist(), filled_rates(run, steps, lr).tolist())
    kinds = _onsets(run)
    lines = [line for line in run.log if line.get("loss") is not None and line.get("lr") is not None]
    steps, loss, lr = ([line[key] for line in lines] for key in ("step", "loss", "lr"))
    boundaries = (loss_boundary(steps, loss, lr, axes) for axes in ("log", "linear"))
    return Phases(kinds, matrices, *boundaries)


def onsets(run: Run) -> dict[str, int | None]:
    """Finds the onset of stability of each module kind, in its median SD variation over its learning rate."""
    return {kind: kink and kink.step for kind, kink in _onsets(run).items()}


def _onsets(run: Run) -> dict[str, Kink | None]:
    rates = rates_by_kind(run)
    return {
        kind: onset(steps.tolist(), spread[:, 1].tolist(), rates[kind].tolist())
        for kind, (steps, spread) in variation_by_kind(run).items()
    }
