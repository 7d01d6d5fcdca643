"""TensorBoard event files and an offline W&B run, read back."""

import struct

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

import sosd_fast
from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.integrations.tensorboard import TensorBoardWriter
from sosd_fast.integrations.wandb import WandbWriter


def diverge(on_event):
    net = torch.nn.Linear(6, 4, bias=False)
    with sosd_fast.track(net, method="full", optimizers=[], on_event=on_event) as probe:
        with torch.no_grad():
            net.weight[0, 0] = float("nan")
        probe.step()
        probe.step()
        return probe.events


def train(on_record, steps=4, log=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with sosd_fast.track(model, method="full", on_record=on_record) as probe:
        for step in range(1, steps + 1):
            model(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if log:
                log(step)
        return {(r.step, key): value for r in probe.records() for key, value in scalars(r, METRICS).items()}


def test_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        expected = train(TensorBoardWriter(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {(e.step, key): e.value for key in events.Tags()["scalars"] for e in events.Scalars(key)}
    assert found == pytest.approx(expected, rel=1e-6), "TensorBoard keeps float32"
    assert (4, "spectra/0.weight/sd_variation") in found and (0, "spectra/0.weight/sd_variation") not in found


def test_tensorboard_has_events_as_text(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        (event,) = diverge(TensorBoardWriter(writer).on_event)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("spectra/events/text_summary")
    assert text.step == 1 and text.tensor_proto.string_val == [str(event).encode()]


def test_wandb_has_events_as_alerts(tmp_path):
    run = wandb.init(dir=tmp_path, mode="offline", project="test")
    (event,) = diverge(WandbWriter().on_event)
    run.finish()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    alerts = [r.alert for r in records(path) if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text, a.level) for a in alerts] == [(event.title, str(event), "WARN")]


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a record's header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last piece
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def rows(folder):
    """The history rows of an offline run."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}


@pytest.mark.parametrize("own_logging", [False, True])
def test_wandb_rows_of_its_own(tmp_path, own_logging):
    run = wandb.init(dir=tmp_path, mode="offline", project="test")
    log = (lambda step: run.log({"loss": 1 / step})) if own_logging else None
    expected = train(WandbWriter(own_rows=True), log=log)
    run.finish()
    wandb.teardown()  # waits for the process that writes the file
    found = list(rows(tmp_path))
    assert expected == spectra(found)
    if own_logging:
        assert [1 / row["spectra/step"] for row in found if "loss" in row] == [r["loss"] for r in found if "loss" in r]


def spectra(found):
    return {
        (row["spectra/step"], key): value
        for row in found
        for key, value in row.items()
        if key.startswith("spectra/") and key != "spectra/step"
    }


LOOPS = {
    "no step": lambda run, step: run.log({"loss": step}),
    "steps from 1": lambda run, step: run.log({"loss": step}, step=step),
    "steps from 0": lambda run, step: run.log({"loss": step}, step=step - 1),
    "tokens": lambda run, step: run.log({"loss": step}, step=4096 * step),
    "epochs": lambda run, step: run.log({"loss": step}, step=step // 4) if step % 4 == 0 else None,
    "every other step": lambda run, step: run.log({"loss": step}, step=step) if step % 2 == 0 else None,
    "two calls": lambda run, step: [run.log({key: step}, step=step - 1) for key in ("loss", "lr")],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_wandb_keeps_the_rows_of_the_loop(tmp_path, loop):
    run = wandb.init(dir=tmp_path, mode="offline", project="test")
    logged = []

    def log(step):
        LOOPS[loop](run, step)
        if loop not in ("epochs", "every other step") or step % (4 if loop == "epochs" else 2) == 0:
            logged.append(step)

    expected = train(WandbWriter(run), steps=8, log=log)
    run.finish()
    wandb.teardown()
    found = list(rows(tmp_path))
    assert [row["loss"] for row in found if "loss" in row] == logged, "no row of the loop is dropped"
    measured = spectra(found)
    assert measured.items() <= expected.items() and {step for step, _ in measured} >= {8, *logged[1:]}
    if loop not in ("epochs", "every other step"):
        assert {step for step, _ in measured} >= set(range(2, 9)), "each row of the loop has spectra"


def test_wandb_says_where_rows_stay_open(tmp_path, caplog):
    run = wandb.init(dir=tmp_path, mode="offline", project="test")
    train(WandbWriter(run), steps=110)
    run.finish()
    wandb.teardown()
    assert sum("W&B's row stayed open for 100 steps" in m and "own_rows=True" in m for m in caplog.messages) == 1


def test_wandb_without_a_run(monkeypatch):
    record = sosd_fast.Record(step=0, name="a", shape=(2, 2), method="exact", sigma_max=1.0)
    with pytest.raises(ValueError, match="WandbWriter: expected an active W&B run"):
        WandbWriter()(record)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    WandbWriter()(record)  # another process than the first usually has none
