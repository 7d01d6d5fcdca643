"""Which ranks meet, whom they miss, and what they say of it."""

import functools
from pathlib import Path

import pytest
from prepared import run_ranks

from sosd_fast.distributed import group

WORKER = Path(__file__).with_name("group_worker.py")


CASES = {
    2: ["missing"],
    # The default group of one store after that of another; the last case takes away what the others need
    4: ["stores", "crossing", "stages", "missing", "others", "meshes", "without_private_names"],
}


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What one set of processes said that went through all cases of as many ranks."""
    return functools.cache(lambda ranks: run_ranks(ranks, WORKER, tmp_path_factory.mktemp("met"), *CASES[ranks]))


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_ranks_meet(ranks, case, met):
    assert met(ranks).stdout.count(f"{case}: met as it should be") == ranks, met(ranks).stdout + met(ranks).stderr


@pytest.mark.parametrize("ranks", CASES)
def test_nothing_else_is_said(ranks, met):
    assert (met(ranks).returncode, met(ranks).stderr) == (0, "")


@pytest.mark.parametrize("ranks", [[], [3], range(4096), range(1, 4000, 8), [0, 1, 5]])
def test_ranks_are_spelled(ranks):
    text = group._spell(ranks)
    assert group._ranks(text) == set(ranks) and len(text) < 60
