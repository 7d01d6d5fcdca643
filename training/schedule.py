"""Learning-rate schedules: pure functions from the update's index to a multiplier of the peak learning rate.

Each takes ``step`` in 0 .. steps - 1 (the update about to be made), the run's length ``steps`` and ``warmup``, the
number of updates of linear warm-up, during which the multiplier is (step + 1) / warmup times the schedule's own value.
"""

import math


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def constant(step: int, steps: int, warmup: int = 0) -> float:  # noqa: ARG001 - all schedules share one signature
    """1."""
    return _ramp(step, warmup)


def step_decay(step: int, steps: int, warmup: int = 0) -> float:
    """1, then 0.1 from 50 % of the steps, then 0.01 from 75 %."""
    level = 1.0 if step < 0.5 * steps else 0.1 if step < 0.75 * steps else 0.01
    return _ramp(step, warmup) * level


def wsd(step: int, steps: int, warmup: int = 0, decay: float = 1450 / 5100) -> float:
    """1, then (steps - step) / (decay * steps) over the final fraction ``decay``: linear to 0 just after the last step.

    The default fraction is that of the paper's runs: 1,450 of 5,100 steps.
    """
    return _ramp(step, warmup) * min(1.0, (steps - step) / (decay * steps))


def cosine(step: int, steps: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Floor + (1 - floor) * (1 + cos(pi * t)) / 2 with t = (step - warmup) / (steps - warmup), 0 during warm-up."""
    t = max(0, step - warmup) / max(1, steps - warmup)
    return _ramp(step, warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))


SCHEDULES = {"constant": constant, "step": step_decay, "wsd": wsd, "cosine": cosine}
