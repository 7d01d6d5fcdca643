"""Steps that cease to be seen after the first ones are told."""

import copy

import pytest
import torch
from arranged import backward, model, sgd

import sosd_fast


def told(caplog, words):
    return [r.levelname for r in caplog.records if words in r.getMessage()]


@pytest.mark.parametrize("seen", [0, 5])
def test_a_given_optimizer_that_is_made_anew(seen, caplog):
    net = model()
    given = sgd(net.parameters())
    probe = sosd_fast.track(net, [given], method="full")
    optimizer = given
    for i in range(30):
        if i == seen:
            optimizer = sgd(net.parameters())
        backward(net)
        optimizer.step()
        assert len(told(caplog, "20 steps of optimizers other than the given ones, so none")) == (i + 1 >= seen + 20)
    assert probe.step_count == seen
    del given, optimizer
    probe.close()
    assert told(caplog, f"{30 - seen} steps of optimizers other than the given ones, so none was counted")
    assert not seen or "after step 5 " in caplog.messages[0]


def test_other_optimizers_between_the_given_ones_are_not_told(caplog):
    net = model()
    often, seldom = (sgd(layer.parameters()) for layer in net)
    other = model()
    others = sgd(other.parameters())
    probe = sosd_fast.track(net, [seldom], method="full")
    for i in range(100):
        for n, optimizer in ((net, often), (other, others), *[(net, seldom)] * (i % 8 == 7)):
            backward(n)
            optimizer.step()
    for _ in range(50):  # the tracked model is not trained any more
        backward(other)
        others.step()
    probe.close()
    assert probe.step_count == 12 and not caplog.messages


@pytest.mark.parametrize("how", ["in place", "data", "another model's optimizer"])
def test_weights_that_something_else_trains_after_some_steps(how, caplog):
    net, master = model(), model()
    optimizer, of_master = sgd(net.parameters()), sgd(master.parameters())
    probe = sosd_fast.track(net, method="full")
    for i in range(30):
        backward(net)
        if i < 5:
            optimizer.step()
            continue
        if how == "another model's optimizer":
            backward(master)
            of_master.step()
        with torch.no_grad():
            for p, q in zip(net.parameters(), master.parameters(), strict=True):
                if how == "data":
                    p.data -= 0.1 * p.grad.data
                elif how == "in place":
                    p.sub_(0.1 * p.grad)
                else:
                    p.copy_(q)
    said = bool(told(caplog, "after step 5 20 steps of optimizers that hold none of the tracked parameters"))
    assert said == (how == "another model's optimizer")
    assert "the last is step 5; the weights have changed since" in str(probe)
    caplog.clear()
    probe.close()
    assert told(caplog, "so none was counted") == ["WARNING"] and "after step 5 " in caplog.messages[0]


@pytest.mark.parametrize("given", [None, []])
@pytest.mark.parametrize("how", ["nothing", "load", "swap"])
def test_weights_that_are_loaded_at_the_end_warn_of_nothing(how, given, caplog):
    caplog.set_level("INFO", "sosd_fast")
    net = model()
    best, optimizer = copy.deepcopy(net.state_dict()), sgd(net.parameters())
    probe = sosd_fast.track(net, given, method="full")
    for _ in range(3):
        backward(net)
        optimizer.step()
        if given is not None:
            probe.step()
    if how == "load":
        net.load_state_dict(best)
    elif how == "swap":
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p * 0.9)
    probe.close()
    expected = ["INFO"] if how != "nothing" and given is None else []
    assert (
        told(caplog, "after step 3 the weights changed without a step")
        == expected
        == [r.levelname for r in caplog.records]
    )


@pytest.mark.parametrize("given", [None, "all", []])
def test_steps_that_count_by_hand_and_by_optimizers_are_told_once(given, caplog):
    net = model()
    optimizer = sgd(net.parameters())
    with sosd_fast.track(net, [optimizer] if given == "all" else given, method="full") as probe:
        for _ in range(3):
            backward(net)
            optimizer.step()
            probe.step()
        assert probe.step_count == (3 if given == [] else 6)
        assert ("doubtful: Probe.step was called at step 2 though" in str(probe)) == (given != [])
    assert len(told(caplog, "Probe.step was called at step 2 though")) == (given != [])


def test_steps_by_hand_alone_are_not_doubted(caplog):
    net = model()
    with sosd_fast.track(net, method="full") as probe:
        for _ in range(3):
            probe.step()
    assert probe.step_count == 3 and not told(caplog, "Probe.step was called")


def test_steps_by_hand_note_no_weights_for_a_message_that_is_never_given():
    net = model()
    with sosd_fast.track(net, [], method="full") as probe:
        noted = probe._matrices._noted
        for _ in range(3):
            probe.step()
        assert probe._matrices._noted is noted and probe.step_count == 3
