"""A claim of the paper: statistics, seed by seed, and the verdict by a rule."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Claim:
    """What was measured for one claim; `rows` are (statistic, its value at each seed)."""

    id: str
    claim: str
    rule: str
    rows: list[tuple[str, list[float]]] = field(default_factory=list)
    verdict: str = ""

    def judge(self, strong: Callable, weak: Callable) -> "Claim":
        """Applies the two rules to the values of one seed, and to the medians, in the order of the rows."""
        values = np.array([v for _, v in self.rows], dtype=float)  # (rows, seeds)
        if all(bool(strong(*seed)) for seed in values.T):
            self.verdict = "holds"
        else:
            self.verdict = "holds weakly" if weak(*np.median(values, axis=1)) else "does not hold at this scale"
        return self
