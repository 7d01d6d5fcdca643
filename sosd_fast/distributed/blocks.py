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
        return local_block(m, box, m.read(p) if m.read else p.detach())

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
        """The whole matrices that this rank owns among those given, of one dtype; each block comes from one rank."""
        found: dict[int, Tensor] = {}
        moving = {i: None for i in indices if self.spreads[i].senders != (self.owner[i],)}
        for i in filter(self.mine, indices):
            own = self.local(i)
            found[i] = own.new_empty(self.shapes[i]) if i in moving else own
            if i in moving and own.numel():
                put(found[i], self.spreads[i].blocks[self.rank], own)
        sent, come = [0] * self.ranks, [0] * self.ranks
        for i in moving:
            where = self.spreads[i]
            come[where.owner] += self.moved(i)
            for p in where.senders:
                sent[p] += where.blocks[p].size * self.sizes[i] * (p != where.owner)
        rounds = -(-max(sent + come) // CHUNK_BYTES)  # what is more than a chunk comes in pieces of it
        for turn in range(rounds):
            self._move(list(moving), turn, rounds, found)
        return list(found.values())

    def _move(self, moving: Sequence[int], turn: int, rounds: int, found: dict[int, Tensor]):
        """Sends some rows of each block to the owners of matrices, who put them in their place."""

        def some(block: Block) -> slice:
            step = -(-len(block.rows) // rounds)
            return slice(turn * step, (turn + 1) * step)

        outgoing: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        incoming: list[list[tuple[int, Block]]] = [[] for _ in range(self.ranks)]
        for i in moving:
            where, owner = self.spreads[i], self.owner[i]
            if self.rank in where.senders and owner != self.rank:
                outgoing[owner].append(self.local(i)[some(where.blocks[self.rank])])
            for p in where.senders if owner == self.rank else ():
                if p != owner:
                    block = where.blocks[p]
                    incoming[p].append((i, block._replace(rows=block.rows[some(block)])))
        like = torch.empty(0, dtype=self.matrices[moving[0]].parameter.dtype, device=self._device)
        parts = self.deliver(outgoing, [sum(block.size for _, block in of) for of in incoming], like)
        for of, part in zip(incoming, parts, strict=True):
            for (i, block), values in zip(of, part.split([block.size for _, block in of]), strict=True):
                put(found[i], block, values.view(block.shape))
