"""What each rank measures of a model: its share of copies (DDP), or of what ranks hold together (FSDP2)."""

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sosd_fast.distributed.layout import assign, cost, is_sharded, row_dimension, shape_of
from sosd_fast.matrices import Matrix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Models that the ranks of a group hold copies of, though nothing about them says so: what a Trainer passes to callbacks
copies: "weakref.WeakKeyDictionary[nn.Module, ProcessGroup]" = weakref.WeakKeyDictionary()


class RankAssignment(NamedTuple):
    """What one rank measures of a model's matrices."""

    matrices: list[Matrix]  # those of this rank's replica
    parameters: list[Tensor]  # of all matrices
    group: "ProcessGroup | None"  # the ranks that hold rows of these matrices, where they are sharded
    rank: int  # of all ranks
    ranks: int


def share(model: nn.Module, matrices: list[Matrix]) -> RankAssignment:
    """Finds what this rank measures.

    Args:
        model: DistributedDataParallel, among `copies`, sharded by `fully_shard`, or none of these.
        matrices: all of its matrices, in the same order on every rank.

    Raises:
        ValueError: a parameter that is sharded other than by rows over one dimension of a mesh, or parameters on
            several meshes.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = [m.parameter for m in matrices]
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        group = model.process_group if ddp else copies.get(model)
        if group is None:
            return RankAssignment(matrices, parameters, None, 0, 1)
        rank, ranks = group.rank(), group.size()
        return RankAssignment(_own(matrices, rank, ranks), parameters, None, rank, ranks)
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    for m in matrices:
        p = m.parameter
        rows = [d for d, each in enumerate(getattr(p, "placements", ())) if each.is_shard(0)]
        if not is_sharded(p) or len(rows) != 1 or p.placements != placements or p.device_mesh != mesh:
            raise ValueError(
                f"track: expected every parameter sharded by rows over one mesh, got {m.name} with "
                f"placements={getattr(p, 'placements', None)}. Use fully_shard, or exclude the parameter."
            )
    if any(not (p.is_shard(0) or p.is_replicate()) for p in placements) or mesh.ndim > 2:
        raise ValueError(
            f"track: expected rows sharded over one dimension and copies over another, got placements={placements}. "
            "Use fully_shard with a mesh of one or two dimensions."
        )
    at = row_dimension(sharded[0])
    replica, replicas = (mesh.get_local_rank(1 - at), mesh.size(1 - at)) if mesh.ndim == 2 else (0, 1)
    group = mesh.get_group(at)
    rank = replica * group.size() + group.rank()
    return RankAssignment(_own(matrices, replica, replicas), parameters, group, rank, replicas * group.size())


def _own(matrices, part, parts):
    parts_of = assign([cost(shape_of(m)) for m in matrices], parts)
    return [m for m, p in zip(matrices, parts_of, strict=True) if p == part]


def row_range(matrix: Matrix, rank: int, ranks: int) -> tuple[int, int]:
    """The rows (first, end) of a matrix that a rank holds."""
    rows = matrix.parameter.shape[0]
    chunk = -(-rows // ranks)
    start, stop = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
    if matrix.index:  # a stack: the rank has the whole matrix or nothing of it
        return (0, shape_of(matrix)[0]) if start <= matrix.index[0] < stop else (0, 0)
    if matrix.part is None or matrix.part[0] == 1:
        return start, stop
    _, offset, length = matrix.part
    period = matrix.period or rows
    first, end = (row // period * length + min(max(row % period - offset, 0), length) for row in (start, stop))
    return first, end


def local_rows(matrix: Matrix, rank: int, ranks: int) -> Tensor:
    """This rank's rows of a matrix of a row-sharded parameter, (m_p, n); none where it holds none."""
    p = matrix.parameter
    assert is_sharded(p)
    local, start = p.to_local().detach(), rank * -(-p.shape[0] // ranks)
    first, end = row_range(matrix, rank, ranks)
    if matrix.index:
        return local[(matrix.index[0] - start, *matrix.index[1:])] if end else local.new_empty(0, p.shape[-1])
    if matrix.flatten:
        return local.flatten(1)
    if matrix.part is None:
        return local
    dim, offset, length = matrix.part
    if matrix.period:  # its rows stand among those of other parts
        rows = torch.arange(first, end, device=local.device)
        return local[rows // length * matrix.period + rows % length + offset - start]
    if dim == 1:
        return local.narrow(1, offset, length)
    return local.narrow(0, offset + first - start if end > first else 0, end - first)
