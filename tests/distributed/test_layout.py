"""Which block of which matrix each rank of a mesh holds, without processes."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from sosd_fast.distributed.layout import (
    Box,
    Mesh,
    assign,
    block_of,
    box_at,
    boxes_on,
    cost,
    local_block,
    put,
    shape_of,
    spread,
    take,
)
from sosd_fast.distributed.ways import full_bytes
from sosd_fast.matrices import Matrix


def numbered(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape)).view(shape)


def by_chunks(tensor: Tensor, mesh: Mesh, order: list[tuple[int, int]]) -> dict[int, Tensor]:
    """Splits as torch does: over each (dimension of the mesh, dimension of the tensor) in turn, by torch.chunk."""
    found = {}
    for rank in mesh.ranks:
        part = tensor
        for over, dim in order:
            chunks = list(part.chunk(mesh.shape[over], dim)) + [part.narrow(dim, 0, 0)] * mesh.shape[over]
            part = chunks[mesh.coordinates[rank][over]]
        found[rank] = part
    return found


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*each) for each in box)]


PLACEMENTS = {
    "rows": ((4,), [Shard(0)], [(0, 0)]),
    "columns": ((3,), [Shard(1)], [(0, 1)]),
    "from the end": ((3,), [Shard(-1)], [(0, 1)]),
    "copies": ((3,), [Replicate()], []),
    "hybrid": ((2, 3), [Replicate(), Shard(0)], [(1, 0)]),
    "rows twice": ((2, 3), [Shard(0), Shard(0)], [(0, 0), (1, 0)]),
    "rows and columns": ((2, 3), [Shard(1), Shard(0)], [(0, 1), (1, 0)]),
    "FSDP2 after column-wise TP": ((2, 3), [_StridedShard(0, split_factor=3), Shard(0)], [(1, 0), (0, 0)]),
    "FSDP2 after row-wise TP": ((2, 3), [Shard(0), Shard(1)], [(1, 1), (0, 0)]),
    "HSDP after TP": ((2, 2, 2), [Replicate(), _StridedShard(0, split_factor=2), Shard(0)], [(2, 0), (1, 0)]),
    "FSDP2 after two splits": (
        (2, 2, 2), [_StridedShard(0, split_factor=4), Shard(0), Shard(0)], [(1, 0), (2, 0), (0, 0)],
    ),
    "FSDP2 between two splits": (
        (2, 3, 2), [_StridedShard(0, split_factor=2), Shard(1), Shard(0)], [(1, 1), (2, 0), (0, 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(24, 12), (13, 7), (3, 2), (1, 1), (31, 6)])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_boxes_are_torchs_chunks(name, size):
    shape, placements, order = PLACEMENTS[name]
    placements = [Shard(p.dim % 2) if p == Shard(-1) else p for p in placements]
    mesh = Mesh(shape, tuple(range(math.prod(shape))))
    whole = numbered(*size)
    expected = by_chunks(whole, mesh, order)
    for rank, box in boxes_on(size, mesh, placements).items():
        own = cut(whole, box)
        assert torch.equal(own, expected[rank]) or own.numel() == expected[rank].numel() == 0


@pytest.mark.parametrize("placement", [Partial(), _StridedShard(0, split_factor=3)])
def test_what_cannot_be_described_is_said(placement):
    with pytest.raises(ValueError, match="a part of a sum; redistribute|does not fit a mesh"):
        box_at((8, 8), (2, 2), (0, 0), [placement, Shard(0)])


def matrices() -> list[Matrix]:
    """One of each kind of matrix in a parameter, with odd sizes."""
    plain, wide, stack, grid = numbered(17, 5), numbered(5, 18), numbered(4, 6, 5), numbered(2, 3, 5, 4)
    kernel, keras, fused = numbered(13, 2, 3, 3), numbered(3, 3, 4, 7), numbered(24, 5)
    return [
        Matrix("plain", plain),
        *(Matrix("part", plain, part=(0, start, size)) for start, size in ((0, 6), (6, 6), (12, 5))),
        Matrix("columns", plain, part=(1, 2, 3)),
        *(Matrix("wide part", wide, part=(1, start, 6)) for start in (0, 6, 12)),
        *(Matrix("by head", fused, part=(0, start, 2), period=6) for start in (0, 2, 4)),
        *(Matrix("columns by head", fused.mT.contiguous(), part=(1, start, 3), period=8) for start in (0, 3)),
        *(Matrix("expert", stack, index=(e,)) for e in range(4)),
        *(Matrix("grid", grid, index=i) for i in itertools.product(range(2), range(3))),
        Matrix("kernel", kernel, flatten=1),
        Matrix("keras", keras, flatten=3),
    ]


@pytest.mark.parametrize("dims", list(itertools.product(range(2), range(4))))
@pytest.mark.parametrize("sizes", [(1, 2), (2, 3), (7, 2)])
def test_blocks_make_up_each_matrix(sizes, dims):
    mesh = Mesh(sizes, tuple(range(math.prod(sizes))))
    for m in matrices():
        first, second = (min(d, m.parameter.ndim - 1) for d in dims)
        boxes = boxes_on(m.parameter.shape, mesh, [Shard(first), Shard(second)])
        (found,) = spread([m], [[boxes[p] for p in mesh.ranks]])
        whole = m.tensor()
        counts, built = torch.zeros_like(whole), torch.full_like(whole, -1)
        for p, box in boxes.items():
            local = local_block(m, box, cut(m.parameter, box))
            assert local.shape == found.blocks[p].shape == block_of(m, box).shape
            if not local.numel():
                assert p not in found.senders
                continue
            assert torch.equal(take(whole, found.blocks[p]), local), m.name
            put(built, found.blocks[p], local)
            if p in found.senders:
                put(counts, found.blocks[p], take(counts, found.blocks[p]) + 1)
        assert torch.equal(built, whole) and (counts == 1).all(), (m.name, dims)


def test_copies_send_once_and_the_nearest_sends():
    mesh = Mesh((2, 3), tuple(range(6)))
    m = Matrix("W", numbered(9, 4))
    boxes = list(boxes_on((9, 4), mesh, [Replicate(), Shard(0)]).values())
    several = spread([m] * 6, [boxes] * 6, [mesh] * 6)
    assert sorted(each.owner for each in several) == list(range(6))
    for each in several:
        replica = (0, 1, 2) if each.owner < 3 else (3, 4, 5)
        assert each.senders == replica


def test_who_holds_all_of_a_matrix_owns_it():
    """Experts over two of six ranks, beside what all ranks have copies of: nothing of either moves."""
    mesh = Mesh((3, 2), tuple(range(6)))
    stack = numbered(4, 6, 5)
    experts = [Matrix(f"e[{i}]", stack, index=(i,)) for i in range(4)]
    dense = Matrix("dense", numbered(6, 5))
    boxes = list(boxes_on(stack.shape, mesh, [Replicate(), Shard(0)]).values())
    everywhere = list(boxes_on(dense.parameter.shape, mesh, [Replicate(), Replicate()]).values())
    found = spread([*experts, dense, dense], [boxes] * 4 + [everywhere] * 2)
    assert [each.owner % 2 for each in found[:4]] == [0, 0, 1, 1]
    assert all(each.senders == (each.owner,) for each in found)
    assert sorted(each.owner for each in found) == list(range(6))


def test_assignment_to_some_parts_only():
    assert assign([1.0, 1.0, 5.0], 3, [{0}, {0}, {0, 1, 2}]) == [0, 0, 1]
    assert assign([], 2, []) == []


def test_the_shape_of_a_block_is_that_of_its_entries():
    m = Matrix("kernel", numbered(4, 3, 5, 2), flatten=1)
    box = ((0, 4), (0, 3), (1, 3), (0, 2))  # a split inside the kernel: its columns stand apart
    block = block_of(m, box)
    assert not isinstance(block.columns, range) and block.shape == (4, 12) and shape_of(m) == (4, 30)
    assert torch.equal(take(m.tensor(), block), local_block(m, box, cut(m.parameter, box)))


def test_the_owner_of_summed_products_is_left_the_eigenvalues_alone():
    """GPT-2 small's on 4 ranks, FSDP2 and TP: its embedding must not count as ten matrices for its owner."""
    mesh = Mesh((2, 2), tuple(range(4)))
    shapes = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12 + [(50304, 768)]
    several = [Matrix(f"w{i}", torch.empty(shape, device="meta")) for i, shape in enumerate(shapes)]
    # the embedding by FSDP2 alone, over half the ranks
    boxes = [list(boxes_on(s, mesh, [Shard(0), Replicate() if s[0] > 3072 else Shard(1)]).values()) for s in shapes]
    found = spread(several, boxes)
    assert [each.by_products for each in found] == [m > 3072 for m, _ in shapes]  # of others that saves too little
    load = [0.0] * 4
    for (m, n), each in zip(shapes, found, strict=True):
        load[each.owner] += cost((m, n)) - each.by_products * m * n * n
        for p in each.senders if each.by_products else ():
            load[p] += each.blocks[p].size * n
    assert max(load) <= 1.02 * sum(load) / 4
    # a full measurement of all: less than the matrices' own size
    assert full_bytes(several, found) <= sum(4 * m * n for m, n in shapes)
