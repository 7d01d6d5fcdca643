import json
import warnings

import numpy as np
import prepared
import pytest
import torch

import sosd_fast
from sosd_fast.runs.phases import Kink, Phases
from training.data import load_data, load_text
from training.flags import parse_args as parse_run_args
from training.model import PRESETS, Config, Transformer
from training.paper import claims, figures, reproduce, scales, theory
from training.paper.finished import Finished

GPT2 = Config(n_layer=2, n_head=2, width=32, ff_width=64, context=32, vocab=256)
LLAMA = Config(2, 2, 32, 64, 32, 256, activation="swiglu", norm_gain=True, tied=False)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs the script at a developer's scale, in this process; returns (status, folder)."""
    monkeypatch.setitem(PRESETS, "gpt2-nano", GPT2)
    monkeypatch.setitem(PRESETS, "llama-nano", LLAMA)
    models = [(f"--model={name}", "--batch-size=1") for name in ("gpt2-nano", "llama-nano")]
    scale = scales.Scale(*models, 30, 3, 5, ("--device=cpu",), theory_steps=400)
    monkeypatch.setitem(reproduce.SCALES, "nano", scale)
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d times %d is %d\n" % (i, j, i * j) for i in range(60) for j in range(60)))

    def call(*argv, out="out", drawn=False):
        folder = tmp_path / out
        if not drawn:  # half a second each
            monkeypatch.setattr(figures, "save", lambda *_: None)
        return reproduce.main(["--jobs=0", f"--data={text}", f"--out={folder}", *argv]), folder

    return call


@pytest.mark.slow
def test_all_ends_with_figures_numbers_and_every_claim(tiny, tmp_path, capsys):
    published = tmp_path / "published"
    status, out = tiny("all", "--seeds=1", f"--publish={published}", drawn=True)
    assert status == 0
    assert {p.name for p in published.iterdir()} == {
        *(f"{f}.png" for f in reproduce.PAPER),
        "table.md",
        "settings.json",
    }
    settings = json.loads((published / "settings.json").read_text())
    assert settings["seeds"] == [0] and settings["torch"] == torch.__version__ and len(settings["flags"]) == 5
    text = (out / "table.md").read_text()
    assert capsys.readouterr().out.count(text) == 1
    for name in ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "T1", "T2", "T3", "C1b", "C2b", "T2b", "T3b"):
        assert f"| {name} |" in text and f"- **{name}**" in text
    assert text.count("holds |") + text.count("holds weakly |") + text.count("at this scale |") == 16
    for figure in figures.RUNS:
        png, numbers = (out / f"{figure}.png").read_bytes(), (out / f"{figure}.csv").read_text().splitlines()
        assert png[:4] == b"\x89PNG" and len(png) < 200_000
        assert numbers[0] == "panel,curve,seed,step,value" and len(numbers) > 100
    assert (out / "theory.png").stat().st_size < 200_000


def test_t1_holds_at_every_record_of_a_run_and_a_violation_is_reported(tiny, capsys):
    status, out = tiny("fig1", "--seeds=1")
    assert status == 0
    finished = Finished(out / "gpt2-wsd-s0")
    worst, violations, count = finished.bound_ratio
    assert 0 < worst <= 1 and violations == 0 and count == 30 * (2 * 6 + 1)
    observed = dict(np.load(out / "gpt2-wsd-s0" / "observed.npz"))
    observed["updates"][17] *= worst / 2
    np.savez(out / "gpt2-wsd-s0" / "observed.npz", **observed)
    capsys.readouterr()
    status, _ = tiny("fig1", "--seeds=1")
    assert status == 1 and "| T1 |" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_table_and_finished_runs_are_kept(tiny, capsys):
    argv = ("fig1", "--seeds=2", "--steps=12")
    _, first = tiny(*argv)
    _, second = tiny(*argv, out="again")
    assert (first / "table.md").read_text() == (second / "table.md").read_text()
    assert (first / "fig1.csv").read_text() == (second / "fig1.csv").read_text()
    before = (first / "gpt2-wsd-s1" / "log.jsonl").stat().st_mtime_ns
    (first / "gpt2-wsd-s0" / "finished.json").unlink()  # as an interruption leaves it
    capsys.readouterr()
    tiny(*argv)
    assert "1 are there, 1 to do" in capsys.readouterr().out
    assert (first / "gpt2-wsd-s1" / "log.jsonl").stat().st_mtime_ns == before
    assert (first / "table.md").read_text() == (second / "table.md").read_text()
    mark = first / "gpt2-wsd-s0" / "finished.json"
    mark.write_text(json.dumps(json.loads(mark.read_text())["flags"]))  # as it was written before there were commits
    tiny(*argv)
    assert "1 are there, 1 to do" in capsys.readouterr().out
    tiny("fig1", "--seeds=1", "--steps=8")  # other flags: another run
    assert "0 are there, 1 to do" in capsys.readouterr().out


def test_flags_after_two_dashes_go_to_every_run(tiny, capsys):
    status, out = tiny("fig1", "--seeds=1", "--steps=12", "--", "--width=48", "--layers=1")
    assert status == 0
    shapes = {r.name: r.shape for r in Finished(out / "gpt2-wsd-s0").run.records}
    assert shapes["wte.weight"] == (256, 48) and shapes["h.0.mlp.c_fc.weight"] == (96, 48)
    assert not any(name.startswith("h.1.") for name in shapes)
    assert "--width=48" in json.loads((out / "settings.json").read_text())["flags"]["gpt2-wsd-s0"]
    with pytest.raises(SystemExit):
        tiny("fig1", "--", "--steps=3")
    assert "after --, got --steps=3" in capsys.readouterr().err


FORKED = """  # a fresh interpreter takes seconds for each run, and again for one that then has nothing to do
import multiprocessing
from training.paper import reproduce
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda _: context
reproduce.ProcessPoolExecutor = lambda jobs, mp_context, max_tasks_per_child: ProcessPoolExecutor(jobs, mp_context)
from concurrent.futures import ProcessPoolExecutor
raise SystemExit(reproduce.main({argv!r}))
"""


@pytest.mark.slow
def test_runs_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    model = ("--model=gpt2-nano", "--batch-size=1")
    monkeypatch.setitem(reproduce.SCALES, "nano", scales.Scale(model, model, 2, 1, 2, ("--device=cpu",)))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 40)
    argv = ["fig1", "--seeds=1", "--jobs=2", f"--data={text}", f"--out={tmp_path / 'out'}"]
    assert reproduce.main(argv) == 0
    out = capsys.readouterr().out
    assert "gpt2-wsd-s0: " in out and "left" in out
    argv[3] = "--data=/nowhere"
    done = prepared.run(FORKED.format(argv=argv))
    assert done.returncode == 1 and "exit status 2" in done.stderr, done.stderr


def test_the_observer_measures_every_update_and_the_cosine_to_the_end(tmp_path):
    torch.manual_seed(0)
    model = Transformer(GPT2)
    body = list(model.h.parameters())
    optimizers = [torch.optim.SGD(body, lr=0.1), torch.optim.AdamW([model.wte.weight], lr=0.01)]
    matrices = sosd_fast.matrices.find_matrices(model)
    states = []
    with reproduce.Observer(7) as observer:
        for _ in range(7):
            tokens = torch.randint(256, (2, 32))
            loss = model(tokens, tokens)
            if not states:
                states.append([m.tensor().clone() for m in matrices])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            states.append([m.tensor().clone() for m in matrices])
    observer.save(tmp_path / "observed.npz")
    seen = np.load(tmp_path / "observed.npz")
    assert seen["names"].tolist() == [m.name for m in matrices] and seen["steps"].tolist() == list(range(8))
    for step in range(7):
        expected = [
            float((b.double() - a.double()).norm()) for a, b in zip(states[step], states[step + 1], strict=True)
        ]
        np.testing.assert_allclose(seen["updates"][step], expected, rtol=1e-5)
    flat = [[m.double().flatten() for m in state] for state in states]
    expected = [[float(a @ b / (a.norm() * b.norm())) for a, b in zip(s, flat[-1], strict=True)] for s in flat]
    np.testing.assert_allclose(seen["cosine"], expected, atol=1e-5)
    model(torch.zeros(1, 4, dtype=torch.long))  # no hook is left behind
    assert not torch.nn.modules.module._global_forward_pre_hooks


class Synthetic(Finished):
    """A run made of curves."""

    def __init__(
        self, lr, attention, mlp, loss=None, final_loss=1.0, onsets=(60, 60), boundary=50, norm=1.0, fall=50.0
    ):
        self.steps = np.arange(1, len(lr) + 1)
        self.lr, self.loss = lr, 3 / self.steps**0.2 if loss is None else loss
        self.val = np.array([[len(lr), final_loss]])
        self.kinds = {"attention": (self.steps, attention), "mlp": (self.steps, mlp)}
        kinks = {k: Kink(o, o, o, -2.0, 0.0, fall) if o else None for k, o in zip(self.kinds, onsets, strict=True)}
        at = Kink(boundary, 0, 0, -1.0, -0.1, 2.0) if boundary else None
        self.phases = Phases(kinks, {}, at, Kink(50, 0, 0, -1.0, -0.1, 2.0))
        self.body_norm = lambda: (self.steps, np.full(len(lr), norm))


T = np.arange(1, 401)
WSD, COSINE = np.minimum(1, (401 - T) / 114), 0.1 + 0.45 * (1 + np.cos(np.pi * T / 400))
CUTS = np.where(T <= 200, 1, np.where(T <= 300, 0.1, 0.01))


def verdict(claim, *runs):
    return claim(*([run] * 3 for run in runs)).verdict


def test_verdicts_follow_their_rules():
    wsd = Synthetic(WSD, 2e-4 * WSD, 1e-4 * WSD, loss=3 / T**0.2 - 0.2 * (1 - WSD))
    llama = Synthetic(COSINE, 2e-4 * COSINE, 1e-4 * COSINE)
    worse = Synthetic(WSD, 1e-4 * WSD, 2e-4 * WSD, onsets=(60, None), boundary=None, fall=3.0)
    NO, WEAK = "does not hold at this scale", "holds weakly"
    assert verdict(claims.c2, wsd, llama) == "holds"
    assert verdict(claims.c2, worse, llama) == WEAK
    assert verdict(claims.c2, Synthetic(WSD, WSD, WSD, onsets=(None, None)), llama) == NO
    assert verdict(claims.c3, wsd, llama) == "holds"
    assert verdict(claims.c3, worse, llama) == WEAK
    assert verdict(claims.c3, Synthetic(WSD, WSD, WSD, onsets=(300, 300)), llama) == NO
    assert verdict(claims.c4, wsd, llama) == "holds"
    assert verdict(claims.c4, Synthetic(WSD, 2 * WSD, WSD, onsets=(200, 60)), llama) == WEAK
    assert verdict(claims.c4, worse, llama) == NO
    step = Synthetic(CUTS, 2e-4 * CUTS, 1e-4 * CUTS, loss=wsd.loss - 0.1 * (T > 200))
    assert verdict(claims.c5, step, wsd) == "holds"
    assert verdict(claims.c5, Synthetic(CUTS, CUTS**0.4, CUTS**0.4, loss=step.loss), wsd) == WEAK
    assert verdict(claims.c5, Synthetic(CUTS, CUTS, CUTS, loss=wsd.loss), wsd) == NO
    assert verdict(claims.c6, wsd) == "holds"
    assert verdict(claims.c6, Synthetic(WSD, WSD / T, WSD / T, loss=wsd.loss)) == WEAK
    assert verdict(claims.c6, Synthetic(WSD, WSD, WSD)) == NO  # no gain in loss
    assert verdict(claims.c7, llama) == "holds"
    assert verdict(claims.c7, Synthetic(COSINE, 0 * T + 1.0, 1.0 * T)) == NO
    decayed = Synthetic(COSINE, 4e-4 * COSINE, 2e-4 * COSINE, norm=0.5, final_loss=0.9)
    assert verdict(claims.c8, llama, decayed) == "holds"
    assert verdict(claims.c8, llama, Synthetic(COSINE, COSINE, COSINE, norm=0.5, final_loss=1.1)) == WEAK
    assert verdict(claims.c8, decayed, llama) == NO
    assert verdict(claims.c9, wsd, Synthetic(WSD, 2e-5 * WSD, 1e-5 * WSD, final_loss=0.9)) == "holds"
    assert verdict(claims.c9, wsd, Synthetic(WSD, 1e-4 * WSD, 5e-5 * WSD, final_loss=1.1)) == WEAK
    assert verdict(claims.c9, wsd, wsd) == NO


def test_a_folder_of_results_may_move(tmp_path):
    flags = [f"--data={tmp_path}/bpe300/shards", "--steps=8"]
    (tmp_path / "run").mkdir()
    assert reproduce.portable(flags, tmp_path) == ["--data=bpe300/shards", "--steps=8"]
    (tmp_path / "run/finished.json").write_text(json.dumps({"flags": ["--data=bpe300/shards", "--steps=8"]}))
    assert reproduce.is_finished(tmp_path / "run", flags)
    assert not reproduce.is_finished(tmp_path / "run", ["--data=elsewhere/bpe300/shards", "--steps=8"])


def test_second_rules_beside_the_first():
    NO, WEAK = "does not hold at this scale", "holds weakly"
    impulse = 1 + 30 * np.exp(-(((T - 30) / 10) ** 2))  # 31 times the floor
    wsd, llama = Synthetic(WSD, impulse * WSD, impulse * WSD), Synthetic(COSINE, impulse * COSINE, impulse * COSINE)
    assert verdict(claims.c2_height, wsd, llama) == "holds"
    low = Synthetic(COSINE, impulse * COSINE, impulse**0.5 * COSINE)  # 5.6 times in MLP
    assert verdict(claims.c2_height, wsd, low) == WEAK
    assert verdict(claims.c2_height, Synthetic(WSD, WSD, WSD), llama) == NO  # the rate falls, and nothing else
    wsd.snapshots = llama.snapshots = low.snapshots = T
    for run, early in ((wsd, 40), (llama, 40), (low, 150)):
        run.spectrum_cosine = np.cos(0.1 * np.exp(-T / early))[:, None]  # near 1 from the start
        run.parameter_cosine = np.cos(1.5 * np.exp(-T / 200))[:, None]
    assert verdict(claims.c1_angle, wsd, llama) == "holds"
    assert verdict(claims.c1_angle, wsd, low) == WEAK
    low.spectrum_cosine = np.cos(0.1 * np.exp(-T / 300))[:, None]
    assert verdict(claims.c1_angle, wsd, low) == NO


def test_t2_and_t3_over_seeds():
    def results(v, q, least=0.01, powers=(1.0, 1.1, 1.2)):
        return [
            {
                "thresholds": {"exponent_V": {"exponent": a}, "exponent_QK": {"exponent": b}},
                "phase_I": {"least decrease per step over lr": least},
                "phase_II": {"largest exponent of a bound": power},
            }
            for a, b, power in zip(v, q, powers, strict=True)
        ]

    apart = results((0.40, 0.60, 0.50), (0.35, 0.54, 0.45))  # each pair differs, whatever the spread of the seeds
    assert claims.t2_over_seeds(apart).verdict == "holds"
    assert claims.t2_over_seeds(results((0.40, 0.60, 0.50), (0.45, 0.50, 0.45))).verdict == "holds weakly"
    assert (
        claims.t2_over_seeds(results((1.40, 1.60, 1.50), (0.45, 0.50, 0.45))).verdict == "does not hold at this scale"
    )
    assert claims.t3_over_seeds(apart).verdict == "holds"
    assert claims.t3_over_seeds(results((1, 1, 1), (1, 1, 1), least=-0.01)).verdict == "holds weakly"
    nothing = results((1, 1, 1), (1, 1, 1), powers=(0.0, 0.0, 0.5))
    assert claims.t3_over_seeds(nothing).verdict == "does not hold at this scale"


def test_subwords_are_written_once_and_again_where_they_were_interrupted(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    root = tmp_path / "source"
    root.mkdir()
    for i in range(60):
        (root / f"{i}.txt").write_bytes(b"".join(b"%d times %d is %d\n" % (i, j, i * j) for j in range(200)))
    monkeypatch.setattr(scales, "load_text", lambda: load_text(root))
    shards = scales.subwords(tmp_path / "bpe", 300)
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    tokens = load_data(shards)
    assert tokens.vocab == 300 and len(tokens.train) > 10 * len(tokens.val) > 100
    before = (shards / "meta.json").stat().st_mtime_ns
    assert scales.subwords(tmp_path / "bpe", 300) == shards and (shards / "meta.json").stat().st_mtime_ns == before
    (shards / "meta.json").unlink()
    scales.subwords(tmp_path / "bpe", 300)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == files


def test_one_seed_that_fails_makes_a_claim_weak_and_a_missing_number_makes_it_fail():
    good, bad = (Synthetic(WSD, a * WSD, WSD) for a in (2.0, 0.5))
    llama = Synthetic(COSINE, 2 * COSINE, COSINE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert claims.c4([good, good, bad], [llama] * 3).verdict == "holds weakly"
        nothing = claims.Claim("X", "", "", [("value", [float("nan")] * 3)])
        assert nothing.judge(lambda v: v > 0, lambda v: v > 0).verdict == "does not hold at this scale"
        assert "| value | – (– to –) |" in reproduce.table([nothing])


def test_t2_and_t3_read_the_theory(tmp_path):
    trace = theory.simulate(0, width=12, positions=8, classes=4, lr=0.1, steps=1500)
    results = json.loads(json.dumps([theory.analyse(trace, 0.1)] * 3))
    t2, t3 = claims.t2(results), claims.t3(results)
    assert t2.verdict and t3.verdict and all(np.isfinite(v).all() for c in (t2, t3) for _, v in c.rows)
    results[0]["thresholds"]["exponent_V"]["exponent"] = 1.5
    assert claims.t2(results[:1] * 3).verdict == "does not hold at this scale"
    results[0]["phase_I"]["least decrease per step over lr"] = -0.1
    assert claims.t3(results[:1] * 3).verdict == "does not hold at this scale"


def test_paper_prints_its_commands_and_every_run_has_a_preset(capsys):
    assert reproduce.main(["fig4", "--scale=paper"]) == 0
    assert [line.split("--preset=")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "small-adamw-step",
        "small-adamw-wsd",
        "llama-0.5b-cosine",
    ]
    presets = pytest.importorskip("training.presets")
    assert {name for names in reproduce.PAPER.values() for name in names} <= set(presets.RUNS)


def test_flags_are_those_of_the_script(capsys):
    for scale in reproduce.SCALES.values():
        for flags in reproduce.run_flags(scale, scale.steps).values():
            parse_run_args(flags)
    with pytest.raises(SystemExit):
        reproduce.parse_args(["fig9"])
    for flag in ("--seeds=0", "--steps=0", "--jobs=-1"):
        with pytest.raises(SystemExit):
            reproduce.parse_args([flag])
        assert f"argument {flag.split('=')[0]}: expected a number of at least" in capsys.readouterr().err
