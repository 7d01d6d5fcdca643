"""What all benchmarks share: the card, the truth, interleaved timing, gates and bars, the table, the JSON line."""

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from training.machine import card

ROOT = Path(__file__).resolve().parent.parent


def show_card():
    """Prints the machine card."""
    print("  ".join(f"{name} {value}" for name, value in card().items() if value), flush=True)


def upright(W: Tensor) -> Tensor:
    """The orientation that torch.linalg.svdvals is faster in."""
    return W if W.shape[0] >= W.shape[1] else W.mT


def true_svdvals(W: Tensor) -> Tensor:
    """The singular values (r,) of W (m, n), by a float64 SVD on the CPU, descending."""
    return torch.linalg.svdvals(upright(W.double().cpu()))


def resident_mb() -> float:
    """The resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def interleaved(variants: dict[str, Callable], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Times variants in turn, in a new order each time, so that a drifting machine and the one before hit all alike.

    On the CPU each begins after a pause: OpenMP's threads go on spinning for milliseconds after their work, and would
    charge one variant with the end of another (top-k at 768 x 768 after svdvals: 1.65 ms, by itself 0.77;
    LOG.md#topk-cpp).

    Returns:
        name -> {"ms": median, "low": 20 % quantile, "high": 80 % quantile}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, turns = random.Random(0), list(variants.items())
    for i in range(warmup + repeats):
        order.shuffle(turns)
        for name, run in turns:
            time.sleep(0.0 if torch.cuda.is_available() else 0.02)
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: quantiles(times) for name, times in seconds.items()}


FLUSH_BYTES = 2**28  # several times any L2


def interleaved_cuda(variants: dict[str, Callable], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """`interleaved` by CUDA events, with a cold L2 and the host running ahead, as in a training step."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
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


def gates(found: dict[str, bool]) -> bool:
    """Says in a line each whether a condition holds without which no time counts; returns whether all do."""
    for what, holds in found.items():
        print(f"gate: {what}: {'holds' if holds else 'FAILS'}")
    return all(found.values())


def bar(what: str, value: float, limit: float, at_least: bool = False):
    """Says in one line whether a figure meets the bar set for it."""
    holds = value >= limit if at_least else value <= limit
    side = "at least" if at_least else "at most"
    print(f"bar: {what}: {value:.3g}, {side} {limit:g}: {'holds' if holds else 'MISSED'}")


def parser(description: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """An argument parser with the options of every benchmark, and --repeats where that has a default."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--json", metavar="FILE", help="Writes the result to bench/results/<machine>/FILE; off by default.")
    if repeats is not None:
        what = "The number of interleaved repetitions, %(default)s by default."
        p.add_argument("--repeats", type=int, default=repeats, help=what)
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
