import gc
import logging
import math
import weakref

import pytest
import torch
from three_layers import adamw, loss, model, train
from torch import nn
from torch.optim import optimizer as torch_optimizer

import sosd_fast
from sosd_fast.probe.hooks import live
from sosd_fast.testing import sd_distance


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks) + len(torch_optimizer._global_optimizer_pre_hooks)


@pytest.mark.parametrize("method", ["full", "exact"])
def test_every_value_of_every_matrix_every_step(method):
    net = model()
    probe = sosd_fast.track(net, method=method, k=4)
    weights = [[p.detach().clone() for p in net.parameters() if p.ndim == 2]]
    train(net, [adamw(net)], 3, lambda: weights.append([p.detach().clone() for p in net.parameters() if p.ndim == 2]))
    records = probe.records()
    assert [(r.step, r.name) for r in records] == [
        (s, n) for s in range(4) for n in ("0.weight", "2.weight", "4.weight")
    ]
    for r in records:
        W = weights[r.step][("0.weight", "2.weight", "4.weight").index(r.name)]
        S = torch.linalg.svdvals(W.double())
        p = S / S.sum()
        assert sd_distance(torch.as_tensor(r.spectrum), S) <= min(1e-6, r.sd_error)
        assert r.topk == tuple(r.spectrum[:4].tolist())
        assert r.nuclear_norm == pytest.approx(S.sum().item(), rel=1e-6)
        assert r.frobenius_norm == pytest.approx(W.norm().item(), rel=1e-6)
        assert r.sigma_max == pytest.approx(S[0].item(), rel=1e-6)
        assert r.effective_rank == pytest.approx(torch.special.entr(p).sum().exp().item(), rel=1e-5)
        if r.step == 0:
            assert r.sd_variation is None and r.interval is None
            continue
        before = weights[r.step - 1][("0.weight", "2.weight", "4.weight").index(r.name)]
        S_before = torch.linalg.svdvals(before.double())
        q = S_before / S_before.sum()
        assert r.interval == 1
        assert r.sd_variation == pytest.approx((p - q).norm().item(), abs=2e-7)
        assert r.sd_variation_topk == pytest.approx((p - q)[:4].norm().item(), abs=2e-7)
        first = torch.linalg.svdvals(weights[0][("0.weight", "2.weight", "4.weight").index(r.name)].double())
        assert r.cosine == pytest.approx((S @ first / S.norm() / first.norm()).item(), abs=1e-6)


def test_leading_values():
    net = model()
    exact = sosd_fast.track(net, method="exact", k=4)
    probe = sosd_fast.track(net, method="topk", k=4)
    train(net, [torch.optim.AdamW(net.parameters(), lr=1e-3)], 12)
    latest, truth = probe.latest(), exact.latest()
    r, t = latest["0.weight"], truth["0.weight"]
    assert r.method == "topk" and r.interval == 1
    assert r.topk == pytest.approx(t.topk, rel=2e-3)
    assert r.frobenius_norm == pytest.approx(t.frobenius_norm, rel=1e-6)
    assert r.sd_variation_topk == pytest.approx(t.sd_variation_topk, rel=0.05)
    assert r.sd_variation is None and r.nuclear_norm is None and r.sd_error is None, "absent, not guessed"
    assert latest["4.weight"].method != "topk", "with fewer than 3 k values all of them are measured"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_leading_values_at_any_scale(scale):
    net = nn.Linear(64, 64, bias=False)
    net.weight.data *= scale
    probe = sosd_fast.track(net, method="topk", k=4)
    net.weight.data[0] *= 2
    probe.step()
    r = probe.latest()["weight"]
    assert r.method == "topk" and r.frobenius_norm == pytest.approx(net.weight.double().norm().item(), rel=1e-6)
    assert 0 < r.sd_variation_topk < 1 and 1 <= r.stable_rank <= 64


def test_auto_spends_what_it_may():
    net = model()
    rich, poor = sosd_fast.track(net, budget=1.0, k=4), sosd_fast.track(net, budget=1e-6, k=4)
    optimizer = adamw(net)
    train(net, [optimizer], 10)
    counts = [sum(r.step > 1 for r in p.records()) for p in (rich, poor)]
    assert counts[0] > 3 * counts[1]


@pytest.mark.parametrize("method", ["full", "topk", "exact", "auto"])
def test_training_is_bit_identical(method):
    def run(tracked):
        net = model()
        muon = sosd_fast.Muon([net[0].weight, net[2].weight], lr=0.01)
        rest = torch.optim.AdamW([net[2].bias, *net[4].parameters()], lr=1e-2)
        probe = sosd_fast.track(net, method=method, k=4, budget=0.5) if tracked else None
        losses = []
        for _ in range(8):
            value = nn.functional.dropout(net(torch.randn(4, 48)), 0.5).square().mean()
            losses.append(value.item())
            value.backward()
            for optimizer in (muon, rest):
                optimizer.step()
                optimizer.zero_grad()
        if probe:
            assert probe.latest()["0.weight"].step == 8
        return losses, [p.detach().clone() for p in net.parameters()]

    losses, weights = run(tracked=False)
    tracked_losses, tracked_weights = run(tracked=True)
    assert losses == tracked_losses and all(map(torch.equal, weights, tracked_weights))


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


def test_two_optimizers_make_one_step():
    net = model()
    probe = sosd_fast.track(net, method="full")
    first = torch.optim.SGD([net[0].weight], lr=0.1)
    second = torch.optim.AdamW([*net[2].parameters(), *net[4].parameters()], lr=1e-2)
    train(net, [first, second], 5)
    assert steps_of(probe) == [0, 1, 2, 3, 4, 5]
    S = torch.linalg.svdvals(net[2].weight.detach().double())
    assert sd_distance(torch.as_tensor(probe.latest()["2.weight"].spectrum), S) < 1e-6, "measured after both"


def test_an_optimizer_of_another_model_is_not_followed():
    net, other = model(), model(1)
    probe = sosd_fast.track(net, method="full")
    train(other, [adamw(other)], 3)
    assert steps_of(probe) == [0]


def test_given_optimizers_only():
    net = model()
    counted, ignored = (torch.optim.SGD(net.parameters(), lr=1e-3) for _ in range(2))
    probe = sosd_fast.track(net, counted, method="full")
    train(net, [counted, ignored], 3)
    assert steps_of(probe) == [0, 1, 2, 3]


def test_no_optimizers_means_by_hand():
    net = model()
    probe = sosd_fast.track(net, optimizers=[], method="full")
    train(net, [adamw(net)], 3)
    assert steps_of(probe) == [0]
    probe.step()
    assert steps_of(probe) == [0, 1]


def test_parameters_without_an_optimizer_and_frozen_ones():
    net = model()
    net[2].weight.requires_grad_(False)
    probe = sosd_fast.track(net, method="full")
    train(net, [torch.optim.SGD([net[0].weight], lr=0.1)], 4)
    probe.flush()
    assert steps_of(probe) == [0, 1, 2, 3, 4]
    assert probe.latest()["2.weight"].sd_variation == 0


def test_an_optimizer_that_stops_stepping():
    net = model()
    probe = sosd_fast.track(net, method="full")
    first, second = torch.optim.SGD([net[0].weight], lr=0.1), torch.optim.SGD(net[2:].parameters(), lr=0.1)
    train(net, [first, second], 3)
    train(net, [first], 3)
    probe.flush()
    assert steps_of(probe) == [0, 1, 2, 3, 4, 5, 6]


def test_gradient_accumulation_and_skipped_steps():
    net = model()
    probe = sosd_fast.track(net, method="full")
    optimizer = adamw(net)
    for i in range(6):
        loss(net).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert steps_of(probe) == [0, 1, 2, 3]


def test_by_hand():
    net = model()
    probe = sosd_fast.track(net, method="full")
    with torch.no_grad():
        net[0].weight.mul_(2)
    probe.step()
    assert steps_of(probe) == [0, 1] and probe.latest()["0.weight"].sd_variation < 1e-12


def test_every():
    net = model()
    probe = sosd_fast.track(net, method="full", every=3)
    train(net, [adamw(net)], 7)
    assert steps_of(probe) == [0, 3, 6]
    assert [r.interval for r in probe.records() if r.name == "0.weight"] == [None, 3, 3]


def test_low_precision_and_compiled_models():
    net = model().bfloat16()
    probe = sosd_fast.track(torch.compile(net), method="full")
    with torch.no_grad():
        net[0].weight += 0.125
    probe.step()
    S = torch.linalg.svdvals(net[0].weight.detach().double())
    assert sd_distance(torch.as_tensor(probe.latest()["0.weight"].spectrum), S) < 1e-6


def test_nan_weights_give_nan_records_and_one_warning(caplog):
    net = model()
    probe = sosd_fast.track(net, method="full")
    topk = sosd_fast.track(net, method="topk", k=4)
    with torch.no_grad():
        net[0].weight[2, 3] = math.nan
    for _ in range(3):
        probe.step()
        topk.step()
    assert math.isnan(probe.latest()["0.weight"].sd_variation)
    assert math.isnan(topk.latest()["0.weight"].sigma_max)
    assert math.isfinite(probe.latest()["2.weight"].sd_variation)
    assert sum("0.weight holds NaN or Inf at step 1" in m for m in caplog.messages) == 2, "one for each probe"
    with torch.no_grad():
        net[0].weight[2, 3] = 0.0
    probe.step()
    topk.step()
    topk.step()
    probe.step()
    assert math.isfinite(probe.latest()["0.weight"].sd_variation)
    assert math.isfinite(topk.latest()["0.weight"].sd_variation_topk)


def test_a_zero_matrix(caplog):
    net = model()
    nn.init.zeros_(net[2].weight).requires_grad_(False)
    nn.init.zeros_(net[4].weight)  # a usual start, as of an adapter
    probe = sosd_fast.track(net, method="auto", k=4)
    for _ in range(3):
        net[4].weight.grad = torch.ones_like(net[4].weight)
        train(net, [adamw(net)], 1)
    assert [m for m in caplog.messages if "is zero" in m] == [
        "sosd_fast: 2.weight is zero at step 1, so it has no singular distribution."
    ]
    assert math.isfinite(probe.latest()["0.weight"].sigma_max)


def test_it_detaches_and_can_be_collected():
    sosd_fast.track(model(), method="full").close()
    before = hooks()  # one pair for the whole process, which stays
    assert before >= 2
    net = model()
    with sosd_fast.track(net, method="full") as probe:
        assert probe in live() and hooks() == before
    assert probe not in live() and hooks() == before
    probe.close()
    train(net, [adamw(net)], 1)
    assert steps_of(probe) == [0]

    probe = sosd_fast.track(net, method="full")
    reference = weakref.ref(probe)
    del probe
    gc.collect()
    assert reference() is not None, "it lives as long as the model"
    watched = weakref.ref(net)
    del net
    gc.collect()
    assert watched() is None and reference() is None, "the hooks keep neither alive"
    assert hooks() == before


@pytest.mark.expects_probe_failure
def test_an_error_inside_stops_the_probe_and_not_the_run(caplog):
    net = model()
    probe = sosd_fast.track(net, method="full")

    def broken(seconds):
        if probe.step_count == 1:
            raise RuntimeError("disk on fire")

    probe._planner.charge = broken
    train(net, [adamw(net)], 4)
    assert max(steps_of(probe)) == 1 and probe not in live()
    assert [r.levelno for r in caplog.records].count(logging.ERROR) == 1
    assert "the probe failed at step 1" in caplog.text and "disk on fire" in caplog.text


def test_on_record():
    net = model()
    seen = []
    probe = sosd_fast.track(net, method="full", on_record=seen.append)
    train(net, [adamw(net)], 2)
    assert seen == probe.records() and len(seen) == 9


def test_overhead():
    net = model()
    probe = sosd_fast.track(net, method="full")
    assert probe.overhead == 0
    train(net, [adamw(net)], 5)
    assert 0 < probe.overhead < 1


def test_a_probe_says_what_it_does():
    net = model()
    net.register_parameter("scale", nn.Parameter(torch.ones(1, 1, dtype=torch.int64), requires_grad=False))
    probe = sosd_fast.track(net, method="topk", k=14, exclude=["4.weight"])
    assert "steps seen: 0 (where no optimizer of torch trains, call Probe.step after each)" in str(probe)
    train(net, [adamw(net)], 3)
    lines = str(probe).split("\n  ")
    assert lines[0] == "Probe of 2 matrices of Sequential" and lines[4:6] == [
        "steps seen: 3, the last is step 3",
        "measured each step: 50 % of the matrices in full, 50 % by leading values",
    ]
    assert sorted(lines[1:4]) == [
        "left out: 1 (4.weight), each is excluded",
        "left out: 1 (scale), each has dtype torch.int64",
        "left out: 2 (2.bias, 4.bias), each has fewer than two dimensions",
    ]
    assert lines[6].startswith("overhead: ") and lines[6].endswith(" % of the time")
    assert lines[7] == "oldest record: 0.weight, of step 3 (0 ago)" and len(lines) == 8
    page = probe._repr_html_()
    assert page.startswith("<pre>Probe of 2 matrices of Sequential\n") and page.count("<tr>") == 3
    assert "<td>0.weight</td>" in page and "<th>sd_variation</th>" in page
    probe.close()
    assert repr(probe) == "Probe(2 matrices, step 3, closed)" and not probe.alive and 0 < probe.seconds
    assert str(probe).startswith("Probe of 2 matrices of Sequential, closed")


def test_a_probe_names_what_cannot_be_measured(caplog):
    net = model()
    probe = sosd_fast.track(net, method="full", optimizers=[])
    net[0].weight.data = torch.zeros(0)
    probe.step()
    assert "cannot be measured at present: 0.weight" in str(probe)
