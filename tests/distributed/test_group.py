"""Which ranks meet, whom they miss, and what they say of it."""

from pathlib import Path

import pytest
from prepared import run_ranks

from sosd_fast.distributed import group

WORKER = Path(__file__).with_name("group_worker.py")


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("crossing", 4), ("stages", 4), ("missing", 2), ("missing", 3), ("others", 3), ("meshes", 4), ("stores", 4),
        ("without_private_names", 4),
    ],
)  # fmt: skip
def test_ranks_meet(case, ranks, tmp_path):
    done = run_ranks(ranks, WORKER, case, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("met as it should be") == ranks, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("ranks", [[], [3], range(4096), range(1, 4000, 8), [0, 1, 5]])
def test_ranks_are_spelled(ranks):
    text = group._spell(ranks)
    assert group._ranks(text) == set(ranks) and len(text) < 60
