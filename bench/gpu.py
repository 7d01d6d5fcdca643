"""Everything that a GPU has to prove, in 8 minutes: the tests, then each benchmark, each with a time limit of its own.

JSON goes to bench/results/<gpu name>/, what each part printed to build/gpu/<part>.log; one summary at the end. A part
that fails or takes too long loses no other; the benchmarks run only if the tests pass, or with --anyway.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness import ROOT, card, show

PARTS = {  # name -> (seconds, arguments of python)
    "tests": (150, ["-m", "pytest", "-q", "-x", *(f"tests/test_{name}.py" for name in (
        "cuda", "side", "syrk", "sturm", "tridiagonal", "distribution", "newton_schulz", "muon"))]),
    "svdvals": (75, ["-m", "bench.svdvals", "--json", "svdvals.json"]),
    "newton_schulz": (60, ["-m", "bench.newton_schulz", "--repeats", "5", "--json", "newton_schulz.json"]),
    "distribution": (45, ["-m", "bench.distribution", "--json", "distribution.json"]),
    "topk": (45, ["-m", "bench.topk", "--json", "topk.json"]),
    "svd_overhead": (75, ["-m", "bench.svd_overhead", "--model", "gpt2-small", "--json", "svd_overhead.json"]),
}  # fmt: skip


def run(name: str, seconds: float, arguments: list[str], logs: Path) -> tuple[str, float]:
    """Runs a part in a process of its own; returns how it ended and the seconds it took."""
    began = time.perf_counter()
    path = logs / f"{name}.log"
    with path.open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "140"},
            )  # fmt: skip
            ended = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
    lines = path.read_text(errors="replace").splitlines()
    lines = [line for line in lines if not line.startswith("{")]  # the JSON
    print(f"--- {name}: {ended}", *lines[-25 if ended == "ok" else -60 :], sep="\n", flush=True)
    return ended, time.perf_counter() - began


def main():
    """Runs the parts; exit status 1 if one did not end well."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    p.add_argument("--anyway", action="store_true", help="run the benchmarks although the tests fail")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: expected a CUDA GPU, got none. The same kernels are proved by `make test`.")
    print("  ".join(f"{k} {v}" for k, v in card().items() if v), flush=True)
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    ended = {}
    for name in args.only:
        if ended.get("tests", ("ok",))[0] != "ok" and not args.anyway:
            ended[name] = ("left out: the tests are red", 0.0)
        else:
            ended[name] = run(name, *PARTS[name], logs)
    show("GPU", ["part", "ended", "s"], [[name, how, f"{seconds:.0f}"] for name, (how, seconds) in ended.items()])
    raise SystemExit(any(how != "ok" for how, _ in ended.values()))


if __name__ == "__main__":
    main()
