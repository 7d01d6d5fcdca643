"""Runs a part of `bench.gpu` on the stub of a GPU: `python -m bench.rehearse -m bench.topk --json topk.json`.

Every Python line runs that would run beside a GPU, at small sizes, and with the results of the references: a gate that
fails shows a fault of that part. No time means anything, so that no bar says whether it holds.
"""

import argparse
import importlib
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import triton  # noqa: F401  before sosd_fast, which then defines its kernels
from triton.backends.compiler import GPUTarget

from bench import harness, stub_gpu
from training import model

TARGET = GPUTarget("cuda", 90, 32)
SMALL = {  # module -> constants in the place of its own
    "bench.svdvals": {"SETS": {"gpt2-small": [((48, 48), 4), ((48, 96), 2)]}},
    "bench.newton_schulz": {"CUDA_SHAPES": [(m, n) for m in (48, 64, 80) for n in (m, 4 * m)], "CUDA_BATCH": 2},
    "bench.distribution": {"GROUPS": [(3, 48), (2, 48), (2, 64), (2, 80), (1, 16)]},
}
FLAGS = {  # module -> flags after its own
    "bench.end_to_end": ["--tokens", "128", "--micro-batch", "1", "--turns", "1", "--steps", "1"],
    "bench.topk": ["--k", "8"],
    "bench.compile_report": ["--only", "sturm fp32", "syrk fp32: GPT-2"],
    # the tests of kernels alone, which run in the interpreter; and a bound that LAPACK does not keep
    "pytest": ["--deselect", "tests/kernels", "--deselect",
               "tests/spectra/test_cuda.py::test_small_eigenproblems_at_full_size"],
}  # fmt: skip
# Tests whose names hold these have sizes that the references take minutes for.
LARGE = ("4096", "2048", "1024", "3072", "768", "300", "72", "torch.float16", "muon_follows")


def bar(what: str, value: float, limit: float, at_least: bool = False):  # noqa: ARG001
    """In the place of `harness.bar`."""
    print(f"bar: {what}: not measured, {'at least' if at_least else 'at most'} {limit:g}")


def once(variants, repeats, warmup=2, run=harness.interleaved_cuda):  # noqa: ARG001
    """In the place of `harness.interleaved_cuda`: each variant once, and no memory to empty a cache with."""
    return run(variants, 1, 0)


def main():
    """Runs the module that `-m` names, with the arguments after it."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-m", dest="module", required=True, help="The module to run; all arguments after it are its own.")
    name = p.parse_args(sys.argv[1:3]).module
    sys.argv = [name, *sys.argv[3:], *FLAGS.get(name, [])]
    if name == "pytest":  # which takes the last -k
        sys.argv += ["-n", "0"] if "-n" in sys.argv else []
        given = sys.argv[sys.argv.index("-k") + 1]
        sys.argv += ["-k", " and ".join([f"({given})", *(f"not {text}" for text in LARGE)])]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    harness.ROOT = Path(tempfile.mkdtemp(prefix="rehearsal"))  # a stub's figures are no result
    harness.bar, harness.interleaved_cuda, harness.FLUSH_BYTES = bar, once, 1
    model.PRESETS["gpt2-small"] = model.Config(n_layer=2, n_head=2, width=48, ff_width=96, context=32, vocab=256)
    if name != "pytest":
        module = importlib.import_module(name)
        for other, constants in SMALL.items():
            vars(importlib.import_module(other)).update(constants)
    # the report puts a stub of its own in the place of each GPU it compiles for
    stub = stub_gpu.launches if name == "bench.compile_report" else stub_gpu.installed
    with stub(TARGET) as launches:
        try:
            runpy.run_module("pytest", run_name="__main__") if name == "pytest" else module.main()
        finally:
            kernels = sorted({launch.kernel.__name__ for launch in launches})
            print(f"{len(launches)} launches, {len({launch.key for launch in launches})} to compile: {kernels}")


if __name__ == "__main__":
    main()
