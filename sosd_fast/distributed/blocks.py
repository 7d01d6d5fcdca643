"""Matrices of which ranks hold blocks, and how these come to the rank that owns each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sosd_fast.distributed.exchange import Exchange
from sosd_fast.distributed.layout import Block, Box, Spread, is_sharded, local_block, put, shape_of
from sosd_fast.matrices import Matrix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_BYTES = 64 * 2**20  # that a rank sends, or receives, at a time


class Blocks(Exchange):
    """Matrices that the ranks of a group hold parts of. All ranks make the same calls, in the same order.

    Args:
        matrices: the same on every rank; of their parameters each rank has its part.
        boxes: what this rank holds of each parameter; None for nothing.
        spreads: who holds what of each matrix.
        group: the ranks.

    Attributes:
        shapes: (m, n) of each matrix.
        sizes: bytes of an entry of each matrix.
        owner: of each matrix, its rank in the group.
    """

    def __init__(
        self, matrices: list[Matrix], boxes: Sequence[Box | None], spreads: Sequence[Spread], group: "ProcessGroup"
    ):
        super().__init__(group, matrices[0].parameter.device if matrices else torch.device("cpu"))
        self.matrices, self.spreads, self._boxes = matrices, spreads, boxes
        self.shapes = [shape_of(m) for m in matrices]
        self.sizes = [m.parameter.dtype.itemsize for m in matrices]
        self.owner = [each.owner for each in spreads]

    def mine(self, i: int) -> bool:
        """Whether this rank owns a matrix."""
        return self.owner[i] == self.rank

    def local(self, i: int) -> Tensor:
        """The entries of a matrix that this rank contributes, (m_p, n_p), (0, 0) where another one has copies."""
        m, box = self.matrices[i], self._boxes[i]
        p = m.parameter
        if box is None or self.rank not in self.spreads[i].senders:
            return torch.empty(0, 0, dtype=p.dtype, device=p.device)
        if is_sharded(p):
            p = p.to_local()
        return local_block(m, box, m.read(p, ()) if m.read else p.detach())

    def chunks(self, indices: Sequence[int], bytes_of: Callable[[int], int]) -> list[list[int]]:
        """Positions in a list of matrices, those in turn that owners measure at once, each its own.

        No owner has more than CHUNK_BYTES of several at a time: of larger ones each has one.

        Args:
            indices: of matrices.
            bytes_of: what comes to its owner of a matrix.
        """
        chunks: list[list[int]] = []
        last, load = [0] * self.ranks, [0] * self.ranks  # of each owner, its last chunk and what comes to it in that
        for j, i in enumerate(indices):
            owner, size = self.owner[i], bytes_of(i)
            if load[owner] and load[owner] + size > CHUNK_BYTES:
                last[owner], load[owner] = last[owner] + 1, 0
            load[owner] += size
            chunks += [[] for _ in range(last[owner] + 1 - len(chunks))]
            chunks[last[owner]].append(j)
        return chunks

    def moved(self, i: int) -> int:
        """The bytes that come to the owner of a matrix where it measures the whole of it."""
        where = self.spreads[i]
        return sum(where.blocks[p].size for p in where.senders if p != where.owner) * self.sizes[i]

    def gather(self, indices: Sequence[int]) -> list[Tensor]:
        """The whole matrices that this rank owns among those given, of one dtype; each block comes from one rank.

        Besides them it holds what is sent and what comes in one turn: a chunk each, and up to a row more of each block.
        """
        found: dict[int, Tensor] = {}
        outgoing: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        incoming: list[list[tuple[int, Block]]] = [[] for _ in range(self.ranks)]
        sent, come = [0] * self.ranks, [0] * self.ranks
        for i in indices:
            where, owner = self.spreads[i], self.owner[i]
            moves = where.senders != (owner,)
            if self.mine(i):
                own = self.local(i)
                found[i] = own.new_empty(self.shapes[i]) if moves else own
                if moves and own.numel():
                    put(found[i], where.blocks[owner], own)
            for p in where.senders:
                if p == owner:
                    continue
                sent[p] += where.blocks[p].size * self.sizes[i]
                come[owner] += where.blocks[p].size * self.sizes[i]
                if self.rank == p:
                    outgoing[owner].append(self.local(i))
                if self.rank == owner:
                    incoming[p].append((i, where.blocks[p]))
        rounds = -(-max(sent + come) // CHUNK_BYTES)  # what is more than a chunk comes in pieces of it
        like = torch.empty(0, dtype=self.matrices[indices[0]].parameter.dtype, device=self._device)
        buffers = None
        for turn in range(rounds):
            sending = [[_piece(block, turn, rounds) for block in of] for of in outgoing]
            coming = [
                [(i, block._replace(rows=_piece(block.rows, turn, rounds))) for i, block in of] for of in incoming
            ]
            sizes = [sum(block.size for _, block in of) for of in coming]
            if buffers is None:  # the first turn moves the most
                most = sum(block.numel() for of in sending for block in of), sum(sizes)
                buffers = like.new_empty(most[0]), like.new_empty(most[1])
            for of, part in zip(coming, self.deliver(sending, sizes, like, buffers), strict=True):
                for (i, block), values in zip(of, part.split([block.size for _, block in of]), strict=True):
                    put(found[i], block, values.view(block.shape))
        return list(found.values())


def _piece(rows, turn: int, turns: int):
    """Those of some rows, or of their numbers, that are moved in one turn of several."""
    step = -(-len(rows) // turns)
    return rows[turn * step : (turn + 1) * step]
