"""Damages run directories and token shards, and sees that what reads them gives what is there, or says so.


A mutant fails as one of tests/checkpoints/fuzz.py does.

    python tests/runs/fuzz_runs.py COUNT SEED [FOLDER]   prints a line of JSON; keeps failed mutants in FOLDER
"""

import collections
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import fuzz  # what mutates and watches there

from sosd_fast.__main__ import main as command
from sosd_fast.runs import records, watch
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import JsonLines, Record, RunWriter, load
from training.data import fixed_batches, load_data
from training.prepare import prepare
from training.shards import write_shard

REPORTED = 40  # one of so many, for a page takes a second
SAID = re.compile(
    r"(load|load_data|load_text|Run|Run\.\w+|JsonLines|report|watch|analyze|read_shard|Shards\.read|prepare|documents"
    r"|Tokenizer|fixed_batches): expected "
)


class Whole(NamedTuple):
    """Files that are whole: where they are, which one is damaged, and what reads them."""

    folder: Path
    damaged: Path
    read: Callable[[Path, random.Random, Path], None]


def run_in(folder: Path, parquet: bool) -> Path:
    """A run of closed segments, with all files that one may have."""
    records.SEGMENT_BYTES, hidden = 4000, sys.modules.get("pyarrow")
    if not parquet:
        sys.modules["pyarrow"] = None
    try:
        settings = {"settings": {"k": 2}, "matrices": ["h.0.attn.q.weight", "h.0.mlp.fc.weight"]}
        writer = RunWriter(folder, settings)
        for step in range(30):
            S = np.linspace(2, 0.5, 5) + 0.01 * step
            writer.append([
                Record(step, name, (5, 7), "gram32", 1, 0.1 / (step + 1), cosine=float("nan"), sigma_max=2.0,
                       topk=(2.0, 1.0), residual=(0.1, 0.2), spectrum=S)
                for name in settings["matrices"]
            ])  # fmt: skip
        writer.close()
    finally:
        if not parquet:
            sys.modules.pop("pyarrow") if hidden is None else sys.modules.update(pyarrow=hidden)
    lines = JsonLines(folder / "log.jsonl")
    lines.write(*({"step": step, "loss": 5 / (step + 1), "overhead": 0.01, "step_ms": 3.0} for step in range(30)))
    lines.close()
    lines = JsonLines(folder / "events.jsonl")
    event = Event(step=9, what="onset", names=("attention",), at=7, value=0.1)
    lines.write(*({k: v for k, v in vars_of(event).items() if v is not None} for _ in range(3)))
    lines.close()
    (folder / "config.json").write_text(json.dumps({"lr": 1e-3, "model": "a", "steps": 30}))
    return folder


def vars_of(event: Event) -> dict:
    """The fields of an event."""
    return {f: getattr(event, f) for f in event.__dataclass_fields__}


def read_run(folder: Path, rng: random.Random, out: Path):
    """Reads it in three ways, now and then by a page, or by going on after step 12."""
    if rng.random() < 1 / REPORTED:
        return page(folder, out)
    run = load(folder)
    steps = [
        lambda: run.records, lambda: run.columns("step", "name", "sd_variation", "interval"),
        lambda: [run.spectra(name) for name in run.names], lambda: run.events, lambda: run.log,
        lambda: shown.print(watch.snapshot(folder)), lambda: run.to_parquet(out / "all.parquet"),
        lambda: (RunWriter(folder, step=12).close(), load(folder).records),
    ]  # fmt: skip
    refused = []
    for step in rng.sample(steps, 3):
        try:
            step()
        except ValueError as error:
            refused.append(error)
    if refused:
        raise min(refused, key=lambda error: bool(SAID.match(str(error))))  # one that is no sentence first


def page(folder: Path, out: Path):
    """The report, as the command makes it."""
    with open(os.devnull, "w") as nothing:
        sys.stdout, sys.stderr, kept = nothing, nothing, (sys.stdout, sys.stderr)
        try:
            status = command(["report", str(folder), "-o", str(out / "r.html")])
        finally:
            sys.stdout, sys.stderr = kept
    if status:
        raise ValueError("report: expected a run that can be read.")


def read_shards(folder: Path, rng: random.Random, out: Path):  # noqa: ARG001
    """Opens the data as training does, and reads batches of it."""
    fixed_batches(load_data(folder).train, 4, 8, 16)


def prepare_text(folder: Path, rng: random.Random, out: Path):
    """Makes shards of text by a tokenizer from a file, or of bytes."""
    shutil.rmtree(out / "shards", ignore_errors=True)
    name = f"tokenizers:{folder / 'tokenizer.json'}" if rng.random() < 0.7 else "bytes"
    prepare(str(folder / "a.txt"), out / "shards", name, val_tokens=50)


def wholes(folder: Path) -> dict[str, Whole]:
    """Whole files of each kind."""
    found = {}
    for name in ("json", "parquet"):
        run = run_in(folder / name, name == "parquet")
        segment = sorted(run.glob("records-*"))[0]
        files = ("meta.json", "records.jsonl", "spectra-00000.f32", "events.jsonl", "log.jsonl", "config.json")
        for file in (*(files if name == "json" else ()), segment.name):
            found[f"run's {file}"] = Whole(run, run / file, read_run)
    for rank in range(2):
        run_in(folder / "ranks" / f"rank-0000{rank}", True)
    found["rank's meta.json"] = Whole(folder / "ranks", folder / "ranks/rank-00001/meta.json", read_run)
    data = folder / "data"
    data.mkdir()
    for i, name in enumerate(("train_0.bin", "train_1.bin", "val_0.bin")):
        write_shard(data / name, np.random.default_rng(i).integers(0, 300, 400))
    (data / "meta.json").write_text(json.dumps({"vocab": 300}))
    found |= {f"shards' {file}": Whole(data, data / file, read_shards) for file in ("train_1.bin", "meta.json")}
    text = folder / "text"
    text.mkdir()
    (text / "a.txt").write_text("The quick brown fox jumps over the lazy dog. Öäü 日本\n" * 20)
    try:
        prepare(str(text / "a.txt"), folder / "made", "bpe:300", val_tokens=50)
        shutil.copy(folder / "made/tokenizer.json", text)
        found |= {f"text's {file}": Whole(text, text / file, prepare_text) for file in ("a.txt", "tokenizer.json")}
    except ImportError:
        pass
    return found


def outcome_of(whole: Whole, rng: random.Random, out: Path) -> str:
    """Reads a mutant; "read", "refused", or what is wrong."""
    signal.alarm(20)
    fuzz.watching = False  # what these commands write is asked for
    try:
        whole.read(whole.folder, rng, out)
        return "read"
    except ValueError as error:
        if not SAID.match(str(error)) or "\n" in str(error) or len(str(error)) > 1500:
            return f"sentence: {str(error)[:300]!r} {traceback.format_exc(limit=-3)}"
        return "asked for too much" if re.search("MemoryError|llocate", str(error)) else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {traceback.format_exc(limit=-5)}"
    finally:
        signal.alarm(0)


def main(count: int, seed: int, keep: Path | None) -> int:
    """Prints the counts of each kind; returns 1 where a mutant failed."""
    torch.set_num_threads(1)
    sys.addaudithook(started)
    rng, failures = random.Random(seed), []
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        out.mkdir()
        made = wholes(Path(temporary) / "made")
        backup = Path(temporary) / "whole"
        shutil.copytree(Path(temporary) / "made", backup)
        for whole in made.values():  # what is imported, and thread pools
            outcome = outcome_of(whole, random.Random(1), out)
            if outcome != "read":
                raise SystemExit(f"a whole file was not read: {whole.damaged}: {outcome}")
        page(Path(temporary) / "made/json", out)
        address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address + 3 * fuzz.MEMORY, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")
        base = fuzz.peak()
        for i in range(count):
            name = list(made)[i % len(made)]
            whole = made[name]
            restored(whole.folder, Path(temporary))
            mutant = fuzz.mutate(whole.damaged.read_bytes(), rng)
            whole.damaged.write_bytes(mutant)
            outcome = outcome_of(whole, rng, out)
            if fuzz.executed:
                outcome = f"executed {fuzz.executed.pop()}"
            if fuzz.peak() - base > fuzz.MEMORY:
                outcome = f"{(fuzz.peak() - base) >> 20} MB"
                Path("/proc/self/clear_refs").write_text("5")
            counts[name][outcome if outcome in ("read", "refused") else "failed"] += 1
            if outcome not in ("read", "refused"):
                failures.append((name, i, outcome))
                if keep:
                    (keep / f"{i}-{whole.damaged.name}").write_bytes(mutant)
        print(json.dumps({"kinds": counts, "peak_mb": (fuzz.peak() - base) >> 20, "failures": failures[:20]}))
    return bool(failures)


def restored(folder: Path, temporary: Path):
    """Puts a folder of files back to what it was."""
    shutil.rmtree(folder)
    shutil.copytree(temporary / "whole" / folder.relative_to(temporary / "made"), folder)


def started(event: str, arguments: tuple):
    """Notes programs that are started, and connections."""
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pty.")):
        fuzz.executed.append(f"{event}{arguments}"[:200])


if __name__ == "__main__":
    from rich.console import Console

    shown = Console(file=open(os.devnull, "w"), width=100)  # noqa: SIM115
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, fuzz.alarmed)
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), folder))
