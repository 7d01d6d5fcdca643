"""Measurements that come some steps later, as from a GPU: by a late lane on the CPU, natively where there is one."""

import contextlib

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.probe import executor as side

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


class Late(side.Host):
    """Results that are there after the third look at them."""

    def __init__(self):
        self.held = 0

    @contextlib.contextmanager
    def measuring(self, weights):
        self.versions = [W._version for W in weights]
        yield

    def fetch(self, tensors):
        return LateResults({name: t.clone() for name, t in tensors.items()})

    def hold(self):
        self.held += 1


class LateResults:
    seconds = device_seconds = 1e-3

    def __init__(self, tensors):
        self.tensors, self.looks, self.waited = tensors, 0, False

    def ready(self):
        self.looks += 1
        return self.looks > 3

    def get(self):
        return self.tensors


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
def test_late_records_are_the_same(method, every, monkeypatch, tmp_path):
    def run(run_dir):
        net = model()
        probe = sosd_fast.track(net, method=method, k=8, every=every, audit=False, run_dir=run_dir, theory_bound=True)
        seen = []
        train(
            net,
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            12,
            lambda: seen.append(max(probe.latest().values(), key=lambda r: r.step).step),
        )
        probe.close()
        return sosd_fast.load(run_dir), seen, probe

    now, seen, _ = run(tmp_path / "now")
    lanes = []
    monkeypatch.setattr(side, "lane", lambda _: lanes.append(Late()) or lanes[-1])
    late, seen_late, probe = run(tmp_path / "late")
    assert late.records == now.records and late.records[-1].step == 12
    for name in ("0.weight", "1.weight"):
        for a, b in zip(late.spectra(name), now.spectra(name), strict=True):
            assert (a == b).all()
    assert max(s - t for s, t in zip(seen, seen_late, strict=True)) >= 2, "the records were late"
    assert lanes[0].held == 12, "before every step of the optimizer"
    assert 0 < probe.overhead


def test_flush_waits_and_state_is_whole(monkeypatch):
    monkeypatch.setattr(side, "lane", lambda _: Late())
    net = model()
    probe = sosd_fast.track(net, method="full")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 5)
    assert probe.latest()["0.weight"].step < 5
    state = probe.state_dict()
    assert probe.latest()["0.weight"].step == 5 and torch.equal(
        state["matrices"]["0.weight"]["spectrum"], probe._tracked[0].S
    )
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 1)
    probe.flush()
    assert probe.latest()["0.weight"].step == 6


@pytest.mark.parametrize(("topk_ms", "most"), [(1.0, "topk"), (20.0, "full")])
def test_auto_takes_what_is_cheaper_by_the_devices_clock(topk_ms, most, monkeypatch):
    class Clocked(Late):
        def fetch(self, tensors):
            found = super().fetch(tensors)
            found.seconds = found.device_seconds = 1e-3 * (topk_ms if "residual" in tensors else 10.0)
            found.looks = 2  # there a step later: many steps' costs on their way would not be counted
            return found

    monkeypatch.setattr(side, "lane", lambda _: Clocked())
    now = [0.0]
    probe = sosd_fast.track(model(), optimizers=[], method="auto", k=8, budget=0.01, audit=False)
    probe._clock = lambda: now[0]
    for _ in range(40):
        now[0] += 1.0  # earns 10 ms; the full spectrum of a matrix takes as much
        probe.step()
    records = [r for r in probe.records() if r.step > 10]  # what the first step takes is paid off by then
    shares = [sum(r.method == "topk" for r in records) / len(records), len(records) / (2 * 30)]
    if most == "topk":  # each step, and full ones in turn
        assert 0.3 < shares[0] < 0.8 and shares[1] == 1
    else:
        assert shares[0] == 0 and 0.3 < shares[1] < 0.7


def test_by_hand_holds_at_once(monkeypatch):
    lanes = []
    monkeypatch.setattr(side, "lane", lambda _: lanes.append(Late()) or lanes[-1])
    probe = sosd_fast.track(model(), optimizers=[], method="full")
    held = lanes[0].held
    probe.step()
    assert lanes[0].held == held + 1


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
    assert probe._finalizer.alive
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


def test_late_records_keep_their_matrices_when_some_are_added(monkeypatch):
    monkeypatch.setattr(side, "lane", lambda _: Late())
    net = nn.ModuleDict({"b": nn.Linear(8, 8, bias=False), "c": nn.Linear(8, 12, bias=False)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, method="full")

    def step():
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
    with torch.device("meta"):
        probe = sosd_fast.track(_on_cpu(), optimizers=[], method="full")
        probe.step()
    assert probe.latest()["0.weight"].sd_variation == 0


def _on_cpu():
    with torch.device("cpu"):
        return model()
