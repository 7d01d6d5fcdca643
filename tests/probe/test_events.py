"""Events, live and after a resume: each happening gives exactly one, to the run directory and to on_event."""

import itertools
import json
import math

import prepared
import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast import Event
from sosd_fast.probe import full
from sosd_fast.probe.watcher import Watcher
from sosd_fast.runs import events
from sosd_fast.runs.phases import onsets
from sosd_fast.runs.records import Record, RunWriter


class Loop:
    """A loop without gradients: each step turns a matrix by an angle of one's choice, at lr 1."""

    def __init__(self, run_dir, **options):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"attn": nn.Linear(12, 12, bias=False), "mlp": nn.Linear(12, 12, bias=False)})
        self.options = {"method": "full", "optimizers": [], "run_dir": run_dir, **options}
        self.heard, self.step = [], 0
        self.track()

    def track(self, step=None):
        if step is not None:
            self.step = step
        self.probe = sosd_fast.track(self.net, step=step, on_event=self.heard.append, **self.options)

    def train(self, sizes):
        for size in sizes:
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            with torch.no_grad():
                for layer in self.net.values():
                    W = layer.weight
                    W += size * torch.randn(W.shape, generator=generator)
            self.probe.step()


def spiking(step):
    return 3e-2 if step == 40 else 1e-3


def test_a_spike_is_one_event_live_and_after_a_resume(tmp_path):
    loop = Loop(tmp_path)
    loop.train(map(spiking, range(1, 61)))
    (event,) = loop.heard
    assert (event.what, event.at) == ("spike", 40) and event.value > 10
    assert set(event.names) == {"attn.weight", "mlp.weight"}
    assert list(loop.probe.events) == [event] == sosd_fast.load(tmp_path).events
    for step in (45, 60):  # in the middle of what the spike leaves, and long after it
        loop.probe.close()
        loop.track(step=step)
        loop.train(map(spiking, range(step + 1, 81)))
        assert [e for e in sosd_fast.load(tmp_path).events if e.what == "spike"] == [event]
    loop.probe.close()
    loop.track(step=30)  # before it: the event is cut off, and found again
    assert not sosd_fast.load(tmp_path).events
    loop.train(map(spiking, range(31, 61)))
    (again,) = (e for e in sosd_fast.load(tmp_path).events if e.what == "spike")
    assert (again.step, set(again.names)) == (40, set(event.names)) and again.value > 10


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([1.0] * 30 + [3.0] + [1.0] * 5, [31]),
        ([1.0] * 15 + [1.25**i for i in range(20)], []),  # a rise, as at the end of a warm-up, is none
        ([1.0, 2.9] * 15 + [4.0] + [1.0] * 5, []),  # where as large a step is usual
        ([1.0] * 20 + [(3.0, 9)] * 20, []),  # over nine steps a spectrum that wanders goes three times as far,
        ([(3.0, 9)] * 20 + [1.0] * 20, []),  # and what is left of it by the step is less
        ([(3.0, 9)] * 20 + [(9.0, 9)], [21]),
    ],
)
def test_what_is_a_spike(sizes, found):
    watcher = Watcher()
    heard = []
    for step, (size, interval) in enumerate((each if isinstance(each, tuple) else (each, 1) for each in sizes), 1):
        record = Record(step, "mlp.weight", (4, 4), "gram32", interval, 1e-3 * size, sigma_max=1.0, sd_error=1e-8)
        heard += watcher.update([], [record])[0]
    assert [event.at for event in heard] == found


def onset_at_sixty(step):
    return 1e-2 * max(1, 60 / step)


def test_an_onset_is_one_event_live_and_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("sosd_fast.probe.watcher.SEARCH_SHARE", math.inf)  # whatever the clock says
    for stop in (300, 80, 180):  # before it can be seen, and after
        loop = Loop(tmp_path / str(stop))
        loop.train(map(onset_at_sixty, range(1, stop + 1)))
        if stop < 300:
            loop.probe.close()
            loop.track()
            loop.train(map(onset_at_sixty, range(stop + 1, 301)))
        loop.probe.close()
        run = sosd_fast.load(tmp_path / str(stop))
        found = {e.names[0]: e for e in run.events if e.what == "onset"}
        assert set(found) == {"attention", "mlp"} and run.events == loop.heard and len(run.events) == 2, stop
        assert all(45 <= e.at <= 75 and e.step > e.at for e in found.values())
        assert {name: e.at for name, e in found.items()} == pytest.approx(onsets(run), rel=0.25)


def test_a_short_run_sees_its_onset_at_its_end(tmp_path):
    loop = Loop(tmp_path)
    loop.probe.clock = itertools.count().__next__  # seconds: the first search takes the time of all others
    loop.train(map(onset_at_sixty, range(1, 201)))
    seen = [e for e in loop.heard if e.what == "onset"]
    loop.probe.close()
    found = {e.names[0]: e.at for e in sosd_fast.load(tmp_path).events}
    assert len(seen) <= 1 and found == onsets(sosd_fast.load(tmp_path)) and len(loop.heard) == 2


def test_searches_follow_a_clock_that_comes_later(tmp_path, monkeypatch):
    monkeypatch.setattr("sosd_fast.probe.watcher.SEARCH_SHARE", 0.5)
    loop = Loop(tmp_path)
    loop.probe.clock = itertools.count().__next__  # which began later than the one before
    loop.train(map(onset_at_sixty, range(1, 301)))
    assert {e.names[0] for e in loop.heard if e.what == "onset"} == {"attention", "mlp"}


def test_the_learning_rate_is_no_onset_and_no_spike():
    """Under warm-up, a jump and a decay of the rate the updates over it stay alike."""
    torch.manual_seed(0)
    net = nn.Linear(12, 12, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    probe = sosd_fast.track(net, method="full")
    for step in range(1, 201):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 30) * (10 if step > 60 else 1) * min(1, 90 / step) ** 2
        net.weight.grad = torch.randn(12, 12)
        optimizer.step()
    probe.close()
    assert not probe.events


@pytest.mark.parametrize("what", ["nan", "zero"])
def test_a_matrix_that_is_lost_is_one_event_live_and_after_a_resume(tmp_path, what):
    loop = Loop(tmp_path)
    loop.train([1e-3] * 5)
    kept = loop.net["mlp"].weight.detach().clone()
    for _ in range(2):
        with torch.no_grad():
            loop.net["mlp"].weight.mul_(math.nan if what == "nan" else 0)
        loop.train([0.0] * 3)
        loop.probe.close()
        loop.track()
        loop.train([0.0] * 3)
        events = sosd_fast.load(tmp_path).events
        assert [(e.step, e.what, e.names) for e in events[-1:]] == [(loop.step - 5, what, ("mlp.weight",))]
        with torch.no_grad():
            loop.net["mlp"].weight.copy_(kept)
        loop.train([0.0] * 3)
    assert len(events) == 2 == len(loop.heard), "a second time, for it had recovered"


def test_a_model_that_diverges_is_one_event(tmp_path):
    loop = Loop(tmp_path)
    loop.train([1e-3] * 3 + [math.nan] * 3)
    (event,) = sosd_fast.load(tmp_path).events
    assert event.names == ("attn.weight", "mlp.weight") and event.what == "nan"
    assert str(event) == "NaN or Inf in attn.weight and 1 more at step 4"


def test_a_matrix_that_cannot_be_measured_is_no_event():
    loop = Loop(None)
    loop.net["mlp"].weight.data = torch.zeros(0)
    loop.probe.step()
    assert not loop.heard and math.isnan(loop.probe.latest()["mlp.weight"].sigma_max)


def test_an_audit_beyond_its_bound_is_one_event(tmp_path, monkeypatch):
    real, wrong = full.spectra, []

    def spectra(matrices, method, previous):
        result = real(matrices, method, previous)
        return result._replace(S=result.S * (1 + 1e-4 * torch.rand_like(result.S))) if wrong else result

    monkeypatch.setattr(full, "spectra", spectra)
    monkeypatch.setattr("sosd_fast.probe.audit.Auditor.DEARER", 1.0)
    loop = Loop(tmp_path)
    loop.train([1e-3] * 30)
    assert loop.probe.audits and not loop.heard
    wrong.append(True)
    while not loop.heard:
        loop.train([1e-3])
    wrong.clear()
    loop.train([1e-3] * 30)
    loop.probe.close()
    loop.track()
    loop.train([1e-3] * 30)
    (event,) = (e for e in sosd_fast.load(tmp_path).events if e.what == "audit")
    assert event.value > event.limit > 0 and len(loop.probe.audits) > 0 and "beyond its bound" in str(event)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, "tests/probe")
from test_events import Loop, spiking
loop = Loop(sys.argv[1])
loop.step = loop.probe.step_count
for step in range(loop.step + 1, 61):
    loop.train([spiking(step)])
    if step in map(int, sys.argv[2:]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_events_survive_a_kill(tmp_path):
    for at in ([40], [41, 55], [60]):
        prepared.run(KILLED, tmp_path, *at)
    (event,) = (e for e in sosd_fast.load(tmp_path).events if e.what == "spike")
    assert event.at == 40 and {r.step for r in sosd_fast.load(tmp_path).records} == set(range(61))


def test_a_torn_or_early_line_is_cut_off(tmp_path):
    loop = Loop(tmp_path)
    loop.train(map(spiking, range(1, 61)))
    loop.probe.close()
    path = tmp_path / "events.jsonl"
    before = path.read_bytes()
    early = events.to_line(Event(61, "nan", ("mlp.weight",), 61))  # a kill came before the records of step 61
    path.write_bytes(before + json.dumps(early).encode() + b"\n" + b'{"step": 61, "wh')
    assert len(sosd_fast.load(tmp_path).events) == 2
    loop.track()
    assert path.read_bytes() == before


def test_several_ranks_events_are_one_runs(tmp_path):
    spike = Event(40, "spike", ("a", "b"), 40, 5.0)
    ranks = [
        [spike, Event(90, "onset", ("mlp",), 50, 3.0)],
        [Event(42, "spike", ("c",), 42, 9.0), Event(80, "onset", ("mlp",), 48, 3.0), Event(95, "spike", ("c",), 95, 4)],
    ]
    for rank, found in enumerate(ranks):
        RunWriter(tmp_path / f"rank-{rank:05d}", {"rank": rank, "shared_by": [0, 1]}).close()
        events.append(tmp_path / f"rank-{rank:05d}", list(map(events.to_line, found)))
    assert [(e.step, e.what, e.names) for e in sosd_fast.load(tmp_path).events] == [
        (40, "spike", ("a", "b", "c")), (80, "onset", ("mlp",)), (95, "spike", ("c",)),
    ]  # fmt: skip


@pytest.mark.expects_probe_failure
def test_what_fails_in_the_search_or_in_on_event_ends_alone(tmp_path, monkeypatch, caplog):
    loop = Loop(tmp_path)
    monkeypatch.setattr(Watcher, "update", lambda *_: 1 / 0)
    loop.train([1e-3] * 3)
    assert loop.probe.alive and loop.probe.step_count == 3 == sosd_fast.load(tmp_path).records[-1].step
    assert [m for m in caplog.messages if "the search for events failed" in m] == caplog.messages
    monkeypatch.undo()
    caplog.clear()
    loop = Loop(None)
    loop.probe._recorder._on_event.function = lambda _: 1 / 0
    loop.train([1e-3, math.nan, 0.0])
    assert loop.probe.alive and len(loop.probe.events) == 1 == len(caplog.messages) - 2
    assert "on_event failed at NaN or Inf in a matrix, step 2" in caplog.text
