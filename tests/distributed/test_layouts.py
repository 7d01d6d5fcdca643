from pathlib import Path

import pytest
from prepared import run_ranks

WORKER = Path(__file__).with_name("layouts_worker.py")


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("tp", 2), ("tp", 3), ("fsdp+tp", 4), ("hsdp+tp", 8), ("columns", 3), ("last", 4), ("copies", 2), ("experts", 4)],
)
def test_spectra_are_those_of_one_process(kind, ranks):
    done = run_ranks(ranks, WORKER, kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all as in one process") == ranks, done.stdout
