"""What a model gains, loses and replaces between `track` and the first step, and later, is seen."""

import pytest
import torch
from arranged import backward, model, sgd, sigma_max, steps_of
from torch import nn

import sosd_fast


def changed(net, how):
    if how == "a new head":
        net[1] = nn.Linear(10, 5, bias=False)
    elif how == "an appended layer":
        net.append(nn.Linear(8, 4, bias=False))
    elif how == "a layer less":
        del net[1]
    elif how == "another name":
        net[1] = nn.Sequential(net[1])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", ["a new head", "an appended layer", "a layer less", "another name"])
def test_changes_before_the_first_step_are_seen(how, before, caplog):
    net = model()
    if not before:  # the optimizer knows what is to come
        probe = sosd_fast.track(net, method="full")
    changed(net, how)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if before:
        probe = sosd_fast.track(net, method="full")
    for _ in range(2):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
    now = dict(net.named_parameters())
    assert {n for n, r in probe.latest().items() if r.step == 2} == set(now)
    for name, p in now.items():
        twice = how == "a new head" and name == "1.weight" and not before  # as it was when it was tracked, and now
        assert steps_of(probe, name) == [0] * twice + [0, 1, 2]
        assert all(r.sd_variation > 0 for r in probe.records() if r.name == name and r.step)
        assert probe.latest()[name].sigma_max == pytest.approx(sigma_max(p), rel=1e-5)
    gone = how in ("a layer less", "another name") and not before
    assert sum("1.weight are not measured after step 0 any more" in m for m in caplog.messages) == gone


def test_a_lazy_layer_is_seen_when_it_has_its_shape(caplog):
    net = nn.Sequential(nn.Linear(12, 10, bias=False), nn.LazyLinear(8, bias=False))
    probe, optimizer = sosd_fast.track(net, method="full"), sgd(net.parameters())
    assert list(probe.latest()) == ["0.weight"]
    for _ in range(2):
        backward(net)
        optimizer.step()
    assert steps_of(probe, "1.weight") == [0, 1, 2]
    assert [r.sd_variation is not None for r in probe.records() if r.name == "1.weight"] == [False, True, True]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("how", ["a new head", "an appended layer", "a layer less"])
def test_changes_midway_that_no_optimizer_tells_are_seen(how, by_hand):
    net = model()
    probe, optimizer = sosd_fast.track(net, [] if by_hand else None, method="full"), sgd(net.parameters(), lr=1e-2)
    for i in range(45):
        if i == 5:
            changed(net, how)
        backward(net)
        optimizer.step()
        if by_hand:
            probe.step()
    assert {n for n, r in probe.latest().items() if r.step == 45} == set(dict(net.named_parameters()))
    for name, p in net.named_parameters():
        assert probe.latest()[name].sigma_max == pytest.approx(sigma_max(p), rel=1e-5)
