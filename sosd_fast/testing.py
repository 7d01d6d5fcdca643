"""Matrices with prescribed spectra, and the comparison that the tests use."""

import math

import torch
from torch import Tensor

SPECTRA = (
    "gaussian",
    "uniform",
    "flat",
    "power",
    "log4",
    "log10",
    "half_zeros",
    "spikes",
    "repeated",
    "rank_one",
    "zero",
)


def spectrum(name: str, r: int) -> Tensor:
    """Returns r singular values, float64, descending.

    Args:
        name: "flat", "power" (1/i), "log4" and "log10" (log-spaced from 1 to 1e-4 and 1e-10), "half_zeros", "spikes"
            (ten values 30 times the rest), "repeated" (groups of four), "rank_one" or "zero".
        r: how many.
    """
    i = torch.arange(r, dtype=torch.float64)
    ramp = torch.linspace(1, 0.01, r, dtype=torch.float64) if r > 1 else torch.ones(1, dtype=torch.float64)
    values = {
        "flat": torch.ones(r, dtype=torch.float64),
        "power": 1 / (i + 1),
        "log4": 10 ** (-4 * i / max(r - 1, 1)),
        "log10": 10 ** (-10 * i / max(r - 1, 1)),
        "half_zeros": (i < (r + 1) // 2).double(),
        "spikes": torch.where(i < 10, 30.0, 1.0) * ramp,
        "repeated": 1 / (1 + i // 4),
        "rank_one": (i == 0).double(),
        "zero": torch.zeros(r, dtype=torch.float64),
    }
    if name not in values:
        raise ValueError(f"spectrum: expected one of {', '.join(values)}, got name={name!r}. Choose one.")
    return values[name]


def matrix(name: str, m: int, n: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Returns an (m, n) matrix with random singular vectors.

    Args:
        name: of a `spectrum`, or "gaussian" (normal entries) or "uniform" (entries in [0, 1)).
        m: rows.
        n: columns.
        dtype: rounded to from float64.
        seed: of the entries or the singular vectors.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    if name == "gaussian":
        return normal(m, n).to(dtype)
    if name == "uniform":
        return torch.rand(m, n, dtype=torch.float64, generator=generator).to(dtype)
    r = min(m, n)
    U, V = (torch.linalg.qr(normal(size, r)).Q for size in (m, n))
    return (U * spectrum(name, r) @ V.mT).to(dtype)


def sd_distance(S: Tensor, S_ref: Tensor) -> float:
    """Returns |SD - SD_ref|_2, the error of a singular distribution."""
    S, S_ref = S.double(), S_ref.double()
    return float((S / S.sum() - S_ref / S_ref.sum()).norm())


def assert_svdvals_close(
    S: Tensor, S_ref: Tensor, *, eps: float, size: int, c: float = 1.0, limit: Tensor | None = None
):
    """Asserts that singular values are sorted and agree with a more precise computation.

    Args:
        S: (r,) computed.
        S_ref: (r,) float64, the truth.
        eps: of the dtype that S was computed in.
        size: max(m, n).
        c: max |S - S_ref| must be at most c * eps * size * S_ref[0].
        limit: (r,) bounds that each error must also meet, such as those returned with S.

    Raises:
        AssertionError: naming the worst value.
    """
    S, S_ref = S.detach().double().cpu(), S_ref.detach().double().cpu()
    assert S.shape == S_ref.shape, f"shapes differ: {tuple(S.shape)} and {tuple(S_ref.shape)}"
    assert not S.isnan().any(), "S holds NaN"
    assert (S[:-1] >= S[1:]).all(), "S is not descending"
    assert (S >= 0).all(), "S holds negative values"
    error = (S - S_ref).abs()
    allowed = c * eps * size * float(S_ref[0])
    worst = int(error.argmax())
    assert float(error.max()) <= allowed, f"value {worst}: |{S[worst]:.9g} - {S_ref[worst]:.9g}| > {allowed:.3g}"
    if limit is not None:
        # The truth itself is rounded; that is no error of S.
        slack = 64 * torch.finfo(torch.float64).eps * math.sqrt(size) * float(S_ref[0])
        excess = error - limit.detach().double().cpu()
        worst = int(excess.argmax())
        assert float(excess.max()) <= slack, f"value {worst}: error {error[worst]:.3g} > bound {limit[worst]:.3g}"
