"""Models that several ranks hold copies of: which ranks these are, and which of them have not tracked theirs."""

import contextlib
import hashlib
import json
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sosd_fast.distributed.group import default_store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

# Models that the ranks of a group hold copies of, though nothing about them says so: what a Trainer passes to callbacks
copies: "weakref.WeakKeyDictionary[nn.Module, ProcessGroup]" = weakref.WeakKeyDictionary()


def group_of_copies(model: nn.Module, parameters: Iterable[Tensor]) -> "ProcessGroup | None":
    """Finds the ranks that hold copies of parameters, by the modules that keep these equal.

    Whatever is around such a module, inside of it or beside it, only the parameters count: each of them must lie in
    one, and all of these must have the same group.

    Args:
        model: any.
        parameters: some of its parameters.

    Returns:
        The group; None where not all of the parameters are known to be copies.
    """
    group_of: dict[int, ProcessGroup] = {}
    for module in model.modules():
        group = copies.get(module) or _averages_over(module)
        if group is not None:
            ignored: set[str] = getattr(module, "parameters_to_ignore", None) or set()  # DistributedDataParallel's
            inner: Any = module.module if ignored else module
            for name, p in inner.named_parameters():
                if name not in ignored and getattr(p, "allreduce", True):  # not so: DeepSpeed's and Megatron's experts
                    group_of.setdefault(id(p), group)
    groups = {id(group): group for group in (group_of.get(id(p)) for p in parameters)}
    return next(iter(groups.values())) if len(groups) == 1 else None


def _averages_over(module: nn.Module) -> "ProcessGroup | None":
    """The group over which a module averages the gradients of its parameters."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.process_group
    kept = vars(module).get("data_parallel_group")  # DeepSpeedEngine's
    return kept if kept is not None and _is_group(kept) else _replicated_over(module)


def _replicated_over(module: nn.Module) -> "ProcessGroup | None":
    """The group of a module that `torch.distributed._composable.replicate` made; that is private to torch."""
    try:
        import torch.distributed as dist
        from torch.distributed import _composable

        if "replicate" not in (_composable._get_registry(module) or ()):
            return None
        state: Any = _composable.replicate.state(module)  # pyright: ignore[reportFunctionMemberAccess]
        if state is None:  # another function of that name made it, with DTensors
            return None
        made = getattr(state, "_ddp", None)  # since the first forward pass
        options = getattr(state, "_init_kwargs", None) or {}
        mesh = options.get("device_mesh")
        return (
            made.process_group
            if made
            else options.get("process_group") or (mesh.get_group() if mesh else dist.group.WORLD)
        )
    except (ImportError, AttributeError):
        return None


def _is_group(value: object) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(value, dist.ProcessGroup)


class Roll:
    """Tells which of the ranks that share a model have not tracked it, without waiting for any of them.

    Args:
        members: the ranks, numbered in the world.
        shapes: of the model's parameters, which tell it from another model that they share.
    """

    def __init__(self, members: Sequence[int], shapes: Iterable[Sequence[int]]):
        import torch.distributed as dist

        self._members, self._rank = list(members), dist.get_rank()
        what = json.dumps([self._members, list(map(list, shapes))])
        self._key = hashlib.sha256(what.encode()).hexdigest()
        self._store: Store | None = None
        with contextlib.suppress(Exception):  # it is not there to end a run
            found = default_store()
            self._number = found.add(f"{self._key}/{self._rank}", 1)
            found.add(f"{self._key}/{self._number}/all", 1)
            self._store = found

    def absent(self) -> list[int]:
        """The ranks that have not tracked the model, on the first rank that has; empty on the others."""
        with contextlib.suppress(Exception):
            if self._store is not None and self._store.add(f"{self._key}/{self._number}/all", 0) < len(self._members):
                absent = [q for q in self._members if self._store.add(f"{self._key}/{q}", 0) < self._number]
                if self._rank == next(q for q in self._members if q not in absent):
                    return absent
        return []
