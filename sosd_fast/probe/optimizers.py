"""What the probe reads of optimizers: which parameters they hold, and whether a step of theirs changes anything."""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Value = TypeVar("Value")


class Notes(Generic[Value]):
    """A value for each of some optimizers, none of them kept alive, by identity: what == and hash make is theirs."""

    def __init__(self):
        self._notes: dict[int, tuple[weakref.ref[Optimizer], Value]] = {}

    def __setitem__(self, optimizer: Optimizer, value: Value):
        if id(optimizer) not in self._notes:  # lest those that are gone add up
            self._notes = {key: note for key, note in self._notes.items() if note[0]() is not None}
        self._notes[id(optimizer)] = weakref.ref(optimizer), value

    def get(self, optimizer: Optimizer) -> Value | None:
        """Returns the value of one; None where it has none."""
        note = self._notes.get(id(optimizer))
        return note[1] if note is not None and note[0]() is optimizer else None

    def discard(self, optimizer: Optimizer):
        """Removes one, where it is there."""
        self._notes.pop(id(optimizer), None)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter([o for o in [ref() for ref, _ in self._notes.values()] if o is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, optimizer: Optimizer) -> bool:
        note = self._notes.get(id(optimizer))
        return note is not None and note[0]() is optimizer


class Optimizers(Notes[bool]):
    """A set of optimizers."""

    def __init__(self, optimizers: Iterable[Optimizer] = ()):
        super().__init__()
        self.add(*optimizers)

    def add(self, *optimizers: Optimizer):
        """Adds some; twice is fine."""
        for o in optimizers:
            self[o] = True

    def same(self, other: "Optimizers") -> bool:
        """Whether others are these."""
        return set(map(id, self)) == set(map(id, other))


def _groups(optimizer: Optimizer) -> list[Sequence[Tensor]]:
    """The parameters of each group of an optimizer, of which someone else's may lack any."""
    groups: Any = getattr(optimizer, "param_groups", ())
    return [group.get("params", ()) for group in groups]


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Iterates over the parameters of an optimizer."""
    return itertools.chain.from_iterable(_groups(optimizer))


def held_by(optimizers: Iterable[Optimizer]) -> set[int]:
    """Returns the ids of the parameters of optimizers."""
    return set(map(id, itertools.chain.from_iterable(map(parameters_of, optimizers))))


def share_parameters(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers hold a parameter in common."""
    return not held_by([one]).isdisjoint(map(id, parameters_of(other)))


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether torch calls the hooks when an optimizer steps; `Optimizer.__init__` sees to that."""
    return getattr(type(optimizer).step, "hooked", False)


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which is called even where its scaler skips the step, did nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and found_inf.device.type == "cpu" and bool(found_inf.item())


def is_idle(optimizer: Optimizer) -> bool:
    """Whether all learning rates and all gradients of an optimizer are zero, so that its step changes no weight.

    `torch.distributed.checkpoint.state_dict` takes such a step, before the first one, to make an optimizer's state. A
    warm-up from zero has gradients. They are read only where all rates are zero: reading them waits for a GPU.
    """
    groups: Any = getattr(optimizer, "param_groups", ())
    if not groups or not all(_is_zero_rate(group.get("lr")) for group in groups):
        return False
    # DTensors first: ranks ask one another for theirs, and must do so alike.
    parameters = sorted(parameters_of(optimizer), key=lambda p: not hasattr(p, "placements"))
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


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where it does not count, as one made in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0
