"""The paper's runs: their settings, and that each of them starts."""

import prepared
import pytest
import torch

import sosd_fast
from training import checkpoint
from training import run as script
from training.model import PRESETS, flops_per_token
from training.parallel import mesh_sizes
from training.presets import RUNS
from training.schedule import SCHEDULES

PAPER = {
    # steps, tokens a step, all tokens, optimizer, weight decay, schedule, warm-up, clip
    "small-adamw-step": (20_400, 524_288, 10.7e9, "adamw", 0.0, "step", 250, None),
    "small-adamw-wsd": (5_100, 524_288, 2.67e9, "adamw", 0.0, "wsd", 250, None),
    "small-muon-wsd": (5_100, 524_288, 2.67e9, "muon", 0.0, "wsd", 250, None),
    "medium-adamw-wsd": (5_100, 524_288, 2.67e9, "adamw", 0.125, "wsd", 500, None),
    "llama-0.5b-cosine": (100_000, 1_048_576, 105e9, "adamw", 0.1, "cosine", 1_000, 1.0),
    "llama-0.5b-cosine-nodecay": (100_000, 1_048_576, 105e9, "adamw", 0.0, "cosine", 1_000, 1.0),
    "llama-2b-cosine": (100_000, 1_048_576, 105e9, "adamw", 0.1, "cosine", 1_000, 1.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_of_the_paper(name):
    args = script.parse_args([f"--preset={name}", "--device=cpu"])
    steps, step_tokens, tokens, optimizer, decay, schedule, warmup, clip = PAPER[name]
    context = PRESETS[args.model].context
    assert (args.steps, args.batch_size * context, args.optimizer) == (steps, step_tokens, optimizer)
    assert (args.weight_decay, args.schedule, args.warmup, args.clip) == (decay, schedule, warmup, clip)
    assert args.steps * args.batch_size * context == pytest.approx(tokens, rel=0.01)
    assert args.eval_sequences * context == pytest.approx(10e6, rel=0.01)
    assert args.dtype == "bfloat16" and args.compile
    assert args.lr == {"gpt2": 0.02 if optimizer == "muon" else 1.8e-3, "llam": args.lr}[args.model[:4]]
    assert 4e-4 <= args.lr <= 1e-3 or args.model.startswith("gpt2")


def test_wsd_decays_over_the_last_1450_steps_and_cosine_ends_at_a_tenth():
    args = script.parse_args(["--preset=small-adamw-wsd"])
    multiplier = [SCHEDULES[args.schedule](step, args.steps, args.warmup) for step in range(args.steps)]
    assert multiplier[args.warmup - 1] == multiplier[3650] == 1 > multiplier[3651]
    args = script.parse_args(["--preset=llama-2b-cosine"])
    assert SCHEDULES[args.schedule](args.steps - 1, args.steps, args.warmup) == pytest.approx(0.1, abs=1e-6)


def test_every_recipe_has_a_nano_run():
    nano = {name: run for name, run in RUNS.items() if name.startswith("nano-")}
    assert set(RUNS) == set(PAPER) | set(nano)
    recipe = ("optimizer", "weight_decay", "schedule", "clip", "decay_all")
    recipes = [{key: run.get(key) for key in recipe} for run in RUNS.values()]
    for name in PAPER:
        assert any({key: RUNS[name].get(key) for key in recipe} == each for each in recipes[len(PAPER) :]), name
    for name, run in nano.items():
        assert PRESETS[run["model"]].width == 256 and run["steps"] * run["batch_tokens"] < 4e6, name


def test_a_flag_beats_the_preset_and_the_preset_the_default():
    args = script.parse_args(["--preset=small-muon-wsd", "--steps=3", "--no-compile"])
    assert (args.steps, args.compile, args.optimizer, args.tracker_k) == (3, False, "muon", 32)


@pytest.mark.parametrize("name", RUNS)
def test_dry_run_says_the_size(name, capsys):
    count = {"small": "123.6 M", "medium": "353.5 M", "llama-0.5b": "475.2 M", "llama-2b": "2.14 B"}
    count |= {"nano-llama": "4.3 M", "nano": "3.2 M"}
    assert script.main([f"--preset={name}", "--dry-run", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert f": {next(size for start, size in count.items() if name.startswith(start))} parameters" in out
    assert f"{RUNS[name]['batch_tokens']:,} tokens" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("nano-")])
def test_nano_runs_start(name, tmp_path, text, unsaved):
    flags = ["--steps=2", "--context=32", "--batch-tokens=64", "--eval-sequences=2", "--quiet", "--device=cpu"]
    assert script.main([f"--preset={name}", *flags, f"--data={text}", f"--run-dir={tmp_path / 'run'}"]) == 0
    run = sosd_fast.load(tmp_path / "run")
    assert len(run.log) == 2 and run.log[-1]["lr"] > 0 and run.records


@pytest.fixture
def unsaved(monkeypatch):
    """Leaves out the last checkpoint, 450 MB for the vocabulary of GPT-2; test_resume.py has the checkpoints."""
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a text that is long enough " * 100)
    return file


@pytest.mark.slow
def test_gpt2_small_starts_with_its_real_width_and_vocabulary(tmp_path, text, unsaved):
    """A step of 64 tokens in bfloat16, one block; whole models start in `python -m bench.training --presets`."""
    flags = [
        "--steps=1",
        "--layers=1",
        "--context=32",
        "--batch-tokens=64",
        "--no-compile",
        "--eval-sequences=1",
        "--tracker=off",
    ]
    flags += ["--quiet", "--device=cpu", f"--data={text}", f"--run-dir={tmp_path / 'run'}", "--micro-batch-size=1"]
    assert script.main(["--preset=small-adamw-wsd", *flags]) == 0
    losses = [line["loss"] for line in sosd_fast.load(tmp_path / "run").log]
    assert losses[0] == pytest.approx(10.8, abs=0.4)  # log 50304


def test_the_2b_model_builds_and_gets_its_optimizers_on_the_meta_device():
    with torch.device("meta"):
        model = script.Transformer(PRESETS["llama-2b"])
    args = script.parse_args(["--preset=llama-2b-cosine", "--device=cpu"])
    (adamw,) = script.build_optimizers(model, args.optimizer, args.lr, args.weight_decay, decay_all=args.decay_all)
    decayed = {id(p) for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    x = torch.zeros(1, 2048, dtype=torch.int64, device="meta")
    assert model(x, x).shape == ()


def test_flops_are_six_a_weight_and_attention():
    config = PRESETS["gpt2-small"]
    assert flops_per_token(config) == 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    config = PRESETS["llama-0.5b"]
    assert flops_per_token(config) == 6 * (15 * 16 * 1280**2 + 32000 * 1280) + 12 * 15 * 1280 * 2048


def test_batches_that_do_not_divide_are_refused(capsys):
    for flags, message in [
        (["--batch-tokens=1000"], "--batch-tokens: expected a multiple of 256, got 1000"),
        (["--batch-size=8", "--micro-batch-size=3"], "--batch-size: expected a multiple of 1 ranks x"),
        (["--preset=large"], "small-adamw-wsd"),
    ]:
        with pytest.raises(SystemExit):
            script.parse_args(flags)
        assert message in capsys.readouterr().err


def test_parallel_needs_torchrun(tmp_path, capsys):
    assert script.main(["--parallel=fsdp", f"--run-dir={tmp_path / 'run'}", "--device=cpu"]) == 2
    assert "setup: expected the environment that torchrun sets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (
            8,
            ["--parallel=fsdp+tp", "--tp-size=3"],
            "expected a number that divides the 8 processes, got --tp-size=3. Ch",
        ),
        (8, ["--parallel=tp", "--tp-size=2"], "got --tp-size=2. Leave --tp-size out, or take --parallel=fsdp+tp."),
        (8, ["--parallel=tp"], "--tp-size: expected a number that divides the 4 heads of --model=gpt2-nano, got 8. Ch"),
        (8, ["--parallel=hsdp+tp", "--replicas=3"], "divides 8 processes / 2 that share products, got --replicas=3."),
        (
            8,
            ["--parallel=fsdp+tp", "--batch-size=6"],
            "expected a multiple of 4 groups of 2 ranks x --micro-batch-size",
        ),
    ],
)
def test_meshes_that_do_not_divide_are_refused(monkeypatch, capsys, ranks, flags, message):
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert message in capsys.readouterr().err


def test_sizes_of_meshes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh_sizes("ddp", 8) == {}
    assert mesh_sizes("fsdp", 8, tp=2) == {"shard": 8}  # --tp-size is for tp
    assert mesh_sizes("hsdp", 8) == {"replicate": 2, "shard": 4}
    assert mesh_sizes("tp", 8) == {"tp": 8}
    assert mesh_sizes("fsdp+tp", 8) == {"shard": 4, "tp": 2}
    assert mesh_sizes("hsdp+tp", 16, tp=4) == {"replicate": 4, "shard": 1, "tp": 4}


def test_documented_presets_exist():
    done = prepared.run(script.__file__, "--help")
    assert done.returncode == 0, done.stderr
    for name in RUNS:
        assert name in done.stdout.replace("\n", "").replace(" ", "")
