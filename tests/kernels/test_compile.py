"""Every shipped configuration compiles for each generation of GPU, without spills, on tensor cores where meant."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_resources(target):
    # a process of its own: in this one the kernels are the interpreter's
    command = [sys.executable, "-m", "bench.compile_report", "--targets", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    kernels = {row["kernel"].split()[0] for row in rows}
    assert kernels == {"distribution", "gram", "symmetric", "tridiagonal", "scale", "sturm", "eigh"}
    for row in rows:
        assert row["target"] == target and row["spill"] == 0 and 0 < row["registers"] <= 255
        if row["kernel"].startswith(("gram", "symmetric")):
            assert {80: "mma", 90: "wgmma", 100: "tcgen05"}[target] in row["mma"]


def test_a_spill_is_a_fault():
    from bench.compile_report import Case, faults

    case = Case("name", None, {}, {}, mma=True, wide=True, most_registers=128)
    row = {"registers": 128, "spill": 0, "mma": ["mma"], "wide": 8}
    assert not faults(case, row)
    for change in ({"registers": 129}, {"spill": 8}, {"mma": []}, {"wide": 0}):
        assert len(faults(case, row | change)) == 1
