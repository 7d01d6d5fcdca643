r"""One step of the subspaces that carry leading singular values: block Krylov with momentum, and Rayleigh-Ritz.

For W (m, n), m >= n, and orthonormal rows V (b, n), with Y = V W^T, Z = Y W and rho the Rayleigh quotients diag(Z V^T):

    R = Z - (Z V^T) V,  D = R, or with P, the last change of V:  D = pace R / rho + P

and the leading Ritz vectors of W^T W on the span of V and D are the next V. `sosd_fast.spectra.topk` says the same in
array operations, for every device and dtype, and is the reference.

Source: Knyazev, LOBPCG (SISC 2001), with residual and last change summed in one block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels


class Advance(NamedTuple):
    """What `advance_subspaces` returns; where `done` is false, nothing else of that matrix is to be used."""

    squares: Tensor  # (B, b) Ritz values of W^T W, descending up to rounding
    residual: Tensor  # (B, b) |W^T u - s v|_2 of the directions V that came in
    V: Tensor  # (B, b, n) the next directions
    P: Tensor  # (B, b, n) their change
    done: list[bool]


def advance_subspaces(matrices: list[Tensor], V: Tensor, P: Tensor, pace: float) -> Advance | None:
    """Takes one step with each of a list of matrices of one shape, which are read in place.

    Args:
        matrices: B tensors (m, n), m >= n, float32 on the CPU, of any strides. Not modified.
        V: (B, b, n) rows, b < n.
        P: (B, b, n) the last change of V, zeros at first.
        pace: weight of the residual against P.

    Returns:
        `Advance`; the kernel declines matrices that hold NaN or Inf, are zero or of low rank, or lie beyond 2**30 or
        below 2**-30, and those whose V is not orthonormal. None where the kernel is missing or does not apply: another
        device or dtype, b = n.

    Accuracy:
        Float32 throughout: squares err by about sqrt(n) * eps * S[0]**2 beyond what the subspace misses.
    """
    if kernels._C is None or V.shape[1] >= V.shape[2]:
        return None
    if not all(A.dtype == torch.float32 and A.device.type == "cpu" for A in matrices):
        return None
    matrices = [A if 1 in A.stride() else A.contiguous() for A in matrices]
    V = V.contiguous()
    squares, residual = V.new_empty(V.shape[:2]), V.new_empty(V.shape[:2])
    next_V, next_P = torch.empty_like(V), torch.empty_like(V)
    threads = torch.get_num_threads()
    done = kernels._C.advance_subspaces(matrices, pace, V, P.contiguous(), next_V, next_P, squares, residual, threads)
    return Advance(squares, residual, next_V, next_P, done)
