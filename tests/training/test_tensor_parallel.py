from pathlib import Path

import pytest
from prepared import run_ranks

WORKER = Path(__file__).with_name("heads_worker.py")


@pytest.mark.parametrize("ranks", [2, 3, 4])  # parts of q, k, v that do and do not end where a rank's outputs end
def test_a_transformer_over_several_ranks(ranks):
    done = run_ranks(ranks, WORKER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as on one process") == ranks
