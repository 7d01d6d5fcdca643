import numpy as np
import pytest

from sosd_fast.phases import onset_of_stability

STEPS = np.arange(200)
IMPULSE = 1e-2 * np.exp(-((STEPS - 20) ** 2) / 50) + 1e-4  # falls to a tenth of its peak at about step 31


def test_an_impulse():
    assert onset_of_stability(STEPS, IMPULSE) == pytest.approx(31, abs=1)


def test_one_outlier_does_not_decide():
    noisy = IMPULSE.copy()
    noisy[150] = 1
    assert onset_of_stability(STEPS, noisy) == onset_of_stability(STEPS, IMPULSE)


def test_a_return_puts_it_off():
    returning = IMPULSE.copy()
    returning[100:110] = 5e-3
    assert onset_of_stability(STEPS, returning) == pytest.approx(109, abs=2)


def test_not_seen():
    assert onset_of_stability(STEPS, np.full(200, 1e-3)) is None
    assert onset_of_stability(STEPS[:25], IMPULSE[:25]) is None
    assert onset_of_stability([], []) is None


def test_what_was_not_measured_is_passed_over():
    sparse = [v if i % 2 else None for i, v in enumerate(IMPULSE)]
    assert onset_of_stability(STEPS, sparse) == pytest.approx(31, abs=2)
