"""The benchmark of random matrices: a few of its inputs, and that it sees what is wrong."""

import pytest
import torch

import sosd_fast
from bench import robustness


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_a_few_inputs(first):
    for seed in range(first, first + 10):
        given, result = robustness.check(seed)
        assert all(found == "refused" or found <= 1 for found in result.values()), (seed, str(given), result)


WRONG = {
    "too large": lambda _, S: S * (1 + 1e-3),
    "NaN": lambda _, S: S * torch.nan,
    "too short": lambda _, S: S[..., :-1],
    "written to": lambda W, S: (W.zero_(), S)[1],
    "raises": lambda *_: 1 / 0,
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found(monkeypatch, kind):
    real = sosd_fast.svdvals

    def svdvals(W, **options):
        S, bound = real(W, **options)
        return WRONG[kind](W, S), bound

    monkeypatch.setattr(sosd_fast, "svdvals", svdvals)
    found = [robustness.check(seed)[1]["svdvals"] for seed in range(30)]
    wrong = [each for each in found if each != "refused" and (isinstance(each, str) or each > 1)]
    assert len(wrong) > 10
    if kind == "written to":
        assert "changed its input" in wrong
