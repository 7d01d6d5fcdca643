"""Gram matrices, of all rows or of some at a time, without the drift of their rounding, and their eigenvalues."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, backend_of
from sosd_fast.kernels.drift import Products, correct, products
from sosd_fast.kernels.eigh import library
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.tridiagonal import tridiagonal, tridiagonal_all
from sosd_fast.kernels.turns import at_once

DRIFT_LEFT = 0.5  # of what is taken out; less was seen


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
            known = products(A.mT)
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
    # The bisections of a few matrices take as long as those of many.
    calls = [functools.partial(sturm, d, e) for d, e in tridiagonal_all(batches)]
    return at_once(calls, [len(G) for G in batches], batches[0].device)
