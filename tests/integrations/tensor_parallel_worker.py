"""Run by test_parallel.py: a tiny Llama under its own plan of tensor parallelism, alone where there is one process."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import sosd_fast

folder, kind = sys.argv[1:]
dist.init_process_group("gloo")
torch.set_num_threads(1)
options = {"tp_plan": "auto"} if dist.get_world_size() > 1 else {}
model = AutoModelForCausalLM.from_pretrained(f"{folder}/llama", dtype=torch.float32, **options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
probe = sosd_fast.track(model, method="full", run_dir=f"{folder}/{kind}")
for step in range(3):
    tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
probe.close()
spread = sum(hasattr(p, "placements") for p in model.parameters())
print(f"loss {loss.item():.6f} {spread} DTensors\n", end="", flush=True)  # in one piece, for two ranks share a pipe
dist.destroy_process_group()
