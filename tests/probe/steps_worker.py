"""Run by test_steps.py on three ranks: ranks agree on what a step is, also one that holds no row of a matrix."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sosd_fast

dist.init_process_group("gloo")
ranks = dist.get_world_size()
for idle in (True, False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    probe = sosd_fast.track(model, method="full")
    if idle:
        get_state_dict(model, optimizer)  # takes a step with zero gradients
        assert optimizer.state
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.01 * step  # a warm-up from zero
        model(torch.ones(2, 6)).square().sum().backward()
        model[0].weight.grad = None  # the other has two rows, and a rank that holds nothing of its gradient
        optimizer.step()
        optimizer.zero_grad()
    probe.close()
    counts = [None] * ranks
    dist.all_gather_object(counts, (probe.step_count, [r.step for r in probe.records()]))
    assert {count for count, _ in counts} == {3}, counts
    assert sorted(step for _, steps in counts for step in steps) == sorted([0, 1, 2, 3] * 2), counts
print("the ranks agree", flush=True)
dist.barrier()
dist.destroy_process_group()
