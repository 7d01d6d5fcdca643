"""Gradients tell which steps of several optimizers make one training step, whoever joins late or misses some."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from arranged import backward, model, sgd, sigma_max
from torch import nn

import sosd_fast
from sosd_fast.probe.passes import trains_alone

NAMES = ("0.weight", "1.weight")


def wrong_records(rounds, step, given=False, net=None):
    """The (step, name) of records that are not those of the end of a round of `step(i, net, first, second)`."""
    net = net or model()
    optimizers = [sgd(layer.parameters(), 0.01) for layer in net]
    truth = [[sigma_max(layer.weight) for layer in net]]
    with sosd_fast.track(net, optimizers if given else None, method="full") as probe:
        for i in range(rounds):
            step(i, net, *optimizers)
            truth.append([sigma_max(layer.weight) for layer in net])
    assert probe.step_count == rounds
    found = {(r.step, r.name): r.sigma_max for r in probe.records()}
    wanted = {(i, name): value for i, values in enumerate(truth) for name, value in zip(NAMES, values, strict=True)}
    assert set(found) == set(wanted)
    return [key for key, value in wanted.items() if found[key] != pytest.approx(value, rel=1e-6)], probe


@pytest.mark.parametrize("zeroed", ["at the end", "at once", "in place"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("alone", [1, 5, 25])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_optimizer_that_joins_late_and_steps_before_the_other(alone, given, frozen, zeroed, caplog):
    """As one that waits until a new head is trained."""

    def step(i, net, late, first):
        net[0].requires_grad_(i >= alone or not frozen)
        backward(net)
        if i >= alone:
            late.step()
            if zeroed == "at once":
                late.zero_grad()
        first.step()
        net.zero_grad(set_to_none=zeroed != "in place")

    wrong, probe = wrong_records(alone + 6, step, given)
    assert wrong in ([], [(alone, "0.weight")])
    said = [m for m in caplog.messages if f"The records of step {alone} hold its change of step {alone + 1}" in m]
    assert len(said) == len(caplog.messages) == len(wrong)
    assert all(m.removeprefix("sosd_fast: ") in str(probe) for m in said)


@pytest.mark.parametrize("alone", [1, 5, 25])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_optimizer_that_joins_late_and_steps_after_the_other(alone, frozen, caplog):
    def step(i, net, late, first):
        net[0].requires_grad_(i >= alone or not frozen)
        backward(net)
        first.step()
        if i >= alone:
            late.step()
        net.zero_grad()

    wrong, _ = wrong_records(alone + 6, step)
    assert wrong in ([], [(alone + 1, "0.weight")])
    assert len(caplog.messages) == len(wrong)


def test_threads_of_a_pool_that_wait_for_work_are_no_training(caplog):
    """As those that torch.compile leaves."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        test_an_optimizer_that_joins_late_and_steps_after_the_other(5, False, caplog)
        held, begun = Event(), Event()
        work = pool.submit(lambda: begun.set() or held.wait())
        assert begun.wait(60)
        alone = trains_alone()
        held.set()
        assert work.result() and not alone


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("given", [False, True])
def test_partners_that_miss_steps_in_any_order(seed, given):
    """Any of them, in batches without an order, as long as they all step in the first batches."""
    own = random.Random(seed)

    def step(i, net, *optimizers):
        backward(net)
        order = [o for o in optimizers if i < 2 or own.random() < 0.7] or [own.choice(optimizers)]
        own.shuffle(order)
        for optimizer in order:
            optimizer.step()
        net.zero_grad()

    assert wrong_records(40, step, given)[0] == []


@pytest.mark.parametrize("zeroed", ["at the end", "at once", "in place"])
def test_gradients_that_are_clipped_or_scaled_between_two_steps(zeroed):
    def step(i, net, *optimizers):
        backward(net)
        for optimizer in optimizers[:: 1 if i % 2 else -1]:
            if i > 4:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)
            optimizer.step()
            if zeroed != "at the end":
                optimizer.zero_grad(set_to_none=zeroed == "at once")
        net.zero_grad()

    assert wrong_records(40, step)[0] == []


def test_one_loss_becomes_two(caplog):
    """Optimizers that stepped on one loss, and then each on its own, with all gradients renewed in between."""

    def step(i, net, *optimizers):
        if i < 5:
            backward(net)
        for optimizer in optimizers:
            if i >= 5:
                net.zero_grad()
                backward(net)
            optimizer.step()
        net.zero_grad()

    net = model()
    optimizers = [sgd(layer.parameters(), 0.01) for layer in net]
    with sosd_fast.track(net, method="full") as probe:
        for i in range(40):
            step(i, net, *optimizers)
    assert probe.step_count <= 43, "three may be counted until this is seen, which is said"
    assert sum("each of these steps was counted" in m for m in caplog.messages) == 1


@pytest.mark.parametrize("alone", [5, 25])
def test_what_gradients_cannot_tell_is_said(alone, caplog):
    """A generator may step after its critic or before it: both loops look the same."""

    def loop(generator_first):
        net = model()
        critic, generator = (sgd(layer.parameters(), 0.01) for layer in net)
        with sosd_fast.track(net, method="full") as probe:
            for i in range(40):
                late = [generator] * (i >= alone - (not generator_first))
                for optimizer in [*late, critic] if generator_first else [critic, *late]:
                    backward(net)
                    optimizer.step()
                    net.zero_grad()
        assert probe.step_count in (40, 41)  # the last, begun step counts
        return probe

    for generator_first in (True, False):
        probe = loop(generator_first)
        said = [m for m in caplog.messages if f"stepped for the first time at step {alone}, on gradients of its" in m]
        assert len(said) == 1 == len(caplog.messages) and "pass optimizers=[] and call Probe.step" in said[0]
        assert said[0].removeprefix("sosd_fast: ") in str(probe)
        caplog.clear()


@pytest.mark.parametrize("seed", range(5))
def test_a_step_for_each_parameter_inside_of_the_backward_pass(seed):
    """Layers are dropped at random, and each parameter has an optimizer, which steps as soon as it has its gradient."""
    own = random.Random(seed)
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
    for p in layers.parameters():
        optimizer = sgd([p], 0.01)

        def now(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(now)
    probe = sosd_fast.track(layers, method="full")
    truth = [[sigma_max(p) for p in layers.parameters()]]
    for i in range(40):
        x = torch.ones(2, 8)
        for layer in [x for x in layers if i == 0 or own.random() < 0.6] or [layers[0]]:
            x = layer(x).tanh()
        x.square().mean().backward()
        truth.append([sigma_max(p) for p in layers.parameters()])
    probe.close()
    assert probe.step_count == 40
    for r in probe.records():
        assert r.sigma_max == pytest.approx(truth[r.step][int(r.name[0])], rel=1e-6)
