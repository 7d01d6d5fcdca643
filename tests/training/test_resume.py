"""A run that was stopped and resumed is the run that was not, bit for bit."""

import json
import math
import os
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


def test_non_finite_loss_leaves_a_checkpoint_of_the_step_before(nano, text, tmp_path, capsys, monkeypatch):
    run_dir, calls, forward = tmp_path / "run", 0, script.Transformer.forward

    def struck(self, x, y):
        nonlocal calls
        calls += 1
        return forward(self, x, y) * (math.nan if calls == 9 else 1.0)

    monkeypatch.setattr(script.Transformer, "forward", struck)
    assert script.main([*FLAGS, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off"]) == 1
    steps = [json.loads(line)["step"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert checkpoint.step_of(checkpoint.latest(run_dir)) == steps[-1] == 3
    assert "the records and the weights up to there are in" in capsys.readouterr().err
    assert script.main([f"--resume={run_dir}"]) == 0
    assert len(sosd_fast.load(run_dir).log) == 10


@pytest.mark.filterwarnings("ignore")  # the probe warns of the matrices that turned NaN, as it should
@pytest.mark.parametrize("lr", ["1e15", "1e30"])
def test_weights_that_are_not_finite_are_not_saved(nano, text, tmp_path, capsys, lr):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, f"--data={text}", f"--run-dir={run_dir}", "--tracker=off", f"--lr={lr}", "--warmup=0"]
    assert script.main([*flags, "--checkpoint-every=1"]) == 1
    for path in checkpoint.all_of(run_dir):
        model = script.Transformer(TINY)
        checkpoint.load(path, model, script.build_optimizers(model, "adamw", 1.0), script.setup("none", "cpu"))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    said = capsys.readouterr().err
    assert "run: no checkpoint was written at step" in said and "expected finite weights" in said
    assert "; the records up to there are in" in said


def damage(path, how):
    """Damages a checkpoint as a power failure, a careless copy or another writer would."""
    part = path / "__0_0.distcp"
    if how == "cut":
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    elif how == "bits":
        part.write_bytes(part.read_bytes()[:64] + bytes(part.stat().st_size - 64))
    elif how == "no index":
        (path / ".metadata").unlink()
    elif how == "cut index":
        (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-20])
    elif how == "random states":
        (path / "rank-00000.pt").write_bytes(b"")
    elif how == "executes":
        (path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(path.parent / "run").encode())
    elif how == "leads outside":
        index = (path / ".metadata").read_bytes()
        (path / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../../../xyz"))
    elif how == "nan":
        model = script.Transformer(TINY)
        optimizers = script.build_optimizers(model, "adamw", 1.0)
        checkpoint.load(path, model, optimizers, script.setup("none", "cpu"))
        weights, states = checkpoint.get_state_dict(model, optimizers)
        weights["wte.weight" if "wte.weight" in weights else next(iter(weights))][0] = math.nan
        checkpoint.dcp.save({"model": weights, "optimizers": states}, checkpoint_id=path)


HOWS = ("cut", "bits", "no index", "cut index", "random states", "executes", "leads outside", "nan")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to; tests take copies."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_bytes(Path(script.__file__).read_bytes() * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "gpt2-nano", TINY)
        flags = [*FLAGS, f"--data={folder / 'text.txt'}", "--tracker=topk"]
        assert script.main([*flags, f"--run-dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.mark.expects_probe_failure  # torch's own log of what failed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(nano, whole, tmp_path, capsys, how):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    damage(run_dir / "checkpoints" / "step-000010", how)
    assert script.main([f"--resume={run_dir}"]) == 0
    said = capsys.readouterr().err
    assert "step-000010 (" in said and "trying the checkpoint before it" in said and "Traceback" not in said
    assert outcome(run_dir) == outcome(whole), "it went on from step 9"
    assert not (run_dir / "checkpoints" / "run").exists(), "nothing was executed"
    assert weights(run_dir) == weights(whole), "and the checkpoint was written again"


def test_no_checkpoint_that_can_be_read(nano, whole, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in checkpoint.all_of(run_dir):
        damage(path, "executes")
    before = (run_dir / "log.jsonl").read_bytes()
    assert script.main([f"--resume={run_dir}"]) == 2
    assert "none of its checkpoints can be read" in capsys.readouterr().err
    assert (run_dir / "log.jsonl").read_bytes() == before, "nothing was cut off"
    assert not (run_dir / "checkpoints" / "run").exists()


@pytest.mark.expects_probe_failure  # torch's own log of what failed
@pytest.mark.filterwarnings("ignore")
def test_values_in_a_checkpoint_are_not_executed(nano, whole, tmp_path, capsys):
    """torch reads what is no tensor, such as a learning rate, with the whole of pickle."""
    run_dir, mark = tmp_path / "run", tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(mark),))

    shutil.copytree(whole, run_dir)
    path = run_dir / "checkpoints" / "step-000010"
    model = script.Transformer(TINY)
    optimizers = script.build_optimizers(model, "adamw", 1.0)
    checkpoint.load(path, model, optimizers, script.setup("none", "cpu"))
    weights, states = checkpoint.get_state_dict(model, optimizers)
    states["param_groups"][0]["eps"] = Evil()
    checkpoint.dcp.save({"model": weights, "optimizers": states}, checkpoint_id=path)
    assert not mark.exists()
    assert script.main([f"--resume={run_dir}"]) == 0
    assert not mark.exists() and "trying the checkpoint before it" in capsys.readouterr().err


FULL = """
import resource, sys, torch
torch.set_num_threads(1)
from training import run
from training.model import PRESETS, Config
PRESETS["gpt2-nano"] = {config!r}
from training import checkpoint
save, calls = checkpoint.save, 0
def small(*args):
    global calls
    calls += 1
    if calls == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    try:
        return save(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.save = small
sys.exit(run.main({argv!r}))
"""


@pytest.mark.parametrize("limit", [50_000, 0])
def test_a_checkpoint_that_finds_the_disk_full(text, tmp_path, limit):
    """The second of four: the first stays, no part is left, training goes on."""
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--steps=8", f"--data={text}", "--tracker=off", "--checkpoint-every=2", f"--run-dir={run_dir}"]
    stopped = [*flags, "--steps=5"]
    for argv, kept in ((stopped, ["step-000002", "step-000005"]), (flags, ["step-000006", "step-000008"])):
        done = run(FULL.format(config=TINY, limit=limit, argv=argv))
        assert done.returncode == 0, done.stderr
        assert "run: no checkpoint was written at step 4" in done.stderr and "that of step 2 is kept" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == kept
        shutil.rmtree(run_dir)


def test_resume_needs_a_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([f"--resume={tmp_path}"])
    assert "--resume: expected a folder with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        "[1]", "{", "[" * 100_000, '{"steps": -3}', '{"steps": %s}' % ("9" * 5000), '{"optimizer": "nobody"}',
        '{"model": []}', '{"seed": -1}', '{"lr": NaN}', '{"steps": {}}', "\xff",
    ],
    ids=range(11),
)  # fmt: skip
def test_a_config_of_another_hand_is_one_line(tmp_path, capsys, config):
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(SystemExit):
        script.parse_args([f"--resume={tmp_path}"])
    assert "run.py" in (said := capsys.readouterr().err.splitlines())[-1] or "error: argument" in said[-1]
    assert "error: argument --" in said[-1]


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
