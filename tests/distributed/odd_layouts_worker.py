"""Run by test_layouts.py on four ranks: parameters that differ from rank to rank, that cannot be measured, that change.

The argument is a folder for records.
"""

import logging
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import sosd_fast
from sosd_fast.distributed import copies
from sosd_fast.distributed import share as sharing
from sosd_fast.testing import sd_distance

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
folder = sys.argv[1]
said = []
logging.getLogger("sosd_fast").addFilter(lambda record: said.append(record.getMessage()))


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gathered(value):
    everyone = [None] * ranks
    dist.all_gather_object(everyone, value)
    return everyone


def spectrum(W):
    return torch.linalg.svdvals(W.double())


# Plain parameters beside a DTensor: copies, and what two pairs of ranks have of their own
model = nn.Module()
model.dense = nn.Parameter(distribute_tensor(noisy(30, 20), mesh, [Shard(0), Shard(1)]))
model.copied = nn.Parameter(noisy(20, 20, seed=1))
model.experts = nn.Parameter(noisy(2, 12, 10, seed=2 + rank % 2))
if rank == 3:
    model.extra = nn.Parameter(noisy(7, 9, seed=5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
probe = sosd_fast.track(model, method="full", run_dir=f"{folder}/own")
with mock.patch.object(sharing, "lockstep", side_effect=AssertionError("ranks met again without need")):
    for _ in range(21):  # the model is looked at now and then
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
probe.close()
dist.barrier()
run = sosd_fast.load(f"{folder}/own")
names = [
    "copied", "dense", "experts[0][rank 0]", "experts[0][rank 1]", "experts[1][rank 0]", "experts[1][rank 1]", "extra",
]  # fmt: skip
assert sorted(run.names) == names, run.names
assert sorted((r.step, r.name) for r in run.records) == [(step, name) for step in range(22) for name in names]
for name in names:
    steps, S = run.spectra(name)
    W = {"dense": noisy(30, 20), "copied": noisy(20, 20, seed=1), "extra": noisy(7, 9, seed=5)}.get(name)
    if W is None:
        W = noisy(2, 12, 10, seed=2 + int(name[-2]))[int(name[8])]
    for step in (0, 21):
        assert sd_distance(torch.from_numpy(S[step]).double(), spectrum(W - 0.5 * step)) < 1e-5, (name, step)
assert len(said) == (rank == 0) and all("experts[0][rank 0], experts[0][rank 1], experts[1][rank 0]" in t for t in said)

# Partial sums are left out by name, and refused where nothing else is left
model.sums = nn.Parameter(DTensor.from_local(noisy(8, 8), mesh, [Partial(), Replicate()]))
probe = sosd_fast.track(model, method="full")
probe.close()
texts = [text for text in said if "left out" in text]
assert (
    len(texts) == 1 and "sums has the placement P" in texts[0] and "redistribute it to Shard or Replicate" in texts[0]
)
try:
    sosd_fast.track(model, method="full", include=["sums"])
    raise AssertionError("partial sums were measured")
except ValueError as error:
    assert "got sums, which has the placement P" in str(error), error
said.clear()

# What a Trainer says to be copies, of a model that each pair of ranks has spread
several = nn.Module()
several.weight = nn.Parameter(distribute_tensor(noisy(40, 30), mesh["tp"], [Shard(1)]))
copies.copies[several] = dist.group.WORLD
with sosd_fast.track(several, method="full", run_dir=f"{folder}/copies"):
    pass
dist.barrier()
assert [(r.step, r.name) for r in sosd_fast.load(f"{folder}/copies").records] == [(0, "weight")]

# Parameters of another dtype, which all ranks see at the same step
net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
torch.manual_seed(0)
for p in net.parameters():
    p.data = torch.randn(p.shape)
fully_shard(net[0], mesh=mesh)  # copies of rows
probe = sosd_fast.track(net, [], method="full", theory_bound=True)
for dtype in (torch.float32, torch.float64, torch.float64):
    for p in net.parameters():
        (p.to_local() if isinstance(p, DTensor) else p).data.mul_(1.25)
    net.to(dtype)
    probe.step()
latest = gathered({name: (r.step, r.sd_variation, r.theory_bound) for name, r in probe.latest().items()})
assert sorted(name for own in latest for name in own) == ["0.weight", "1.weight"]
for own in latest:
    for step, variation, bound in own.values():
        assert step == 3 and variation < 1e-6 < bound
for name, own in {name: value for each in latest for name, value in each.items()}.items():
    p = dict(net.named_parameters())[name]
    W = (p.full_tensor() if isinstance(p, DTensor) else p).detach()
    alone = nn.Module()
    alone.weight = nn.Parameter(W / 1.25)
    single = sosd_fast.track(alone, [], method="full", theory_bound=True)
    alone.weight.data.mul_(1.25)
    single.step()
    assert abs(single.latest()["weight"].theory_bound - own[2]) <= 1e-5 * own[2], name
    single.close()
probe.close()
print("all said", flush=True)
dist.destroy_process_group()
