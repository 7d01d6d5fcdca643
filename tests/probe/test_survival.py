"""What fails or is lost goes alone: a callback, a matrix, a handler. Training and the rest go on."""

import gc
import itertools
import logging
import math
import weakref

import pytest
import torch
from plain_loop import train
from scaled import Scaled
from torch import nn

import sosd_fast
from sosd_fast.probe.audit import Auditor
from sosd_fast.probe.full import FullGroup
from sosd_fast.probe.hooks import live
from sosd_fast.probe.leading import LeadingGroup


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 40, bias=False))


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


def test_handlers_of_the_log_may_raise(tmp_path):
    class Broken(logging.Handler):
        def emit(self, record):  # noqa: ARG002
            raise RuntimeError("nobody listens")

    net, handler = model(), Broken()
    probe = sosd_fast.track(net, method="full")
    probe.clock = lambda: 1 / 0
    logging.getLogger("sosd_fast").addHandler(handler)
    try:
        train(net, 2)
    finally:
        logging.getLogger("sosd_fast").removeHandler(handler)
    assert probe not in live()


@pytest.mark.expects_probe_failure
def test_on_record_that_raises_is_dropped_after_ten_failures_in_a_row(caplog, tmp_path):
    net, called = model(), []

    def broken(record):
        called.append(record)
        if len(called) != 5:
            raise RuntimeError("no network")

    probe = sosd_fast.track(net, method="full", on_record=broken, run_dir=tmp_path)
    train(net, 10)
    assert steps_of(probe) == list(range(11)) and len(sosd_fast.load(tmp_path).records) == 33
    assert len(called) == 5 + 10, "one that went well begins the count anew"
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 3 and "failed 10 times in a row" in errors[-1] and "no network" in caplog.text


def test_on_record_may_interrupt():
    net, seen = model(), []

    def interrupts(record):
        seen.append(record.step)
        if record.step == 2 and len(seen) == 7:
            raise KeyboardInterrupt

    probe = sosd_fast.track(net, method="full", on_record=interrupts)
    with pytest.raises(KeyboardInterrupt):
        train(net, 4)
    train(net, 1)
    assert probe.latest()["0.weight"].step == 3 and seen == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_on_record_may_use_the_probe_and_train_another_model():
    net, other, heard = model(), model(1), []
    inner = sosd_fast.track(other, method="full", on_record=lambda r: heard.append(("inner", r.step)))

    def uses(record):
        if record.name != "0.weight" or record.step == 0:
            return
        heard.append(("outer", record.step))
        assert probe.latest()["0.weight"] == record and probe.records()
        probe.flush()
        train(other, 1)
        if record.step == 3:
            probe.close()

    probe = sosd_fast.track(net, method="full", on_record=uses)
    train(net, 5)
    assert [h for h in heard if h[0] == "outer"] == [("outer", 1), ("outer", 2), ("outer", 3)]
    assert inner.latest()["0.weight"].step == 3 and probe not in live()


@pytest.mark.parametrize("method", ["auto", "topk", "full", "exact"])
def test_float64(method):
    net = nn.Sequential(nn.Linear(60, 60, bias=False)).double()
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[])
    probe.step()
    r = probe.latest()["0.weight"]
    assert r.step == 1 and r.sigma_max == pytest.approx(torch.linalg.svdvals(net[0].weight.detach())[0].item(), 1e-3)


@pytest.mark.parametrize("method", ["full", "topk", "exact"])
def test_a_matrix_with_nan_stops_neither_the_others_nor_their_audits(method, caplog, monkeypatch):
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(3)))
    monkeypatch.setattr(Auditor, "SHARE", 20.0)  # one audit a step
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[])
    with torch.no_grad():
        net[1].weight[3, 4] = math.nan
    for _ in range(12):
        probe.step()
    assert probe in live() and math.isnan(probe.latest()["1.weight"].sigma_max)
    assert probe.latest()["0.weight"].step == 12 and math.isfinite(probe.latest()["2.weight"].sigma_max)
    if method == "full":
        assert {a.name for a in probe.audits} == {"0.weight", "2.weight"}
    assert sum("1.weight holds NaN or Inf" in m for m in caplog.messages) == 1


def test_nan_at_the_beginning_and_recovered():
    net = model()
    good = net[1].weight.detach().clone()
    nn.init.constant_(net[1].weight, math.nan)
    probe = sosd_fast.track(net, method="topk", k=4, optimizers=[])
    with torch.no_grad():
        net[1].weight.copy_(good)
    for _ in range(5):
        with torch.no_grad():
            net[1].weight.mul_(1.01)
            net[1].weight[0] += 1e-3
        probe.step()
    r = probe.latest()["1.weight"]
    assert r.sd_variation_topk > 0 and r.sd_variation_carried > 0
    found = [r.cosine for r in probe.records() if r.name == "1.weight" and r.cosine is not None]
    assert not found or math.isnan(found[0]) or math.isfinite(found[-1])


@pytest.mark.parametrize("method", ["full", "topk", "exact", "auto"])
def test_a_matrix_that_cannot_be_measured(method, caplog):
    """Its data are taken away and given back, as offloading does."""
    net = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)))
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[], budget=1.0)
    probe.clock = itertools.count().__next__  # seconds, of which each measurement takes a small part
    data = net[1].weight.data
    probe.step()
    net[1].weight.data = torch.zeros(0)
    for _ in range(3):
        probe.step()
    assert probe in live() and probe.latest()["0.weight"].step == 4
    assert all(math.isfinite(probe.latest()[n].sigma_max) for n in ("0.weight", "2.weight"))
    said = [m for m in caplog.messages if "1.weight" in m]
    assert len(said) == 1
    net[1].weight.data = data
    for _ in range(4):
        with torch.no_grad():
            net[1].weight.mul_(1.01)
        probe.step()
    r = probe.latest()["1.weight"]
    assert r.step == 8 and r.sigma_max == pytest.approx(
        torch.linalg.svdvals(net[1].weight.detach())[0].item(), rel=1e-3
    )


def test_why_no_matrix_can_be_measured_is_said_in_whole_sentences():
    net = nn.Linear(40, 40, bias=False)
    net.weight.untyped_storage().resize_(0)  # as FSDP1 frees the weights that are not in use
    with pytest.raises(
        ValueError, match=r"at least one matrix that can be .*raises \w+: .*\w\. Exclude such parameters"
    ):
        sosd_fast.track(net, method="full")


@pytest.mark.parametrize("method", ["full", "topk"])
def test_results_that_cannot_be_read_are_lost_alone(method, caplog, monkeypatch):
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(44, 48, bias=False))  # of two groups
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[])
    group = FullGroup if method == "full" else LeadingGroup
    read = group.read

    def fails(self, tensors):
        if self.states[0].shape == (40, 40) and probe.step_count == 2:
            raise RuntimeError("an error of the device, told late")
        return read(self, tensors)

    monkeypatch.setattr(group, "read", fails)
    for _ in range(4):
        probe.step()
    (said,) = caplog.messages
    assert "0.weight cannot be measured at step 2" in said and "told late" in said
    values = {(r.name, r.step): r.sigma_max for r in probe.records()}
    assert [key for key, value in values.items() if math.isnan(value)] == [("0.weight", 2)] and len(values) == 10


@pytest.mark.parametrize("method", ["full", "topk"])
def test_what_raises_in_a_group_is_measured_alone(method, caplog):
    net = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)))
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[])
    probe.step()
    state = probe.state_dict()  # of one matrix it is made to fit nothing, and the group is given it with the others'
    broken = state["matrices"]["1.weight"]
    if method == "topk":
        broken["state"] = (torch.zeros(3, 3), torch.zeros(3, 3))
    else:
        broken["S"] = torch.zeros(7, dtype=torch.float64)
    probe.load_state_dict(state)
    probe.step()
    assert sum("1.weight cannot" in m for m in caplog.messages) == 1
    others = [r for r in probe.records() if r.step == 2 and r.name != "1.weight"]
    assert len(others) == 2 and all(r.interval == 1 and math.isfinite(r.sigma_max) for r in others)
    lost = probe.latest()["1.weight"]
    assert lost.step == 2 and math.isnan(lost.sigma_max) and all(map(math.isnan, lost.topk))
    for _ in range(3):
        probe.step()
    found = probe.latest()["1.weight"]
    assert found.step == 5 and (found.sd_variation if method == "full" else found.sd_variation_topk) < 1e-2
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("method", ["full", "topk", "auto"])
@pytest.mark.parametrize("form", [(30, 40), (64, 30), torch.float64, torch.bfloat16, torch.int64])
def test_data_of_another_form(form, method, caplog):
    net = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)))
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[], budget=1.0)
    probe.clock = itertools.count().__next__  # seconds, of which each measurement takes a small part
    probe.step()
    old = net[1].weight.data
    new = torch.randn(form) if isinstance(form, tuple) else (100 * old).to(form)
    net[1].weight.requires_grad_(False).data = new
    for _ in range(3):
        probe.step()
    latest = probe.latest()
    assert probe in live() and latest["0.weight"].step == latest["2.weight"].step == 4
    if form == torch.int64:
        assert sum("1.weight" in m for m in caplog.messages) >= 1
        return
    assert latest["1.weight"].step == 4 and latest["1.weight"].shape == tuple(new.shape)
    expected = torch.linalg.svdvals(new.double())[0].item()
    assert latest["1.weight"].sigma_max == pytest.approx(expected, rel=1e-2)
    probe.records()


class Marked(nn.Parameter):
    """A plain parameter with a mark."""


def test_tensor_subclasses_are_left_out_by_name(caplog):
    net = model()
    net[1].weight = nn.Parameter(Scaled(torch.ones(64, 64, dtype=torch.int8), 0.1), requires_grad=False)
    net[2].weight = Marked(net[2].weight.detach())
    probe = sosd_fast.track(net, method="full", optimizers=[])
    probe.step()
    assert list(probe.latest()) == ["0.weight", "2.weight"]
    said = [m for m in caplog.messages if "left out" in m]
    assert len(said) == 1 and "1.weight is a Scaled" in said[0]
    only = nn.Sequential(net[1])
    with pytest.raises(ValueError, match=r"whose 0\.weight is a Scaled"):
        sosd_fast.track(only)


def test_fake_tensors_and_parameters_that_wait_for_their_shape(caplog):
    from torch._subclasses import FakeTensorMode

    net = model()
    with FakeTensorMode():
        net[1].weight = nn.Parameter(torch.ones(64, 64))
    net.append(nn.LazyLinear(3))
    assert list(sosd_fast.track(net, method="full").latest()) == ["0.weight", "2.weight"]
    said = [m for m in caplog.messages if "left out" in m]
    assert len(said) == 1 and "1.weight is a FakeTensor" in said[0] and "3.weight is not initialized" in said[0]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 16), nn.Linear(16, 24, bias=False)

    def forward(self, tokens):
        return self.head(self.emb(tokens))


def resize(net):
    """As a vocabulary grows."""
    wider = nn.Embedding(30, 16)
    wider.weight.data[:20] = net.emb.weight.data
    net.emb = wider


def grow(net):
    net.emb.weight.data = torch.cat([net.emb.weight.data, torch.ones(10, 16)])


@pytest.mark.parametrize("method", ["full", "topk", "auto"])
@pytest.mark.parametrize("change", [lambda net: net.bfloat16(), lambda net: net.double(), grow, resize])
def test_parameters_that_are_cast_or_resized_midway(change, method, caplog):
    torch.manual_seed(0)
    net = Tokens()
    probe = sosd_fast.track(net, method=method, k=4, **({"budget": 1.0} if method == "auto" else {}))
    probe.clock = itertools.count().__next__  # seconds, of which each measurement takes a small part

    def run(count):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(count):
            net(torch.arange(8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    run(3)
    change(net)
    run(3)
    resized = net.emb.weight.shape[0] > 20
    said = [m for m in caplog.messages if "another shape or dtype after step 3" in m]
    assert len(said) == 1 and "emb.weight" in said[0] and ("head.weight" in said[0]) != resized
    for name in ("emb.weight", "head.weight"):
        found = [r for r in probe.records() if r.name == name]
        steps = [r.step for r in found]
        assert sorted(set(steps)) == list(range(7)) and len(steps) - 7 <= resized  # of step 3 before and after, at most
        assert all(r.shape == tuple(net.get_parameter(name).shape) for r in found if r.step >= 4)
        truth = torch.linalg.svdvals(net.get_parameter(name).detach().double())
        assert found[-1].sigma_max == pytest.approx(truth[0].item(), rel=1e-4)
        moved = {r.step: r.sd_variation if method != "topk" else r.sd_variation_topk for r in found}
        assert all(v is None or v > 0 for v in moved.values()), "not what did not move: the same weights measured twice"
        if name == "head.weight" or not resized:
            assert all(moved[step] is not None for step in ((3, 6) if method == "auto" else (3, 5, 6)))


def kept_alive(weights):
    gc.collect()
    return [ref() is not None for ref in weights]


@pytest.mark.parametrize("stepped", [False, True, None])
def test_a_kept_probe_does_not_keep_the_weights_of_a_model_that_is_gone(stepped, caplog):
    net = model()
    probe, optimizer = sosd_fast.track(net, method="full"), torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.ones(2, 48)).sum().backward()
        optimizer.step()
    weights = [weakref.ref(p) for p in net.parameters()]
    if stepped is None:
        probe.close()
    del net
    assert all(kept_alive(weights)), "the optimizer keeps them"
    if stepped:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert probe.step_count == 3 and probe.latest()["0.weight"].sigma_max > 0
        del p
    del optimizer
    assert not any(kept_alive(weights))
    assert len({r.step for r in probe.records()}) == 3 + bool(stepped) and "a model that is gone" in str(probe)
    probe.flush()
    probe.close()
    assert not caplog.messages


def test_a_kept_probe_does_not_keep_its_copies_of_weights_that_are_gone():
    net = model()
    part, optimizer = net[0], torch.optim.SGD(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, method="full", theory_bound=True)
    copies = [weakref.ref(t.W) for t in probe._matrices.states]
    del net
    for i in range(3):
        part(torch.ones(2, 48)).sum().backward()
        optimizer.step()
        assert probe.latest()["0.weight"].theory_bound > 0 and probe.step_count == i + 1
    del optimizer
    assert kept_alive(copies) == [True, *[False] * (len(copies) - 1)], "those of the part, and of nothing else"
    del part
    assert not any(kept_alive(copies))
    probe.close()


def test_a_part_of_a_model_that_outlives_it_is_measured_on(caplog):
    """As the module inside of a wrapper that nobody keeps."""
    net = model()
    part, optimizer = net[0], torch.optim.SGD(net[0].parameters(), lr=0.1)
    wrapped = nn.Sequential(net[0])
    probe, of_wrapper = sosd_fast.track(net, method="full"), sosd_fast.track(wrapped, method="full")
    del net, wrapped
    gc.collect()
    for i in range(3):
        part(torch.ones(2, 48)).sum().backward()
        optimizer.step()
        assert of_wrapper.step_count == probe.step_count + (i == 0) == i + 1 or probe.step_count == i + 1
    probe.flush()
    for each in (probe, of_wrapper):
        assert each.matrices[0].parameter is part.weight
        assert each.latest()["0.weight"].step == 3
        assert each.latest()["0.weight"].sigma_max == pytest.approx(torch.linalg.svdvals(part.weight)[0].item())
    assert sum("are not measured after step" in m for m in caplog.messages) == 1
