"""What all benchmarks share: the card, interleaved timing, the table, the JSON line."""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def card() -> dict:
    """Names the machine, the versions and the commit."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(variants: dict[str, Callable], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Times variants in turn, A B C A B C ..., so that a drifting machine hits all alike.

    On the CPU each begins after a pause: OpenMP's threads go on spinning for milliseconds after their work, and would
    charge one variant with the end of another (top-k at 768 x 768 after svdvals: 1.65 ms, by itself 0.77).

    Returns:
        name -> {"ms": median, "low": 20 % quantile, "high": 80 % quantile}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + repeats):
        for name, run in variants.items():
            time.sleep(0.0 if torch.cuda.is_available() else 0.02)
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: quantiles(times) for name, times in seconds.items()}


def interleaved_cuda(variants: dict[str, Callable], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """`interleaved` by CUDA events, with a cold L2 and the host running ahead, as in a training step."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # several times any L2
    for i in range(warmup + repeats):
        for name, run in variants.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host queues the launches
            began.record()
            run()
            ended.record()
            ended.synchronize()
            if i >= warmup:
                seconds[name].append(1e-3 * began.elapsed_time(ended))
    return {name: quantiles(times) for name, times in seconds.items()}


def attempted_cuda(variants: dict[str, Callable], repeats: int = 2) -> dict[str, dict[str, float]]:
    """Times libraries' functions one by one, once where that takes seconds; says which fail, and leaves them out."""
    times = {}
    for name, run in variants.items():
        try:
            times[name] = interleaved_cuda({name: run}, 1, 0)[name]
            if times[name]["ms"] < 2000:
                times[name] = interleaved_cuda({name: run}, repeats, 0)[name]
        except Exception as error:
            print(f"{name} failed: {error}", flush=True)
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 20 and 80 % quantiles, in ms."""
    fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
    return {"ms": 1e3 * statistics.median(seconds), "low": 1e3 * fifths[0], "high": 1e3 * fifths[3]}


def show(title: str, columns: list[str], rows: list[list]):
    """Prints a table."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for i, row in enumerate(cells):
        first, *rest = (c.rjust(w) if j else c.ljust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join([first, *rest]).rstrip())
        if i == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))


def bar(what: str, value: float, limit: float, at_least: bool = False):
    """Says in one line whether a figure meets the bar set for it."""
    holds = value >= limit if at_least else value <= limit
    side = "at least" if at_least else "at most"
    print(f"bar: {what}: {value:.3g}, {side} {limit:g}: {'holds' if holds else 'MISSED'}")


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options of every benchmark."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="also write the result to bench/results/<machine>/FILE")
    return p


def finish(result: dict, file: str | None):
    """Prints the result as the last line, in JSON, and keeps it where asked."""
    result = {"card": card()} | result
    if file:
        machine = (result["card"]["gpu"] or result["card"]["cpu"]).lower().replace(" ", "-").replace("/", "-")
        path = ROOT / "bench" / "results" / machine / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
