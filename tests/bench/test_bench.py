"""The benchmarks run, pass their own gates, and lose no part to one that hangs."""

import json
import math

import pytest
import torch
from prepared import run

from bench import bounds, gpu
from bench.harness import ROOT
from sosd_fast.spectra.svdvals import spectra

MAIN = """
import runpy
from training.model import PRESETS, Config
PRESETS["gpt2-nano"] = Config(n_layer=2, n_head=2, width=32, ff_width=64, context=32, vocab=256)
runpy.run_module("bench.{}", run_name="__main__", alter_sys=True)
"""


def test_the_tests_for_a_gpu_are_there():
    assert not [path for path in gpu.TESTS if not (ROOT / path).is_file()]


def result_of(name, *flags):
    """The last line of a benchmark, on a model of the smallest size."""
    done = run(MAIN.format(name), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_end_to_end_benchmark_runs():
    small = ["--model", "gpt2-nano", "--tokens", "64", "--micro-batch", "1", "--turns", "1", "--steps", "1"]
    result = result_of("end_to_end", *small, "--trackers", "full", "fast")
    assert set(result["rows"]) == {"off", "full", "fast"} and all(result["gate"].values())
    assert len(result["gate"]) == 3 and result["rows"]["full"]["own_percent"] > 0


def test_a_part_that_hangs_on_a_gpu_loses_no_other(tmp_path, monkeypatch, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = {"hangs": (1, ["-c", child]), "fails": (20, ["-c", "1 / 0"]), "works": (20, ["-c", "print('bar: x')"])}
    monkeypatch.setattr(gpu, "PARTS", parts)
    ended, bars = gpu.summary(list(parts), tmp_path)
    assert ended["hangs"][0] == "stopped after 1 s" and ended["hangs"][1] < 10
    assert ended["fails"][0] == "failed (1)" and ended["works"][0] == "ok" and bars == ["bar: x"]
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "TOTAL", 2 * gpu.LEAST + 1)  # nor does it take the time of later ones
    parts["hangs"] = (60, ["-c", child])
    assert gpu.summary(list(parts), tmp_path)[0]["hangs"][0] == "stopped after 1 s"


def test_the_overhead_benchmark_runs():
    result = result_of("svd_overhead", "--steps", "3", "--batch-size", "1")
    assert set(result["rows"]) == {"off", "fast", "full", "topk", "exact"} and all(result["gate"].values())
    shares = {name: row["measured_in_full"] for name, row in result["rows"].items() if name != "off"}
    assert shares["full"] == shares["exact"] == 1 and 0 <= shares["fast"] <= 1


@pytest.mark.parametrize("shape", [(1, 9), (7, 7), (60, 13), (3, 64)], ids=str)
def test_the_judge_of_bounds_is_right_to_a_unit(shape):
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S, T = bounds.jacobi(W), torch.linalg.svdvals(W)
    assert ((S - T).abs() <= 40 * 2.0**-53 * T[0]).all()
    r = min(shape)
    exact = torch.zeros(shape, dtype=torch.float64)
    exact[range(r), range(r)] = 3.0 * 2.0 ** -torch.arange(r, dtype=torch.float64)
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < max(shape):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])  # Hadamard's: exact sums
    tall = signs[:, : shape[0]] @ exact
    assert ((bounds.jacobi(tall)[:r] / math.sqrt(len(signs)) - exact.diagonal()).abs() <= 2.0**-52 * 3).all()
    constant = bounds.jacobi(torch.full((300, 7), 0.7, dtype=torch.float64))
    assert abs(float(constant[0]) / (0.7 * math.sqrt(2100)) - 1) <= 2.0**-52 and constant[1:].max() <= 2.0**-52


def test_values_beyond_a_bound_are_told(monkeypatch):
    matrices = [torch.randn(20, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert all(max(row[2:]) <= 1 for row in bounds.check(matrices))
    wrong = spectra(matrices)
    wrong.S[1, 0] *= 1 + 1e-4
    monkeypatch.setattr(bounds, "spectra", lambda *_: wrong)
    assert [max(row[2:]) > 1 for row in bounds.check(matrices)] == [False, True, False]


def test_large_matrices_and_forced_methods_are_drawn():
    drawn = [m for *_, matrices in bounds.batches(14, True, 3, large=True) for m in matrices]
    assert len(drawn) == 14 and all(256 <= min(m.shape) <= 1024 and max(m.shape) <= 1.5 * min(m.shape) for m in drawn)
    small = [matrices for *_, matrices in bounds.batches(40, True, 3)]
    assert min(min(m.shape) for matrices in small for m in matrices) < 48
    for method in ("gram32", "gram64"):
        assert {row[0] for row in bounds.check(small[0], method)} == {method}


def test_the_benchmark_of_peers_runs():
    """Where a peer is missing, its row says so."""
    result = result_of("peers", "--steps", "4", "--batch-size", "1", "--repeats", "2")
    rows = result["spectra"] | result["newton_schulz"] | result["steps"]
    peers = {"WeightWatcher", "diffract-core", "gram-newton-schulz", "trainscope"}
    missing = {name for name in peers if result["versions"][name.lower()] is None}
    assert {name for name, row in rows.items() if "missing" in row} - {"sosd_fast, bfloat16"} == missing
    assert peers < set(rows) and len(rows) == 13 and all(result["gate"].values())
    assert all(row["missing"].startswith("no module") for name, row in rows.items() if name in missing)
    assert rows["sosd_fast, full"]["spectra_a_step"] == 13 and 0 < rows["sosd_fast"]["error"] < 1e-6


def test_what_8_ranks_send_is_as_the_page_says():
    done = run("import json\nfrom bench.training import bytes_moved\nprint(json.dumps(bytes_moved('gpt2-small', 8)))")
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/distributed.md").read_text()
    sent = {row["layout"]: f"{row['sent_mb']:.0f} MB | {row['ratio']:.2f}" for row in json.loads(done.stdout)}
    assert len(sent) == 6 and not [layout for layout, row in sent.items() if f"\n| {layout} | {row} |" not in page]
