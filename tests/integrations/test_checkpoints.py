"""Folders that transformers wrote; memory; WeightWatcher on the same weights."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_trainers import MODELS

from sosd_fast.checkpoints.analyze import analyze


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("shards", ["1GB", "20kB"])
def test_a_folder_written_by_transformers(tmp_path, make, shards):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20kB")
    command = [sys.executable, "-m", "sosd_fast", "analyze", "--json", "--spectra", str(tmp_path)]
    (found,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    rows = {row["name"]: row for row in found["matrices"]}
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    for name in [n for n in weights if n.endswith("c_attn.weight")]:
        weights |= {f"{name}[{p}]": part for p, part in zip("qkv", weights.pop(name).chunk(3, 1), strict=True)}
    assert set(rows) == set(weights)
    for name, W in weights.items():
        S, S_ref = np.array(rows[name]["spectrum"]), torch.linalg.svdvals(W.double()).numpy()
        assert np.linalg.norm(S / S.sum() - S_ref / S_ref.sum()) <= 1e-6
        assert rows[name]["shape"] == list(W.shape)


PEAK = """
import resource, sys
from sosd_fast.checkpoints.analyze import analyze
list(analyze([FIRST]))  # imports, and thread pools
base = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")
(records,) = analyze([PATH])
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(records), peak - base)
"""


@pytest.mark.parametrize("form", ["safetensors", "shards", "torch"])
def test_memory_is_bounded_by_the_largest_matrix(tmp_path, form):
    """24 matrices of 50 MB, 1.2 GB in all; the bound is 350 MB."""
    largest = 50 * 2**20
    W = torch.randn(largest // 512, 128)
    tensors = {f"layer.{i}.weight": W.roll(i, 0) for i in range(24)}
    if form == "torch":
        path = tmp_path / "model.pt"
        torch.save(tensors, path)
        torch.save({"w": W[:200]}, tmp_path / "first.pt")
    else:
        (tmp_path / "model").mkdir()
        path = tmp_path / "model"
        parts = [list(tensors)] if form == "safetensors" else [list(tensors)[i::4] for i in range(4)]
        for i, keys in enumerate(parts):
            save_file({key: tensors[key] for key in keys}, path / f"{i}.safetensors")
        save_file({"w": W[:200]}, tmp_path / "first.safetensors")
    del tensors
    code = PEAK.replace("PATH", repr(str(path))).replace("FIRST", repr(str(next(tmp_path.glob("first.*")))))
    count, peak = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(count) == 24
    assert int(peak) <= 3 * largest + 200 * 2**20, f"{int(peak) / 2**20:.0f} MB"
    assert int(peak) > largest / 2, "it was measured"
    print(f"{form}: peak {int(peak) / 2**20:.0f} MB for a largest matrix of 50 MB")


def test_against_weightwatcher(tmp_path):
    """Same singular values and stable ranks; the time is printed side by side."""
    import weightwatcher

    torch.manual_seed(0)
    shapes = [(300, 200), (200, 256), (256, 120)]
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=False) for n, m in shapes))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    began = time.perf_counter()
    (records,) = analyze([tmp_path / "model.pt"], split={})
    ours_s = time.perf_counter() - began
    began = time.perf_counter()
    watcher = weightwatcher.WeightWatcher(model=model)
    details = watcher.analyze()
    theirs_s = time.perf_counter() - began
    assert len(records) == len(details) == 3
    for r, (_, theirs) in zip(records, details.iterrows(), strict=True):
        values = np.sqrt(np.sort(watcher.get_ESD(layer=int(theirs.layer_id)))[::-1])
        assert r.spectrum == pytest.approx(values, rel=1e-4, abs=1e-5 * values[0])
        assert r.stable_rank == pytest.approx(theirs.stable_rank, rel=1e-5)
        assert (r.sigma_max, r.sigma_min) == pytest.approx((theirs.sv_max, theirs.sv_min), rel=1e-4)
    print(f"3 matrices: analyze {1e3 * ours_s:.0f} ms, WeightWatcher (with its power-law fits) {1e3 * theirs_s:.0f} ms")


def test_transformers_checkpoints_in_a_row(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    for step in (100, 200):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", safe_serialization=True)
        with torch.no_grad():
            model.lm_head.weight[:, 0] *= 2
    first, second = analyze([tmp_path / "checkpoint-100", tmp_path / "checkpoint-200"])
    moved = {r.name: r.sd_variation for r in second if r.sd_variation > 1e-6}
    assert list(moved) == ["lm_head.weight"] and {r.interval for r in second} == {100} and len(first) == len(second)
