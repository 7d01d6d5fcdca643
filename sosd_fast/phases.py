"""Phases of training: where singular distributions become stable."""

from collections.abc import Sequence

import numpy as np


def onset_of_stability(
    steps: Sequence[int], variation: Sequence[float], *, fraction: float = 0.1, window: int = 5
) -> int | None:
    """Finds the onset of stability of a singular distribution (SoSD).

    It is the first step at which the SD variation, as a running median over `window` measurements, falls to
    `fraction` of its peak for good: no later median exceeds it.

    Args:
        steps: (T,) increasing training steps.
        variation: (T,) SD variation at each; NaN and None count as not measured.
        fraction: of the peak; the published impulse is 10 to 100 times its floor.
        window: measurements in the running median, which keeps one outlier from deciding.

    Returns:
        The step, or None where the variation has not come down, or fewer than 2 * window values were measured.
    """
    values = np.array([np.nan if v is None else v for v in variation], dtype=float)
    measured = np.isfinite(values)
    values, steps = values[measured], np.asarray(steps)[measured]
    if len(values) < 2 * window:
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=-1)
    above = np.flatnonzero(medians > fraction * medians.max())
    if above[-1] + 1 >= len(medians):
        return None
    return int(steps[above[-1] + 1 + window // 2])  # the window's middle
