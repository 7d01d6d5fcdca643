"""The benchmarks run, pass their own gates, and lose no part to one that hangs."""

import json
import subprocess
import sys

import pytest

from bench import gpu
from bench.harness import ROOT


def test_the_tests_for_a_gpu_are_there():
    assert not [path for path in gpu.TESTS if not (ROOT / path).is_file()]


@pytest.mark.slow
def test_the_end_to_end_benchmark_runs():
    small = ["--model", "gpt2-nano", "--tokens", "512", "--micro-batch", "1", "--turns", "1", "--steps", "1"]
    command = [sys.executable, "-m", "bench.end_to_end", *small, "--trackers", "full", "fast"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
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


@pytest.mark.slow
def test_the_overhead_benchmark_runs():
    command = [sys.executable, "-m", "bench.svd_overhead", "--steps", "3", "--batch-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["rows"]) == {"off", "fast", "full", "topk", "exact"} and all(result["gate"].values())
