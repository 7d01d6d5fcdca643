"""The real DeepSpeed, where it is installed: ZeRO stages 1 and 2 over two processes, no operator compiled.

DS_BUILD_OPS=0 pip install --no-build-isolation --no-deps deepspeed==0.19.8
pip install hjson msgpack einops py-cpuinfo
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

WORKER = Path(__file__).with_name("deepspeed_worker.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize("stage", [1, 2])
def test_zero(tmp_path, stage):
    done = torchrun(2, WORKER, stage, tmp_path / "found.pt", timeout=200, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for by_hand, weights, records, said in found["runs"]:
        assert all(torch.equal(W, weights[name]) for name, W in found["plain"].items())
        assert list(records) == ["0.weight", "2.weight"], "as in the model, without DeepSpeed's `module.`"
        for name, (step, spectrum) in records.items() if by_hand else ():
            assert step == 25
            assert torch.allclose(spectrum, torch.linalg.svdvals(weights[name].double()), atol=1e-6)
        if not by_hand:  # its optimizers train copies of the weights
            assert {step for step, _ in records.values()} == {0} and "steps seen: 0" in said
    assert "sosd_fast: 20 steps of optimizers that hold none of the tracked parameters" in done.stdout
    assert "sosd_fast: 25 steps of optimizers" in done.stdout, "at the end"
