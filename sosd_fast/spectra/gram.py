"""Gram matrices whose drift is measured: what rounding did to their eigenvalues together.

The sums behind G = W W^T err at random for most matrices, but not for those of few distinct values (signs, ternary or
quantised weights), where equal products round alike, nor on tensor cores, which round towards zero: the diagonal, sums
of terms of one sign, drifts, and the other elements do by a common factor. So the diagonal and some other elements are
computed in float64. The factor follows from the latter by regression; the diagonal is set to its true value times that
factor, which leaves (1 + drift) W W^T and noise. The C++ kernels do the same (kernels/cpu/rounding.hpp).
"""

from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = 256  # of neighbouring rows, at most, whose products are taken in float64
MOST_DRIFT = 2.0**-18  # of elements beside the diagonal, relative
DRIFT_LEFT = 0.5  # of what is taken out; less was seen


class Products(NamedTuple):
    """Elements of W W^T in float64."""

    squares: Tensor  # (..., r), (i, i)
    cross: Tensor  # (..., min(r - 1, PAIRS)), (i + 1, i)

    @classmethod
    def of(cls, W: Tensor) -> "Products":
        """Those of W (..., r, K), which is scaled so that its squares stay in range. Waits for no device."""
        if W.dtype == torch.float64:  # torch.sum adds in pairs, more accurately than a product does
            squares = W.square().sum(-1)
        elif W.device.type == "cpu" and W.stride(-1) != 1:
            # The norm's sums in float64 along what stands apart take 10 ns an entry; these take 1.3.
            squares = W.new_zeros(W.shape[:-1], dtype=torch.float64)
            for part in W.split(256, -1):
                squares += part.double().square().sum(-1)
        else:
            squares = torch.linalg.vector_norm(W, dim=-1, dtype=torch.float64).square()
        some = W[..., : PAIRS + 1, :].double()
        return cls(squares, (some[..., 1:, :] * some[..., :-1, :]).sum(-1))


def correct(G: Tensor, known: Products, inner: int) -> Tensor:
    """Sets the diagonal of Gram matrices right.

    Args:
        G: (B, r, r); its diagonal is written, its lower triangle read.
        known: elements of W W^T, with the same leading dimension.
        inner: K, the terms of each sum.

    Returns:
        drift (B,) float64: G is now (1 + drift) W W^T and noise.
    """
    squares, cross = known
    mean = squares.mean(-1)
    error = G.diagonal(-1, -2, -1)[:, : cross.shape[-1]].double() - cross
    # Where rows are nearly orthogonal the elements say little; those of random signs are mean / sqrt(K).
    least = cross.shape[-1] * mean.square() / (16 * inner)
    drift = ((error * cross).sum(-1) / (cross.square().sum(-1) + least)).nan_to_num(0.0)
    drift = drift.clamp(-MOST_DRIFT, MOST_DRIFT)
    G.diagonal(0, -2, -1).copy_(squares * (1 + drift[:, None]))
    return drift


def singular_values(eigenvalues: Tensor, known: Products, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values from the eigenvalues of a corrected Gram matrix.

    Args:
        eigenvalues: (B, r), ascending.
        known: as of `correct`, whose trace is the sum of the true eigenvalues.
        drift: as `correct` returned it.

    Returns:
        S (B, r) float64, descending, and the drift (B,) that may be left in them, relative to the mean eigenvalue.
    """
    eigenvalues = eigenvalues.double() / (1 + drift[:, None])
    mean = known.squares.mean(-1)
    shift = (eigenvalues.mean(-1) / mean - 1).nan_to_num(0.0)
    return eigenvalues.flip(-1).clamp(min=0).sqrt(), torch.hypot(shift, DRIFT_LEFT * drift)
