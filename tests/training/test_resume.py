"""A run that was stopped and resumed is the run that was not, bit for bit."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import run

import sosd_fast
from training import checkpoint
from training import run as script
from training.model import PRESETS, Config

TINY = Config(n_layer=2, n_head=2, width=32, ff_width=64, context=32, vocab=256)
FLAGS = ["--steps=10", "--batch-size=4", "--micro-batch-size=2", "--clip=1", "--warmup=2", "--eval-every=3", "--quiet"]
FLAGS += ["--eval-sequences=4", "--device=cpu", "--checkpoint-every=3", "--weight-decay=0.1", "--tracker-k=4"]
CLOCK = ("step_ms", "tokens_per_s", "overhead")

# Run the script on the tiny model, and at a chosen call of a function send this process a signal.
CHILD = """
import os, sys, signal
import torch
torch.set_num_threads(1)
from training import checkpoint, run
from training.model import PRESETS, Config, Transformer
PRESETS["gpt2-nano"] = {config!r}
owner, name, call = {point}
calls, original = 0, getattr(owner, name)
def struck(*args, **kwargs):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), {signal})
    return original(*args, **kwargs)
setattr(owner, name, struck)
sys.exit(run.main({argv!r}))
"""


@pytest.fixture
def nano(monkeypatch):
    monkeypatch.setitem(PRESETS, "gpt2-nano", TINY)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(Path(script.__file__).read_bytes() * 4)
    return file


def outcome(run_dir):
    """What a run leaves behind but for what the clock says."""
    found = sosd_fast.load(run_dir)
    log = [{key: value for key, value in line.items() if key not in CLOCK} for line in found.log]
    records = [
        {f: getattr(r, f) for f in r.__dataclass_fields__ if f != "spectrum" and getattr(r, f) is not None}
        for r in found.records
    ]
    spectra = {name: [part.tobytes() for part in found.spectra(name)] for name in found.names}
    return log, repr(records), spectra


def weights(run_dir):
    """The bytes of the last checkpoint's tensors, whichever file holds them."""
    torch.manual_seed(0)
    model = script.Transformer(TINY)
    optimizers = script.build_optimizers(model, json.loads((run_dir / "config.json").read_text())["optimizer"], 1.0)
    checkpoint.load(checkpoint.latest(run_dir), model, optimizers, script.setup("none", "cpu"))
    state = [p for o in optimizers for each in o.state.values() for p in each.values() if isinstance(p, torch.Tensor)]
    return [p.detach().numpy().tobytes() for p in [*model.parameters(), *state]]


# Forward calls: 2 a step, and 2 a validation after steps 3, 6, 9.
POINTS = {
    "term": ("(Transformer, 'forward', 9)", signal.SIGTERM, 4),  # in step 4: it ends, and is saved
    "kill": ("(Transformer, 'forward', 20)", signal.SIGKILL, 6),  # in step 8, after the checkpoint of step 6
    "kill-saving": ("(checkpoint.dcp, 'save', 2)", signal.SIGKILL, 3),  # half of the checkpoint of step 6 is there
}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "tracker"), [("adamw", "full"), ("muon", "topk")])
def test_kill_and_resume_is_bit_identical(nano, text, tmp_path, optimizer, tracker):
    flags = [*FLAGS, f"--data={text}", f"--optimizer={optimizer}", f"--tracker={tracker}"]
    whole = tmp_path / "whole"
    assert script.main([*flags, f"--run-dir={whole}"]) == 0
    expected, expected_weights = outcome(whole), weights(whole)
    assert len(expected[0]) == 10 and expected[2]
    for name, (point, number, saved) in POINTS.items():
        run_dir = tmp_path / name
        argv = [*flags, f"--run-dir={run_dir}"]
        code = CHILD.format(config=TINY, point=point, signal=int(number), argv=argv)
        done = run(code)
        assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
        assert checkpoint.step_of(checkpoint.latest(run_dir)) == saved
        assert script.main([f"--resume={run_dir}"]) == 0
        assert outcome(run_dir) == expected
        assert weights(run_dir) == expected_weights


def test_a_run_without_a_tracker_resumes(nano, text, tmp_path):
    flags = [*FLAGS, f"--data={text}", "--tracker=off"]
    assert script.main([*flags, f"--run-dir={tmp_path / 'whole'}"]) == 0
    assert script.main([*flags, f"--run-dir={tmp_path / 'part'}"]) == 0
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000010")
    assert script.main([f"--resume={tmp_path / 'part'}"]) == 0
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")
    assert script.main([f"--resume={tmp_path / 'part'}"]) == 0  # it has ended: nothing is left to do
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")


def test_only_the_newest_checkpoints_are_kept(nano, text, tmp_path):
    run_dir = tmp_path / "run"
    assert script.main([*FLAGS, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off"]) == 0
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-000009", "step-000010"]


@pytest.mark.filterwarnings("ignore")  # the probe warns of the matrices that turned NaN, as it should
def test_non_finite_loss_leaves_a_checkpoint_of_the_step_before(nano, text, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off", "--lr=1e15", "--warmup=0"]
    flags.remove("--clip=1")
    assert script.main(flags) == 1
    steps = [json.loads(line)["step"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == steps[-1]
    assert "the weights up to there are in" in capsys.readouterr().err


def test_resume_needs_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([f"--resume={tmp_path}"])
    assert "--resume: expected a folder with a config.json" in capsys.readouterr().err


def test_accumulation_is_the_large_batch(nano, text, tmp_path):
    losses = {}
    for size in (1, 2, 4):
        run_dir = tmp_path / str(size)
        flags = [*FLAGS, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off", f"--micro-batch-size={size}"]
        assert script.main(flags) == 0
        losses[size] = np.array([(line["loss"], line["grad_norm"]) for line in sosd_fast.load(run_dir).log])
    np.testing.assert_allclose(losses[1], losses[4], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[4], rtol=1e-5)


def test_clipping_bounds_the_step(nano, text, tmp_path):
    found = {}
    for clip in (None, 1e-3, 1e9):
        flags = [flag for flag in FLAGS if not flag.startswith("--clip")] + ([f"--clip={clip}"] if clip else [])
        run_dir = tmp_path / str(clip)
        assert script.main([*flags, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off"]) == 0
        found[clip] = sosd_fast.load(run_dir).log
    assert all("grad_norm" not in line for line in found[None])
    assert [line["loss"] for line in found[None]] == [line["loss"] for line in found[1e9]]
    assert [line["loss"] for line in found[None]] != [line["loss"] for line in found[1e-3]]
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 1e-3 for line in found[1e-3])
