"""Continuous piecewise linear fits whose knots a penalised information criterion chooses."""

import math
import statistics
from typing import NamedTuple

import numpy as np

PENALTY = 3.0
MOST_KNOTS = 8


class Kink(NamedTuple):
    """A kink; with 95 % confidence and the other knots as they are, it lies in `low` to `high`."""

    step: int
    low: int
    high: int
    slope_before: float  # of log y against log t; on linear axes, of y against t
    slope_after: float
    fall: float  # factor by which y fell on the way to it; on linear axes, the difference


class PiecewiseFit:
    """Continuous piecewise linear least squares of y on x with weights w; knots are indices into `grid`."""

    def __init__(self, x, y, w, spread, rate, unit=math.exp):
        self.x, self.y, self.spread, self.rate, self.n, self._unit = x, y, spread, rate, len(x), unit
        self.grid = np.sort(np.concatenate([x, (x[1:] + x[:-1]) / 2]))  # a knot may fall between two bins
        self._sqrt_w = np.sqrt(w)
        self._y = y * self._sqrt_w
        self._lines = self._weighted(np.stack([np.ones_like(x), x], axis=-1))
        self._hinges = self._weighted(np.maximum(x[:, None] - self.grid, 0))
        # Normal equations of what a straight line leaves: half a QR's time (LOG.md#python-of-a-step).
        Q = np.linalg.qr(self._lines)[0]
        left, hinges = self._y - Q @ (Q.T @ self._y), self._hinges - Q @ (Q.T @ self._hinges)
        self._squares, self._left = hinges.T @ np.column_stack([hinges, left]), float(left @ left)

    def rss(self, knots) -> float:
        """The residual sum of squares."""
        of_knots = self._squares[knots]
        products = of_knots[:, -1]
        return max(self._left - float(products @ np.linalg.solve(of_knots[:, knots], products)), 0.0)

    def rss_with_one_more(self, knots) -> np.ndarray:
        """The residual sum of squares with each place of the grid as one more knot; inf where it may not be."""
        of_knots = self._squares[knots]
        solved = np.linalg.solve(of_knots[:, knots], of_knots)
        explained = of_knots[:, -1] @ solved
        squares = self._squares.diagonal() - np.sum(of_knots[:, :-1] * solved[:, :-1], axis=0)
        gains = (self._squares[:, -1] - explained[:-1]) ** 2 / np.maximum(squares, 1e-300)
        allowed = np.zeros(len(self.grid), dtype=bool)
        allowed[4:-4] = True  # two bins from the ends, and from each other
        for knot in knots:
            allowed[max(knot - 3, 0) : knot + 4] = False
        return np.where(allowed, np.maximum(self._left - explained[-1] - gains, 0), math.inf)

    def criterion(self, rss, knots: int):
        """Bayesian information criterion, with PENALTY times its price for a knot's place and slope."""
        return self.n * np.log(np.maximum(rss / self.n, 1e-12)) + PENALTY * 2 * knots * math.log(self.n)

    def choose_knots(self) -> list[int]:
        """Adds knots one by one, each time moving all to their best places, and takes out those that do not pay."""
        knots: list[int] = []
        tried = [(self.criterion(self.rss([]), 0), [])]
        while len(knots) < MOST_KNOTS and np.isfinite(rss := self.rss_with_one_more(knots)).any():
            knots.append(int(rss.argmin()))
            for _ in knots:
                knots = knots[1:]
                knots.append(int(self.rss_with_one_more(knots).argmin()))
            tried.append((self.criterion(self.rss(knots), len(knots)), list(knots)))
        value, knots = min(tried)
        while knots:
            fewer = [[k for k in knots if k != out] for out in knots]
            best, fewer = min((self.criterion(self.rss(k), len(k)), k) for k in fewer)
            if best > value:
                break
            value, knots = best, fewer
        return sorted(knots)

    def pieces(self, knots):
        """Heights at the ends and knots, and slope and standard error of each piece."""
        A = self._design(knots)
        coefficients = np.linalg.lstsq(A, self._y, rcond=None)[0]
        variance = max(self.rss(knots), 1e-12) / self._freedom(knots)
        sums = np.tril(np.ones((len(knots) + 1, len(knots) + 1)))  # of the changes of slope
        covariance = sums @ (variance * np.linalg.pinv(A.T @ A))[1:, 1:] @ sums.T
        ends = np.array([self.x[0], *self.grid[knots], self.x[-1]])
        slopes = sums @ coefficients[1:]
        heights = coefficients[0] + coefficients[1] * ends[0] + np.append(0, np.cumsum(slopes * np.diff(ends)))
        return heights, slopes, np.sqrt(np.diag(covariance))

    def climb_after(self, heights, knots, i) -> float:
        """The most by which the fit plus the log rate exceeds what it is at knot i, afterwards."""
        ends = np.array([self.x[0], *self.grid[knots], self.x[-1]])
        after = self.x[self.x >= self.grid[knots[i]]]
        curve = np.interp(after, ends, heights) + np.interp(after, self.x, self.rate)
        return curve.max() - heights[i + 1] - np.interp(self.grid[knots[i]], self.x, self.rate)

    def deviation_after(self, knot: int) -> float:
        """The standard deviation of single values after a knot, about a straight line."""
        after = self.x > self.grid[knot]
        x, y = self.x[after] - self.x[after].mean(), self.y[after] - self.y[after].mean()
        slope = x @ y / max(x @ x, np.finfo(float).tiny)
        return math.sqrt(np.mean((y - slope * x) ** 2) + statistics.median(self.spread[after]) ** 2)

    def kink(self, knots, i, fall) -> Kink:
        """Describes knot i; its interval are the places that raise the residuals by less than F(1, n; 95 %) allows."""
        others = knots[:i] + knots[i + 1 :]
        limit = self.rss(knots) * (1 + 4 / self._freedom(knots))
        allowed = [knots[i], *np.flatnonzero(self.rss_with_one_more(others) <= limit)]
        step, low, high = (round(self._unit(self.grid[k])) for k in (knots[i], min(allowed), max(allowed)))
        before, after = map(float, self.pieces(knots)[1][i : i + 2])
        return Kink(step, low, high, before, after, self._unit(fall))

    def _freedom(self, knots) -> int:
        return max(self.n - 2 - 2 * len(knots), 1)

    def _design(self, knots) -> np.ndarray:
        return np.concatenate([self._lines, self._hinges[:, knots]], axis=1)

    def _weighted(self, A):
        return A * self._sqrt_w[:, None]
