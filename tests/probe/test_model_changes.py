"""What a model gains, loses and replaces between `track` and the first step, and later, is seen."""

import math

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


def tied_and_changed(net, how):
    inner = net[1]
    if how == "tied":
        inner[0].weight = net[0].weight
    elif how == "untied":
        inner[2].weight = nn.Parameter(net[0].weight.detach().clone())
    elif how == "replaced":
        inner[0].weight = nn.Parameter(inner[0].weight.detach() * 2)
    elif how == "its module":
        inner[0] = nn.Linear(12, 12, bias=False)
    elif how == "the module around it":
        net[1] = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), inner[2])
    elif how == "removed":
        del inner[0]


@pytest.mark.parametrize("how", ["tied", "untied", "replaced", "its module", "the module around it", "removed"])
def test_what_becomes_of_a_followed_parameter_is_seen_at_the_next_step(how):
    """Though the optimizer that tells is none of the new parameter's."""
    net = nn.Sequential(
        nn.Linear(12, 12, bias=False), nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3)))
    )
    net[1][2].weight = net[0].weight
    probe, optimizer = sosd_fast.track(net, method="full"), sgd(net.parameters(), lr=1e-2)
    for i in range(6):
        if i == 3:
            tied_and_changed(net, how)
        backward(net)
        optimizer.step()
    probe.flush()
    now = dict(net.named_parameters())
    assert {n for n, r in probe.latest().items() if r.step == 6} == set(now)
    for name in probe.latest():
        assert steps_of(probe, name)[-1] == (6 if name in now else 3)
    for name, p in now.items():
        assert probe.latest()[name].sigma_max == pytest.approx(sigma_max(p), rel=1e-5)


@pytest.mark.parametrize("method", ["full", "auto", "topk", "exact"])
@pytest.mark.parametrize("how", ["swapped", "its module", "all", "back again"])
def test_a_parameter_that_is_moved_to_the_meta_device(how, method, caplog):
    net = model()
    probe, optimizer = sosd_fast.track(net, method=method), sgd(net.parameters(), lr=1e-2)
    kept = {name: p.detach().clone() for name, p in net[1].named_parameters()}
    for i in range(25 if how == "back again" else 6):
        if i == 3:
            net.zero_grad()
            torch.__future__.set_swap_module_params_on_conversion(how == "swapped")
            (net if how == "all" else net[1]).to("meta")
            torch.__future__.set_swap_module_params_on_conversion(False)
        if i == 5 and how == "back again":
            net[1].to_empty(device="cpu").load_state_dict(kept)
        net[0](torch.ones(2, 12, device=net[0].weight.device)).square().mean().backward()
        optimizer.step()
    probe.flush()
    assert probe.alive and not [m for m in caplog.messages if "failed" in m]
    assert any("on the meta device" in m for m in caplog.messages)
    measured = [(r.step, r.name) for r in probe.records() if math.isfinite(r.sigma_max)]
    assert max(step for step, name in measured if name == "1.weight") <= (25 if how == "back again" else 3)
    if how == "all":
        assert max(measured)[0] <= 3 and "Probe of 0 matrices" in str(probe)
    elif how == "back again":
        assert len(probe.matrices) == 2 and (25, "1.weight") in measured or method == "auto"
    else:
        assert ("cannot be measured at present" if how == "swapped" else "left out: 1 (1.weight)") in str(probe)
        assert (6, "0.weight") in measured or method == "auto"
