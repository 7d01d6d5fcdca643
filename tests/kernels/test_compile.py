"""Every shipped configuration compiles for each generation of GPU, without spills, on tensor cores where meant."""

import json
import os

import pytest
from prepared import run

pytest.importorskip("triton")


MAIN = """
import runpy, sys, triton
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
runpy.run_module("bench.compile_report", run_name="__main__", alter_sys=True)
"""
MMA = {80: "mma", 90: "wgmma", 100: "tcgen05"}
# Products are other code on each generation. The others differ by the assembler's choice of registers alone, and are
# compiled for one; SOSD_TARGETS="80 90 100", as `make check` sets it, names more.
TARGETS = [int(target) for target in os.environ.get("SOSD_TARGETS", "90").split()]
KERNELS = {
    ("gram", "symmetric"): tuple(MMA),
    ("tridiagonal",): TARGETS,
    ("distribution", "scale", "sturm", "eigh"): TARGETS,
}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS, ids=" ".join)
def test_resources(kernels):
    # a process of its own: in this one the kernels are the interpreter's
    done = run(MAIN, "--only", *kernels, "--targets", *KERNELS[kernels], timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {(row["kernel"].split()[0], row["target"]) for row in rows}
    assert found == {(kernel, target) for kernel in kernels for target in KERNELS[kernels]}
    for row in rows:
        assert row["spill"] == 0 and 0 < row["registers"] <= 255
        if "gram" in kernels:
            assert MMA[row["target"]] in row["mma"]


def test_no_kernel_is_left_out():
    from bench.compile_report import cases

    names = {case.name.split()[0]: case.mma for case in cases()}
    assert set(names) == {name for kernels in KERNELS for name in kernels}
    assert {name for name, mma in names.items() if mma} == {"gram", "symmetric"}


def test_a_spill_is_a_fault():
    from bench.compile_report import Case, faults

    case = Case("name", None, {}, {}, mma=True, wide=True, most_registers=128)
    row = {"registers": 128, "spill": 0, "mma": ["mma"], "wide": 8}
    assert not faults(case, row)
    for change in ({"registers": 129}, {"spill": 8}, {"mma": []}, {"wide": 0}):
        assert len(faults(case, row | change)) == 1
