from pathlib import Path

import pytest
from prepared import run_ranks

WORKER = Path(__file__).with_name("muon_worker.py")
LAYOUTS = {
    2: ["mixed", "column TP", "row TP"],
    3: ["rows", "columns", "copies", "partial sums"],
    4: ["both sides", "rows twice", "copies of columns", "FSDP2 + ColwiseParallel", "FSDP2 + RowwiseParallel"],
    8: ["HSDP + TP"],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_muon_on_any_layout_is_that_of_one_process(ranks, tmp_path):
    done = run_ranks(ranks, WORKER, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"as on one process: {name}" for name in LAYOUTS[ranks]]
