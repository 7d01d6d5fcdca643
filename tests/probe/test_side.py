"""Measurements whose results come some steps later, as from a GPU: late ones on the CPU, and on a GPU."""

import contextlib
import math
import weakref

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.distributed.share import share
from sosd_fast.matrices import find_matrices
from sosd_fast.probe.executor import HostExecutor
from sosd_fast.probe.followed import FollowedMatrices, Found
from sosd_fast.probe.leading import LeadingTensors
from sosd_fast.probe.measurer import Measurer
from sosd_fast.probe.planner import Plan
from sosd_fast.probe.probe import Probe
from sosd_fast.probe.settings import Settings

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


class Late:
    """An executor whose results are there after the third look at them."""

    def __init__(self, device=None):  # noqa: ARG002
        self.held = 0

    @contextlib.contextmanager
    def measuring(self, weights):  # noqa: ARG002
        yield

    def fetch(self, tensors, work):  # noqa: ARG002
        return LateResults([t if t is None else t.clone() for t in tensors])

    def hold(self):
        self.held += 1


class LateResults:
    late = True
    seconds = device_seconds = 1e-3

    def __init__(self, tensors):
        self.tensors, self.looks = tensors, 0

    def ready(self):
        self.looks += 1
        return self.looks > 3

    def get(self):
        return self.tensors


def follow(net, executor_of, optimizers=None, **settings):
    """As `sosd_fast.track`, with another executor."""
    find = lambda: Found(share(net, find_matrices(net)))  # noqa: E731
    return Probe(weakref.ref(net), find, optimizers, Settings(**settings), executor_of=executor_of)


def model(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128, bias=False), nn.Linear(128, 96, bias=False)).to(device)


def train(net, optimizer, steps, each=lambda: None):
    device = next(net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        net(torch.randn(8, 96, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        each()


@pytest.mark.parametrize("method", ["full", "topk", "exact"])
@pytest.mark.parametrize("every", [1, 2])
def test_late_records_are_the_same(method, every, tmp_path):
    def run(run_dir, executor_of):
        net = model()
        settings = {"method": method, "k": 8, "every": every, "run_dir": run_dir, "theory_bound": True}
        probe = follow(net, executor_of, audit=False, **settings)
        seen = []
        train(
            net,
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            12,
            lambda: seen.append(max(probe.latest().values(), key=lambda r: r.step).step),
        )
        probe.close()
        return sosd_fast.load(run_dir), seen, probe

    now, seen, _ = run(tmp_path / "now", lambda _: HostExecutor())
    executor = Late()
    late, seen_late, probe = run(tmp_path / "late", lambda _: executor)
    assert late.records == now.records and late.records[-1].step == 12
    for name in ("0.weight", "1.weight"):
        for a, b in zip(late.spectra(name), now.spectra(name), strict=True):
            assert (a == b).all()
    assert max(s - t for s, t in zip(seen, seen_late, strict=True)) >= 2, "the records were late"
    assert executor.held == 12, "before every step of the optimizer"
    assert 0 < probe.overhead


def test_flush_waits_and_state_is_whole():
    net = model()
    probe = follow(net, Late, method="full")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 5)
    assert probe.latest()["0.weight"].step < 5
    state = probe.state_dict()["matrices"]["0.weight"]
    assert probe.latest()["0.weight"].step == 5 and torch.equal(state["spectrum"], state["S"])
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 1)
    probe.flush()
    assert probe.latest()["0.weight"].step == 6


@pytest.mark.parametrize(("topk_ms", "most"), [(1.0, "topk"), (20.0, "full")])
def test_auto_takes_what_is_cheaper_by_the_devices_clock(topk_ms, most):
    class Clocked(Late):
        def fetch(self, tensors, work):
            found = super().fetch(tensors, work)
            each = topk_ms if isinstance(tensors, LeadingTensors) else 10.0
            found.seconds = found.device_seconds = 1e-3 * each * len(tensors.S)
            found.looks = 2  # there a step later: many steps' costs on their way would not be counted
            return found

    now, net = [0.0], model()
    probe = follow(net, Clocked, [], method="auto", k=8, budget=0.01, audit=False)
    probe.clock = lambda: now[0]
    for _ in range(40):
        now[0] += 1.0  # earns 10 ms; the full spectrum of a matrix takes as much
        probe.step()
    records = [r for r in probe.records() if r.step > 10]  # what the first step takes is paid off by then
    shares = [sum(r.method == "topk" for r in records) / len(records), len(records) / (2 * 30)]
    if most == "topk":  # each step, and full ones in turn
        assert 0.3 < shares[0] < 0.8 and shares[1] == 1
    else:
        assert shares[0] == 0 and 0.3 < shares[1] < 0.7


def test_auto_learns_what_measurements_cost():
    class Cheaper(Late):
        def fetch(self, tensors, work):
            found = super().fetch(tensors, work)
            found.seconds = found.device_seconds = seconds[0] * len(tensors.S)
            found.looks = 3
            return found

    seconds, now, net = [10e-3], [0.0], model()
    probe = follow(net, Cheaper, [], method="auto", k=40, budget=0.01, audit=False)  # too many leading values
    probe.clock = lambda: now[0]
    measured = []
    for step in range(400):
        seconds[0] = 10e-3 if step < 100 else 1e-3
        now[0] += 1.0  # earns 10 ms
        probe.step()
        measured.append(sum(r.step == step + 1 for r in probe.latest().values()))
    assert 0.4 < sum(measured[50:100]) / (2 * 50) < 0.6, "at first one of two a step"
    assert measured[-100:] == [2] * 100


def test_by_hand_holds_at_once_unless_told_otherwise():
    executor, net = Late(), model()
    probe = follow(net, lambda _: executor, [], method="full")
    held = executor.held
    probe.step()
    assert executor.held == held + 1
    probe.step(hold=False)
    assert executor.held == held + 1


def test_results_change_what_the_host_knows_only_when_they_are_kept():
    net = model()
    matrices = FollowedMatrices(weakref.ref(net), lambda: Found(share(net, find_matrices(net))))
    measurer, plan, state = Measurer(matrices, every=1, k=8, executor_of=Late), Plan([0, 1], [0, 1]), matrices.states[0]

    def host():
        return state.spectrum, state.leading, state.reference, state.usual_move, state.method

    first = measurer.launch(plan, step=1)
    S, subspace = state.last, state.subspace
    assert S is not None and subspace is not None and state.S_step == 1, "handed on before the results are there"
    second = measurer.launch(plan, step=2)
    assert state.last is not S and state.S_step == 2 and not first.ready()
    before = host()
    found = first.result()
    assert host() == before == (None, None, None, None, "auto") and state.S_step == 2, "reading writes nothing"
    matrices.update(found)
    assert state.leading.step == 1 and (state.spectrum == found[0].full.spectrum).all() and state.S_step == 2
    matrices.update(second.result())
    assert state.leading.step == 2 and state.usual_move == 0.0 and (state.spectrum == state.last.tensor.numpy()).all()


@pytest.mark.parametrize("method", ["full", "topk"])
def test_a_late_result_that_cannot_be_read_is_lost_alone(method, caplog):
    class Torn(Late):
        def fetch(self, tensors, work):
            found = super().fetch(tensors, work)
            if torn:
                found.get = lambda: [t if t is None else t[:1] for t in found.tensors]
            return found

    torn, net = [], nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(2)))
    probe = follow(net, Torn, [], method=method, k=4, audit=False)
    for step in range(1, 12):
        torn = [True] * (step == 4)
        probe.step()
    records = {(r.step, r.name): r for r in probe.records()}
    assert math.isfinite(records[4, "0.weight"].sigma_max) and math.isnan(records[4, "1.weight"].sigma_max)
    assert all(math.isfinite(records[step, f"{i}.weight"].sigma_max) for step in (3, 11) for i in range(2))
    assert len(records) == 24 and [m[:44] for m in caplog.messages] == ["sosd_fast: 1.weight cannot be measured at st"]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", ["full", "topk", "auto"])
def test_nothing_in_a_step_waits_for_the_device(device, method):
    net = model(device)
    probe = sosd_fast.track(net, method=method, budget=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 3)
    x = torch.randn(8, 96, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    probe.flush()
    assert probe.alive
    last = probe.latest()["0.weight"]
    if method == "auto":  # steps as short as these may not earn a measurement each
        assert last.step >= 1
    else:
        assert last.step == 8 and (last.sd_variation_topk if method == "topk" else last.sd_variation) > 0


@pytest.mark.parametrize("device", [CUDA])
def test_the_device_gives_what_the_host_gives(device):
    records = []
    for where in ("cpu", device):
        net = model()
        probe = sosd_fast.track(net.to(where), method="full")
        for step in range(6):
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(where), alpha=1e-3)
            probe.step()
        probe.flush()
        records.append(probe.records())
    for a, b in zip(*records, strict=True):
        assert (a.step, a.name) == (b.step, b.name)
        assert a.sd_variation == pytest.approx(b.sd_variation, abs=2e-6)


@pytest.mark.parametrize("method", ["full", "auto"])
def test_late_records_keep_their_matrices_when_some_are_added(method):
    net = nn.ModuleDict({"b": nn.Linear(8, 8, bias=False), "c": nn.Linear(8, 12, bias=False)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = follow(net, Late, method=method, budget=1.0)
    now = [0.0]
    probe.clock = lambda: now[0]

    def step():
        now[0] += 1.0
        sum(p.square().sum() for p in net.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    rest = dict(net.items())
    net.clear()
    net.update({"a": nn.Linear(12, 12, bias=False), **rest})  # before the others
    optimizer.add_param_group({"params": net["a"].parameters()})
    for _ in range(3):
        step()
    shapes = {"a.weight": (12, 12), "b.weight": (8, 8), "c.weight": (12, 8)}
    records = probe.records()
    assert all(r.shape == shapes[r.name] and len(r.spectrum) == min(r.shape) for r in records)
    assert min(r.step for r in records if r.name == "a.weight") >= 5
    assert max(r.step for r in records) == 8, "records() waits"


def test_what_a_record_holds_is_its_own():
    net = model()
    probe = sosd_fast.track(net, optimizers=[], method="full", on_record=lambda r: r.spectrum.sort())
    probe.step()
    assert all(r.sd_variation == 0 for r in probe.latest().values())


def test_another_default_device():
    net = _on_cpu()
    with torch.device("meta"):
        probe = sosd_fast.track(net, optimizers=[], method="full")
        probe.step()
    assert probe.latest()["0.weight"].sd_variation == 0


def _on_cpu():
    with torch.device("cpu"):
        return model()
