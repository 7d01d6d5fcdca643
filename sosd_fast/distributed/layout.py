"""Which rank holds what of a model's matrices, for any placement of DTensors on a mesh of any dimension.

Of a parameter a rank holds a box, and of a matrix in it a block: some of its rows by some of its columns. Ranks with
the same block have copies of it, and one of them sends it where it is needed. All of this is arithmetic that every
rank does alike; nothing here communicates.

Shard(d) splits dimension d in chunks of ceil(size / ranks), the rule of `torch.chunk`: late ranks may hold nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from sosd_fast.matrices import Matrix

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension of a tensor


class Mesh(NamedTuple):
    """The ranks of a mesh, in the order of its coordinates, the last of which runs fastest."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def coordinates(self) -> dict[int, tuple[int, ...]]:
        """Where each rank stands in it."""
        return dict(zip(self.ranks, itertools.product(*map(range, self.shape)), strict=True))


class Block(NamedTuple):
    """The entries of a matrix that a rank holds: those in some of its rows and some of its columns."""

    rows: range | Tensor  # their numbers, ascending
    columns: range | Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m_p, n_p)."""
        return len(self.rows), len(self.columns)

    @property
    def size(self) -> int:
        """How many entries there are."""
        return len(self.rows) * len(self.columns)


NOTHING = Block(range(0), range(0))


class Spread(NamedTuple):
    """Where the entries of one matrix are."""

    blocks: tuple[Block, ...]  # of each rank
    owner: int  # the rank that measures and records the matrix
    senders: tuple[int, ...]  # ranks that hold every entry once between them, the owner's own and the nearest ones
    by_products: bool = False  # whether the senders' Gram matrices are summed for the full spectrum


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a `torch.distributed.tensor.DTensor`."""
    return hasattr(tensor, "placements")


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """The (m, n) of a matrix, without touching its values."""
    whole = torch.empty(matrix.parameter.shape, device="meta")
    m, n = dataclasses.replace(matrix, parameter=whole, read=None).tensor().shape
    return m, n


def box_at(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: "Sequence[Placement]"
) -> Box:
    """The part of a tensor that the rank at a coordinate of a mesh holds.

    Args:
        shape: of the whole tensor.
        mesh_shape: of the mesh.
        coordinate: of the rank in the mesh.
        placements: one for each dimension of the mesh.

    Raises:
        ValueError: a placement that says of no rank which part it holds: partial sums, or one that is not known.
    """
    # The dimensions of the mesh that split each dimension of the tensor, in the order in which they did. That is the
    # mesh's own, but for _StridedShard: FSDP2 makes one of a dimension that tensor parallelism has split before in as
    # many parts as its split_factor says, on later dimensions of the mesh.
    splits: list[list[int]] = [[] for _ in shape]
    for i in reversed(range(len(placements))):
        placement = placements[i]
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None:
            raise ValueError(
                f"has the placement {placement}, of whose values each rank has a part of a sum; redistribute it to "
                "Shard or Replicate first"
            )
        before, factor = splits[dim], int(getattr(placement, "split_factor", 1))
        sizes = [math.prod(mesh_shape[each] for each in before[:j]) for j in range(len(before) + 1)]
        if factor not in sizes:
            raise ValueError(f"is split by {placement}, which does not fit a mesh of shape {tuple(mesh_shape)}")
        before.insert(sizes.index(factor), i)
    box = []
    for size, order in zip(shape, splits, strict=True):
        start, stop = 0, size
        for i in order:
            chunk = -(-(stop - start) // mesh_shape[i])
            start, stop = (min(start + part * chunk, stop) for part in (coordinate[i], coordinate[i] + 1))
        box.append((start, stop))
    return tuple(box)


def boxes_on(shape: Sequence[int], mesh: Mesh, placements: "Sequence[Placement]") -> dict[int, Box]:
    """The part of a tensor that each rank of a mesh holds; raises as `box_at` does."""
    return {rank: box_at(shape, mesh.shape, at, placements) for rank, at in mesh.coordinates.items()}


def mesh_of(tensor: "DTensor") -> Mesh:
    """The mesh of a DTensor."""
    mesh = tensor.device_mesh
    return Mesh(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))


def box_of(tensor: "DTensor") -> Box:
    """The part of a DTensor that this rank holds, whose shape is that of its local tensor.

    Raises:
        ValueError: placements that cannot be described, or a local tensor of another shape than they say.
    """
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ((0, 0),) * tensor.ndim
    box = box_at(tensor.shape, tuple(mesh.shape), coordinate, tensor.placements)
    expected, found = [stop - start for start, stop in box], list(tensor.to_local().shape)
    if expected != found and (0 not in expected or 0 not in found):
        raise ValueError(
            f"has a part of shape {tuple(found)} on this rank, where {tuple(tensor.placements)} of "
            f"{tuple(tensor.shape)} over a mesh of shape {tuple(mesh.shape)} makes it {tuple(expected)}"
        )
    return box


def block_of(matrix: Matrix, box: Box) -> Block:
    """The entries of a matrix that lie in a box of its parameter."""
    sides = _sides(matrix, box)
    if sides is None:
        return NOTHING
    if matrix.part is not None:
        dim = matrix.part[0]
        sides[dim], _ = _of_part(matrix, sides[dim])
    block = Block(*sides)
    return block if block.size else NOTHING


def _sides(matrix: Matrix, box: Box) -> list[range | Tensor] | None:
    """The rows and columns in a box, those of other parts of a fused matrix included; None where it holds nothing."""
    if any(start >= stop for start, stop in box):
        return None
    if not all(start <= i < stop for i, (start, stop) in zip(matrix.index, box, strict=False)):
        return None
    shape, box = tuple(matrix.parameter.shape)[len(matrix.index) :], box[len(matrix.index) :]
    if not matrix.flatten:
        return [range(*each) for each in box]
    order = [matrix.first, *(d for d in range(len(shape)) if d != matrix.first)]
    rows, columns = order[: matrix.flatten], order[matrix.flatten :]
    return [_flat([shape[d] for d in dims], tuple(box[d] for d in dims)) for dims in (rows, columns)]


def _of_part(matrix: Matrix, side: range | Tensor) -> tuple[range | Tensor, Tensor | range]:
    """The rows or columns of a part of a fused matrix among some: their numbers in the part, and their places."""
    assert matrix.part is not None
    dim, offset, length = matrix.part
    whole = torch.empty(matrix.parameter.shape[len(matrix.index) :], device="meta")
    period = matrix.period or matrix.unfolded(whole).shape[dim]
    if not isinstance(side, range):
        places = ((side % period >= offset) & (side % period < offset + length)).nonzero()[:, 0]
        numbers = side[places]
        return numbers // period * length + numbers % period - offset, places
    ends = (i // period * length + min(max(i % period - offset, 0), length) for i in (side.start, side.stop))
    numbers = range(*ends)
    if not matrix.period:
        return numbers, range(numbers.start + offset - side.start, numbers.stop + offset - side.start)
    at = torch.arange(numbers.start, numbers.stop, device="cpu")
    return numbers, at // length * period + at % length + offset - side.start


def _flat(shape: Sequence[int], box: Box) -> range | Tensor:
    """The numbers that the entries of a box have in the flattened tensor."""
    partial = [d for d, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)) if stop - start < size]
    last = partial[-1] if partial else 0
    if all(stop - start == 1 for start, stop in box[:last]):  # one stretch of memory
        first = 0
        for size, (start, _) in zip(shape, box, strict=True):
            first = first * size + start
        return range(first, first + math.prod(stop - start for start, stop in box))
    numbers = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, (start, stop) in zip(shape, box, strict=True):
        numbers = (numbers[:, None] * size + torch.arange(start, stop, device="cpu")).flatten()
    return numbers


def local_block(matrix: Matrix, box: Box, local: Tensor) -> Tensor:
    """The entries of a matrix in a box of its parameter, (m_p, n_p), as `block_of` numbers them.

    Args:
        matrix: any.
        box: of its parameter.
        local: the values of the parameter in the box. Not modified.

    Returns:
        A view, or a copy where the entries stand apart; (0, 0) where there is none.
    """
    sides = _sides(matrix, box)
    if sides is None:
        return local.new_empty(0, 0)
    local = matrix.unfolded(local[tuple(i - start for i, (start, _) in zip(matrix.index, box, strict=False))])
    if matrix.part is None:
        return local
    dim = matrix.part[0]
    _, places = _of_part(matrix, sides[dim])
    if not len(places):
        return local.new_empty(0, 0)
    if isinstance(places, range):
        return local.narrow(dim, places.start, len(places))
    return local.index_select(dim, places.to(local.device))


def put(whole: Tensor, block: Block, values: Tensor):
    """Writes the entries of a block, (m_p, n_p), into the matrix (m, n)."""
    if isinstance(block.rows, range) and isinstance(block.columns, range):
        take(whole, block).copy_(values)
    else:
        whole[_index(block, whole.device)] = values


def take(whole: Tensor, block: Block) -> Tensor:
    """The entries of a block, (m_p, n_p), of a matrix (m, n): a view where rows and columns are consecutive."""
    if isinstance(block.rows, range) and isinstance(block.columns, range):
        return whole[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop]
    return whole[_index(block, whole.device)]


def _index(block: Block, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.as_tensor(side, device=device) for side in block)
    return rows[:, None], columns[None, :]


def cost(shape: tuple[int, int]) -> float:
    """What the full spectrum of an (m, n) matrix costs, in units of a product's operations (LOG.md#svdvals-cpu)."""
    r = min(shape)
    return r * r * max(shape) + 2.2 * r**3


def gram_bytes(r: int, itemsize: int) -> int:
    """What a sender sends of its part of a Gram matrix (r, r): one triangle, and the elements known in float64."""
    return r * (r + 1) // 2 * max(4, itemsize) + 8 * (r + 1)


def products_pay(sent: int, gathered: int) -> bool:
    """Whether sums of products, for which ranks send so many bytes, are better than bringing the matrix to its owner.

    They are where they move an eighth of the bytes: what each rank computes for them besides, by torch's operations,
    takes longer than the owner's kernels take for the whole matrix.
    """
    return 8 * sent < gathered


def long_side_is_split(shape: tuple[int, int], blocks: Collection[Block]) -> bool:
    """Whether every block has all entries along the short side of a matrix."""
    short = 0 if shape[0] < shape[1] else 1
    return all(block.shape[short] == shape[short] for block in blocks)


def _sums_products(matrix: Matrix, shape: tuple[int, int], blocks: Collection[Block]) -> bool:
    """Whether the Gram matrices of the blocks of a matrix are sent; else it is the blocks, all but the largest."""
    size = matrix.parameter.dtype.itemsize
    gathered = (math.prod(shape) - max((block.size for block in blocks), default=0)) * size
    sent = (len(blocks) - 1) * gram_bytes(min(shape), size)
    return long_side_is_split(shape, blocks) and products_pay(sent, gathered)


def assign(
    costs: Sequence[float],
    parts: int,
    allowed: Sequence[Collection[int]] | None = None,
    load: Sequence[float] | None = None,
) -> list[int]:
    """Shares work out: the longest first, each to the part that has least so far.

    Args:
        costs: of each item.
        parts: how many.
        allowed: the parts that each item may go to; None allows all. Those that may not go everywhere go first.
        load: what each part has already; None is nothing.

    Returns:
        The part of each item. Where all are allowed and nothing is there, no part has more than
        4/3 - 1/(3 parts) times the best maximum.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969).
    """
    total, part, everywhere = list(load or [0.0] * parts), [0] * len(costs), range(parts)
    choices = [everywhere if allowed is None else sorted(allowed[i]) for i in range(len(costs))]
    for i in sorted(range(len(costs)), key=lambda i: (len(choices[i]) == parts, -costs[i])):
        part[i] = min(choices[i], key=total.__getitem__)
        total[part[i]] += costs[i]
    return part


def spread(
    matrices: Sequence[Matrix],
    boxes: Sequence[Sequence[Box | None]],
    meshes: Sequence[Mesh | None] | None = None,
) -> list[Spread]:
    """Says who holds what of each matrix, who owns it, and who sends its blocks to the owner.

    A matrix that some ranks hold whole goes to one of these, and need not be sent.

    Args:
        matrices: any; their parameters are asked for nothing but their shapes.
        boxes: of each matrix's parameter, what each rank holds; None of it for nothing.
        meshes: of each matrix's parameter, by the numbers of ranks that the boxes have, where there is one. Of ranks
            with the same block that one sends it to the owner whose coordinates differ least from the owner's, then
            the one next in number.
    """
    blocks = []
    for m, of in zip(matrices, boxes, strict=True):
        each = {box: NOTHING if box is None else block_of(m, box) for box in set(of)}
        blocks.append(tuple(each[box] for box in of))
    shapes, ranks = [shape_of(m) for m in matrices], len(boxes[0]) if boxes else 1
    whole = [
        [p for p, block in enumerate(of) if block.size == math.prod(shape)] or range(ranks)
        for of, shape in zip(blocks, shapes, strict=True)
    ]
    holding: list[dict[Box, list[int]]] = [{} for _ in matrices]
    for holders, of, held in zip(holding, blocks, boxes, strict=True):
        for p, box in enumerate(held):
            if of[p].size and box is not None:
                holders.setdefault(box, []).append(p)
    by_products = [
        _sums_products(m, shape, [of[those[0]] for those in holders.values()])
        for m, shape, of, holders in zip(matrices, shapes, blocks, holding, strict=True)
    ]
    # Where Gram matrices are summed, the senders share their cost; what is left to the owner are the eigenvalues.
    load, found = [0.0] * ranks, dict[int, Spread]()
    for i in (i for i, summed in enumerate(by_products) if summed):
        r, senders = min(shapes[i]), list[int]()
        for those in holding[i].values():
            senders.append(p := min(those, key=load.__getitem__))
            load[p] += blocks[i][p].size * r
        owner = min(senders, key=load.__getitem__)
        load[owner] += cost((r, r)) - r**3
        found[i] = Spread(blocks[i], owner, tuple(sorted(senders)), by_products=True)
    others = [i for i in range(len(matrices)) if i not in found]
    owners = assign([cost(shapes[i]) for i in others], ranks, [whole[i] for i in others], load)
    for i, owner in zip(others, owners, strict=True):
        mesh = meshes[i] if meshes else None
        coordinates = mesh.coordinates if mesh else {}
        own = coordinates.get(owner, ())

        def order(p: int, owner: int = owner, own=own, coordinates=coordinates) -> tuple[int, int, int]:
            differ = sum(a != b for a, b in zip(own, coordinates.get(p, ()), strict=False))
            return differ if p in coordinates else len(own) + 1, abs(p - owner), p

        senders = [owner if owner in those else min(those, key=order) for those in holding[i].values()]
        found[i] = Spread(blocks[i], owner, tuple(sorted(senders)))
    return [found[i] for i in range(len(matrices))]
