"""Groups of ranks that follow a model together."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_groups: "dict[tuple[int, ...], ProcessGroup]" = {}


def lockstep(
    members: Collection[int],
    digest: Mapping[str, str] | str = "",  # noqa: ARG001
    patience: float = 45.0,  # noqa: ARG001
) -> "ProcessGroup":
    """The group of the ranks of some meshes; all of them make this call.

    Args:
        members: the ranks, of all processes.
        digest: what the ranks must agree about.
        patience: seconds that others may take to come.
    """
    import torch.distributed as dist  # not every torch is built with it

    ranks = tuple(sorted(members))
    if len(ranks) == dist.get_world_size():
        return dist.distributed_c10d._get_default_group()
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[ranks]
