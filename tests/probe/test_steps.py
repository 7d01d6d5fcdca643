"""A training step is what a person calls one: counts, and when weights are read, however optimizers are arranged."""

import threading
from pathlib import Path

import pytest
import torch
from arranged import (
    ARRANGED,
    Containing,
    Inheriting,
    Wrapping,
    backward,
    model,
    sgd,
    sigma_max,
    steps_of,
)
from prepared import run_ranks
from torch import nn

import sosd_fast


def inner(optimizer):
    """The optimizers that a person may name instead."""
    if hasattr(optimizer, "optimizers"):
        return optimizer.optimizers
    return [optimizer.optimizer] if hasattr(optimizer, "optimizer") else [optimizer]


@pytest.mark.parametrize("given", ["none", "it", "inner"])
@pytest.mark.parametrize("name", ARRANGED)
def test_the_outermost_step_counts(name, given, caplog):
    net = model()
    optimizer = ARRANGED[name](net)
    optimizers = {"none": None, "it": optimizer, "inner": inner(optimizer)}[given]
    probe = sosd_fast.track(net, optimizers, method="full")
    for i in range(5):
        backward(net)
        optimizer.step()
        net.zero_grad()
        latest = probe.latest()
        for layer in ("0", "1"):
            assert latest[f"{layer}.weight"].step == i + 1
            assert latest[f"{layer}.weight"].sigma_max == pytest.approx(sigma_max(net[int(layer)].weight), rel=1e-5)
    assert steps_of(probe) == [0, 1, 2, 3, 4, 5]
    assert all(r.sd_variation > 0 for r in probe.records() if r.step)
    assert not [r for r in caplog.records if r.name == "sosd_fast"]


@pytest.mark.parametrize("given", [False, True])
def test_an_error_inside_of_a_step_leaves_nothing_behind(given):
    class Failing(Wrapping):
        def step(self):
            self.optimizer.step()
            if self.fails:
                raise RuntimeError("out of luck")

    net = model()
    optimizer = Failing(sgd(net.parameters()))
    probe = sosd_fast.track(net, optimizer.optimizer if given else None, method="full")
    for optimizer.fails in (False, True, False, True, False):
        backward(net)
        try:
            optimizer.step()
        except RuntimeError:
            continue
    probe.flush()
    assert steps_of(probe) == [0, 1, 2, 3]


@pytest.mark.parametrize("shared", [False, True])
def test_threads_that_train_the_same_weights(shared):
    """As Hogwild does; each thread has an optimizer, or they share one."""
    net, threads, start = model(), 4, threading.Barrier(4)
    optimizers = [sgd(net.parameters(), 1e-3) for _ in range(1 if shared else threads)] * (threads if shared else 1)
    probe = sosd_fast.track(net, method="full", audit=False)

    def work(optimizer):
        start.wait()
        for _ in range(25):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()

    running = [threading.Thread(target=work, args=(optimizer,)) for optimizer in optimizers]
    for t in running:
        t.start()
    for t in running:
        t.join()
    probe.close()
    assert probe.step_count == 100 and steps_of(probe) == list(range(101))


def test_nested_steps_in_threads_do_not_mix():
    counts, start = {}, threading.Barrier(3)

    def work(key):
        net = model()
        optimizer = Wrapping(Inheriting(net.parameters(), lr=1e-3))
        with sosd_fast.track(net, method="full", audit=False) as probe:
            start.wait()
            for _ in range(20):
                with torch.no_grad():
                    for p in net.parameters():
                        p.grad = torch.ones_like(p)
                optimizer.step()
            counts[key] = steps_of(probe)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert counts == dict.fromkeys(range(3), list(range(21)))


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(6, 6, bias=False), nn.Linear(6, 5, bias=False)

    def step(self, name, optimizer):
        """Trains one, while the other is frozen."""
        other = self.critic if name == "generator" else self.generator
        other.requires_grad_(False)
        self.critic(self.generator(torch.ones(2, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.requires_grad_(True)


@pytest.mark.parametrize("order", [("critic", "generator"), ("generator", "critic")])
@pytest.mark.parametrize("given", [False, True])
def test_networks_that_are_frozen_for_the_moment(order, given):
    net = Adversarial()
    optimizers = {name: sgd(getattr(net, name).parameters()) for name in order}
    probe = sosd_fast.track(net, list(optimizers.values()) if given else None, method="full")
    weights = [{name: getattr(net, name).weight.detach().clone() for name in order}]
    for _ in range(10):
        for name in order:
            net.step(name, optimizers[name])
        weights.append({name: getattr(net, name).weight.detach().clone() for name in order})
    probe.close()
    for name in order:
        assert steps_of(probe, f"{name}.weight") == list(range(11))
    for r in probe.records():
        assert r.sigma_max == pytest.approx(sigma_max(weights[r.step][r.name.split(".")[0]]), rel=1e-5), "one batch's"


@pytest.mark.parametrize("every", [2, 3, 5, 7])
@pytest.mark.parametrize("batches", [1, 4, 5, 15, 30])
@pytest.mark.parametrize("given", [False, True])
def test_an_optimizer_that_steps_every_so_many_times(every, batches, given):
    net = Adversarial()
    often, seldom = sgd(net.critic.parameters()), sgd(net.generator.parameters())
    probe = sosd_fast.track(net, [often, seldom] if given else None, method="full")
    for i in range(batches):
        net.step("critic", often)
        if (i + 1) % every == 0:
            net.step("generator", seldom)
    probe.close()
    assert steps_of(probe, "critic.weight") == list(range(batches + 1))
    assert probe.latest()["generator.weight"].sigma_max == pytest.approx(sigma_max(net.generator.weight), rel=1e-5)


def test_optimizers_that_are_put_in_the_place_of_others():
    net = model()
    probe, kept = sosd_fast.track(net, method="full"), []
    for _ in range(3):
        kept.append(sgd(net.parameters()))  # the others live
        for _ in range(2):
            backward(net)
            kept[-1].step()
            assert steps_of(probe)[-1] == probe.step_count
    assert steps_of(probe) == list(range(7))
    for _ in range(3):  # one comes back
        backward(net)
        kept[0].step()
    probe.close()
    assert steps_of(probe) == list(range(10))


def test_an_optimizer_for_each_step():
    net = model()
    probe = sosd_fast.track(net, method="full")
    for _ in range(4):
        backward(net)
        sgd(net[0].parameters()).step()  # gone before the step ends, for the other matrix may have an optimizer yet
    probe.close()
    assert steps_of(probe) == [0, 1, 2, 3, 4]


def test_trainable_parameters_without_an_optimizer_are_waited_for_a_while():
    net = model()
    probe, optimizer, late = sosd_fast.track(net, method="full"), sgd(net[0].parameters()), []
    for i in range(30):
        backward(net)
        optimizer.step()
        late.append(i + 1 - probe.latest()["0.weight"].step)
    assert late[:20] == [1] * 20 and late[21:] == [0] * 9
    assert steps_of(probe) == list(range(31))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_that_only_makes_the_state_is_none(resumed, tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1))
    if resumed:
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        saved = get_state_dict(net, optimizer)
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, method="full", step=1 if resumed else None)
    if resumed:
        set_state_dict(net, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    else:
        get_state_dict(net, optimizer)
    start = probe.step_count
    assert optimizer.state and start == int(resumed)
    net.append(nn.Linear(8, 4, bias=False))  # what is changed until the first step is seen
    optimizer.add_param_group({"params": net[2].parameters(), "lr": 0.1})
    for _ in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        get_state_dict(net, optimizer)
    assert steps_of(probe) == [start + i for i in range(4)] == steps_of(probe, "2.weight")


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_warm_up_from_zero_counts(rate):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    probe = sosd_fast.track(net, method="full")
    for _ in range(2):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
    assert steps_of(probe) == [0, 1, 2]


def test_rates_and_gradients_of_any_kind():
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3, bias=False))
    optimizer = sgd(net.parameters(), lr=0.0)
    probe = sosd_fast.track(net, method="full")
    net(torch.tensor([1, 1, 2])).sum().backward()
    net[1].weight.grad = None
    optimizer.step()
    assert steps_of(probe) == [0, 1], "sparse gradients that are not zero"
    still = nn.Linear(4, 3)  # whose steps all change nothing: only the first may be none of the person's
    probe, optimizer = sosd_fast.track(still, method="full"), sgd(still.parameters(), lr=0.0)
    for _ in range(3):
        optimizer.step()
    assert steps_of(probe, "weight") == [0, 1, 2]
    other = nn.Linear(4, 3)
    probe, optimizer = sosd_fast.track(other, method="full"), sgd(other.parameters())
    optimizer.param_groups[0]["lr"] = None
    optimizer.step()  # no gradients
    assert steps_of(probe, "weight") == [0, 1]


@pytest.mark.parametrize("given", [False, True])
def test_where_no_step_is_seen_it_is_said_within_20_and_at_the_end(given, caplog):
    net, other = model(), model()
    probe = sosd_fast.track(net, sgd(net.parameters()) if given else None)
    optimizer = sgd(other.parameters())
    for i in range(25):
        backward(other)
        optimizer.step()
        said = [m for m in caplog.messages if "so none was counted" in m]
        assert len(said) == (i >= 19)
    assert "pass optimizers=[] and call Probe.step after each step" in said[0]
    probe.close()
    assert sum("25 steps of optimizers" in m for m in caplog.messages) == 1
    for optimizers in (None, []):
        with sosd_fast.track(net, optimizers) as probe:
            probe.step()
    assert len(caplog.messages) == 2


class ScheduleFree(torch.optim.Optimizer):
    """The weights between two steps are y; `eval` puts the averaged ones in their place, and `train` puts y back."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr})
        self.beta, self.count = beta, 0

    @torch.no_grad()
    def step(self):
        self.count += 1
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            z, x = s.setdefault("z", p.clone()), s.setdefault("x", p.clone())
            z.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            x.lerp_(z, 1 / self.count)
            p.copy_(z.lerp(x, self.beta))

    @torch.no_grad()
    def swap(self):
        for p in self.param_groups[0]["params"]:
            x = self.state[p]["x"]
            y = p.clone()
            p.copy_(x)
            x.copy_(y)


def test_the_weights_at_the_end_of_a_step_or_others_by_hand():
    """As docs/steps.md says."""
    net = model()
    optimizer = ScheduleFree(net.parameters())
    probe = sosd_fast.track(net, method="full")
    averaged = sosd_fast.track(net, optimizers=[], method="full")
    for i in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        y = sigma_max(net[0].weight)
        optimizer.swap()
        averaged.step()
        x = sigma_max(net[0].weight)
        optimizer.swap()
        assert probe.latest()["0.weight"].sigma_max == pytest.approx(y, rel=1e-6)
        assert i == 0 or x != pytest.approx(y, rel=1e-6)
        assert averaged.latest()["0.weight"].sigma_max == pytest.approx(x, rel=1e-6)
        assert averaged.step_count == probe.step_count == i + 1


def test_an_average_of_the_weights_is_a_model_of_its_own():
    net = model()
    average = torch.optim.swa_utils.AveragedModel(net)
    probe, of_average = sosd_fast.track(net, method="full"), sosd_fast.track(average, optimizers=[], method="full")
    optimizer = sgd(net.parameters())
    for _ in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
        of_average.step()
    name, r = next(iter(of_average.latest().items()))
    assert steps_of(probe) == steps_of(of_average, name) == [0, 1, 2, 3]
    assert r.sigma_max == pytest.approx(sigma_max(average.module[0].weight), rel=1e-6)
    assert r.sigma_max != pytest.approx(sigma_max(net[0].weight), rel=1e-6)


def test_the_walk_up_the_stack_stops_at_hooks_of_our_own():
    net, other, seen = model(), model(), []
    inner_optimizer = sgd(other.parameters())
    probe = sosd_fast.track(other, method="full")

    def train_other(record):
        seen.append(record.step)
        backward(other)
        inner_optimizer.step()

    sosd_fast.track(net, method="full", on_record=train_other)
    optimizer = Containing([sgd(net[0].parameters()), sgd(net[1].parameters()), sgd(other.parameters(), 0.0)])
    optimizer.optimizers.pop()  # it holds the other model's parameters, and does not step them
    before = probe.step_count
    backward(net)
    optimizer.step()
    assert seen.count(1) == 2 and probe.step_count - before == 3, "the container's, and those that its records take"


def test_ranks_agree_on_what_a_step_is():
    done = run_ranks(3, Path(__file__).with_name("steps_worker.py"))
    assert done.returncode == 0 and done.stdout.count("the ranks agree") == 3, done.stdout + done.stderr


@pytest.mark.parametrize("given", [None, []])
@pytest.mark.parametrize("change", ["in place", "data", "not at all"])
def test_weights_that_move_without_a_step_are_told_at_the_end(given, change, caplog):
    net = model()
    probe = sosd_fast.track(net, given, method="full")
    for _ in range(3):
        backward(net)
        for p in net.parameters():
            if change == "data":
                p.data -= 0.1 * p.grad.data
            elif change == "in place":
                with torch.no_grad():
                    p.sub_(0.1 * p.grad)
    assert not caplog.messages
    probe.close()
    probe.close()
    said = [
        m
        for m in caplog.messages
        if "the weights changed without a step" in m and "call Probe.step after each step" in m
    ]
    assert len(said) == len(caplog.messages) == (change != "not at all")
