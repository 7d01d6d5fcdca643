"""Where one of several optimizers misses steps, steps seldom, or they change their order, records stay in step."""

import copy
import pickle

import pytest
import torch
from arranged import backward, model, sgd, sigma_max, steps_of
from torch import nn

import sosd_fast
from sosd_fast.probe.optimizers import Notes


def records_and_truth(rounds, step):
    """The largest values of the first weight, by records and by an SVD after each round of `step(i, first, second)`."""
    net = model()
    first, second = (sgd(layer.parameters(), 0.01) for layer in net)
    truth = [sigma_max(net[0].weight)]
    with sosd_fast.track(net, method="full") as probe:
        for i in range(rounds):
            backward(net)
            step(i, first, second)
            net.zero_grad()
            truth.append(sigma_max(net[0].weight))
    found = {r.step: r.sigma_max for r in probe.records() if r.name == "0.weight"}
    assert list(found) == list(range(rounds + 1))
    return list(found.values()), pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("missed", [[3], [20, 21], [5, 9, 10, 11, 30], [39]])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("at_once", [True, False])
def test_records_stay_in_step_where_an_optimizer_misses_some(who, missed, at_once):
    """As where a gradient scaler skips one of several optimizers."""

    def step(i, *optimizers):
        for n, optimizer in enumerate(optimizers):
            if n != who or i not in missed:
                optimizer.step()
            if at_once:
                optimizer.zero_grad()

    found, truth = records_and_truth(40, step)
    assert found == truth


@pytest.mark.parametrize("every", [2, 5])
def test_an_optimizer_that_steps_seldom_and_first(every):
    def step(i, seldom, often):
        if i % every == 0:
            seldom.step()
        often.step()

    found, truth = records_and_truth(40, step)
    assert found == truth


def test_optimizers_whose_order_alternates():
    def step(i, *optimizers):
        for optimizer in optimizers[:: 1 if i % 2 else -1]:
            optimizer.step()

    found, truth = records_and_truth(12, step)
    assert found == truth


def test_an_optimizer_that_is_given_other_parameters_of_the_same_number():
    """As a model whose state is loaded with assign=True."""
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8))
    optimizer = sgd(net.parameters(), 0.01)
    probe = sosd_fast.track(net, method="full")
    for i in range(8):
        if i == 5:
            net.load_state_dict({name: p.clone() for name, p in net.state_dict().items()}, assign=True)
            optimizer.param_groups[0]["params"] = list(net.parameters())
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
    probe.close()
    assert probe.step_count == 8
    assert probe.latest()["0.weight"].sigma_max == pytest.approx(sigma_max(net[0].weight), rel=1e-6)


def test_a_model_that_keeps_its_probe_is_copied_and_saved(tmp_path):
    net = model()
    net.probe = sosd_fast.track(net, method="full")
    assert copy.deepcopy(net).probe is None and pickle.loads(pickle.dumps(net)).probe is None
    torch.save(net, tmp_path / "net.pt")
    assert torch.load(tmp_path / "net.pt", weights_only=False).probe is None and net.probe.alive


@pytest.mark.parametrize("ratio", [1, 3])
def test_optimizers_of_the_same_weights_by_turns(ratio):
    """Each of them changes all weights, on gradients of its own."""
    net = model()
    first, second = sgd(net.parameters()), sgd(net.parameters(), 0.01)
    probe = sosd_fast.track(net, method="full")
    for i in range(12):
        backward(net)
        (second if i % (ratio + 1) == ratio else first).step()
        net.zero_grad()
        assert steps_of(probe) == list(range(i + 2))
        assert probe.latest()["0.weight"].sigma_max == pytest.approx(sigma_max(net[0].weight), rel=1e-5)


def test_optimizers_of_the_same_weights_on_the_same_gradients():
    net = model()
    optimizers = sgd(net.parameters()), sgd(net.parameters(), 0.01)
    probe = sosd_fast.track(net, method="full")
    for _ in range(6):
        backward(net)
        for optimizer in optimizers:
            optimizer.step()
        net.zero_grad()
    probe.close()
    assert steps_of(probe) == list(range(7))
    assert probe.latest()["0.weight"].sigma_max == pytest.approx(sigma_max(net[0].weight), rel=1e-5)


def test_optimizers_that_are_gone_leave_nothing_behind():
    net = model()
    with sosd_fast.track(net, method="full") as probe:
        for _ in range(30):
            optimizer = sgd(net.parameters())
            backward(net)
            optimizer.step()
            kept = vars(probe._steps).items()
            assert max(len(notes._notes) for _, notes in kept if isinstance(notes, Notes)) <= 2
    assert probe.step_count == 30
