"""Gram matrices whose drift is measured: what rounding did to their eigenvalues together.

The sums behind G = W W^T err at random for most matrices, but not for those of few distinct values (signs, ternary or
quantised weights), where equal products round alike, nor on tensor cores, which round towards zero: the diagonal, sums
of terms of one sign, drifts, and the other elements do by a common factor. So the diagonal and some other elements are
computed in float64. The factor follows from the latter by regression; the diagonal is set to its true value times that
factor, which leaves (1 + drift) W W^T and noise. The C++ kernels do the same (kernels/cpu/rounding.hpp).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, backend_of
from sosd_fast.kernels.eigh import library
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.tridiagonal import tridiagonal, tridiagonal_all

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


def correct(G: Tensor, known: Products, inner: int | Tensor) -> Tensor:
    """Sets the diagonal of Gram matrices right.

    Args:
        G: (B, r, r); its diagonal is written, its lower triangle read.
        known: elements of W W^T, with the same leading dimension.
        inner: K, the terms of each sum; (B,) where they differ.

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


def triangles(parts: Sequence[Tensor], scale: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Computes Gram matrices of some rows each of matrices, without drift: those of all rows are their sums.

    Args:
        parts: B tensors (K_i, r) of one dtype, none empty, on one device. Not modified.
        scale: (B,) float64, powers of two: squares of scale * part are of ordinary size.
        out: (B, r (r + 1) / 2), float32 or float64, is written: the upper triangles of A^T A row by row.

    Returns:
        The diagonals (B, r), and the drift (B,) that was taken out of each, float64.
    """
    r = parts[0].shape[1]
    if backend_of("svdvals", parts[0]) is Backend.CPP:
        squares, drift = scale.new_empty(len(parts), r), torch.empty_like(scale)
        threads = torch.get_num_threads()
        kernels._C.gram_triangles(
            parts=parts, scale=scale, triangles=out, squares=squares, drift=drift, threads=threads
        )
        return squares, drift
    found = []
    with kernels.full_precision(out.device.type):
        for A, factor, to in zip(parts, scale, out, strict=True):
            A = (A.double() * factor).to(out.dtype)
            known = Products.of(A.mT)
            G = _upper(A)[None]
            drift = correct(G, Products(*(each[None] for each in known)), len(A))
            to.copy_(G[0][_indices(r, out.device)].double() / (1 + drift))
            found.append((known.squares, drift[0]))
    squares, drift = (torch.stack(each) for each in zip(*found, strict=True))
    return squares, drift


def _upper(A: Tensor) -> Tensor:
    """The upper triangle of A^T A and some of the lower one, for about half the operations of a whole product."""
    n = A.shape[1]
    G, step = A.new_zeros(n, n), max(64, -(-n // 8))
    for first in range(0, n, step):
        torch.mm(A[:, first : first + step].mT, A[:, first:], out=G[first : first + step, first:])
    G.diagonal(-1).copy_(G.diagonal(1))  # which `correct` reads
    return G


@functools.lru_cache(maxsize=1)  # 134 MB at r = 4096
def _indices(n: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.triu_indices(n, n, device=device))


def set_diagonal(triangles: Tensor, squares: Tensor):
    """Writes the diagonals (B, r) of Gram matrices whose upper triangles (B, r (r + 1) / 2) lie row by row."""
    r = squares.shape[1]
    row = torch.arange(r, device=squares.device)
    triangles[:, row * r - row * (row - 1) // 2] = squares.to(triangles.dtype)


def whole(triangles: Tensor, r: int) -> Tensor:
    """The symmetric matrices (B, r, r) whose upper triangles (B, r (r + 1) / 2) lie row by row."""
    G = triangles.new_empty(len(triangles), r, r)
    rows, columns = _indices(r, triangles.device)
    G[:, rows, columns] = G[:, columns, rows] = triangles
    return G


def singular_values(eigenvalues: Tensor, squares: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values from the eigenvalues of a corrected Gram matrix.

    Args:
        eigenvalues: (B, r), ascending, float64, without the drift.
        squares: (B, r) float64, the true diagonal, whose sum is that of the true eigenvalues.
        drift: (B,) what was taken out.

    Returns:
        S (B, r) float64, descending, and the drift (B,) that may be left in them, relative to the mean eigenvalue.
    """
    mean = squares.mean(-1)
    shift = (eigenvalues.mean(-1) / mean - 1).nan_to_num(0.0)
    return eigenvalues.flip(-1).clamp(min=0).sqrt(), torch.hypot(shift, DRIFT_LEFT * drift)


def gram_eigenvalues(G: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices (B, r, r), ascending. G is used up."""
    if backend_of("tridiagonal", G) is Backend.TRITON:
        return sturm(*tridiagonal(G, overwrite=True))
    # LAPACK's float32 eigenvalues err more than a float32 Gram matrix does: the SD of a 611 x 790 matrix by 6e-7, 2.5
    # times its bound, against 1e-9 (LOG.md#one-planner). In float64 they take 1.5 times as long.
    return library("eigvalsh", G.double())


def gram_eigenvalues_all(batches: Sequence[Tensor]) -> list[Tensor]:
    """`gram_eigenvalues` of batches (B, r, r) of one r and several dtypes."""
    if len(batches) == 1 or backend_of("tridiagonal", batches[0]) is not Backend.TRITON:
        return [gram_eigenvalues(G) for G in batches]
    return [sturm(d, e) for d, e in tridiagonal_all(batches)]
