"""What ranks send to one another: sums, maxima, objects, and parts of matrices, with the bytes counted."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sosd_fast.distributed.layout import row_dimension

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

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

    def deliver(self, outgoing: list[list[Tensor]], sizes: list[int], like: Tensor) -> list[Tensor]:
        """Sends tensors of any shapes to each rank; returns what came from each, flat, of the sizes given.

        Args:
            outgoing: for each rank.
            sizes: how many entries come from each.
            like: a tensor of their dtype and device.
        """
        counts = [sum(each.numel() for each in part) for part in outgoing]
        self.sent_bytes += like.itemsize * (sum(counts) - counts[self.rank])
        flat = torch.cat([like.new_empty(0), *(each.reshape(-1) for part in outgoing for each in part)])
        received = like.new_empty(sum(sizes))
        self._dist.all_to_all_single(received, flat, sizes, counts, group=self._group)
        return list(received.split(sizes))

    def all_to_all(self, outgoing: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Sends outgoing[q], one-dimensional, to rank q and returns what came from each, of the sizes given."""
        self.sent_bytes += sum(part.nbytes for q, part in enumerate(outgoing) if q != self.rank)
        flat = torch.cat(outgoing)
        received = flat.new_empty(sum(sizes))
        self._dist.all_to_all_single(received, flat, sizes, [len(part) for part in outgoing], group=self._group)
        return list(received.split(sizes))


def apply_to_whole(rows: list[Tensor], like: "DTensor", function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Applies a function of whole matrices to row-sharded ones of one shape, each rank to its share of them.

    Args:
        rows: (m_p, n), this rank's rows of each. Not modified.
        like: a DTensor (m, n) that is sharded as they are.
        function: (B, m, n) -> (B, m, n), of any B.

    Returns:
        This rank's rows of the results.
    """
    m, n = like.shape
    exchange = Exchange(like.device_mesh.get_group(row_dimension(like)), rows[0].device)
    rank, ranks = exchange.rank, exchange.ranks
    ends = [min(p * -(-m // ranks), m) for p in range(ranks + 1)]
    counts = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    of = [rows[q::ranks] for q in range(ranks)]
    own = len(of[rank])
    empty = rows[0].reshape(-1)[:0]
    outgoing = [torch.cat([empty, *(each.reshape(-1) for each in share)]) for share in of]
    parts = exchange.all_to_all(outgoing, [own * count * n for count in counts])
    whole = torch.cat([part.view(own, count, n) for part, count in zip(parts, counts, strict=True)], dim=1)
    done = (function(whole) if own else whole).split(counts, dim=1)
    parts = exchange.all_to_all([part.reshape(-1) for part in done], [len(share) * counts[rank] * n for share in of])
    result = list(rows)
    for q, part in enumerate(parts):
        result[q::ranks] = part.view(len(of[q]), counts[rank], n).unbind(0)
    return result
