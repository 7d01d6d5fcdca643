"""What the probe sees of onsets while it runs, and what a report finds in the records afterwards, agree."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.probe.watcher import Watcher
from sosd_fast.runs import events
from sosd_fast.runs.curves import rates_by_kind, variation_by_kind
from sosd_fast.runs.onset import OnsetDetector
from sosd_fast.runs.phases import onset, onsets
from sosd_fast.runs.records import Record, RunWriter
from sosd_fast.runs.report import write_report


def detectors(run):
    """Those that have seen the whole run, by kind."""
    found, rates = {}, rates_by_kind(run)
    for kind, (steps, spread) in variation_by_kind(run).items():
        found[kind] = OnsetDetector()
        for values in zip(steps.tolist(), spread[:, 1].tolist(), rates[kind].tolist(), strict=True):
            found[kind].update(*values)
    return found


def assert_agreement(run):
    """The curves that the probe followed are those of the report, and so are the onsets that it told at the end."""
    told = {event.names[0]: event for event in run.events if event.what == "onset"}
    last, bins = int(run.columns("step")["step"].max()), {}
    for line in events.read(run.run_dir)[1]:
        bins.setdefault(line["curve"], []).append(line["bin"])
    for kind, detector in detectors(run).items():
        end = told[kind].step if kind in told else last
        expected = [list(each) for each in detector.bins if math.exp(each.log_step) < end]
        assert len(bins.get(kind, ())) >= len(expected) - 1
        np.testing.assert_allclose(bins.get(kind, []), expected[: len(bins.get(kind, ()))], rtol=1e-12)
        seen = onsets(run)[kind]
        if kind not in told:
            assert seen is None
        elif told[kind].step == last:
            assert told[kind].at == seen
    return told


def rate(step, peak, half):
    return peak * min(step / 20, 1) * 0.5 ** (step / half)


LATE_IMPORTS = """
import sys
import torch
import sosd_fast
torch.manual_seed(0)
layer, events = torch.nn.Linear(12, 12, bias=False), []
optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
probe = sosd_fast.track(layer, method="full", run_dir=sys.argv[1], on_event=events.append)
for step in range(1, 301):
    optimizer.param_groups[0]["lr"] = 0.01 * min(step / 20, 1) * 0.5 ** (step / 150)
    layer.weight.grad = torch.randn(12, 12) * max(1, 60 / step)
    optimizer.step()
    if step == 3:
        before = set(sys.modules)
probe.close()
print([event.what for event in events], sorted(set(sys.modules) - before))
"""


def test_no_step_imports(tmp_path):
    """What the search for onsets loads would halt a step: numpy.ma, for which np.median asks, takes 28 ms."""
    command = [sys.executable, "-c", LATE_IMPORTS, str(tmp_path)]  # in a process that has loaded nothing else
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "['onset'] []", done.stdout + done.stderr


@pytest.mark.parametrize(("budget", "cuts"), [(None, ()), (None, (45, 150, 151, 290)), (0.02, (100, 250))])
def test_training(tmp_path, budget, cuts):
    """Two kinds under rates of their own, without a log: the records say under which rate each step was made."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.Linear(12, 12, bias=False), "mlp": nn.Linear(12, 12, bias=False)})
    rates = {"attn": (0.01, 150), "mlp": (0.03, 300)}
    optimizer = torch.optim.SGD([{"params": net[name].parameters(), "lr": 0.0} for name in rates])
    options = {"method": "full"} if budget is None else {"method": "auto", "k": 4, "budget": budget}
    probe = sosd_fast.track(net, run_dir=tmp_path, **options)
    for step in range(1, 301):
        for group, of in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate(step, *of)
        for layer in net.values():
            layer.weight.grad = torch.randn(12, 12) * max(1, 60 / step)
        optimizer.step()
        if step in cuts:
            probe.close()
            probe = sosd_fast.track(net, run_dir=tmp_path, step=step, **options)
    probe.close()
    run = sosd_fast.load(tmp_path)
    moved = [r for r in run.records if r.sd_variation is not None]
    assert moved and all(r.lr == rate(r.step, *rates[r.name.split(".")[0]]) for r in moved)
    told = assert_agreement(run)
    if budget is None:
        assert set(told) == {"attention", "mlp"} and all(45 <= event.at <= 75 for event in told.values())


@pytest.mark.parametrize("cuts", [(), (70, 1000, 2500, 2990)])
def test_matrices_that_take_turns_in_a_long_run(tmp_path, cuts):
    """Medians stand for some steps, and long bins are thinned, also by a watcher that takes them up in their middle."""
    rng = np.random.default_rng(0)
    names = [f"h.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")]
    watcher, writer = Watcher(), RunWriter(tmp_path, {"matrices": names})
    for step in range(1, 3001):
        values = 1e-3 * max(1, (900 / step) ** 2) * rng.lognormal(0, 0.3, len(names))
        lr = 1e-3 * (1 - step / 6_000)
        records = [
            Record(step, name, (4, 4), "gram32", 1, float(value * lr), sigma_max=1.0, sd_error=1e-9, lr=lr)
            for i, (name, value) in enumerate(zip(names, values, strict=True))
            if (step + i) % 7 == 0 or step % 50 == i
        ]
        if records:
            found, lines = watcher.update([], records)
            events.append(tmp_path, [*map(events.to_line, found), *lines])
            writer.append(records)
        if step in cuts:
            writer.flush()
            watcher = Watcher()
            watcher.resume(tmp_path)
    events.append(tmp_path, [events.to_line(event) for event in watcher.finish()])
    writer.close()
    told = assert_agreement(sosd_fast.load(tmp_path))
    assert all(600 < event.at < 1200 for event in told.values())


def test_where_later_steps_move_an_onset_the_report_says_by_how_much(tmp_path, monkeypatch):
    """The variation falls to a floor, on which an onset is told, and once more, farther and faster, much later."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr("sosd_fast.probe.watcher.SEARCH_SHARE", math.inf)  # whatever the clock says
    watcher, writer = Watcher(), RunWriter(tmp_path, {"matrices": ["mlp.weight"]})
    for step in range(1, 3001):
        value = 1e-3 * max(1, 60 / step) * min(1, 1000 / step) ** 4 * rng.lognormal(0, 0.05)
        record = Record(step, "mlp.weight", (4, 4), "gram32", 1, value, sigma_max=1.0, sd_error=1e-12)
        found, lines = watcher.update([], [record])
        events.append(tmp_path, [*map(events.to_line, found), *lines])
        writer.append([record])
    writer.close()
    run = sosd_fast.load(tmp_path)
    (event,) = (each for each in run.events if each.what == "onset")
    seen = onsets(run)["mlp"]
    assert 45 < event.at < 75 and event.at < event.step < 1000 and seen != event.at
    upto = [r for r in run.records if r.step <= event.step]
    then = onset([r.step for r in upto], [r.sd_variation for r in upto])
    assert then is not None and then.step == event.at, "what a report of that step would have said"
    text = write_report([tmp_path], tmp_path / "r.html").read_text()
    said = "none" if seen is None else f"it at step {seen}"
    assert f"{event}; the whole run shows {said}" in text and "not taken back" in text
