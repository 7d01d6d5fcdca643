"""The accuracy of the leading values where it matters: on the weights of a real run."""

import pytest
import torch

import sosd_fast
from sosd_fast.spectra.topk import topk_svdvals
from training.data import batches, load_text
from training.model import PRESETS, Transformer, resized
from training.optimizers import DEFAULT_LR, build_optimizers

K = 32


@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", 1e-3), ("muon", 5e-3)])
def test_after_step_20(optimizer, limit):
    torch.manual_seed(0)
    model = Transformer(resized(PRESETS["gpt2-nano"], layers=2))  # the time goes into Muon's iteration of each matrix
    optimizers = build_optimizers(model, optimizer, DEFAULT_LR[optimizer])
    stream = batches(load_text().train, 1, 64, torch.Generator().manual_seed(0))
    followed = [model.h[0].attn.c_proj.weight, model.h[1].mlp.c_fc.weight, model.h[1].mlp.c_proj.weight]
    states, before = [None] * 3, [None] * 3
    for step in range(1, 26):
        tokens, targets = next(stream)
        model(tokens, targets).backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        for i, W in enumerate(followed):
            S, _, states[i] = topk_svdvals(W, K, state=states[i])
            if step < 20:
                continue
            exact = sosd_fast.svdvals(W.detach(), method="gram64").double()
            total = exact.sum()
            if step > 20:
                assert (S / exact[:K] - 1).abs().max() <= limit
                measured = (S / total - before[i][0]).norm()
                assert measured == pytest.approx(float((exact[:K] / total - before[i][1]).norm()), rel=0.05)
            before[i] = S / total, exact[:K] / total
