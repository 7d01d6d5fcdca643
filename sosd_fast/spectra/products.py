"""Products of subspaces with a batch of matrices that stay where they are, in the range of their dtype."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sosd_fast.spectra.arrays import cast, largest_entry, power_of_two, transposed

CHUNK_BYTES = 2**30  # of what is made of a list of matrices on a device, at a time


class State(NamedTuple):
    """What is carried between calls of `topk_svdvals`: n is the short side, b = k + oversamples."""

    V: Any  # (..., b, n) orthonormal rows, leading directions first
    P: Any  # (..., b, n) the last change of V


def stacked(states: Sequence[State | None]) -> State | None:
    """The states of several torch matrices as one of their batch; None where one is missing."""
    warm = [state for state in states if state is not None]
    return State(*map(torch.stack, zip(*warm, strict=True))) if len(warm) == len(states) else None


@functools.lru_cache(maxsize=64)
def _start(b: int, n: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """The same random orthonormal rows each time, from a generator of their own: training's is not touched."""
    V = np.linalg.qr(np.random.default_rng(0).standard_normal((n, b)))[0].T
    V = torch.tensor(V, dtype=dtype, device="cpu")
    return V.pin_memory() if pinned else V  # a copy of other memory would wait for the device


def cold_state(xp, count: int, b: int, n: int, dtype, device) -> State:
    """The state of a cold start of `count` matrices."""
    if xp is torch:
        V = _start(b, n, dtype, device.type == "cuda").to(device, non_blocking=True)
    else:
        V = xp.asarray(_start(b, n, torch.float64, False).numpy(), dtype=dtype, device=device)
    return State(*(xp.broadcast_to(each, (count, b, n)) for each in (V, xp.zeros_like(V))))


class Products:
    """Products of rows with B matrices, scaled by powers of two, which need not be copied for it.

    Each matrix is taken upright (m >= n). Two powers of two, whose product is near its largest entry, divide the rows
    before the product and the product itself, so that neither leaves the range of the dtype. A matrix that holds NaN or
    Inf acts as zero.

    Args:
        xp: the arrays' namespace.
        stacks: arrays (B_i, m_i, n_i), of one short side n, whose matrices follow one another. Not modified.
        largest: (B,) the largest entry of each matrix, or a norm near it, where it is known; NaN or Inf of a matrix
            that is not finite.
        total: adds up over the ranks that have rows of the matrices, in place, what was computed from one rank's rows;
            then `stacks` are those rows, upright, and `largest` is that of the whole matrices.
    """

    def __init__(self, xp, stacks: Sequence[Any], largest=None, total: Callable[[Any], Any] | None = None):
        dtype = xp.float64 if stacks[0].dtype == xp.float64 else xp.float32
        stacks = [cast(xp, W, dtype) for W in stacks]
        self.xp, self._total = xp, total or (lambda x: x)
        self._stacks = [W if total or W.shape[1] >= W.shape[2] else transposed(xp, W) for W in stacks]
        ends = list(itertools.accumulate((W.shape[0] for W in stacks), initial=0))
        self._parts = [slice(*each) for each in itertools.pairwise(ends)]
        if largest is None:
            largest = xp.concat([largest_entry(xp, W) for W in stacks])
        self.finite = xp.isfinite(largest)[:, None]  # (B, 1)
        largest = xp.where(self.finite[:, 0] & (largest > 0), largest, 1.0)
        first = power_of_two(xp, xp.sqrt(largest))  # in the dtype of norms, which can be beyond that of the entries
        halves = (first, power_of_two(xp, largest / first))
        self._first, self._second = (cast(xp, half, dtype)[:, None, None] for half in halves)

    def matmat(self, V) -> list[Any]:
        """V W^T for V (B, b, n): of each stack (B_i, b, m_i), scaled."""
        V = V / self._first
        return [
            self._clean(V[part, ...] @ transposed(self.xp, W), part)
            for part, W in zip(self._parts, self._stacks, strict=True)
        ]

    def rmatmat(self, Y: list[Any]):
        """Y W, (B, b, n), scaled, for what `matmat` returned."""
        Z = [Y_i / self._first[part, ...] @ W for Y_i, part, W in zip(Y, self._parts, self._stacks, strict=True)]
        return self._clean(self._total(self.xp.concat(Z)))

    def gram(self, Y: list[Any]):
        """Y Y^T, (B, b, b), for what `matmat` returned."""
        return self._total(self.xp.concat([Y_i @ transposed(self.xp, Y_i) for Y_i in Y]))

    def unscaled(self, x):
        """Values (B, b) of the scaled matrices as values of the matrices; NaN of one that is not finite."""
        return self.xp.where(self.finite, x * self._first[..., 0] * self._second[..., 0], math.nan)

    def _clean(self, Y, part: slice = slice(None)):
        return self.xp.where(self.finite[part, ..., None], Y / self._second[part, ...], 0.0)


def stacks_of(xp, matrices: list) -> list[Any]:
    """Copies of matrices, each run of one shape in one array: a launch for each takes longer than its product."""
    runs = [list(run) for _, run in itertools.groupby(matrices, key=lambda A: A.shape)]
    return [xp.stack(run) if len(run) > 1 else run[0][None, ...] for run in runs]


def chunks(sizes: Sequence[int]):
    """Slices of a list of matrices of which no more than CHUNK_BYTES are taken, or those of one matrix."""
    first, size = 0, 0
    for i, own in enumerate(sizes):
        if i > first and size + own > CHUNK_BYTES:
            yield slice(first, i)
            first, size = i, 0
        size += own
    yield slice(first, len(sizes))
