"""Run by test_deepspeed.py under torchrun: DeepSpeed's engine on CPUs, with the probe and without it."""

import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import sosd_fast

stage, path = int(sys.argv[1]), sys.argv[2]
for name in deepspeed.ops.__compatible_ops__:
    deepspeed.ops.__compatible_ops__[name] = False  # or it compiles one for messages in shared memory
deepspeed.init_distributed("gloo", verbose=False)


def trained(tracked, by_hand=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    probe = sosd_fast.track(engine, method="full", optimizers=[] if by_hand else None) if tracked else None
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(25):
        engine.backward(engine(torch.randn(4, 8, generator=data)).square().mean())
        engine.step()
        if probe is not None and by_hand:
            probe.step()
    return engine.module, probe


plain, _ = trained(False)
found = {"plain": plain.state_dict(), "runs": []}
for by_hand in (True, False):
    model, probe = trained(True, by_hand)
    latest = probe.latest()
    records = {name: (r.step, torch.from_numpy(r.spectrum)) for name, r in latest.items()}
    found["runs"].append((by_hand, model.state_dict(), records, str(probe)))
    probe.close()
if dist.get_rank() == 0:
    torch.save(found, path)
dist.barrier()
dist.destroy_process_group()
