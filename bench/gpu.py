"""Everything that a GPU has to prove, in 8 minutes: the tests, then each benchmark, each with a time limit of its own.

JSON goes to bench/results/<gpu name>/, what each part printed to build/gpu/<part>.log; one summary at the end. A part
that fails, hangs or takes too long is ended with all its processes and loses no other. Benchmarks run though tests
fail, for each has a gate of its own, but the summary says so: their figures are then not to be quoted.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness import ROOT, show, show_card

TOTAL = 480  # seconds
LEAST = 25  # seconds that a part leaves to each later one

# Warnings of versions other than the pinned ones must not fail a test; what waits for ever shows where.
PYTEST = ["-m", "pytest", "-q", "-W", "default", "-o", "faulthandler_timeout=40", "--maxfail=20"]
KERNELS = ("syrk", "sturm", "eigh", "distribution", "newton_schulz", "tridiagonal")
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in KERNELS), "tests/spectra/test_topk.py", "tests/spectra/test_cuda.py",
    "tests/test_muon.py", "tests/probe/test_side.py",
]  # fmt: skip
PARTS = {  # name -> (seconds, arguments of python); tests whose programs wait for one another come last
    "tests": (170, [*PYTEST, *TESTS, "-k", "not cold_start"]),
    "svdvals": (70, ["-m", "bench.svdvals", "--json", "svdvals.json"]),
    "topk": (45, ["-m", "bench.topk", "--json", "topk.json"]),
    "end_to_end": (170, ["-m", "bench.end_to_end", "--compile", "--trackers", "full", "fast", "--turns", "3",
                         "--json", "end_to_end.json"]),
    "newton_schulz": (60, ["-m", "bench.newton_schulz", "--repeats", "5", "--json", "newton_schulz.json"]),
    "distribution": (60, ["-m", "bench.distribution", "--json", "distribution.json"]),
    "svd_overhead": (40, ["-m", "bench.svd_overhead", "--model", "gpt2-small", "--json", "svd_overhead.json"]),
}  # fmt: skip


def run(name: str, seconds: float, arguments: list[str], logs: Path) -> tuple[str, float, list[str]]:
    """Runs a part in processes of its own; returns how it ended, the seconds it took, and what it says of the bars."""
    began = time.perf_counter()
    path = logs / f"{name}.log"
    with path.open("w") as log:
        part = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "140"},
        )  # fmt: skip
        try:
            status = part.wait(timeout=seconds)
            ended = "ok" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            try:  # compilers and other children too
                os.killpg(part.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            part.wait(timeout=20)
        except subprocess.TimeoutExpired:  # held by the driver; the next part may find the GPU busy
            ended += ", and would not die"
    lines = path.read_text(errors="replace").splitlines()
    lines = [line for line in lines if not line.startswith("{")]  # the JSON
    print(f"--- {name}: {ended}", *lines[-40 if ended == "ok" else -60 :], sep="\n", flush=True)
    return ended, time.perf_counter() - began, [line for line in lines if line.startswith("bar: ")]


def main():
    """Runs the parts; exit status 1 if one did not end well."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help=f"Runs these parts only; by default all: {', '.join(PARTS)}.",
    )
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: expected a CUDA GPU, got none. The same kernels are proved by `make test`.")
    show_card()
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    ended, bars = summary(args.only, logs)
    show("GPU", ["part", "ended", "s"], [[name, how, f"{seconds:.0f}"] for name, (how, seconds) in ended.items()])
    print(*bars, sep="\n")
    if ended.get("tests", ("ok",))[0] != "ok":
        print("The tests are red: no figure above is to be quoted.")
    raise SystemExit(any(how != "ok" for how, _ in ended.values()))


def summary(names: list[str], logs: Path) -> tuple[dict[str, tuple[str, float]], list[str]]:
    """Runs parts within the time there is; returns how each ended, and after how long, and all lines about bars."""
    began, ended, bars = time.perf_counter(), {}, []
    for i, name in enumerate(names):
        limit, arguments = PARTS[name]
        left = TOTAL - (time.perf_counter() - began) - LEAST * (len(names) - i - 1)
        how, seconds, said = run(name, max(1.0, min(limit, left)), arguments, logs)
        ended[name] = (how, seconds)
        bars += said
    return ended, bars


if __name__ == "__main__":
    main()
