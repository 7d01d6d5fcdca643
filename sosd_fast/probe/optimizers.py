"""What the probe reads of optimizers: which parameters they hold, and whether a step of theirs changes anything."""

# Most of torch has no complete types.
# pyright: reportUnknownMemberType=false

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Optimizers:
    """Optimizers, none of them kept alive, by identity: what they make of == and hash is theirs."""

    def __init__(self, optimizers: Iterable[Optimizer] = ()):
        self._refs = {id(o): weakref.ref(o) for o in optimizers}

    def add(self, optimizer: Optimizer):
        """Adds one; twice is fine."""
        self._refs[id(optimizer)] = weakref.ref(optimizer)

    def discard(self, optimizer: Optimizer):
        """Removes one, where it is there."""
        self._refs.pop(id(optimizer), None)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter([o for o in (ref() for ref in self._refs.values()) if o is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, optimizer: Optimizer) -> bool:
        ref = self._refs.get(id(optimizer))
        return ref is not None and ref() is optimizer

    def same(self, other: "Optimizers") -> bool:
        """Whether others are these."""
        return {id(o) for o in self} == {id(o) for o in other}


def _groups(optimizer: Optimizer) -> list[Sequence[Tensor]]:
    """The parameters of each group of an optimizer, of which someone else's may lack any."""
    groups: Any = getattr(optimizer, "param_groups", ())
    return [group.get("params", ()) for group in groups]


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Iterates over the parameters of an optimizer."""
    return (p for params in _groups(optimizer) for p in params)


def held_by(optimizers: Iterable[Optimizer]) -> set[int]:
    """Returns the ids of the parameters of optimizers."""
    return {id(p) for o in optimizers for p in parameters_of(o)}


def share_parameters(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers hold a parameter in common."""
    held = held_by([one])
    return any(id(p) in held for p in parameters_of(other))


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
