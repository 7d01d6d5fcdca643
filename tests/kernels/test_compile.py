"""Every shipped configuration compiles for each generation of GPU, without spills, on tensor cores where meant."""

import json
import os
import subprocess
import sys

import pytest
import torch
from prepared import ROOT, run

pytest.importorskip("triton")


FRESH = """
import json, runpy, sys, torch, triton
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training", "bench")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
"""
# The report, which begins with the keys of everything that is launched: they take seconds, and are looked at, too.
REPORT = (
    FRESH
    + """
from bench import compile_report
keys, recorded = [], compile_report.recorded

def noted(target, only):
    for name, launch in (found := recorded(target, [""])):
        names = launch.kernel.arg_names
        keys.append({
            "name": name, "target": str(target.arch),
            "options": {k: str(v) for k, v in launch.options.__dict__.items()},
            "constants": {names[at[0]]: str(value) for at, value in launch.constexprs.items()},
            "divisible": [names[at[0]] for at, value in launch.attributes.items() if value],
        })
    return [each for each in found if any(text in each[0] for text in only)]

compile_report.recorded = noted
try:
    compile_report.main()
finally:
    print(json.dumps(keys))
"""
)
MMA = {"80": "mma", "90": "wgmma", "100": "tcgen05", "gfx942": "v_mfma"}
# Some for one target of each maker; SOSD_TARGETS="80 90 100 gfx942", as `make check` sets it, compiles everything for
# those it names, which takes minutes. The reduction on sm_90 is in test_tridiagonal_code.py.
SYRK = "syrk fp32: GPT-2"
SOME = {
    "90": [SYRK, "syrk fp16: Newton-Schulz (12", "syrk bf16: 531", "singular_distribution", "scale fp32: 531",
           "sturm fp32: GPT-2", "eigh fp32: eigenproblems of 192", "squares", "divide", "convert",
           "symmetrise", "shift", "product fp32", "update fp32", "chase fp64: GPT-2"],
    "gfx942": [SYRK, "tridiagonal fp32: 531"],
}  # fmt: skip
CASES = {target: [""] for target in os.environ.get("SOSD_TARGETS", "").split()} or SOME


@pytest.mark.slow
@pytest.mark.parametrize("target", CASES)
def test_compiles_without_spills(target):
    done = run(REPORT, "--only", *CASES[target], "--targets", target, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report, keys = map(json.loads, done.stdout.splitlines()[-2:])
    assert {row["target"] for row in report["rows"]} == {key["target"] for key in keys} == {target}
    for name in CASES[target]:
        assert any(name in row["kernel"] for row in report["rows"]), name
    for row in report["rows"]:
        assert row["spill"] == 0 and 0 < row["registers"] <= 255 and not row["faults"]
        if row["kernel"].startswith("syrk"):
            assert MMA[target] in row["mma"]
    if target == "90":
        the_report_compiles_what_is_launched(keys)
    if target == "gfx942":
        rocm_is_asked_for_nothing_it_does_not_know(keys)


def the_report_compiles_what_is_launched(keys):
    kernels = {row["name"].split()[0] for row in keys}
    banded = {"factor", "product", "triangle", "other_factor", "update", "chase"}
    steps = set("thin thin_gram sum inner total mend directions cholesky basis values advance".split())
    others = {"squares", "divide", "convert", "symmetrise", "shift", "unshift"}  # of Newton-Schulz
    spectra = set("elements syrk correct tridiagonal scale sturm eigh singular_distribution".split())
    assert kernels == spectra | banded | steps | others
    products = [row for row in keys if row["name"].startswith("syrk fp32")]
    whole, odd = (next(row for row in products if x in row["name"]) for x in ("GPT", "531"))
    assert whole["constants"]["GRAIN"] == "16" and odd["constants"]["GRAIN"] == "1"  # 768, 531
    assert {row["constants"]["PRECISION"] for row in keys if "syrk" in row["name"]} == {"tf32x3"}
    reductions = [row for row in keys if row["name"].startswith("tridiagonal fp32")]
    assert "A_ptr" in reductions[0]["divisible"] and "r" in reductions[0]["divisible"]
    shared, alone = (next(row for row in reductions if x in row["name"]) for x in ("531", "many"))
    assert shared["constants"]["COOPERATIVE"] == "True" and shared["options"]["launch_cooperative_grid"] == "True"
    assert alone["constants"]["COOPERATIVE"] == "False" and alone["constants"]["first_event"] == "1"
    chases = {(row["constants"]["COOPERATIVE"], row["constants"]["SWEEPS"]) for row in keys if "chase" in row["name"]}
    assert chases == {("True", "1"), ("False", "4"), ("True", "4")}


def rocm_is_asked_for_nothing_it_does_not_know(keys):
    products = [row for row in keys if row["name"].startswith("syrk")]
    assert {row["constants"]["PRECISION"] for row in products} == {"ieee"}
    assert not [row for row in keys if "maxnreg" in row["options"]]


def test_sizes_and_factors_do_not_make_kernels_of_their_own():
    """What a GPU's JIT compiles takes a minute of the tests; 60 were of this kernel."""
    done = run(
        FRESH
        + """
from bench.compile_report import target_of
from bench.stub_gpu import launches
from sosd_fast.kernels.syrk import syrk
with launches(target_of("90")) as record:
    for m in (1, 5, 16, 40, 64, 531, 768):
        for k in (1, 7, 16, 160, 1000):
            A = torch.empty(3, m, k, device="cuda")
            for view in (A, torch.empty(3, k, m, device="cuda").mT, A[:1], A[:, :, ::2]):
                for alpha in (1.0, 0.5):
                    syrk(view, alpha=alpha, shift=alpha - 1)
print(len(record), len({launch.key for launch in record}))
"""
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched, compiled = map(int, done.stdout.split())
    assert launched >= 280 and compiled <= 7  # rows or columns side by side or neither, at multiples of 16 or not


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_rocm_imports_triton():
    """In a new interpreter: the one that others are forked from has imported Triton."""
    code = """
import sys, torch
assert "triton" not in sys.modules and torch.version.cuda is None
torch.version.hip = "6.2"
from sosd_fast import kernels
assert kernels.triton is not None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_spill_is_a_fault():
    from types import SimpleNamespace

    from bench.compile_report import faults

    options = SimpleNamespace(num_warps=4, launch_cooperative_grid=True, backend_name="cuda")
    launch = SimpleNamespace(options=options, grid=(66, 8), arguments={"r": 768})  # 4 to a multiprocessor
    row = {"registers": 128, "spill": 0, "mma": [], "wide": 8, "kernel": "tridiagonal fp32"}
    assert not faults(launch, row)
    for change in ({"registers": 129}, {"spill": 8}, {"wide": 0}, {"kernel": "syrk fp32"}):
        assert len(faults(launch, row | change)) == 1
