"""How the singular values of a matrix that ranks hold parts of are found, and the bytes that this moves.

    whole   a rank holds all of it: that one owns and measures it
    long    only its long side is split: of all values each sender gives its part of the Gram matrix, one triangle, to
            the owner; of the leading ones all ranks add up products with the subspace along the short side
    gather  every sender sends its block to the owner, in the parameter's own dtype
    thin    of the leading values all ranks add up products with the subspace along both sides

Products are taken where they move far fewer bytes. All of this is arithmetic, without processes.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

from sosd_fast.distributed.layout import Spread, gram_bytes, long_side_is_split, products_pay, shape_of
from sosd_fast.matrices import Matrix


class Way(StrEnum):
    """How a matrix is measured."""

    WHOLE = "whole"
    LONG = "long"
    GATHER = "gather"
    THIN = "thin"


def full_way(shape: tuple[int, int], itemsize: int, spread: Spread) -> tuple[Way, int]:
    """How the full spectrum of a matrix is measured, and the bytes that ranks send for it, but for what is told.

    Args:
        shape: (m, n).
        itemsize: bytes of an entry.
        spread: where the entries are.
    """
    if spread.senders == (spread.owner,):
        return Way.WHOLE, 0
    if spread.by_products:
        return Way.LONG, sum(p != spread.owner for p in spread.senders) * gram_bytes(min(shape), itemsize)
    return Way.GATHER, _gathered(shape, itemsize, spread)


def leading_way(shape: tuple[int, int], itemsize: int, spread: Spread, directions: int) -> tuple[Way, int]:
    """How the leading values of a matrix are measured, and the bytes that ranks send for it in a step once warm.

    Args:
        shape: (m, n).
        itemsize: bytes of an entry.
        spread: where the entries are.
        directions: of the subspace.
    """
    if spread.senders == (spread.owner,):
        return Way.WHOLE, 0
    gathered = _gathered(shape, itemsize, spread)
    long = long_side_is_split(shape, [spread.blocks[p] for p in spread.senders])
    r, b, way = min(shape), directions, Way.LONG if long else Way.THIN
    summed = b * r + (b * b if way is Way.LONG else 2 * b * max(shape))
    sent = 2 * (len(spread.blocks) - 1) * summed * max(4, itemsize)  # of a ring's sums
    return (way, sent) if products_pay(sent, gathered) else (Way.GATHER, gathered)


def full_bytes(matrices: Sequence[Matrix], spreads: Sequence[Spread]) -> int:
    """The bytes that all ranks together send to measure every matrix in full once, the results told to all included.

    Matrices of few distinct values or of low rank, which take another try in float64, send more.

    Args:
        matrices: any, whose parameters are asked for their shapes and dtypes alone.
        spreads: where their entries are, as of `sosd_fast.distributed.layout.spread`.
    """
    total = 0
    for m, where in zip(matrices, spreads, strict=True):
        shape = shape_of(m)
        others = len(where.blocks) - 1
        way, sent = full_way(shape, m.parameter.dtype.itemsize, where)
        scales = 2 * others * 8 if way is Way.LONG else 0
        total += sent + scales + others * 8 * (2 * min(shape) + 2)
    return total


def _gathered(shape: tuple[int, int], itemsize: int, spread: Spread) -> int:
    held = spread.blocks[spread.owner].size if spread.owner in spread.senders else 0
    return (math.prod(shape) - held) * itemsize
