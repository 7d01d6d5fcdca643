import pytest
import torch

from sosd_fast.testing import SPECTRA, assert_svdvals_close, matrix, sd_distance, spectrum

TRUTH = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("S", "limit", "message"),
    [
        (TRUTH + 1e-3, None, "value"),
        (TRUTH.flip(0), None, "not descending"),
        (TRUTH[:2], None, "shapes differ"),
        (torch.tensor([3.0, 2.0, float("nan")]), None, "NaN"),
        (TRUTH - torch.tensor([0.0, 0.0, 1.5]), None, "negative"),
        (TRUTH + torch.tensor([0.0, 1e-7, 0.0]), torch.full((3,), 1e-8), "bound"),
    ],
)
def test_the_comparison_can_fail(S, limit, message):
    with pytest.raises(AssertionError, match=message):
        assert_svdvals_close(S, TRUTH, eps=1.2e-7, size=3, limit=limit)


def test_the_comparison_can_pass():
    assert_svdvals_close(TRUTH + 1e-8, TRUTH, eps=1.2e-7, size=3, limit=torch.full((3,), 2e-8))


@pytest.mark.parametrize("name", [s for s in SPECTRA if s not in ("gaussian", "uniform")])
def test_matrices_have_the_spectrum_that_they_promise(name):
    W = matrix(name, 20, 30, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(W), spectrum(name, 20), atol=1e-14, rtol=1e-14)


def test_sd_distance():
    assert sd_distance(TRUTH, 7 * TRUTH) < 1e-16
    assert sd_distance(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)


def test_unknown_spectrum():
    with pytest.raises(ValueError, match="got name='gauss'"):
        spectrum("gauss", 3)
