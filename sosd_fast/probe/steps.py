"""When a training step is over: all optimizers that change the tracked parameters have stepped once."""

import weakref

from torch import Tensor


class _Optimizers:
    """Optimizers, none of them kept alive, by identity: what they make of == and hash is theirs."""

    def __init__(self, optimizers=()):
        self._refs = {id(o): weakref.ref(o) for o in optimizers}

    def add(self, optimizer):
        self._refs[id(optimizer)] = weakref.ref(optimizer)

    def __iter__(self):
        return iter([o for o in (ref() for ref in self._refs.values()) if o is not None])

    def __len__(self):
        return len(list(iter(self)))

    def __contains__(self, optimizer):
        ref = self._refs.get(id(optimizer))
        return ref is not None and ref() is optimizer

    def same(self, other: "_Optimizers") -> bool:
        return {id(o) for o in self} == {id(o) for o in other}


class Rounds:
    """Tells when all optimizers that change the tracked parameters have stepped once."""

    def __init__(self, parameters, optimizers):
        self._parameters = parameters
        self._given = None if optimizers is None else _Optimizers(optimizers)
        self._known = _Optimizers()
        self._stepped = _Optimizers()
        self._orphans: set[int] = set()  # parameters that a whole round passed by
        self.lost = False  # whether the last round passed by some that the one before did not
        self._strangers = _Optimizers()  # optimizers that hold none of the parameters
        self.foreign = 0  # their steps before the first round

    @property
    def pending(self) -> bool:
        """Whether some but not all optimizers have stepped."""
        return len(self._stepped) > 0

    @property
    def size(self) -> int:
        """How many parameters the optimizers hold: it grows where a model is extended."""
        return sum(len(params) for optimizer in self._known for params in _groups(optimizer))

    def follow(self, parameters):
        """Takes another list of parameters."""
        self._parameters = parameters

    def is_new(self, optimizer) -> bool:
        """Whether this optimizer has not stepped yet."""
        return self._given is None and optimizer not in self._known and optimizer not in self._strangers

    def ends_before(self, optimizer) -> bool:
        """Whether this optimizer, about to step, begins a new round."""
        return optimizer in self._stepped

    def ends_after(self, optimizer) -> bool:
        """Whether this optimizer, having stepped, completes the round."""
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
            self.foreign += not self._known
            return False
        self._stepped.add(optimizer)
        self._known.add(optimizer)
        covered = set().union(*map(self._held, self._known), self._orphans)
        return self._known.same(self._stepped) and all(
            id(p) in covered or not p.requires_grad for p in self._parameters
        )

    def finish(self):
        """Closes the round."""
        self._known = self._stepped
        held = set().union(*map(self._held, self._known))
        orphans = {id(p) for p in self._parameters} - held
        self.lost, self._orphans = bool(orphans - self._orphans), orphans
        self._stepped = _Optimizers()

    @staticmethod
    def _held(optimizer) -> set[int]:
        return {id(p) for params in _groups(optimizer) for p in params}


def _groups(optimizer) -> list:
    """The parameters of each group of an optimizer, of which someone else's may lack any."""
    return [group.get("params", ()) for group in getattr(optimizer, "param_groups", ())]
