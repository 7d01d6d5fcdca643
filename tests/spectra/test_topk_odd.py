"""The leading values of matrices that are odd in every way, one after the other in one state."""

import math
import os

import numpy as np
import pytest
import torch

from sosd_fast import kernels
from sosd_fast.spectra import topk
from sosd_fast.spectra.topk import topk_svdvals

KINDS = [
    "zero",
    "one",
    "few",
    "repeated",
    "zero rows",
    "gaussian",
    "range",
    "signs",
    "identity",
    "constant",
    "nan",
    "inf",
]
PLACES = ["extension", "torch", "numpy", "device"]
DRAWS = 15 * int(os.environ.get("SOSD_DRAWS", "1"))  # of shapes, each with some 10 matrices, in each place


def odd_matrix(kind, m, n, dtype, rng):
    """A matrix of one of KINDS at a scale from subnormal to the end of the range."""
    A = rng.standard_normal((m, n))
    if kind in ("zero", "constant"):
        A[:] = kind == "constant"
    elif kind in ("one", "few"):
        r = 1 if kind == "one" else min(m, n, 3)
        A = rng.standard_normal((m, r)) @ rng.standard_normal((r, n))
    elif kind in ("repeated", "identity"):
        U, V = (np.linalg.qr(rng.standard_normal((s, s)))[0] if kind == "repeated" else np.eye(s) for s in (m, n))
        A = (
            U
            @ np.diag(rng.choice([0.0, 1.0, 2.0], max(m, n)) if kind == "repeated" else np.ones(max(m, n)))[:m, :n]
            @ V
        )
    elif kind == "zero rows":
        A[rng.random(m) < 0.6] = 0
    elif kind == "range":
        A *= 10.0 ** rng.uniform(-30 if dtype == np.float32 else -200, 0, (m, 1))
    elif kind == "signs":
        A = np.sign(A)
    elif kind in ("nan", "inf"):
        A[rng.integers(m), rng.integers(n)] = float(kind)
    info, largest = np.finfo(dtype), np.abs(A[np.isfinite(A)]).max(initial=0.0)
    exponents = (0, 0, info.maxexp - 8, info.maxexp // 2, info.minexp // 2, info.minexp + 4, info.minexp - 6)
    return np.ldexp(A / (largest or 1.0), rng.choice(exponents)).astype(dtype)


def assert_leading(W, S, residual):
    """What topk_svdvals promises of one matrix, in any state."""
    if not np.isfinite(W).all():
        assert np.isnan(S).all() and np.isnan(residual).all()
        return
    assert np.isfinite(S).all() and np.isfinite(residual).all() and (np.diff(S) <= 0).all()
    largest = float(np.abs(W).max()) or 1.0
    info = np.finfo(W.dtype)
    true = np.linalg.svd(W.astype(np.float64) / largest, compute_uv=False)
    S, residual = (x.astype(np.float64) / largest for x in (S, residual))
    subnormal = 4 * max(W.shape) * float(info.smallest_subnormal) / largest  # what S itself and W are known to
    assert (S**2 - true[: len(S)] ** 2 <= 4000 * info.eps * true[0] ** 2 + 2 * subnormal * true[0]).all()
    away = np.abs(S[:, None] - true).min(1)
    assert (away <= residual + 20 * math.sqrt(info.eps) * true[0] + subnormal).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("error")
def test_odd_matrices_that_change_from_step_to_step(place, monkeypatch):
    """Nothing raises, and every finite matrix has finite values within their bounds, whatever came before."""
    if place != "extension":
        monkeypatch.setattr(kernels, "_C", None)
    if place == "device":
        monkeypatch.setattr(topk, "on_host", lambda *_: False)
    rng = np.random.default_rng(PLACES.index(place))
    for _ in range(DRAWS):
        m, n, count = rng.integers(1, 30), rng.integers(1, 30), rng.integers(1, 5)
        dtype = rng.choice([np.float32, np.float64])
        k, spare = int(rng.integers(1, min(m, n) + 1)), int(rng.integers(0, 9))
        state = None
        for _ in range(4):
            W = [odd_matrix(rng.choice(KINDS), m, n, dtype, rng) for _ in range(count)]
            given = W if place == "numpy" else [torch.from_numpy(A) for A in W]
            S, residual, state = topk_svdvals(given, k, n_oversamples=spare, state=state)
            for each in zip(W, np.asarray(S), np.asarray(residual), strict=True):
                assert_leading(*each)


def test_the_check_of_odd_matrices_can_fail():
    W = odd_matrix("gaussian", 20, 30, np.float64, np.random.default_rng(0))
    S = np.linalg.svd(W, compute_uv=False)[:3]
    assert_leading(W, S, 0 * S)
    for wrong in (S * 1.01, S[::-1], S * math.nan, S * [1, 1, 0.9]):
        with pytest.raises(AssertionError):
            assert_leading(W, wrong, 0 * S)
