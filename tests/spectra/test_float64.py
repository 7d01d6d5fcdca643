"""Bounds of the Gram matrix in float64, against singular values in extended precision."""

import functools

import numpy as np
import pytest
import torch

from bench.bounds import few_values
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.testing import SPECTRA, matrix

wide = np.longdouble
pytestmark = pytest.mark.skipif(np.finfo(wide).eps > 1e-18, reason="long double is no wider than double here")


@functools.cache  # both paths ask for the same
def extended_svdvals(shape, data):
    """Singular values by one-sided Jacobi rotations in long double, all disjoint pairs of a round at once."""
    A = np.frombuffer(data).reshape(shape)
    A = (A.T if shape[0] < shape[1] else A).astype(wide)
    V = np.linalg.svd(A.astype(np.float64), full_matrices=False)[2].T.astype(wide)  # leaves little to rotate
    V = V @ (1.5 * np.eye(len(V), dtype=wide) - 0.5 * (V.T @ V))
    columns = (A @ V).T
    r = len(columns)
    if r % 2:
        columns = np.vstack([columns, np.zeros_like(columns[:1])])
    order = np.arange(len(columns))
    for _ in range(6):
        worst = 0.0
        for _ in range(len(columns) - 1):
            p, q = order[: len(order) // 2], order[len(order) // 2 :][::-1]
            x, y = columns[p], columns[q]
            a, b, c = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
            size = np.sqrt(a * b)
            apart = (size > 0) & (np.abs(c) > 1e-19 * size)
            if apart.any():
                worst = max(worst, float((np.abs(c[apart]) / size[apart]).max()))
                zeta = (b - a) / np.where(apart, 2 * c, 1)
                t = np.where(zeta < 0, -1, 1) / (np.abs(zeta) + np.sqrt(1 + zeta * zeta))
                t = np.where(apart, t, 0)[:, None]
                cosine = 1 / np.sqrt(1 + t * t)
                columns[p], columns[q] = cosine * (x - t * y), cosine * (y + t * x)
            order = np.concatenate([order[:1], order[-1:], order[1:-1]])
        if worst < 1e-17:
            break
    return np.sort(np.sqrt((columns * columns).sum(1)))[::-1][:r]


def sd_error_and_bound(W):
    """|SD - SD_true|, its bound, and the largest error of a value over its bound."""
    found, T = spectra([W], "gram64"), extended_svdvals(tuple(W.shape), W.numpy().tobytes())
    S = found.S[0].numpy().astype(wide)
    error = np.sqrt(((S / S.sum() - T / T.sum()) ** 2).sum())
    return float(error), float(found.sd_error[0]), float((np.abs(S - T) / found.bound[0].numpy()).max())


@pytest.mark.parametrize("shape", [(48, 48), (37, 37), (33, 130), (143, 40)], ids=str)
def test_bounds_hold(path, shape):
    few = few_values(*shape, torch.Generator().manual_seed(sum(shape)))
    matrices = {name: W.double() for name, W in few.items()}
    matrices |= {name: matrix(name, *shape, dtype=torch.float64) for name in SPECTRA if name != "zero"}
    for name, W in matrices.items():
        error, bound, value = sd_error_and_bound(W)
        assert error <= bound and value <= 1, (name, error, bound, value)


def test_isolated_small_values(path):
    """The small eigenvalue that a small constant row adds to a flat spectrum errs by a single draw, not by a mean."""
    for seed in (4, 14, 38):  # 0.5 of their bound by torch's path, of 40
        W = few_values(143, 308, torch.Generator().manual_seed(seed))["constant row"].double()
        error, bound, _ = sd_error_and_bound(W)
        assert error <= bound, (seed, error, bound)


@pytest.mark.parametrize("r", [64, 100])
def test_the_bound_is_within_50_times_the_error_of_gaussian_matrices(path, r):
    """In the median of matrices; single ones are lucky."""
    found = [sd_error_and_bound(matrix("gaussian", r, r, dtype=torch.float64, seed=seed)) for seed in range(5)]
    assert all(error <= bound for error, bound, _ in found)
    assert np.median([bound / error for error, bound, _ in found]) <= 50
