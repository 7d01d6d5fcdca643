"""Runs of several processes against the same run in one: losses, spectra, checkpoints, and what failures leave."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import Process, run, run_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import sosd_fast
from sosd_fast.testing import sd_distance
from training import checkpoint
from training import run as script

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("training_worker.py")
FLAGS = ["--steps=4", "--batch-size=8", "--warmup=2", "--eval-every=2", "--eval-sequences=5", "--quiet", "--clip=1"]
FLAGS += ["--device=cpu", "--weight-decay=0.1", "--tracker-k=4"]
# One set of processes goes through all runs of as many ranks: half of what a rank does in one is to learn how DTensor
# spreads each operation.
PARALLEL = {
    2: {"ddp": [], "fsdp": [], "tp": []},
    4: {"hsdp": ["--replicas=2"], "fsdp+tp": ["--tp-size=2"]},
    8: {"hsdp+tp": ["--replicas=2"]},
}
RESUMED = {2: "fsdp", 4: "fsdp+tp"}
HALF = {2: ["fsdp", "tp"], 4: ["fsdp+tp"], 8: []}  # in half precision
LLAMA = ["--model=llama-nano", "--micro-batch-size=2"]
# Sums over ranks round in another order, which Muon amplifies most where a gradient's singular values are smallest. In
# float64 nothing of it is left to see: what differs there by more than the rounding of the spectra's files is a fault.
RUNS = {"adamw": ["--model=gpt2-nano"], "muon64": ["--float64", *LLAMA], "muon": LLAMA}
RUNS["muon64-gpt2"] = ["--float64", "--model=gpt2-nano"]
EXACT, ROUNDED = (1e-12, 1e-8), (1e-5, 1e-6)  # losses, relative; SD
TOLERANCE = {"adamw": ROUNDED, "muon": ROUNDED, "muon64": EXACT, "muon64-gpt2": EXACT}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(Path(script.__file__).read_bytes() * 2)
    return file


def joined(runs):
    """The flags of several runs, for one start of the processes."""
    return [flag for flags in runs for flag in ("--next", *flags)][1:]


def flags_of(names, text, folder, *more):
    usual = [*FLAGS, "--tracker=full", "--eval-every=4", "--checkpoint-every=4", f"--data={text}", *more]
    return joined(
        [*RUNS[name], *usual, f"--optimizer={name.split('6')[0]}", f"--run-dir={folder / name}"] for name in names
    )


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(WORKER, *flags_of(RUNS, text, folder))
    assert done.returncode == 0, done.stderr
    return {name: sosd_fast.load(folder / name) for name in RUNS}


def log(run_dir):
    clock = ("step_ms", "tokens_per_s", "overhead")
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def names_of(ranks, kind):
    """Float32 rounds alike in all kinds; a mesh with copies meets each model and optimizer once."""
    if kind.startswith("hsdp"):
        return ["muon64-gpt2"] if ranks == 8 else ["muon64"]
    return ["adamw", "muon64", *(["muon"] if kind == "fsdp+tp" else [])]


@pytest.mark.parametrize("ranks", PARALLEL)
def test_runs_are_those_of_one_process(alone, text, tmp_path, ranks):
    """Losses, spectra and checkpoints of each layout, and training in half precision."""
    flags = [
        flags_of(names_of(ranks, kind), text, tmp_path / kind, f"--parallel={kind}", *more)
        for kind, more in PARALLEL[ranks].items()
    ]
    flags += [half_precision(kind, text, tmp_path / f"half-{kind}") for kind in HALF[ranks]]
    if ranks in RESUMED:
        flags.append(checkpointed(RESUMED[ranks], text, tmp_path / "whole"))
    if ranks == 4:  # what 2 ranks resume, fresh ones do
        flags.append(resumed(tmp_path, "same"))
    done = run_ranks(ranks, WORKER, *joined(flags))
    assert done.returncode == 0, done.stderr
    for kind in PARALLEL[ranks]:
        for name in names_of(ranks, kind):
            same_run(alone[name], tmp_path / kind / name, ranks, *TOLERANCE[name])
            spectra_are_those_of_the_gathered_weights(tmp_path / kind / name)
    for kind in HALF[ranks]:
        all_matrices_are_measured_and_it_trains(tmp_path / f"half-{kind}")
    if ranks in RESUMED:
        if ranks == 2:
            other = resumed(tmp_path, "elsewhere", "--parallel=tp", "--tracker=off")
            done = run_ranks(2, WORKER, *joined([resumed(tmp_path, "same"), other]))
        else:
            done = run(WORKER, *resumed(tmp_path, "elsewhere", "--parallel=none", "--tracker=off"))
        assert done.returncode == 0, done.stderr
        it_resumed_bit_for_bit_and_in_another_layout(tmp_path)


def spectra_are_those_of_the_gathered_weights(run_dir):
    """Whatever the weights became: the records of the last step against a float64 SVD of the checkpoint's weights."""
    whole = run_dir / "weights.pt"
    dcp_to_torch_save(checkpoint.latest(run_dir), whole)
    weights, measured = torch.load(whole)["model"], sosd_fast.load(run_dir)
    for name in measured.names:
        name_of_whole, _, part = name.rstrip("]").partition("[")
        W = weights[name_of_whole].double()
        W = W.chunk(3)["qkv".index(part)] if part else W
        steps, spectra = measured.spectra(name)
        assert steps[-1] == 4
        assert sd_distance(torch.tensor(spectra[-1]), torch.linalg.svdvals(W)) <= 1e-6, name


def same_run(one, run_dir, ranks, loss_tolerance, sd_tolerance):
    several = sosd_fast.load(run_dir)
    assert len(several.log) == 4
    for key in ("loss", "val_loss", "grad_norm"):
        expected, found = ([line[key] for line in each.log if key in line] for each in (one, several))
        np.testing.assert_allclose(found, expected, rtol=loss_tolerance, err_msg=key)

    measured = [sorted((r.step, r.name) for r in each.records) for each in (one, several)]
    assert measured[0] == measured[1]  # each matrix by exactly one rank
    owners = [{r.name for r in sosd_fast.load(path).records} for path in sorted(run_dir.glob("rank-*"))]
    assert len(owners) == ranks and all(owners) and sum(map(len, owners)) == len(one.names)
    for name in one.names:
        for S, S_ref in zip(several.spectra(name)[1], one.spectra(name)[1], strict=True):
            assert sd_distance(torch.tensor(S), torch.tensor(S_ref)) <= sd_tolerance, name
    expected = {(r.step, r.name): r for r in one.records}
    for r in several.records:
        ref = expected[r.step, r.name]
        assert (r.shape, r.interval) == (ref.shape, ref.interval)
        if ref.sd_variation is not None:
            assert r.sd_variation == pytest.approx(ref.sd_variation, abs=2 * sd_tolerance)
        assert r.cosine == pytest.approx(ref.cosine, abs=sd_tolerance)
        assert len(r.topk) == len(ref.topk)


def checkpointed(kind, text, run_dir):
    flags = [*FLAGS, "--model=llama-nano", "--optimizer=muon", "--tracker=topk", f"--data={text}"]
    return [*flags, f"--parallel={kind}", "--checkpoint-every=2", f"--run-dir={run_dir}"]


def resumed(folder, name, *more):
    """From the checkpoint of step 2."""
    return [f"--half-of={folder / 'whole'}:{folder / name}", f"--resume={folder / name}", *more]


def it_resumed_bit_for_bit_and_in_another_layout(folder):
    assert log(folder / "same") == log(folder / "whole")
    records = [sosd_fast.load(folder / name).records for name in ("same", "whole")]
    assert records[0] == records[1] and records[0][-1].step == 4
    losses = [[line["loss"] for line in log(folder / name)] for name in ("elsewhere", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def half_precision(kind, text, run_dir):
    flags = [*FLAGS, "--tracker=fast", "--tracker-budget=0.01", "--dtype=bfloat16", "--steps=6", f"--data={text}"]
    return [*flags, f"--parallel={kind}", f"--run-dir={run_dir}"]


def all_matrices_are_measured_and_it_trains(run_dir):
    """The ranks have agreed on what to measure, which the clock decides on."""
    found = sosd_fast.load(run_dir)
    assert found.log[-1]["loss"] < found.log[0]["loss"] and len(found.log) == 6
    assert len({r.name for r in found.records}) == 13


@pytest.mark.parametrize("how", ["DIE", "HANG"])
def test_a_rank_that_fails_ends_the_run_and_keeps_what_was_flushed(text, tmp_path, how):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--steps=1000", "--tracker=full", "--eval-every=1", "--parallel=fsdp", f"--run-dir={run_dir}"]
    done = run_ranks(2, WORKER, *flags, f"--data={text}", "--timeout=4", UNTIL=str(tmp_path / "ended"), **{how: "1:6"})
    assert done.returncode not in (0, None)
    assert "Timed out" in done.stderr or how == "DIE", done.stderr
    assert [line["step"] for line in log(run_dir)] == [1, 2, 3, 4, 5]
    assert {r.step for r in sosd_fast.load(run_dir / "rank-00000").records} >= {0, 1, 2, 3, 4, 5}
    assert {r.step for r in sosd_fast.load(run_dir / "rank-00001").records} >= {0, 1, 2, 3, 4, 5}


# torchrun's agent, whose ranks are forked: two interpreters of their own take ten seconds to import what they need.
AGENT = """
import runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def rank(*argv):
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")

config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=0)
elastic_launch(config, rank)(*sys.argv[1:])
"""


def test_sigterm_to_torchrun_saves_on_all_ranks(text, tmp_path):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--steps=100000", "--tracker=full", "--parallel=ddp", f"--data={text}", f"--run-dir={run_dir}"]
    agent = Process(AGENT, WORKER, *flags)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and not ((run_dir / "log.jsonl").exists() and len(log(run_dir)) > 2):
            time.sleep(0.05)
        os.kill(agent.pid, signal.SIGTERM)
        assert agent.wait(60) != 0
    finally:
        agent.kill()
    with agent.stdout as out:
        said = out.read()
    step = log(run_dir)[-1]["step"]
    assert step > 2 and checkpoint.step_of(checkpoint.latest(run_dir)) == step, said
    assert max(r.step for r in sosd_fast.load(run_dir).records) == step
