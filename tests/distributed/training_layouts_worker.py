"""Run by test_layouts.py: a training run of a tiny model whose weights are spread, alone where there is one rank.

The arguments are the methods of each layout in JSON, "none" for no probe, and a folder for the records and the final
weights.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sosd_fast

methods_of, folder = json.loads(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, ranks = dist.get_rank(), dist.get_world_size()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(24, 96), nn.Linear(96, 24), nn.LayerNorm(24)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(24, 50, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def train(kind, method):
    torch.manual_seed(0)
    model = Net()
    if kind != "alone":
        shape = (1, ranks) if kind == "tp" else (2, ranks // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if shape[0] > 1:
            for block in model.blocks:
                fully_shard(block, mesh=mesh["dp"])
        if kind.startswith("fsdp"):
            fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    probe = None
    if method != "none":
        probe = sosd_fast.track(model, method=method, k=4, budget=1.0, run_dir=f"{folder}/{kind}-{method}")
    losses = []
    for step in range(4):
        tokens = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(step))  # the same on every rank
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if probe is not None:
        assert probe.step_count == 4, probe.step_count
        probe.close()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in model.named_parameters()
    }
    bits = {name: p.numpy().tobytes().hex() for name, p in weights.items()}
    if rank == 0:
        with open(f"{folder}/{kind}-{method}.json", "w") as file:
            json.dump({"losses": losses, "weights": bits}, file)


for kind, methods in methods_of.items():
    for method in methods:
        train(kind, method)
print("trained", flush=True)
dist.destroy_process_group()
