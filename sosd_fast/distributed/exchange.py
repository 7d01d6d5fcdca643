"""What ranks send to one another: sums, maxima, objects, and parts of matrices, with the bytes counted."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sosd_fast.distributed.group import group_of
from sosd_fast.distributed.layout import Box, Mesh, boxes_on, cost, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

T = TypeVar("T")


class Exchange:
    """The collectives of one group of ranks. All ranks make the same calls, in the same order.

    Args:
        group: the ranks.
        device: the one that the group communicates on.

    Attributes:
        rank: of this process in the group.
        ranks: how many there are.
        sent_bytes: what this rank has sent to others so far.
    """

    def __init__(self, group: "ProcessGroup", device: torch.device):
        import torch.distributed as dist  # not every torch is built with it

        self._dist, self._group, self._device = dist, group, device
        self.rank, self.ranks = group.rank(), group.size()
        self.sent_bytes = 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        self._dist.all_reduce(values, group=self._group)
        self.sent_bytes += 2 * values.nbytes * (self.ranks - 1) // self.ranks  # a ring's
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Takes the largest of each entry over the ranks, in place. No entry may be NaN."""
        self._dist.all_reduce(values, self._dist.ReduceOp.MAX, group=self._group)
        self.sent_bytes += 2 * values.nbytes * (self.ranks - 1) // self.ranks
        return values

    def broadcast_object(self, value: T) -> T:
        """The first rank's value, on every rank."""
        values = [value]
        self._dist.broadcast_object_list(values, group=self._group, group_src=0, device=self._device)
        return values[0]

    def deliver(
        self,
        outgoing: list[list[Tensor]],
        sizes: list[int],
        like: Tensor,
        buffers: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Sends tensors of any shapes to each rank; returns what came from each, flat, of the sizes given.

        Args:
            outgoing: for each rank.
            sizes: how many entries come from each.
            like: a tensor of their dtype and device.
            buffers: flat, for what is sent and for what comes, at least as large; by default new ones. Threads of
                gloo hold those of some calls after these have returned, so several calls had better share them.
        """
        counts = [sum(each.numel() for each in part) for part in outgoing]
        sent, received = buffers or (like.new_empty(sum(counts)), None)
        sent = sent[: sum(counts)]
        torch.cat([like.new_empty(0), *(each.reshape(-1) for part in outgoing for each in part)], out=sent)
        return self.exchange(sent, counts, sizes, received)

    def exchange(
        self, sent: Tensor, counts: list[int], sizes: list[int], received: Tensor | None = None
    ) -> list[Tensor]:
        """Sends parts of a flat tensor to each rank; returns what came from each, flat, of the sizes given.

        Args:
            sent: what goes to each rank, one after the other.
            counts: how many entries go to each.
            sizes: how many come from each.
            received: a flat buffer for what comes, at least as large; by default a new one.
        """
        self.sent_bytes += sent.itemsize * (sum(counts) - counts[self.rank])
        received = sent.new_empty(sum(sizes)) if received is None else received[: sum(sizes)]
        self._dist.all_to_all_single(received, sent, sizes, counts, group=self._group)
        return list(received.split(sizes))


def apply_to_whole(
    blocks: Sequence[Tensor], like: Sequence[Tensor], kinds: Sequence[int], function: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """Applies a function of whole matrices to spread ones, each rank to its share of them.

    The ranks that hold parts of a matrix send them to one of these, and get their parts of the result. Ranks that hold
    the same, such as those of another replica, do the same apart from them.

    Args:
        blocks: this rank's part of each matrix, of any layout, or the matrix where it is whole. Not modified.
        like: of each a tensor (m, n) that is spread as it is, a DTensor, or any other where it is whole.
        kinds: of each a number; those of one number have one shape and are handed over together.
        function: (kind, (B, m, n)) -> (B, m, n), of any B.

    Returns:
        This rank's parts of the results.

    Raises:
        ValueError: a layout that does not say which part a rank holds.
    """
    groups: dict[object, ProcessGroup | None] = {}
    together: dict[tuple, list[int]] = {}
    for i, (block, t) in enumerate(zip(blocks, like, strict=True)):
        mesh, dims = (t.device_mesh, _splitting(t)) if is_sharded(t) else (None, ())
        if (mesh, dims) not in groups:
            groups[mesh, dims] = group_of(mesh, dims) if mesh is not None and dims else None
        together.setdefault((groups[mesh, dims], block.dtype, block.device), []).append(i)
    results = list(blocks)
    for (group, *_), at in together.items():
        apply = _apply_here if group is None else functools.partial(_apply_at_owners, group=group)
        done = apply([blocks[i] for i in at], [like[i] for i in at], [kinds[i] for i in at], function)
        for i, result in zip(at, done, strict=True):
            results[i] = result
    return results


def _apply_here(matrices, _like, kinds, function):
    done = list(matrices)
    for kind in dict.fromkeys(kinds):
        at = [i for i, each in enumerate(kinds) if each == kind]
        for i, result in zip(at, function(kind, torch.stack([matrices[i] for i in at])), strict=True):
            done[i] = result
    return done


def _apply_at_owners(blocks, like, kinds, function, group):
    import torch.distributed as dist

    exchange, ranks = Exchange(group, blocks[0].device), dist.get_process_group_ranks(group)
    boxes = [boxes_of(tuple(t.shape), t.device_mesh, tuple(t.placements)) for t in like]
    for block, t, of in zip(blocks, like, boxes, strict=True):
        assert block.numel() == _entries(of[ranks[exchange.rank]]), f"{t.placements} of {t.shape}: {block.shape}"
    costly_first = sorted(range(len(like)), key=lambda i: -cost(tuple(like[i].shape)))
    shares = [costly_first[q :: len(ranks)] for q in range(len(ranks))]  # dealt out: whose each matrix is
    own, like_block = shares[exchange.rank], blocks[0]
    sizes = [[_entries(boxes[i][q]) for i in own] for q in ranks]
    received = exchange.deliver([[blocks[i] for i in share] for share in shares], list(map(sum, sizes)), like_block)
    whole = [like_block.new_empty(like[i].shape) for i in own]
    parts_of = [
        [W[tuple(slice(*each) for each in boxes[i][q])] for i, W in zip(own, whole, strict=True)] for q in ranks
    ]
    for values, counts, parts in zip(received, sizes, parts_of, strict=True):
        for part, value in zip(parts, values.split(counts), strict=True):
            part.copy_(value.view(part.shape))
    for W, result in zip(whole, _apply_here(whole, None, [kinds[i] for i in own], function), strict=True):
        W.copy_(result)
    sizes = [[blocks[i].numel() for i in share] for share in shares]
    received = exchange.deliver(parts_of, list(map(sum, sizes)), like_block)
    results = list(blocks)
    for share, counts, values in zip(shares, sizes, received, strict=True):
        for i, value in zip(share, values.split(counts), strict=True):
            results[i] = value.view(blocks[i].shape)
    return results


@functools.lru_cache(maxsize=4096)  # of all ranks, at every step
def boxes_of(shape: tuple[int, ...], mesh: "DeviceMesh", placements: "tuple[Placement, ...]") -> Mapping[int, Box]:
    """The part of a tensor that each rank of a mesh holds.

    Raises:
        ValueError: placements that do not say it.
    """
    return boxes_on(shape, Mesh(tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist())), placements)


def _entries(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _splitting(tensor: "DTensor") -> tuple[int, ...]:
    """The dimensions of a tensor's mesh over which it is split."""
    mesh = tensor.device_mesh
    return tuple(d for d, each in enumerate(tensor.placements) if not each.is_replicate() and mesh.size(d) > 1)
