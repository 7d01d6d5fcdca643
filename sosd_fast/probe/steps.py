"""When a training step is over: all optimizers that change the followed parameters have stepped once."""

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

FOREIGN_STEPS = 20  # of optimizers that hold none of the parameters, before a message says so

log = logging.getLogger("sosd_fast")


class _Optimizers:
    """Optimizers, none of them kept alive, by identity: what they make of == and hash is theirs."""

    def __init__(self, optimizers: Iterable[Optimizer] = ()):
        self._refs = {id(o): weakref.ref(o) for o in optimizers}

    def add(self, optimizer: Optimizer):
        self._refs[id(optimizer)] = weakref.ref(optimizer)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter([o for o in (ref() for ref in self._refs.values()) if o is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, optimizer: Optimizer) -> bool:
        ref = self._refs.get(id(optimizer))
        return ref is not None and ref() is optimizer

    def same(self, other: "_Optimizers") -> bool:
        return {id(o) for o in self} == {id(o) for o in other}


class StepDetector:
    """Tells when a training step is over: when all optimizers that change the parameters have stepped once.

    Args:
        parameters: that the probe follows.
        optimizers: the ones that count; None for every one that holds a parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizers: Iterable[Optimizer] | None):
        self._parameters = parameters
        self._given = None if optimizers is None else _Optimizers(optimizers)
        self._known = _Optimizers()  # that stepped in the last training step
        self._stepped = _Optimizers()  # that stepped in this one
        self._orphans: set[int] = set()  # parameters that no optimizer of the last step holds
        self._size = 0  # how many parameters the optimizers of the last step hold
        self._strangers = _Optimizers()  # that hold none of the parameters
        self._foreign = 0  # steps of strangers before the first training step
        self._said_foreign = False

    @property
    def pending(self) -> bool:
        """Whether some but not all optimizers have stepped."""
        return len(self._stepped) > 0

    def follow(self, parameters: Sequence[Tensor]):
        """Takes another list of parameters."""
        self._parameters = parameters

    def is_new(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer has not stepped yet."""
        return self._given is None and optimizer not in self._known and optimizer not in self._strangers

    def ends_before(self, optimizer: Optimizer) -> bool:
        """Whether the training step is over because this optimizer, about to step, begins another."""
        return optimizer in self._stepped

    def ends_after(self, optimizer: Optimizer) -> bool:
        """Whether the training step is over because this optimizer, the last of them, has stepped."""
        if self._given is not None and optimizer not in self._given:
            return False
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer is called even where its scaler skips
        if isinstance(found_inf, Tensor) and found_inf.device.type == "cpu" and found_inf.item():
            return False
        if self._given is not None:
            self._stepped.add(optimizer)
            return self._given.same(self._stepped)
        if not self._held(optimizer) & {id(p) for p in self._parameters}:
            self._strangers.add(optimizer)
            self._foreign += not self._known
            self._say_foreign()
            return False
        self._stepped.add(optimizer)
        self._known.add(optimizer)
        covered = set[int]().union(*map(self._held, self._known), self._orphans)
        return self._known.same(self._stepped) and all(
            id(p) in covered or not p.requires_grad for p in self._parameters
        )

    def finish(self) -> bool:
        """Closes the training step.

        Returns:
            Whether the optimizers hold more or other parameters than at the step before: the model may have changed.
        """
        self._known, self._stepped = self._stepped, _Optimizers()
        held = set[int]().union(*map(self._held, self._known))
        orphans = {id(p) for p in self._parameters} - held
        before, self._size = self._size, sum(len(params) for o in self._known for params in _groups(o))
        changed = before > 0 and (self._size != before or bool(orphans - self._orphans))
        self._orphans = orphans
        return changed

    @staticmethod
    def _held(optimizer: Optimizer) -> set[int]:
        return {id(p) for params in _groups(optimizer) for p in params}

    def _say_foreign(self):
        if self._foreign >= FOREIGN_STEPS and not self._said_foreign:
            self._said_foreign = True
            log.warning(
                "sosd_fast: %d steps of optimizers that hold none of the tracked parameters, so none was counted. "
                "Where copies of the weights are trained, pass optimizers=[] and call Probe.step after each step.",
                self._foreign,
            )


def _groups(optimizer: Optimizer) -> list[Sequence[Tensor]]:
    """The parameters of each group of an optimizer, of which someone else's may lack any."""
    groups: Any = getattr(optimizer, "param_groups", ())
    return [group.get("params", ()) for group in groups]
