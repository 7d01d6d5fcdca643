"""Audits against float64, and the bounds that a record carries besides."""

import dataclasses
import weakref

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.distributed.share import share
from sosd_fast.matrices import find_matrices
from sosd_fast.probe import full
from sosd_fast.probe.audit import Auditor, audit
from sosd_fast.probe.followed import FollowedMatrices, Found
from sosd_fast.probe.measurer import Measurer
from sosd_fast.probe.planner import Plan
from sosd_fast.probe.state import MatrixState
from sosd_fast.testing import matrix


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))


def train(net, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for _ in range(steps):
        net(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_matrix_is_audited_at_a_twentieth_of_the_cost():
    net = model()
    probe = sosd_fast.track(net, method="full")
    train(net, 800)
    audits = probe.audits
    # four spectra a step earn 4 / 20, an audit costs 20: one in a hundred steps
    assert len(audits) == 8
    assert {a.name for a in list(audits)[:4]} == {a.name for a in list(audits)[4:]} == {f"{i}.weight" for i in range(4)}
    assert all(0 < a.error <= a.bound <= 1e-6 for a in audits)
    recorded = {(r.step, r.name): r.audit_error for r in probe.records() if r.audit_error is not None}
    assert recorded == {(a.step, a.name): a.error for a in audits}


def test_audits_can_be_turned_off():
    net = model()
    probe = sosd_fast.track(net, method="full", audit=False)
    train(net, 250)
    assert not probe.audits


def test_the_order_is_random_fair_and_resumable():
    states = [MatrixState(m) for m in find_matrices(model())]
    auditor, chosen = Auditor(), []
    for _ in range(2000):
        if (i := auditor.choose([0, 1, 2, 3], states)) is not None:
            chosen.append(i)
    assert len(chosen) == 20 and all(sorted(chosen[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 20, 4))
    assert len({tuple(chosen[i : i + 4]) for i in range(0, 20, 4)}) > 1
    other = Auditor()
    other.load_state_dict(auditor.state_dict())
    again = [a.choose([0, 2], states) for a in (auditor, other) for _ in range(300)]
    assert again[:300] == again[300:] and set(again) <= {None, 0, 2}


def test_an_error_beyond_its_bound_is_told_and_answered(caplog, monkeypatch):
    real = full.spectra

    def wrong(matrices, method, previous):
        result = real(matrices, method, previous)
        return result._replace(S=result.S * (1 + 1e-4 * torch.rand_like(result.S))) if method == "auto" else result

    monkeypatch.setattr(full, "spectra", wrong)
    net = model()
    probe = sosd_fast.track(net, method="full")
    train(net, 410)
    assert len(probe.audits) == 4 and all(a.error > a.bound for a in probe.audits)
    first = probe.audits[0]
    assert caplog.messages[0] == (
        f"sosd_fast: audit of {first.name} at step {first.step}: |SD - SD_true| = {first.error:.1e} is beyond its "
        f"bound {first.bound:.1e}. It is measured in float64 from now on."
    )
    assert {r.method for r in probe.latest().values()} == {"gram64"}
    train(net, 410)
    assert all(a.error <= a.bound for a in list(probe.audits)[4:])


def test_what_cannot_be_audited_is_left_out():
    net = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(net.weight)
    matrices = FollowedMatrices(weakref.ref(net), lambda: Found(share(net, find_matrices(net))))
    (measurement,) = Measurer(matrices, every=1, k=4).launch(Plan([0], []), step=0).result()
    assert audit(matrices.states[0], measurement) is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, sosd_fast.Muon])
def test_theory_bounds_every_variation(optimizer):
    net = model()
    probe = sosd_fast.track(net, method="full", theory_bound=True)
    steps = optimizer(net.parameters(), lr=0.02)
    for _ in range(30):
        net(torch.randn(4, 64)).square().mean().backward()
        steps.step()
        steps.zero_grad()
    records = [r for r in probe.records() if r.step > 0]
    assert len(records) == 120 and all(0 < r.sd_variation <= r.theory_bound for r in records)
    assert min(r.theory_bound / r.sd_variation for r in records) < 100, "a bound that says something"


@pytest.mark.parametrize("seed", range(5))
def test_what_leading_values_tell(seed):
    W = matrix("power", 96, 128, seed=seed)
    net = nn.Linear(128, 96, bias=False)
    net.weight.data.copy_(W)
    probe = sosd_fast.track(net, optimizers=[], method="topk", k=16)
    direction = matrix("gaussian", 96, 128, seed=seed + 7)
    S_before = torch.linalg.svdvals(net.weight.detach().double())
    for step in range(1, 12):
        net.weight.data.add_(direction * (0.01 if step == 7 else 1e-3))
        probe.step()
        S = torch.linalg.svdvals(net.weight.detach().double())
        difference = S / S.sum() - S_before / S_before.sum()
        r, S_before = probe.latest()["weight"], S
        whole, head = float(difference.norm()), float(difference[:16].norm())
        assert r.sd_variation is None and r.method == "topk"
        assert r.sd_variation_floor <= whole + 1e-6
        assert r.sd_variation_floor <= r.sd_variation_topk * 1.001 <= r.sd_variation_carried * 1.002
        # an estimate: the sum of the other values is not known (LOG.md#topk-sum)
        assert r.sd_variation_topk == pytest.approx(head, rel=0.6, abs=1e-6)


def test_a_full_measurement_knows_its_leading_part():
    net = model()
    probe = sosd_fast.track(net, method="full", k=8)
    train(net, 2)
    for r in probe.latest().values():
        assert 0 < r.sd_variation_topk == r.sd_variation_floor <= r.sd_variation
        assert r.sd_variation_carried is None
        assert {f.name for f in dataclasses.fields(r)} >= {"audit_error", "theory_bound"}


def test_an_audit_that_raises_ends_alone(caplog, monkeypatch):
    def fails(*args):
        raise MemoryError("no room for a float64 copy")

    monkeypatch.setattr("sosd_fast.probe.audit.audit", fails)
    net = model()
    probe = sosd_fast.track(net, method="full")
    train(net, 410)
    said = [m for m in caplog.messages if "cannot be audited" in m and "MemoryError: no room for a float64 copy" in m]
    assert probe.alive and probe.step_count == 410 and not probe.audits
    assert len(said) == len(caplog.messages) == len({m.split()[1] for m in said}) > 0, "once a matrix"
