"""What to measure at a step: every matrix, or, within a budget, as many as a fraction of the time allows."""

# What ranks agree on may be anything.
# pyright: reportUnknownMemberType=false

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sosd_fast.probe.measurement import Kind

if TYPE_CHECKING:
    from sosd_fast.distributed.spectra import Shards

_MARGIN = 1.15
_COVERED = 0.9  # a smaller share of the matrices each step is worth a message
_SETTLED = 20  # steps before that message
_KEPT = 0.98  # of what is beside measurements, from step to step: an audit may take as long as those of many steps

log = logging.getLogger("sosd_fast")


class Plan(NamedTuple):
    """Places of the matrices to measure at a step, each list ascending."""

    full: list[int]  # all singular values
    leading: list[int]  # the k leading ones


class Cost(NamedTuple):
    """What a measurement of some matrices took."""

    kind: Kind
    places: list[int]
    seconds: float
    device_seconds: float  # of these, on a device beside the host


class Planner:
    """Plans what to measure at each step.

    Args:
        method: "full" and "exact" measure every matrix in full at every step, "topk" the leading values of matrices
            that have at least 3 k values, and "auto" what `Budget` allows.
        k: how many leading values are followed.
        every: steps from one that is measured to the next.
        budget: the fraction of the time that "auto" may take.

    Attributes:
        leading: places of the matrices whose leading values are followed.
        seen: training steps so far, measured or not.
    """

    def __init__(self, method: str, k: int = 32, every: int = 1, budget: float = 0.01):
        self.leading: list[int] = []
        self._method, self._k, self._every, self._fraction = method, k, every, budget
        self._count = 0  # of matrices
        self._shards: Shards | None = None
        self._budget: Budget | None = None
        self._planned: float | None = None  # when the last plan within the budget was made
        self._required: set[int] = set()  # to be measured in full at the next step, whatever the budget
        self._said_coverage = False
        self.seen = 0
        self._steps, self._full_shares, self._leading_shares = 0, 0.0, 0.0

    def follow(self, shapes: Sequence[tuple[int, int]], shards: "Shards | None" = None):
        """Plans for these matrices from now on, which ranks may measure together; `calibrate` must follow."""
        self._count, self._shards = len(shapes), shards
        self._budget = None
        self._required.clear()
        # With fewer than 3 k values the leading ones cost as much as all of them.
        wanted = self._method in ("auto", "topk")
        self.leading = [i for i, shape in enumerate(shapes) if wanted and min(shape) >= 3 * self._k]

    def calibrate(self, measure: Callable[[Plan], dict[int, float]], compiles: bool):
        """Finds out whose leading values can be measured and, for "auto", what each measurement costs.

        Args:
            measure: measures at once; returns the seconds that each matrix took, of those that could be measured.
            compiles: whether kernels are compiled at their first use, as on a GPU.
        """
        leading: dict[int, float] = {}
        if self.leading:
            found = measure(Plan([], self.leading))  # from random subspaces, which takes longer
            self.leading = [i for i in self.leading if i in found]
            leading = measure(Plan([], self.leading))
        if self._method == "auto" and self._count:
            if compiles:
                measure(self.everything)
            full = measure(self.everything)
            dearest, places = max(full.values(), default=1.0), range(self._count)
            seconds = [full.get(i, dearest) for i in places]
            self._budget = Budget(self._fraction, seconds, [leading.get(i) for i in places])

    @property
    def everything(self) -> Plan:
        """Every matrix in full."""
        return Plan(list(range(self._count)), [])

    def plan(self, now: float, step: int) -> Plan | None:
        """Chooses what to measure at a step; None for nothing.

        Args:
            now: seconds on a clock.
            step: its number.
        """
        self.seen += 1
        if step % self._every or not self._count:
            return None
        if self._method != "auto":
            without = set(self.leading)
            plan = Plan([i for i in range(self._count) if i not in without], self.leading)
        elif self._budget is None or self._planned is None:  # what a measurement, or a step, takes is not known yet
            plan = Plan(list(range(self._count)), self.leading)
        else:
            plan = self._budget.plan(now - self._planned)
            if self._shards:  # ranks that measure together follow the clock of the first
                plan = self._shards.broadcast_object(plan)
            if not self._shards or self._shards.rank == 0:
                self._say_coverage(self._budget, step)
        if self._budget:
            self._planned = now
        if self._required:
            plan = Plan(sorted({*plan.full, *self._required}), plan.leading)
            self._required.clear()
        self._steps += 1
        self._full_shares += len(plan.full) / self._count
        self._leading_shares += len(plan.leading) / self._count
        return plan

    @property
    def shares(self) -> tuple[float, float] | None:
        """The shares of the matrices that a measured step measures in full, and by leading values, on average."""
        return (self._full_shares / self._steps, self._leading_shares / self._steps) if self._steps else None

    def charge(self, seconds: float):
        """Takes what a step took of the host's time, measurements included, out of the budget."""
        if self._budget:
            self._budget.charge(seconds)

    def update_cost(self, cost: Cost):
        """Corrects what is expected of measurements by what one took, and charges what it took of a device."""
        if self._budget:
            self._budget.update_cost(cost)

    def heed(self, lacking: list[int], moved: list[int]):
        """Takes wishes into account.

        Args:
            lacking: matrices to be measured in full at the next step, whatever the budget.
            moved: matrices to be measured in full before others.
        """
        self._required.update(lacking)
        if self._budget:
            self._budget.prioritize(moved)

    def _say_coverage(self, budget: "Budget", step: int):
        if not self._said_coverage and budget.coverage < _COVERED and step > _SETTLED:
            self._said_coverage = True
            enough = budget.enough
            log.warning(
                "sosd_fast: budget=%.3g covers %.0f %% of the matrices each step; they take turns. %s would cover all.",
                budget.fraction,
                100 * budget.coverage,
                f"budget={enough:.2g}" if enough <= 1 else "A larger step, or fewer matrices (include, exclude),",
            )


class Budget:
    """Plans measurements of matrices so that they take at most a fraction of the time: a token bucket.

    The leading values of every matrix are measured every step, and full spectra in pairs of consecutive steps, in
    turn, as the budget allows: every matrix every step where it allows that. Where it does not even cover the leading
    values, matrices take turns in pairs.

    Args:
        fraction: of the time between steps that may be spent.
        full: seconds that each matrix's full spectrum takes.
        leading: seconds that each matrix's leading values take; None where only full spectra are sensible.

    Attributes:
        income: seconds a step, smoothed.
        bucket: seconds that are left.
        markup: what a step takes, records, events and audits included, over what its measurements take alone.
    """

    def __init__(self, fraction: float, full: Sequence[float], leading: Sequence[float | None]):
        self.fraction = fraction
        self.full = list(full)
        self.leading = list(leading)
        self.income: float | None = None
        self.bucket = 0.0
        self.markup = 1.0
        self._measuring = self._beside = 0.0  # seconds of the last steps, of measurements and of what is beside them
        self._taken = self._of_host = 0.0  # by measurements since the last charge, and what of it the host worked
        self._turn = deque(range(len(self.full)))
        self._prioritized: set[int] = set()  # put to the front since their last turn
        self._every_step = "turns"  # what is measured every step: full, leading, or nothing, matrices taking turns
        self._second: set[int] = set()  # matrices whose pair is half done

    @property
    def cheapest(self) -> list[float]:
        """Seconds of the cheaper measurement of each matrix; the full spectrum wins a tie, for it says more."""
        return [
            full if leading is None else min(full, leading)
            for full, leading in zip(self.full, self.leading, strict=True)
        ]

    @property
    def coverage(self) -> float:
        """The share of matrices that the income lets one measure each step, at most 1; turns are full spectra."""
        if self.income is None:
            return 1.0
        seconds = sum(self.full if self._every_step == "turns" else self.cheapest)
        return min(1.0, self.income / (self.markup * seconds))

    @property
    def enough(self) -> float:
        """The fraction of the time that lets one measure every matrix at every step; there after the first `plan`."""
        return self.fraction * self.markup * sum(self.cheapest) / max(self.income or 0.0, 1e-30)

    def plan(self, elapsed: float) -> Plan:
        """Chooses what to measure now.

        Args:
            elapsed: seconds since the last call.
        """
        earned = self.fraction * elapsed
        self.income = earned if self.income is None else 0.9 * self.income + 0.1 * earned
        everything = range(len(self.full))
        cap = 2 * max(
            self.income, self.markup * max(self.full)
        )  # idle time must not be saved up for one expensive step
        self.bucket = min(self.bucket + earned, cap)
        income, cheapest = self.income / self.markup, self.cheapest  # what is left for measurements alone
        for choice, cost in (("full", sum(self.full)), ("leading", sum(cheapest)), ("turns", 0.0)):
            # To change for the better takes a margin: a subspace left alone for some steps has to catch up.
            if income >= cost * (1.0 if self._every_step == choice else _MARGIN):
                self._every_step = choice
                break
        if self._every_step == "full":
            self._second.clear()
            return Plan(list(everything), [])
        every_step = self._every_step == "leading"
        always = {i for i in everything if cheapest[i] == self.full[i]} if every_step else set[int]()
        full, self._second = self._second | always, set()
        costs = enumerate(self.leading) if every_step else ()
        leading = {i: cost for i, cost in costs if cost is not None and i not in always}
        left = self.bucket / self.markup - sum(self.full[i] for i in full) - sum(leading.values())
        for _ in range(len(self._turn)):
            i = self._turn[0]
            if left < self.full[i]:
                break
            self._turn.rotate(-1)
            self._prioritized.discard(i)
            if i not in full:
                full.add(i)
                self._second.add(i)
                left -= self.full[i]
        return Plan(sorted(full), list(leading))

    def charge(self, seconds: float):
        """Takes what a step took of the host's time, measurements included, out of the bucket."""
        self.bucket -= seconds
        if seconds:  # else nothing is known of it
            self._measuring = _KEPT * self._measuring + self._taken
            self._beside = _KEPT * self._beside + max(0.0, seconds - self._of_host)
            if self._measuring:
                self.markup = 1 + self._beside / self._measuring
        self._taken = self._of_host = 0.0

    def prioritize(self, places: list[int]):
        """Puts matrices at the head of the turn, each once before its turn comes."""
        for i in places:
            if i not in self._prioritized:
                self._prioritized.add(i)
                self._turn.remove(i)
                self._turn.appendleft(i)

    def update_cost(self, cost: Cost):
        """Corrects the costs by what a measurement of some matrices took together; charges what it took of a device."""
        self.bucket -= cost.device_seconds
        self._taken += cost.seconds
        self._of_host += cost.seconds - cost.device_seconds
        costs = self.full if cost.kind == "full" else self.leading
        known = {i: each for i in cost.places if (each := costs[i]) is not None}
        expected = sum(known.values())
        if expected > 0:
            factor = 0.9 + 0.1 * min(10.0, cost.seconds / expected)
            for i, each in known.items():
                costs[i] = each * factor
