"""When a training step is over: all optimizers that change the followed parameters have stepped once.

What a person calls a step of an optimizer is the outermost `step`: an optimizer may inherit from another and call its
`step`, wrap one or contain several. The hooks name the optimizers inside of whose `step` another one steps.
"""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false

import itertools
import logging
import operator
import threading
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from sosd_fast.probe.doubts import EARLY, LATE, TWICE, TWO_LOSSES, UNKNOWN, Doubts
from sosd_fast.probe.optimizers import (
    Notes,
    Optimizers,
    has_hooks,
    held_by,
    is_idle,
    parameters_of,
    share_parameters,
    version_of,
    was_skipped,
)
from sosd_fast.probe.passes import Partners, Pass, trains_alone

# Steps of optimizers that hold none of the parameters, before a message says so; and training steps in which some
# trainable parameters have no optimizer, before none is expected for them any more.
PATIENCE = 20
# Times in a row that one optimizer seems to begin a training step before its partner has stepped, before they are
# taken to be partners no more: their losses may have become two.
_APART = 6

log = logging.getLogger("sosd_fast")


class StepDetector:
    """Tells when a training step is over: when all optimizers that change the parameters have stepped once.

    Optimizers that step in turn make one training step. Where each of them has stepped, the training step ends at
    once. Where one steps less often than the others, or has not stepped yet, it ends before one of the others steps
    again, so that the count is that of the optimizer that steps most often. Optimizers that once stepped on the
    gradients of one backward pass are partners: one of them that steps on newer gradients than another begins a step.

    Args:
        parameters: that the probe follows.
        optimizers: the ones that count; None for every one that holds a parameter.
        before: training steps before these.

    Attributes:
        by_hand: whether no optimizer's step counts.
        pending: whether optimizers have stepped since the end of the last training step.
        ended: how many training steps are over.
        moves: how often the weights were changed since then, as far as that is known; infinite where they were, and
            nothing counts it.
        doubts: what was said of steps whose end cannot be known.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizers: Iterable[Optimizer] | None, before: int = 0):
        self._given = None if optimizers is None else Optimizers(optimizers)
        self.by_hand = self._given is not None and not len(self._given)
        self._known = Optimizers()  # that step in training steps
        self._stepped = Optimizers()  # those of them that stepped in this one
        self.pending = False
        self._first = Optimizers()  # that stepped first in this training step
        self._leader = Optimizers()  # that stepped first in the last training step in which all stepped
        self._partners = Partners()
        self._apart = 0  # times in a row that partners seemed to step in training steps of their own
        self._passes: list[Pass] = []  # backward passes of this training step
        self._last: list[Pass] = []  # those of the last one
        self._homes: dict[int, Pass | None] = {}  # on which an optimizer is about to step, by its id
        self._thread = 0  # of the last step
        self._threads = Notes[int]()  # of the last step of each optimizer
        self._next: Pass | None = None  # which turned out to belong to the next training step
        self._doubted: Pass | None = None  # of an optimizer that joined when others had trained alone
        self._inside: dict[int, list[Optimizer]] = {}  # given ones that stepped inside of another, by the other's id
        self._seen = Notes[int]()  # that were about to step: a hash of the parameters that they held then
        self._counted = Optimizers()  # that have been counted, even if they were replaced since
        self._idled = Optimizers()  # whose first step changed nothing
        self.ended: int = 0
        self._before, self._ended_by_hand = before, 0  # steps before; the last training step that was ended by hand
        self.moves = 0.0
        self.doubts = Doubts()
        self._foreign = 0  # steps since the last training step that do not count, though they seem to be some
        self._between = Optimizers()  # that took them
        self._ignored = Optimizers()  # that took some between two training steps
        self._versions = 0  # how often parameters had been changed then
        self._covered: set[int] = set()  # parameters that the known optimizers held when one of them last stepped
        self._trainable: set[int] = set()  # parameters that required a gradient at any time
        self._uncovered: set[int] = set()  # those of them that no known optimizer held at the end of the last step
        self._since = 0  # training steps for which they have been the same
        self._orphans: set[int] = set()  # parameters that no known optimizer held at the end of the last step
        self.follow(parameters)

    def follow(self, parameters: Sequence[Tensor]):
        """Takes another list of parameters."""
        self._parameters, self._ids = parameters, set(map(id, parameters))
        self._trainable &= self._ids
        self._look()

    def hold(self, parameters: Sequence[Tensor]):
        """Takes the same parameters again, or lets go of them for the time between two actions."""
        self._parameters = parameters

    def may_have_changed(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether this optimizer, about to step, never did or holds other parameters: the model may be another.

        Args:
            optimizer: any.
            outer: the optimizers inside of whose `step` it steps, the innermost first.
        """
        if outer or self.by_hand:
            return False
        before, held = self._seen.get(optimizer), hash(tuple(map(id, parameters_of(optimizer))))
        self._seen[optimizer] = held
        return before != held

    def ends_before(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether the training step is over because this optimizer, about to step, begins another; see `ends_after`."""
        if not outer:
            self._inside.pop(id(optimizer), None)  # an error may have ended its last step
        if self._enclosing(optimizer, outer) is not None and self._given is None:
            return False
        if not (counts := self._counts_as(optimizer)):
            return False
        home = self._homes[id(optimizer)] = self._home(counts)
        again = any(o in self._stepped for o in counts)
        self._resolve(home)
        if not self.pending:
            if home is not None and any(p.has_any(counts) for p in self._last) and not self._reopen(home, counts):
                self._homes[id(optimizer)] = None
            return False
        if again and home is not None:
            self._next = home
            self._say(LATE, self.ended + 1)
        if again or not len(self._stepped):  # those that stepped are gone
            return True
        return home is None and (self._is_ahead(counts) or self._leads(counts))

    def ends_after(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether the training step is over because this optimizer, the last of them, has stepped.

        Args:
            optimizer: any.
            outer: the optimizers inside of whose `step` it stepped, the innermost first.
        """
        if self.by_hand:
            return False
        counts, enclosing = self._counts_as(optimizer), self._enclosing(optimizer, outer)
        if enclosing is None:
            counts = counts or self._inside.pop(id(optimizer), [])
        elif self._given is None:
            return False  # the other one counts
        if not counts:
            if not outer:
                self._see_foreign(optimizer)
            return False
        if was_skipped(optimizer):
            return False
        first = optimizer not in self._counted
        if first and optimizer not in self._idled and is_idle(optimizer):
            self._idled.add(optimizer)
            self._seen.discard(optimizer)  # the model may change until it steps
            return False
        self._counted.add(optimizer)
        if enclosing is not None:
            self._inside.setdefault(id(enclosing), []).extend(counts)
            return False
        home, before, self._thread = self._homes.pop(id(optimizer), None), self._thread, threading.get_ident()
        for o in (optimizer, *counts):
            self._threads[o] = self._thread
        if self.pending and before != self._thread and any(share_parameters(o, optimizer) for o in self._stepped):
            # Threads that train the same weights, each with an optimizer of its own: each step is one.
            self._known.add(optimizer)
            self._next = Pass(optimizer, counts, (), ())
            return True
        over = home is not None and home in self._last  # it belongs to the step that is over
        if not over:
            if not self.pending:
                self._first = Optimizers(counts)
            self.pending = True
            self._stepped.add(*counts)
        replaces = False
        if self._given is None:
            replaces = home is None and optimizer not in self._known and self._replace_by(optimizer)
            self._known.add(optimizer)
            self._look()
            self._covered = held_by(self._known)
        uncovered = self._trainable - self._covered if self._given is None else set[int]()
        self._enter(home, optimizer, counts, uncovered, joins=first and not replaces)
        if over:
            self._say(EARLY)
            return False
        if self._given is not None:
            return self._given.same(self._stepped)
        expected = uncovered if self._since < PATIENCE else uncovered - self._uncovered
        return self._known.same(self._stepped) and not expected

    def finish(self, by_hand: bool = False) -> bool:
        """Closes the training step.

        Args:
            by_hand: whether `Probe.step` does.

        Returns:
            Whether this was the first one, done by hand, or parameters have lost their optimizers: the model may have
            changed.
        """
        if by_hand and len(self._counted) and (self.pending or self.ended != self._ended_by_hand):
            self._say(TWICE)
        late, self._next = self._next, None
        if late is None and len(self._stepped) > 1 and self._known.same(self._stepped):  # of all: it shows their order
            self._leader = self._first
        self.pending, self._stepped = False, Optimizers()
        self._last, self._passes = [p for p in self._passes if p is not late], []
        first = not self.ended
        self.ended += 1
        if by_hand:
            self._ended_by_hand = self.ended
        self._foreign, self._versions = 0, self._changes()
        self._ignored.add(*self._between)
        held = self._covered if self._given is None else held_by(self._given)
        orphans = self._ids - held
        uncovered = orphans & self._trainable
        self._since = self._since + 1 if uncovered == self._uncovered else 0
        lost, self._uncovered, self._orphans = orphans - self._orphans, uncovered, orphans
        if late is not None:
            self._begin_with(late)
        return not len(self._seen) if first else bool(lost)

    def say_unseen(self):
        """Logs that training steps were not seen, where optimizers stepped that do not count, or the weights moved."""
        after = f"after step {self._before + self.ended} " if self.ended else ""
        whose = "that hold none of the tracked parameters" if self._given is None else "other than the given ones"
        if self._foreign:
            seen = f"{after}{self._foreign} steps of optimizers {whose}"
        elif self.moves and not (self.ended and (self.by_hand or len(self._ignored))):
            seen = f"{after}the weights changed without a step"
        else:
            return
        # A checkpoint that is loaded at the end, or averaged weights, are one or two changes.
        level = logging.INFO if self.ended and not self._foreign and self.moves <= 2 else logging.WARNING
        log.log(
            level,
            "sosd_fast: %s, so none was counted. Pass the optimizers that train the tracked model, or none to take "
            "every one that holds its parameters. Where copies of the weights are trained, or something else than an "
            "optimizer of torch trains them, pass optimizers=[] and call Probe.step after each step.",
            seen,
        )

    def _see_foreign(self, optimizer: Optimizer):
        """Notes a step that does not count, unless it is one of another model.

        After the first training step it seems to be one of this model where the optimizer holds parameters of it and
        took no such step between two training steps, or where parameters change from one such step to the next.
        """
        if self.ended:
            before, self._versions = self._versions, self._changes()
            holds = not self._ids.isdisjoint(map(id, parameters_of(optimizer)))
            if optimizer in self._ignored or not (holds or self._versions > before):
                return
            self._between.add(optimizer)
        elif self.pending:
            return
        self._foreign += 1
        if self._foreign == PATIENCE:
            self.say_unseen()

    def _changes(self) -> int:
        """How often some of the parameters that are trained were changed in place."""
        return sum(map(version_of, itertools.islice((p for p in self._parameters if p.requires_grad), 4)))

    def _home(self, optimizers: Sequence[Optimizer]) -> Pass | None:
        """The pass, of this training step or the last one, on whose gradients optimizers are about to step."""
        passes = [*self._last, *self._passes]
        own = [p for p in passes if p.has_any(optimizers)]
        found = next((p for p in reversed(passes) if p not in own and p.is_of(optimizers)), None)
        if found is None or any(p.is_of(optimizers) for p in own):
            return None  # those that step twice on the same gradients tell nothing
        return found

    def _enter(
        self, home: Pass | None, optimizer: Optimizer, counts: list[Optimizer], uncovered: set[int], joins: bool
    ):
        """Notes on which pass an optimizer has stepped.

        Args:
            home: the pass; None for one of its own.
            optimizer: that has stepped.
            counts: what its step is a step of.
            uncovered: parameters that are trained and that no known optimizer holds.
            joins: whether it is the first step of an optimizer that replaces no other.
        """
        if home is not None:
            home.optimizers.add(*counts)
            self._partners.join(list(home.optimizers))
            self._apart = 0
            return
        counting = self._known if self._given is None else self._given
        ours = [o for o in counting if self._threads.get(o) == self._thread]
        unstepped = [o for o in counting if o not in self._threads]
        others: list[Tensor] = []
        if (unstepped or uncovered) and trains_alone():
            ours += unstepped
            others = [p for p in self._parameters if id(p) in uncovered]
        self._passes.append(new := Pass(optimizer, counts, ours, others))
        if joins and self.ended and len(counting) > len(counts):
            self._doubted = new

    def _is_ahead(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether optimizers are about to step on newer gradients than partners of theirs in this training step."""
        for p in reversed(self._passes):
            if any(self._partners.are(o, partner) for partner in p.optimizers for o in optimizers):
                if p.is_of(optimizers) is not False:
                    return False
                self._apart += p.inside == -1
                if self._apart > _APART:
                    self._partners.forget()
                    self._apart = 0
                    self._say(TWO_LOSSES)
                    return False
                return True
        return False

    def _leads(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether optimizers step first in a training step, and gradients are those of the next one."""
        return any(o in self._leader for o in optimizers) and any(p.has_new_gradients() for p in self._passes[:1])

    def _reopen(self, home: Pass, optimizers: Sequence[Optimizer]) -> bool:
        """Begins a training step with a pass that was taken for the end of the last one, where it was.

        Optimizers stepped in the last one and are about to step again on the gradients of another's pass.
        """
        if all(self._partners.are(o, other) for o in optimizers for other in home.optimizers):
            return False
        self._last.remove(home)
        self._begin_with(home)
        self._say(LATE)
        return True

    def _begin_with(self, late: Pass):
        self._passes, self.pending = [late], True
        self._stepped, self._first = Optimizers(late.optimizers), Optimizers(late.optimizers)

    def _resolve(self, home: Pass | None):
        """Says what cannot be known of an optimizer that joined others, now that the next one is about to step."""
        if self._doubted is not None and home in (None, self._doubted):
            if home is None:
                self._say(UNKNOWN)
            self._doubted = None

    def _say(self, doubt: str, step: int | None = None):
        self.doubts.say(doubt, self._before + (self.ended if step is None else step))

    def _counts_as(self, optimizer: Optimizer) -> list[Optimizer]:
        """The optimizers that a step of this one is a step of.

        A given one that has no hooks of torch, as what accelerate, Fabric and Lightning put around an optimizer, steps
        when one steps that holds one of its parameters. One that has hooks must step itself: another may hold its
        parameters as well.
        """
        if self._given is None:
            return [] if self._ids.isdisjoint(map(id, parameters_of(optimizer))) else [optimizer]
        return [o for o in self._given if o is optimizer or (not has_hooks(o) and share_parameters(o, optimizer))]

    def _enclosing(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> Optimizer | None:
        """The outermost optimizer inside of whose `step` this one steps, of those that train the same parameters."""
        if self._given is None:
            return next((o for o in reversed(outer) if self._counts_as(o)), None)
        return next((o for o in reversed(outer) if o is optimizer or share_parameters(o, optimizer)), None)

    def _replace_by(self, optimizer: Optimizer) -> bool:
        """Expects no more steps of optimizers whose followed parameters this one, which is not expected, holds as well.

        Where one of them steps nevertheless, it takes the place of this one in the same way, or is expected again.

        Returns:
            Whether there are any.
        """
        held = held_by([optimizer])
        replaced = [
            o
            for o in self._known
            if o not in self._stepped and held_by([o]) & self._ids <= held and not self._partners.are(o, optimizer)
        ]
        for other in replaced:
            self._known.discard(other)
        return bool(replaced)

    def _look(self):
        """Notes which parameters require a gradient: one that is frozen now may be trained in turn with others."""
        if len(self._trainable) < len(self._ids):
            trained = map(operator.attrgetter("requires_grad"), self._parameters)
            self._trainable.update(itertools.compress(map(id, self._parameters), trained))
