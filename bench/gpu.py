"""Everything that a GPU has to prove, in 8 minutes: the tests, then each benchmark, each with a time limit of its own.

First all shipped kernels are compiled, on every core, and programs that wait for one another and streams are tested:
a fault there makes everything after it worthless. JSON goes to bench/results/<gpu name>/, what each part printed to
build/gpu/<part>.log; the summary at the end says of every bar whether it holds, is missed or was not reached. A part
that fails, hangs or takes too long is ended with all its processes and loses no other. Benchmarks run though tests
fail, for each has a gate of its own, but the summary says so: their figures are then not to be quoted.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness import ROOT, finish, show, show_card

TOTAL = 480  # seconds
LEAST = 25  # seconds that a part leaves to each later one
SLOWER = 5  # times, a rehearsal

# Warnings of versions other than the pinned ones must not fail a test; what waits for ever shows where.
PYTEST = ["-m", "pytest", "-q", "-W", "default", "-o", "faulthandler_timeout=40", "--maxfail=20"]
# Of the first files those whose programs wait for one another, and what runs on streams.
FIRST = ["tests/kernels/test_tridiagonal.py", "tests/spectra/test_cuda.py", "tests/probe/test_side.py"]
WAITS = "tridiagonal or (test_side and cuda) or wait or stream"
KERNELS = ("syrk", "drift", "sturm", "eigh", "distribution", "newton_schulz")
TESTS = [*(f"tests/kernels/test_{name}.py" for name in KERNELS), "tests/spectra/test_topk.py", "tests/test_muon.py"]
# Compiling takes most of the tests' time: a process for each two cores compiles beside the others.
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2)) if importlib.util.find_spec("xdist") else 1
APART = ["-n", str(WORKERS), "--dist=worksteal"] if WORKERS > 1 else []
# Threads of several processes that wait for one another on the same cores: an eigenvalue problem of 513 rows took 40 s.
THREADS = {"tests": 1}
PARTS = {  # name -> (seconds, arguments of python)
    "compile": (60, ["-m", "bench.compile_report", "--warm", "--json", "compile_report.json"]),
    "reduction": (110, [*PYTEST, *FIRST, "-k", WAITS]),
    "tests": (130, [*PYTEST, *TESTS, FIRST[1], *APART, "-k", f"not cold_start and not ({WAITS})"]),
    "svdvals": (70, ["-m", "bench.svdvals", "--json", "svdvals.json"]),
    "topk": (45, ["-m", "bench.topk", "--json", "topk.json"]),
    "end_to_end": (170, ["-m", "bench.end_to_end", "--compile", "--trackers", "full", "fast", "--turns", "3",
                         "--json", "end_to_end.json"]),
    "newton_schulz": (60, ["-m", "bench.newton_schulz", "--repeats", "5", "--json", "newton_schulz.json"]),
    "distribution": (60, ["-m", "bench.distribution", "--json", "distribution.json"]),
    "svd_overhead": (40, ["-m", "bench.svd_overhead", "--model", "gpt2-small", "--json", "svd_overhead.json"]),
}  # fmt: skip
BARS = {  # part -> a piece of the line of each bar that it sets
    "svdvals": ["all values, ms", "eigvalsh of the Gram", "times faster than torch svdvals", "SD error"],
    "topk": ["warm, ms"],
    "end_to_end": ["full, over percent", "full, own percent", "fast, over percent", "fast, own percent"],
    "newton_schulz": [*["faster than the plain cuBLAS iteration"] * 6, "outside the promised band"],
    "distribution": [*["times faster than torch"] * 3, *["than torch.compile"] * 3],
    "svd_overhead": ["tracker and host included, ms"],
}


def run(name: str, seconds: float, arguments: list[str], logs: Path) -> tuple[str, float, list[str]]:
    """Runs a part in processes of its own; returns how it ended, the seconds it took, and what it says of the bars."""
    began = time.perf_counter()
    path = logs / f"{name}.log"
    threads = {"OMP_NUM_THREADS": str(THREADS[name])} if name in THREADS else {}
    with path.open("w") as log:
        part = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "140"} | threads,
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


def not_reached(name: str, said: list[str]) -> list[str]:
    """A line for each bar of a part that the part said nothing of."""
    left, missing = list(said), []
    for piece in BARS.get(name, []):
        line = next((line for line in left if piece in line), None)
        if line is None:
            missing.append(f"bar: {name}: {piece}: not reached")
        else:
            left.remove(line)
    return missing


def summary(names: list[str], logs: Path, rehearses: bool = False) -> tuple[dict[str, tuple[str, float]], list[str]]:
    """Runs parts within the time there is; returns how each ended, and after how long, and a line about each bar."""
    began, ended, bars = time.perf_counter(), {}, []
    for i, name in enumerate(names):
        limit, arguments = PARTS[name]
        left = TOTAL - (time.perf_counter() - began) - LEAST * (len(names) - i - 1)
        seconds = max(1.0, min(limit, left))
        if rehearses:
            seconds, arguments = SLOWER * limit, ["-m", "bench.rehearse", *arguments]
        how, seconds, said = run(name, seconds, arguments, logs)
        ended[name] = ("ran, not measured" if rehearses and how == "ok" else how, seconds)
        bars += said + not_reached(name, said)
    return ended, bars


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
    p.add_argument(
        "--rehearse",
        action="store_true",
        help="Runs every part at small sizes on a stub of a GPU, which computes nothing and times nothing; off by "
        "default.",
    )
    args = p.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("bench.gpu: expected a CUDA GPU, got none. Add --rehearse to run its lines without one.")
    show_card()
    logs = ROOT / "build" / ("rehearsal" if args.rehearse else "gpu")
    logs.mkdir(parents=True, exist_ok=True)
    ended, bars = summary(args.only, logs, args.rehearse)
    show("GPU", ["part", "ended", "s"], [[name, how, f"{seconds:.0f}"] for name, (how, seconds) in ended.items()])
    print(*bars, sep="\n")
    red = [name for name in ("reduction", "tests") if ended.get(name, ("ok",))[0] not in ("ok", "ran, not measured")]
    if red:
        print(f"Red: {' and '.join(red)}. No figure above is to be quoted.")
    parts = {name: {"ended": how, "seconds": round(seconds)} for name, (how, seconds) in ended.items()}
    finish({"benchmark": "gpu", "parts": parts, "bars": bars}, None if args.rehearse else "gpu.json")
    raise SystemExit(any(how not in ("ok", "ran, not measured") for how, _ in ended.values()))


if __name__ == "__main__":
    main()
