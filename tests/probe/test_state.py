"""What a probe keeps: in its run directory, and in its state."""

import numpy as np
import pytest
import torch
from three_layers import adamw, model, train
from torch import nn

import sosd_fast


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


def test_run_directory_and_resume(tmp_path):
    net = model()
    optimizer = adamw(net)
    with sosd_fast.track(net, method="full", run_dir=tmp_path) as probe:
        train(net, [optimizer], 5)
        assert steps_of(probe) == [0, 1, 2, 3, 4, 5]
    first = sosd_fast.load(tmp_path)
    with sosd_fast.track(net, method="full", run_dir=tmp_path):
        train(net, [optimizer], 2)
    run = sosd_fast.load(tmp_path)
    assert [r.step for r in run.records if r.name == "0.weight"] == list(range(8))
    assert run.records[: len(first.records)] == first.records
    later = [r for r in run.records if r.step == 6]
    assert all(r.interval == 1 for r in later)
    S0 = run.spectra("0.weight")[1][0].astype(float)
    S6 = run.spectra("0.weight")[1][6].astype(float)
    cosine = S0 @ S6 / np.linalg.norm(S0) / np.linalg.norm(S6)
    assert later[0].cosine == pytest.approx(cosine, abs=1e-6), "to the first spectrum of the whole run"
    with sosd_fast.track(net, method="full", run_dir=tmp_path, step=3):
        train(net, [optimizer], 1)
    assert [r.step for r in sosd_fast.load(tmp_path).records if r.name == "0.weight"] == [0, 1, 2, 3, 4]


def test_state_is_at_most_a_tenth_of_the_weights():
    net = nn.Sequential(*(nn.Linear(768, n, bias=False) for n in (768, 768, 3072)))
    probe = sosd_fast.track(net, method="topk", k=32)
    kept = probe.state_dict()["matrices"].values()
    state = sum(t.numel() * t.element_size() for m in kept for t in (*m["state"], m["S"], m["reference"]))
    assert state <= 0.1 * sum(p.numel() * 4 for p in net.parameters())


@pytest.mark.parametrize("method", ["full", "topk"])
def test_state_dict_continues_bit_for_bit(method, tmp_path):
    def records(stop):
        torch.manual_seed(0)
        net = nn.Linear(48, 40, bias=False)
        probe = sosd_fast.track(net, method=method, k=4)
        for step in range(6):
            if step == stop:
                torch.save(probe.state_dict(), tmp_path / "probe.pt")
                probe.close()
                kept = probe.records()
                probe = sosd_fast.track(net, method=method, k=4, step=step)
                probe.load_state_dict(torch.load(tmp_path / "probe.pt"))
            with torch.no_grad():
                net.weight += 1e-2 * torch.randn(40, 48, generator=torch.Generator().manual_seed(step))
            probe.step()
        return (kept if stop else []) + [r for r in probe.records() if not stop or r.step > stop]

    whole = records(None)
    assert len(whole) == 7 and whole == records(3)


def test_state_dict_of_another_step_or_model():
    net = nn.Linear(40, 40)
    state = sosd_fast.track(net).state_dict()
    with pytest.raises(
        ValueError, match=r"Probe\.load_state_dict: expected the state of 1 matrices at step 2, got 1 at"
    ):
        sosd_fast.track(net, step=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"Probe\.load_state_dict: expected the state of 2 matrices"):
        sosd_fast.track(nn.Sequential(net, nn.Linear(40, 40))).load_state_dict(state)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_cosine_of_a_matrix_that_is_zero_at_first(resumed, tmp_path):
    """As LoRA's B: it refers to the first spectrum that is not zero."""
    net = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, method="full", run_dir=tmp_path)
    for i in range(4):
        if resumed and i == 2:
            probe.close()
            probe = sosd_fast.track(net, method="full", run_dir=tmp_path)
        net.weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    probe.close()
    records = {r.step: r for r in probe.records()}
    assert records[0].cosine is None and records[1].cosine in (None, pytest.approx(1))
    steps, S = sosd_fast.load(tmp_path).spectra("weight")
    spectra = dict(zip(map(int, steps), np.asarray(S, dtype=float), strict=True))
    for step in (2, 3, 4):
        first, now = spectra[1], spectra[step]
        expected = first @ now / np.linalg.norm(first) / np.linalg.norm(now)
        assert records[step].cosine == pytest.approx(expected, abs=1e-5)
