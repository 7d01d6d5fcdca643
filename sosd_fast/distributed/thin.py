"""Thin products with matrices of which each rank holds a block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sosd_fast.distributed.layout import Block
from sosd_fast.spectra.products import Products


class BlockProducts(Products):
    """`Products` of upright matrices A (m, n), m >= n, of which each rank holds some rows and columns.

    Args:
        own: (m_p, n_p), this rank's entries of each matrix, (0, 0) where it has none.
        blocks: which these are.
        shape: (m, n).
        largest: (B,) the largest entry of each whole matrix; not finite for one that is not.
        total: adds up over the ranks, in place.
    """

    def __init__(
        self,
        own: Sequence[Tensor],
        blocks: Sequence[Block],
        shape: tuple[int, int],
        largest: Tensor,
        total: Callable[[Tensor], Tensor],
    ):
        super().__init__(torch, [A[None] for A in own], largest, total)
        self._own = [W[0] for W in self._stacks]
        device = largest.device
        self._rows, self._columns = ([_at(block[side], device) for block in blocks] for side in (0, 1))
        self._shape, self._blocks = shape, blocks

    def matmat(self, V: Tensor) -> list[Tensor]:
        """V A^T for V (B, b, n), scaled: of each (b, m), whole on every rank."""
        V = V / self._first
        Y = V.new_zeros(len(V), V.shape[1], self._shape[0])
        for y, v, A, rows, columns in zip(Y, V, self._own, self._rows, self._columns, strict=True):
            if A.numel():
                y[:, rows] = v[:, columns] @ A.mT
        return list(self._clean(self._total(Y)))

    def rmatmat(self, Y: list[Tensor]) -> Tensor:
        """Y A, (B, b, n), scaled, for what `matmat` returned."""
        Z = Y[0].new_zeros(len(Y), Y[0].shape[0], self._shape[1])
        for z, y, A, first, rows, columns in zip(Z, Y, self._own, self._first, self._rows, self._columns, strict=True):
            if A.numel():
                z[:, columns] = y[:, rows] / first @ A
        return self._clean(self._total(Z))

    def gram(self, Y: list[Tensor]) -> Tensor:
        """Y Y^T, (B, b, b), for what `matmat` returned."""
        return torch.stack([y @ y.mT for y in Y])


def _at(side: range | Tensor, device: torch.device) -> slice | Tensor:
    return slice(side.start, side.stop) if isinstance(side, range) else side.to(device)
