import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch

import sosd_fast
from sosd_fast.runs.records import JsonLines, Record, RunWriter
from training import run as script
from training.model import PRESETS, Config, Transformer, flops_per_token
from training.schedule import constant, cosine, step_decay, wsd

RUN = Path(script.__file__)
TINY = Config(n_layer=2, n_head=2, width=32, ff_width=64, context=32, vocab=256)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads; on busy cores waiting for each other made these tests 30x slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(RUN.read_bytes() * 4)
    return file


@pytest.fixture
def train(tmp_path, text, monkeypatch):
    """Run the script on a tiny model in this process; returns (status, run directory)."""
    monkeypatch.setitem(PRESETS, "gpt2-nano", TINY)

    def train(name="run", *flags):
        run_dir = tmp_path / name
        argv = ["--steps=8", "--batch-size=2", "--warmup=2", "--eval-every=4", "--eval-sequences=4", "--device=cpu"]
        return script.main([*argv, f"--data={text}", f"--run-dir={run_dir}", *flags]), run_dir

    return train


def read_log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_it_ends_with_the_commands_that_show_the_run(train, capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", str(Path.cwd() / ".venv/bin/python"))
    _, run_dir = train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"one page about it: .venv/bin/python -m sosd_fast report {run_dir}",
        f"a live view, also while it trains: .venv/bin/python -m sosd_fast watch {run_dir}",
    ]


# Schedules


def test_constant_and_warmup():
    assert [constant(s, 10, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [constant(s, 10) for s in (0, 9)] == [1.0, 1.0]


def test_step_decay_cuts_at_half_and_three_quarters():
    assert [step_decay(s, 20) for s in (0, 9, 10, 14, 15, 19)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert step_decay(0, 20, 2) == 0.5


def test_wsd_falls_linearly_to_zero_after_the_last_step():
    assert [wsd(s, 5100) for s in (0, 3650)] == [1.0, 1.0]
    assert wsd(3651, 5100) == pytest.approx(1449 / 1450)
    assert wsd(4375, 5100) == pytest.approx(0.5)
    assert wsd(5099, 5100) == pytest.approx(1 / 1450)
    assert [wsd(s, 10, 0, 0.5) for s in (5, 6, 9)] == pytest.approx([1.0, 0.8, 0.2])


def test_cosine_falls_to_a_tenth():
    assert cosine(0, 100) == 1.0
    assert cosine(50, 100) == pytest.approx(0.55)
    assert cosine(25, 100) == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert cosine(100, 100) == pytest.approx(0.1)
    assert [cosine(s, 110, 10) for s in (0, 9, 60)] == pytest.approx([0.1, 1.0, 0.55])


def test_schedules_stay_within_one():
    for schedule in (constant, step_decay, wsd, cosine):
        values = [schedule(s, 57, 5) for s in range(57)]
        assert 0 < min(values) and max(values) == 1.0
        assert values[5:] == sorted(values[5:], reverse=True)


# Optimizers


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_muon_gets_the_matrices_of_the_body_only(name):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    names = {id(p): n for n, p in model.named_parameters()}
    muon, adam = script.build_optimizers(model, "muon", 0.02, 0.1, 1e-3)
    assert isinstance(muon, sosd_fast.Muon) and isinstance(adam, torch.optim.AdamW)
    body = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert body == {n for n in names.values() if n.startswith("h.") and "norm" not in n}
    assert body | rest == set(names.values()) and not body & rest
    assert {(g["initial_lr"], g["weight_decay"]) for g in muon.param_groups} == {(0.02, 0.1)}
    fused = {names[id(p)] for g in muon.param_groups if g["split"] == 3 for p in g["params"]}
    assert fused == {n for n in body if n.endswith("c_attn.weight")} and len(fused) == 4
    assert [(g["initial_lr"], g["weight_decay"]) for g in adam.param_groups] == [(1e-3, 0.0)]


def test_adamw_decays_the_body_only():
    (adam,) = script.build_optimizers(Transformer(TINY), "adamw", 1e-3, 0.1)
    assert [(len(g["params"]), g["weight_decay"], g["initial_lr"]) for g in adam.param_groups] == [
        (8, 0.1, 1e-3),
        (1, 0.0, 1e-3),
    ]
    assert adam.defaults["betas"] == (0.9, 0.95)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"build_optimizers: expected one of .*'muon'.*, got optimizer='sgd'"):
        script.build_optimizers(Transformer(TINY), "sgd", 1e-3)


# The run


def test_run_directory_and_output(train, capsys, real_figures):
    status, run_dir = train("run", "--tracker=full", "--steps=9", "--lr=0.01")
    assert status == 0
    log = read_log(run_dir)
    assert [line["step"] for line in log] == list(range(1, 10))
    assert [line["step"] for line in log if "val_loss" in line] == [4, 8, 9]
    keys = {"step", "loss", "lr", "tokens", "step_ms", "tokens_per_s", "overhead"}
    assert all(set(line) - {"val_loss"} == keys for line in log)
    assert [line["tokens"] for line in log] == [64 * step for step in range(1, 10)]
    assert all(line["step_ms"] > 0 and 0 <= line["overhead"] < 1 for line in log)
    assert [line["lr"] for line in log] == pytest.approx([0.01 * wsd(step, 9, 2) for step in range(9)])
    assert log[-1]["loss"] < log[0]["loss"]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["steps"] == 9 and config["lr"] == 0.01 and config["versions"]["torch"] == torch.__version__
    assert (run_dir / "run.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    for word in ("attention", "mlp", "embedding", "onset", "tokens/s", "overhead"):
        assert word in out
    assert str(run_dir) in out.replace("\n", "") and "run.png" in out


def test_every_matrix_is_recorded_every_step(train):
    _, run_dir = train("run", "--tracker=exact")
    run = sosd_fast.load(run_dir)
    names = {r.name for r in run.records}
    assert len(names) == 2 * (3 + 1 + 2) + 1  # q, k, v, projection and two of the MLP a layer; the tied embedding
    assert {r.step for r in run.records} >= set(range(1, 9))
    curves = script.variation_by_kind(run)
    assert set(curves) == {"attention", "mlp", "embedding"}
    for steps, variation in curves.values():
        assert (np.diff(steps) > 0).all() and (variation > 0).all()


def test_the_onset_is_looked_for_before_the_learning_rate_falls(tmp_path):
    writer = RunWriter(tmp_path)
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(1, 101):
        falling = max(0.0, (step - 60) / 40)
        variation = 1e-3 * (1 - 0.999 * falling)
        writer.append([Record(step=step, name="h.0.mlp.w", shape=(4, 4), method="gram32", sd_variation=variation)])
        log.write({"step": step, "lr": 1 - falling})
    writer.close()
    log.close()
    table = script.closing_table(sosd_fast.load(tmp_path))
    assert [column._cells[0] for column in table.columns] == ["mlp", "1.00e-06", "100", "1.00e-03", "1", "not seen"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_bit_identical_whatever_the_tracker(train, optimizer):
    losses = {}
    for tracker in ("off", "fast", "full", "topk", "exact"):
        flags = ("--quiet", f"--tracker={tracker}", f"--optimizer={optimizer}", "--weight-decay=0.1", "--tracker-k=4")
        status, run_dir = train(tracker, *flags)
        assert status == 0
        losses[tracker] = [(line["loss"], line.get("val_loss")) for line in read_log(run_dir)]
    assert all(found == losses["off"] for found in losses.values())
    _, run_dir = train("other", "--quiet", "--tracker=off", f"--optimizer={optimizer}", "--seed=1")
    assert [(line["loss"], line.get("val_loss")) for line in read_log(run_dir)] != losses["off"]


@pytest.mark.parametrize("schedule", ["constant", "step", "wsd", "cosine"])
def test_llama_and_every_schedule(train, monkeypatch, schedule):
    llama = Config(1, 2, 32, 64, 32, 256, activation="swiglu", norm_gain=True, tied=False)
    monkeypatch.setitem(PRESETS, "llama-nano", llama)
    status, run_dir = train(schedule, "--model=llama-nano", f"--schedule={schedule}", "--quiet", "--tracker=full")
    assert status == 0
    assert "head" in script.variation_by_kind(sosd_fast.load(run_dir))


def test_bfloat16(train):
    _, single = train("single", "--quiet", "--tracker=off")
    _, half = train("half", "--quiet", "--tracker=off", "--dtype=bfloat16")
    first, second = read_log(single)[0]["loss"], read_log(half)[0]["loss"]
    assert first != second and second == pytest.approx(first, rel=1e-2)


def test_mfu_is_the_models_flops_over_the_peak(train, monkeypatch):
    monkeypatch.setitem(script.PEAK_FLOPS, "", 1e12)  # "" is part of any device's name, also of none
    _, run_dir = train("mfu", "--quiet", "--tracker=off", "--steps=2")
    for line in read_log(run_dir):
        assert line["mfu"] == pytest.approx(flops_per_token(TINY) * line["tokens_per_s"] / 1e12)


@pytest.mark.filterwarnings("ignore")  # the probe warns of the matrices that turned NaN, as it should
def test_non_finite_loss_stops_with_its_records_kept(train, capsys):
    status, run_dir = train("run", "--tracker=full", "--lr=1e15", "--warmup=0", "--quiet")
    assert status == 1
    assert "run: expected a finite loss, got loss=" in (err := capsys.readouterr().err)
    assert "Lower --lr (now 1e+15)" in err
    log = read_log(run_dir)
    assert 1 <= len(log) < 8
    assert all(math.isfinite(line["loss"]) for line in log)
    assert {r.step for r in sosd_fast.load(run_dir).records} >= {line["step"] for line in log}


def test_default_run_directories_never_mix(train, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "gpt2-nano", TINY)
    for expected in ("runs/gpt2-nano-adamw-wsd-s0", "runs/gpt2-nano-adamw-wsd-s0-2"):
        flags = ["--steps=2", "--batch-size=2", "--tracker=off", "--quiet", "--device=cpu", f"--data={text}"]
        assert script.main(flags) == 0
        assert len(read_log(tmp_path / expected)) == 2
    with pytest.raises(SystemExit):
        train("runs/gpt2-nano-adamw-wsd-s0")
    assert "--run-dir: expected a new or empty folder" in capsys.readouterr().err


# Wrong flags


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tracker=slow", "choose from"),
        ("--tracker=slow", "exact"),
        ("--model=gpt5", "llama-0.5b"),
        ("--optimizer=sgd", "muon"),
        ("--schedule=linear", "cosine"),
        ("--dtype=float16", "bfloat16"),
        ("--device=tpu9", "Try --device=cpu"),
        ("--steps=0", "argument --steps: expected a number of at least 1, got 0"),
        ("--steps=many", "invalid int value"),
        ("--lr=nan", "expected a number of at least 0, got nan"),
    ],
)
def test_wrong_flag_value_says_what_is_right(flag, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args([flag])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_data_leaves_no_run_directory(train, capsys):
    status, run_dir = train("run", "--data=/no/such/text")
    assert status == 2 and not run_dir.exists()
    assert "load_text: expected a text file or a folder, got path='/no/such/text'" in capsys.readouterr().err


def test_unwritable_run_directory_is_an_error(train, text, capsys):
    status, _ = train("run", f"--run-dir={text}/below-a-file")
    assert status == 2
    assert "run: cannot start" in (err := capsys.readouterr().err) and "below-a-file" in err


def test_learning_rates_have_defaults_by_optimizer():
    lr = {name: script.parse_args([f"--optimizer={name}"]) for name in ("adamw", "muon")}
    assert [(args.lr, args.adam_lr) for args in lr.values()] == [(1e-3, 1e-3), (0.02, 1e-3)]
    args = script.parse_args(["--optimizer=muon", "--lr=0", "--adam-lr=0.5"])
    assert (args.lr, args.adam_lr) == (0.0, 0.5)


def test_every_flag_is_documented():
    out = prepared.run(RUN, "--help").stdout
    for flag in ("tracker", "tracker-budget", "tracker-k", "model", "optimizer", "schedule", "warmup", "steps"):
        assert f"--{flag}" in out
    for flag in ("batch-size", "lr", "weight-decay", "data", "seed", "device", "dtype", "compile", "eval-every"):
        assert f"--{flag}" in out


# As a program


def test_ctrl_c_ends_with_the_table(tmp_path, text):
    run_dir = tmp_path / "run"
    flags = ["--tracker=full", "--steps=1000", "--batch-size=1", "--eval-every=1", "--eval-sequences=1", "--device=cpu"]
    process = prepared.Process(RUN, *flags, f"--data={text}", f"--run-dir={run_dir}", folder=tmp_path)
    with process.stdout as said:
        for line in said:  # the first validation has been printed: the loop is under way
            if line.startswith("step 1:"):
                break
        os.kill(process.pid, signal.SIGINT)
        out = said.read()
    assert process.wait(60) == 130, out
    assert "Traceback" not in out
    assert "interrupted after step" in out and "attention" in out
    assert read_log(run_dir)[0]["step"] == 1
    assert (run_dir / "run.png").exists()
