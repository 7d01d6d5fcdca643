"""What the callbacks for Trainers share; with the real Trainers they are tested in tests/integrations."""

import logging

import pytest
import torch
from three_layers import adamw, loss, model
from torch import nn

import sosd_fast
from sosd_fast.integrations.common import AttachedProbe


def fit(attached, net, steps, optimizer=None, since=0):
    """As a Trainer whose count of steps goes by two, for it counts those of two optimizers."""
    optimizer = optimizer or adamw(net)
    attached.attach(net, since, ranks=1, main=True, told=2 * since)
    for step in range(since + 1, since + steps + 1):
        loss(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not attached.advance(2 * step - 2, [optimizer]) and attached.advance(2 * step, [optimizer])
        attached.write(step, loss=1.0, lr=None, val_loss=float("nan"))
    attached.detach()


def steps_in(run_dir):
    return [r.step for r in sosd_fast.load(run_dir).records if r.name == "0.weight"]


def test_a_second_training_is_a_run_of_its_own(tmp_path, caplog):
    attached, net = AttachedProbe(run_dir=tmp_path, method="full"), model()
    fit(attached, net, 3)
    fit(attached, net, 2)
    assert steps_in(tmp_path) == [0, 1, 2, 3] and steps_in(tmp_path / "fit-2") == [0, 1, 2]
    (said,) = caplog.messages
    assert "another training begins" in said and "fit-2" in said
    fit(attached, net, 1, since=2)  # resumed, and so the same run
    assert steps_in(tmp_path / "fit-2") == [0, 1, 2, 3]
    assert [line["step"] for line in sosd_fast.load(tmp_path / "fit-2").log] == [1, 2, 3]


@pytest.mark.expects_probe_failure
@pytest.mark.parametrize("run_dir", [True, False])
def test_a_model_that_cannot_be_followed_ends_no_training(tmp_path, run_dir, caplog):
    attached = AttachedProbe(run_dir=tmp_path if run_dir else None, method="full")
    net = nn.LayerNorm(4)
    attached.attach(net, 0, ranks=1, main=True)
    assert attached.probe is None and attached.advance(1, [])
    attached.write(1, loss=1.0)
    attached.detach()
    (said,) = caplog.messages
    assert said.startswith("sosd_fast: training goes on without the spectra. track: expected")


@pytest.mark.expects_probe_failure
def test_a_log_that_cannot_be_written_ends_alone(tmp_path, caplog, monkeypatch):
    attached, net = AttachedProbe(run_dir=tmp_path, method="full"), model()
    attached.attach(net, 0, ranks=1, main=True)

    def full(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attached._log, "write", full)
    for step in (1, 2):
        attached.advance(step, [])
        attached.write(step, loss=1.0)
    attached.detach()
    (said,) = caplog.messages
    assert "log.jsonl cannot be written at step 1" in said and "No space left" in said
    assert steps_in(tmp_path) == [0, 1, 2]


def test_users_see_each_record_and_may_choose_the_optimizers(caplog):
    caplog.set_level(logging.INFO, "sosd_fast")
    seen, heard, net = [], [], model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attached = AttachedProbe(method="full", on_record=seen.append, optimizers=[optimizer])
    attached.attach(net, 0, ranks=1, main=True, on_record=heard.append)
    loss(net).backward()
    optimizer.step()
    assert attached.advance(1, [optimizer]) and attached.probe.step_count == 1
    attached.detach()
    assert seen == heard and {r.step for r in seen} == {0, 1}
