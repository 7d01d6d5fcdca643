"""When a training step is over: all optimizers that change the followed parameters have stepped once.

What a person calls a step of an optimizer is the outermost `step`: an optimizer may inherit from another and call its
`step`, wrap one or contain several. The hooks name the optimizers inside of whose `step` another one steps.
"""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false

import itertools
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Steps of optimizers that hold none of the parameters, before a message says so; and training steps in which some
# trainable parameters have no optimizer, before none is expected for them any more.
PATIENCE = 20

log = logging.getLogger("sosd_fast")


class _Optimizers:
    """Optimizers, none of them kept alive, by identity: what they make of == and hash is theirs."""

    def __init__(self, optimizers: Iterable[Optimizer] = ()):
        self._refs = {id(o): weakref.ref(o) for o in optimizers}

    def add(self, optimizer: Optimizer):
        self._refs[id(optimizer)] = weakref.ref(optimizer)

    def discard(self, optimizer: Optimizer):
        self._refs.pop(id(optimizer), None)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter([o for o in (ref() for ref in self._refs.values()) if o is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, optimizer: Optimizer) -> bool:
        ref = self._refs.get(id(optimizer))
        return ref is not None and ref() is optimizer

    def same(self, other: "_Optimizers") -> bool:
        return {id(o) for o in self} == {id(o) for o in other}


_Gradient = tuple["weakref.ref[Tensor]", "weakref.ref[Tensor]", int]  # a parameter, its gradient, that one's version


class StepDetector:
    """Tells when a training step is over: when all optimizers that change the parameters have stepped once.

    Optimizers that step in turn make one training step. Where each of them has stepped, the training step ends at
    once. Where one steps less often than the others, or has not stepped yet, it ends before one of the others steps
    again, so that the count is that of the optimizer that steps most often.

    Args:
        parameters: that the probe follows.
        optimizers: the ones that count; None for every one that holds a parameter.

    Attributes:
        pending: whether optimizers have stepped since the end of the last training step.
        ended: how many training steps are over.
        moved: whether the weights were seen to have changed though none is.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizers: Iterable[Optimizer] | None):
        self._given = None if optimizers is None else _Optimizers(optimizers)
        self._by_hand = self._given is not None and not len(self._given)
        self._known = _Optimizers()  # that step in training steps
        self._stepped = _Optimizers()  # those of them that stepped in this one
        self.pending = False
        self._first = _Optimizers()  # that stepped first in this training step
        self._gradients: list[_Gradient] = []  # of some of its parameters, as they were then
        self._leader = _Optimizers()  # that stepped first in the last training step in which all stepped
        self._inside: dict[int, list[Optimizer]] = {}  # given ones that stepped inside of another, by the other's id
        self._seen = _Optimizers()  # that were about to step
        self._held_by: dict[int, int] = {}  # a hash of the parameters that they held then
        self._counted = _Optimizers()  # that have been counted, even if they were replaced since
        self._idled = _Optimizers()  # whose first step changed nothing
        self.ended, self.moved = 0, False
        self._foreign = 0  # steps of optimizers that do not count, before the first training step
        self._covered: set[int] = set()  # parameters that the known optimizers held when one of them last stepped
        self._trainable: set[int] = set()  # parameters that required a gradient at any time
        self._uncovered: set[int] = set()  # those of them that no known optimizer held at the end of the last step
        self._since = 0  # training steps for which they have been the same
        self._orphans: set[int] = set()  # parameters that no known optimizer held at the end of the last step
        self.follow(parameters)

    def follow(self, parameters: Sequence[Tensor]):
        """Takes another list of parameters."""
        self._parameters, self._ids = parameters, set(map(id, parameters))
        self._look()

    def may_have_changed(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether this optimizer, about to step, never did or holds other parameters: the model may be another.

        Args:
            optimizer: any.
            outer: the optimizers inside of whose `step` it steps, the innermost first.
        """
        if outer or self._by_hand:
            return False
        held = hash(tuple(map(id, _parameters(optimizer))))
        same = optimizer in self._seen and self._held_by[id(optimizer)] == held
        self._seen.add(optimizer)
        self._held_by[id(optimizer)] = held
        return not same

    def ends_before(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether the training step is over because this optimizer, about to step, begins another; see `ends_after`."""
        if not outer:
            self._inside.pop(id(optimizer), None)  # an error may have ended its last step
        if self._enclosing(optimizer, outer) is not None and self._given is None:
            return False
        counts = self._counts_as(optimizer)
        gone = self.pending and not len(self._stepped)  # those that stepped
        if self.pending and any(o in self._leader for o in counts) and any(map(_is_renewed, self._gradients)):
            return True  # it steps first in a training step, and gradients are those of the next one
        return any(gone or o in self._stepped for o in counts)

    def ends_after(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> bool:
        """Whether the training step is over because this optimizer, the last of them, has stepped.

        Args:
            optimizer: any.
            outer: the optimizers inside of whose `step` it stepped, the innermost first.
        """
        if self._by_hand:
            return False
        counts, enclosing = self._counts_as(optimizer), self._enclosing(optimizer, outer)
        if enclosing is None:
            counts = counts or self._inside.pop(id(optimizer), [])
        elif self._given is None:
            return False  # the other one counts
        if not counts:
            if not (outer or self.ended or self.pending):
                self._foreign += 1
                if self._foreign == PATIENCE:
                    self.say_unseen()
            return False
        if _skipped(optimizer):
            return False
        first = optimizer not in self._counted
        if first and optimizer not in self._idled and _is_idle(optimizer):
            self._idled.add(optimizer)
            self._seen.discard(optimizer)  # the model may change until it steps
            return False
        self._counted.add(optimizer)
        if enclosing is not None:
            self._inside.setdefault(id(enclosing), []).extend(counts)
            return False
        if not self.pending:
            self._first = _Optimizers(counts)
            self._gradients = [
                (weakref.ref(p), weakref.ref(p.grad), _version(p.grad)) for p in _with_gradients(optimizer)
            ]
        self.pending = True
        for o in counts:
            self._stepped.add(o)
        if self._given is not None:
            return self._given.same(self._stepped)
        if first:
            self._replace_by(optimizer)
        self._known.add(optimizer)
        self._look()
        self._covered = _held(self._known)
        uncovered = self._trainable - self._covered
        expected = uncovered if self._since < PATIENCE else uncovered - self._uncovered
        return self._known.same(self._stepped) and not expected

    def finish(self) -> bool:
        """Closes the training step.

        Returns:
            Whether this was the first one, done by hand, or parameters have lost their optimizers: the model may have
            changed.
        """
        if len(self._stepped) > 1 and self._known.same(self._stepped):  # a step of all, which shows their order
            self._leader = self._first
        self.pending, self._stepped = False, _Optimizers()
        first = not self.ended
        self.ended += 1
        held = self._covered if self._given is None else _held(self._given)
        uncovered, orphans = self._trainable - held, self._ids - held
        self._since = self._since + 1 if uncovered == self._uncovered else 0
        lost, self._uncovered, self._orphans = orphans - self._orphans, uncovered, orphans
        return not len(self._seen) if first else bool(lost)

    def say_unseen(self):
        """Logs that no training step was seen, where optimizers stepped that do not count, or the weights moved."""
        if self.ended or not (self._foreign or self.moved):
            return
        whose = "that hold none of the tracked parameters" if self._given is None else "other than the given ones"
        seen = f"{self._foreign} steps of optimizers {whose}" if self._foreign else "the weights changed without a step"
        log.warning(
            "sosd_fast: %s, so none was counted. Pass the optimizers that train the tracked model, or none to take "
            "every one that holds its parameters. Where copies of the weights are trained, or something else than an "
            "optimizer of torch trains them, pass optimizers=[] and call Probe.step after each step.",
            seen,
        )

    def _counts_as(self, optimizer: Optimizer) -> list[Optimizer]:
        """The optimizers that a step of this one is a step of.

        A given one that has no hooks of torch, as what accelerate, Fabric and Lightning put around an optimizer, steps
        when one steps that holds one of its parameters. One that has hooks must step itself: another may hold its
        parameters as well.
        """
        if self._given is None:
            return [optimizer] if any(id(p) in self._ids for p in _parameters(optimizer)) else []
        return [o for o in self._given if o is optimizer or (not _has_hooks(o) and _share(o, optimizer))]

    def _enclosing(self, optimizer: Optimizer, outer: Sequence[Optimizer]) -> Optimizer | None:
        """The outermost optimizer inside of whose `step` this one steps, of those that train the same parameters."""
        if self._given is None:
            return next((o for o in reversed(outer) if self._counts_as(o)), None)
        return next((o for o in reversed(outer) if o is optimizer or _share(o, optimizer)), None)

    def _replace_by(self, optimizer: Optimizer):
        """Expects no more steps of optimizers whose followed parameters this one, which never stepped, holds as well.

        Where one of them steps nevertheless, it is expected again.
        """
        held = _held([optimizer])
        for other in self._known:
            if other not in self._stepped and _held([other]) & self._ids <= held:
                self._known.discard(other)

    def _look(self):
        """Notes which parameters require a gradient: one that is frozen now may be trained in turn with others."""
        self._trainable &= self._ids
        self._trainable.update(id(p) for p in self._parameters if p.requires_grad)


def _groups(optimizer: Optimizer) -> list[Sequence[Tensor]]:
    """The parameters of each group of an optimizer, of which someone else's may lack any."""
    groups: Any = getattr(optimizer, "param_groups", ())
    return [group.get("params", ()) for group in groups]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for params in _groups(optimizer) for p in params)


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for o in optimizers for p in _parameters(o)}


def _share(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers hold a parameter in common."""
    held = _held([one])
    return any(id(p) in held for p in _parameters(other))


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether torch calls the hooks when an optimizer steps; `Optimizer.__init__` sees to that."""
    return getattr(type(optimizer).step, "hooked", False)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which is called even where its scaler skips the step, did nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and found_inf.device.type == "cpu" and bool(found_inf.item())


def _is_idle(optimizer: Optimizer) -> bool:
    """Whether all learning rates and all gradients of an optimizer are zero, so that its step changes no weight.

    `torch.distributed.checkpoint.state_dict` takes such a step, before the first one, to make an optimizer's state. A
    warm-up from zero has gradients. They are read only where all rates are zero: reading them waits for a GPU.
    """
    groups: Any = getattr(optimizer, "param_groups", ())
    if not groups or not all(_is_zero_rate(group.get("lr")) for group in groups):
        return False
    # DTensors first: ranks ask one another for theirs, and must do so alike.
    parameters = sorted(_parameters(optimizer), key=lambda p: not hasattr(p, "placements"))
    return all(p.grad is None or _is_zero(p.grad) for p in parameters)


def _is_zero_rate(rate: Any) -> bool:
    """Whether a learning rate is zero; one on a device, which only a person puts there, is taken not to be."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and not rate.any()
    return rate == 0


def _is_zero(gradient: Tensor) -> bool:
    """Whether all entries of a gradient are zero, those that other ranks hold included."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    total: Any = values.detach().abs().sum()
    if hasattr(total, "full_tensor"):  # a DTensor: ranks must agree
        total = total.full_tensor()
    return not torch.count_nonzero(total).item()


def _with_gradients(optimizer: Optimizer, most: int = 4) -> list[Any]:
    """Some of the parameters of an optimizer that have a gradient."""
    return list(itertools.islice((p for p in _parameters(optimizer) if p.grad is not None), most))


def _is_renewed(seen: _Gradient) -> bool:
    """Whether a parameter has another gradient than it had, or the same one was added to."""
    parameter, gradient, version = seen
    p = parameter()
    return p is not None and p.grad is not None and (p.grad is not gradient() or _version(p.grad) != version)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where it does not count, as one made in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0
