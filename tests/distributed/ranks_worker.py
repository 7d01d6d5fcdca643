"""Run by test_ranks.py on several ranks, with a case, a folder and more: what ranks record together and apart."""

import functools
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import sosd_fast
from sosd_fast.distributed import share

STEPS = 4
case, folder, *more = sys.argv[1:]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # gradients of micro-batches are summed in another order than those of batches
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
rank = int(os.environ.get("RANK", "0"))


class Layers(nn.Module):
    """Some layers of a deep model, under the names that they have in the whole one."""

    def __init__(self, numbers):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer(i) for i in numbers})

    def forward(self, x):
        for each in self.layers.values():
            x = each(x).tanh()
        return x


def layer(number):
    torch.manual_seed(number)
    return nn.Linear(12, 12)


def batch(step):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def loss_of(y, target):
    return (y - target).square().mean()


def whole():
    """The same training in one process."""
    model = Layers(range(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sosd_fast.track(model, method="full", run_dir=folder):
        for step in range(STEPS):
            loss_of(model(batch(step)), batch(step + 100)).backward()
            optimizer.step()
            optimizer.zero_grad()


def pipeline():
    kind, names = more
    ranks = dist.get_world_size()
    chunks = 2 if kind == "interleaved" else 1
    at = [rank + c * ranks for c in range(chunks)]
    each = 4 // (ranks * chunks)
    numbers = [range(i * each, (i + 1) * each) for i in at]
    parts = [
        nn.Sequential(*(m for i in n for m in (layer(i), nn.Tanh()))) if names == "hand-cut" else Layers(n)
        for n in numbers
    ]
    stages = [PipelineStage(part, i, ranks * chunks, torch.device("cpu")) for part, i in zip(parts, at, strict=True)]
    if kind == "interleaved":
        schedule = ScheduleInterleaved1F1B(stages, 4, loss_fn=loss_of)
    else:
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stages[0], 4, loss_fn=loss_of)
    model = nn.ModuleList(parts) if names == "list" else parts[0]
    probe = sosd_fast.track(model, method="full", run_dir=folder)
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=0.01)
    for step in range(STEPS):
        first = (batch(step),) if rank == 0 else ()
        schedule.step(*first, **({"target": batch(step + 100)} if rank == ranks - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()
    assert probe.step_count == STEPS
    probe.close()


class FabricModule(nn.Module):
    """As Fabric's: what it forwards to, and the module that was set up, inside of it."""

    def __init__(self, forward, original):
        super().__init__()
        self._forward_module, self._original_module = forward, original

    def __getattr__(self, name):
        inner = self.__dict__["_modules"]
        return inner[name] if name in inner else getattr(inner["_original_module"], name)

    def forward(self, x):
        return self._forward_module(x)


class Engine(nn.Module):
    """As DeepSpeed's: it averages the gradients over a group of its own."""

    def __init__(self, module):
        super().__init__()
        self.module, self.data_parallel_group = module, dist.group.WORLD

    def forward(self, x):
        return self.module(x)


def wrapped():
    from torch.distributed._composable import replicate
    from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_as_dtensors

    def ddp():
        return DistributedDataParallel(Layers(range(4)))

    inner = Layers(range(4))
    made = {
        "Fabric": FabricModule(DistributedDataParallel(inner), inner),
        "compiled": torch.compile(ddp()),
        "compiled inside": DistributedDataParallel(torch.compile(Layers(range(4)))),
        "DataParallel": nn.DataParallel(ddp()),
        "nested": FabricModule(torch.compile(nn.DataParallel(ddp())), nn.Identity()),
        "nested otherwise": nn.DataParallel(FabricModule(ddp(), nn.Identity())),
        "part of a larger one": nn.Sequential(ddp(), nn.Tanh()),
        "Engine": Engine(Layers(range(4))),
        "replicate": replicate(Layers(range(4))),
    }
    ranks = dist.get_world_size()
    for name, model in made.items():
        with sosd_fast.track(model, method="full") as probe:
            own = [m.name for m in probe.matrices]
            everyone = [None] * ranks
            dist.all_gather_object(everyone, own)
            joined = sorted(name.removeprefix("0.") for each in everyone for name in each)
            assert joined == [f"layers.{i}.weight" for i in range(4)], (name, everyone)
            assert len(own) == 4 // ranks, name
    replicated = made["replicate"]
    replicated(batch(0)).sum().backward()  # which makes the group inside
    assert len(sosd_fast.track(replicated, method="full").matrices) == 4 // ranks
    spread_copies = replicate_as_dtensors(Layers(range(4)), mesh=init_device_mesh("cpu", (ranks,)))
    dist.all_gather_object(everyone, list(sosd_fast.track(spread_copies, method="full").latest()))
    assert sorted(sum(everyone, [])) == [f"layers.{i}.weight" for i in range(4)], everyone
    apart = nn.ModuleList([ddp(), layer(9)])  # the last is no copy: each rank's own
    assert len(sosd_fast.track(apart, method="full").matrices) == 5
    ignoring = Layers(range(4))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(ignoring, ["layers.0.weight"])
    assert len(sosd_fast.track(DistributedDataParallel(ignoring), method="full").matrices) == 4
    assert len(sosd_fast.track(inner, method="full").matrices) == 4  # nothing shows that it is a copy


def libraries():
    """What lightning's Fabric and accelerate put around a model."""
    from accelerate import Accelerator
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=dist.get_world_size())
    fabric.launch()
    prepared = Accelerator(cpu=True).prepare(Layers(range(4)))
    for model in (fabric.setup(Layers(range(4))), prepared, torch.compile(prepared)):
        with sosd_fast.track(model, method="full") as probe:
            own = [m.name for m in probe.matrices]
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
            assert sorted(sum(everyone, [])) == [f"layers.{i}.weight" for i in range(4)], everyone
            assert len(own) == 4 // dist.get_world_size()


def spread():
    """A model, spread as the first argument says."""
    model = Layers(range(4))
    if more[0] == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for each in model.layers.values():
        fully_shard(each, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, steps, each=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        if each is not None:
            each(step)
        loss_of(model(batch(step)), batch(step + 100)).backward()
        optimizer.step()
        optimizer.zero_grad()


def only_some():
    """The ranks named track the model, the others do not."""
    kind, tracking, steps = more[0], list(map(int, more[1].split(","))), int(more[2])
    model = spread()
    if rank in tracking:
        share.lockstep = functools.partial(share.lockstep, patience=2.0)
        try:
            probe = sosd_fast.track(model, method="full", run_dir=folder)
        except ValueError as error:
            assert kind == "fsdp" and "no call of track on ranks" in str(error) and "on every rank" in str(error), error
            print("refused", flush=True)
        else:
            assert kind == "ddp"
            train(model, steps)
            probe.close()
            return
    train(model, steps)


def killed():
    """A rank dies in a step; the others end by the errors of their own collectives."""
    model = spread()
    probe = sosd_fast.track(model, method="full", run_dir=folder)

    def each(step):
        probe.flush()
        Path(folder, f"flushed-{rank}").write_text(str(step))
        if rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(model, 100, each)
    except RuntimeError as error:
        print("ended by:", type(error).__name__, flush=True)
    os._exit(1)


def raising():
    """A rank's on_record raises, each time or thrice."""
    heard = []

    def on_record(record):
        heard.append(record.step)
        if rank == 1 and (more[1] == "always" or len(heard) < 4):
            raise OSError("the logger is down")

    model, twin = spread(), spread()
    probe = sosd_fast.track(model, method="full", run_dir=folder, on_record=on_record)
    train(model, 12)
    probe.close()
    train(twin, 12)
    assert all(map(torch.equal, map(local, model.parameters()), map(local, twin.parameters())))
    assert probe.step_count == 12 and not probe.alive
    assert len(heard) == (10 if rank == 1 and more[1] == "always" else 13 * (4 // dist.get_world_size()))


def local(p):
    return p.to_local() if hasattr(p, "to_local") else p


if case != "whole":
    dist.init_process_group("gloo")
began = time.monotonic()
globals()[case]()
print("as it should be", flush=True)
if case != "whole":
    dist.destroy_process_group()
