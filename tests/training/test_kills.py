"""Kills at random moments of `track` and of training/run.py, whose records are moved to new segments all the time."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from prepared import Process, run

import sosd_fast
from training import run as script

KILLS = int(os.environ.get("SOSD_KILLS", "4"))  # hundreds to be sure
FLAGS = ["--steps=24", "--batch-size=2", "--micro-batch-size=2", "--warmup=2", "--eval-every=12", "--quiet"]
FLAGS += ["--eval-sequences=2", "--device=cpu", "--checkpoint-every=3", "--tracker-k=4", "--tracker=full"]
CLOCK = ("step_ms", "tokens_per_s", "overhead")

TRACKED = """
import torch
torch.set_num_threads(1)
import sosd_fast, sosd_fast.runs.records
sosd_fast.runs.records.SEGMENT_BYTES = 4000  # closed every few steps
net = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(4)))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
probe = sosd_fast.track(net, run_dir={run!r}, step={resume!r}, method="full")
step = {resume!r} or 0
while True:
    net(torch.randn(2, 8)).square().mean().backward()
    optimizer.step()
    step += 1
    probe.flush()
    print(step, flush=True)
"""

TRAINED = """
import sys
import torch
torch.set_num_threads(1)
import sosd_fast.runs.records
from training import run
from training.model import PRESETS, Config
sosd_fast.runs.records.SEGMENT_BYTES = 12000
PRESETS["gpt2-nano"] = Config(n_layer=2, n_head=2, width=32, ff_width=64, context=32, vocab=256)
print("begun", flush=True)
sys.exit(run.main({argv!r}))
"""


@pytest.mark.slow
def test_kills_of_a_tracked_loop(tmp_path):
    """What was flushed is there after each, and no step is missing, torn or double; it goes on from there or before."""
    rng = np.random.default_rng(0)
    for life in range(KILLS):
        if life % 20 == 0:
            run_dir, resume = tmp_path / f"run-{life}", None
        child = Process(TRACKED.format(run=str(run_dir), resume=resume))
        first = child.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.2)))
        child.kill()
        with child.stdout as rest:
            said = [int(word) for word in (first, *rest.read().split()) if word.strip().isdigit()]
        assert said, first
        found = sosd_fast.load(run_dir)
        table = found.columns("step", "name")
        steps = table["step"][::4].tolist()
        assert steps == list(range(steps[-1] + 1)) and steps[-1] in (said[-1], said[-1] + 1)
        assert list(zip(table["step"], table["name"], strict=True)) == [
            (s, f"{i}.weight") for s in steps for i in range(4)
        ]
        assert found.spectra("3.weight")[0].tolist() == steps
        resume = max(1, said[-1] - int(rng.integers(0, 3)))


def outcome(run_dir):
    """What a run leaves behind but for what the clock says."""
    found = sosd_fast.load(run_dir)
    log = [{key: value for key, value in line.items() if key not in CLOCK} for line in found.log]
    return log, repr(found.records), {name: [part.tobytes() for part in found.spectra(name)] for name in found.names}


@pytest.mark.slow
def test_kills_of_a_training_run(tmp_path):
    """Killed and resumed until it ends, a run is the one that was never killed; how often is counted over all runs."""
    text = tmp_path / "text.txt"
    text.write_bytes(Path(script.__file__).read_bytes() * 4)
    argv = [*FLAGS, f"--data={text}"]
    done = run(TRAINED.format(argv=[*argv, f"--run-dir={tmp_path / 'whole'}"]))
    assert done.returncode == 0, done.stderr
    expected = outcome(tmp_path / "whole")
    assert len(expected[0]) == 24
    rng, kills, lives, resumed = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS:
        run_dir, status = tmp_path / f"run-{lives}", None
        lives += 1
        while status != 0:
            started = (run_dir / "config.json").exists() and any(run_dir.glob("checkpoints/step-*"))
            resumed += started
            child = Process(
                TRAINED.format(argv=[f"--resume={run_dir}"] if started else [*argv, f"--run-dir={run_dir}"])
            )
            assert child.stdout.readline() == "begun\n"
            until = (lines(run_dir) if started else 0) + int(rng.integers(1, 18))
            if kills < KILLS:
                while child_runs(child) and lines(run_dir) < until:
                    time.sleep(0.002)
                time.sleep(float(rng.uniform(0, 0.02)))
                if child_runs(child):
                    child.kill()
                    kills += 1
            status = child.wait(600)
            said = child.stdout.read()
            child.stdout.close()
            assert status in (0, -9), said
            if not started and status and not any(run_dir.glob("checkpoints/step-*")):
                run_dir = tmp_path / f"run-{lives}"  # nothing to resume from
                lives += 1
        assert outcome(run_dir) == expected, run_dir
    assert resumed or KILLS < 4
    print(f"{kills} kills of {lives} training runs, which were resumed {resumed} times")


def lines(run_dir):
    """How many steps a run has logged."""
    log = run_dir / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def child_runs(child):
    """Whether a process goes on."""
    try:
        child.wait(0.001)
    except TimeoutError:
        return True
    return False
