"""What to measure this step: a token bucket earns a fraction of the time and spends it on spectra."""

from collections import deque

_MARGIN = 1.15


class Budget:
    """Plans measurements of matrices so that they take at most a fraction of the time.

    The leading values of every matrix are measured every step, and full spectra in pairs of consecutive steps, in
    turn, as the budget allows: every matrix every step where it allows that. Where it does not even cover the leading
    values, matrices take turns in pairs.

    Args:
        fraction: of the time between steps that may be spent.
        full: seconds that each matrix's full spectrum takes.
        topk: seconds that each matrix's leading values take; None where only full spectra are sensible.
    """

    def __init__(self, fraction: float, full: list[float], topk: list[float | None]):
        self.fraction = fraction
        self.full = list(full)
        self.topk = list(topk)
        self.income = None  # seconds a step, smoothed
        self.bucket = 0.0
        self._turn = deque(range(len(full)))
        self._urged: set[int] = set()  # put to the front since their last turn
        self._every_step = "turns"  # what is measured every step: full, topk, or nothing, matrices taking turns
        self._second: set[int] = set()  # matrices whose pair is half done

    @property
    def cheapest(self) -> list[float]:
        """Seconds of the cheaper measurement of each matrix; the full spectrum wins a tie, for it says more."""
        return [full if topk is None else min(full, topk) for full, topk in zip(self.full, self.topk, strict=True)]

    @property
    def coverage(self) -> float:
        """The share of matrices that the income lets one measure each step, at most 1."""
        return 1.0 if self.income is None else min(1.0, self.income / sum(self.cheapest))

    def plan(self, elapsed: float) -> tuple[list[int], list[int]]:
        """Chooses what to measure now.

        Args:
            elapsed: seconds since the last call.

        Returns:
            (indices to measure in full, indices to measure the leading values of), each ascending.
        """
        earned = self.fraction * elapsed
        self.income = earned if self.income is None else 0.9 * self.income + 0.1 * earned
        everything = range(len(self.full))
        cap = 2 * max(self.income, max(self.full))  # idle time must not be saved up for one expensive step
        self.bucket = min(self.bucket + earned, cap)
        cheapest = self.cheapest
        for choice, cost in (("full", sum(self.full)), ("topk", sum(cheapest)), ("turns", 0.0)):
            # to change for the better takes a margin: a subspace left alone for some steps has to catch up
            if self.income >= cost * (1.0 if self._every_step == choice else _MARGIN):
                self._every_step = choice
                break
        if self._every_step == "full":
            self._second.clear()
            return list(everything), []
        every_step = self._every_step == "topk"
        always = {i for i in everything if every_step and cheapest[i] == self.full[i]}
        full, self._second = self._second | always, set()
        topk = {i: cost for i, cost in enumerate(self.topk) if every_step and cost is not None and i not in always}
        left = self.bucket - sum(self.full[i] for i in full) - sum(topk.values())
        for _ in range(len(self._turn)):
            i = self._turn[0]
            if left < self.full[i]:
                break
            self._turn.rotate(-1)
            self._urged.discard(i)
            if i not in full:
                full.add(i)
                self._second.add(i)
                left -= self.full[i]
        return sorted(full), list(topk)

    def spent(self, seconds: float):
        """Takes what a step's measurements cost out of the bucket."""
        self.bucket -= seconds

    def urge(self, indices: list[int]):
        """Puts matrices that moved unusually at the head of the turn, each once before its turn comes."""
        for i in indices:
            if i not in self._urged:
                self._urged.add(i)
                self._turn.remove(i)
                self._turn.appendleft(i)

    def learn(self, kind: str, indices: list[int], seconds: float):
        """Corrects the costs by what a measurement of `indices` took; kind is "full" or "topk"."""
        costs = getattr(self, kind)
        expected = sum(costs[i] for i in indices)
        if expected > 0:
            for i in indices:
                costs[i] *= 0.9 + 0.1 * min(10.0, seconds / expected)
