# ruff: noqa: ARG002, E402
"""Run by test_torchtitan.py under torchrun: torchtitan's own Trainer on a CPU, with the probe and without.

Where torchtitan knows accelerators only, a line here stands in: the device, its memory's monitor, the time limits of
groups. Gloo multiplies no sums, so FSDP2 is told to divide by itself; attention is torch's own, for flex_attention has
no backward pass on a CPU. The Trainer, the debug models, of which two layers are left, their parallelisation and the
optimizers are torchtitan's.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

torch._utils._get_available_device_type = lambda: "cpu"  # before torchtitan asks

import torchtitan.components.metrics as metrics
import torchtitan.distributed.utils as distributed
import torchtitan.models.llama3 as llama3
import torchtitan.models.qwen3 as qwen3
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3.config_registry import llama3_debugmodel

import sosd_fast
from sosd_fast.testing import sd_distance

LAYERS, STEPS = 2, 4
PARTS = {"[q]": "wq.weight", "[k]": "wk.weight", "[v]": "wv.weight"}  # of wqkv.weight, in torchtitan's checkpoints


class Monitor:
    """Of the memory of a device that has none of its own."""

    device_name = "cpu"

    def get_peak_stats(self):
        return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self):
        pass


class Tokens(BaseDataLoader):
    """Random tokens, the same in each run."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, seq_len, local_batch_size, **_):
        self._shape, self._generator = (local_batch_size, seq_len + 1), torch.Generator().manual_seed(dp_rank)

    def __iter__(self):
        while True:
            tokens = torch.randint(0, 2048, self._shape, generator=self._generator)
            positions = torch.arange(self._shape[1] - 1).expand(self._shape[0], -1)
            yield {"input": tokens[:, :-1], "positions": positions}, tokens[:, 1:]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoTokenizer(BaseTokenizer):
    """The tokens need none."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        super().__init__()

    def encode(self, *args, **kwargs):
        return []

    def decode(self, *args, **kwargs):
        return ""

    def get_vocab_size(self):
        return 2048


metrics.build_device_memory_monitor = Monitor
distributed.set_pg_timeouts = lambda **_: None  # waits on a device
for module in (llama3, qwen3):
    module.get_attention_config = lambda _: ScaledDotProductAttention.Config()
ScaledDotProductAttention.sdpa_backends = [torch.nn.attention.SDPBackend.MATH]


def trainer(model: str, folder: str, parallelism: dict):
    """torchtitan's Trainer of a debug model."""
    spec = (qwen3 if model == "debugmodel_moe" else llama3).model_registry(model, attn_backend="sdpa")
    del spec.model.layers[LAYERS:]
    config = llama3_debugmodel()
    config.model_spec = spec
    config.loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Tokens.Config()
    config.training = TrainingConfig(
        local_batch_size=2, seq_len=32, steps=STEPS, disable_cuda_graphs=True, mixed_precision_param="float32"
    )
    config.checkpoint.enable = config.validator.enable = config.debug.enable_structured_logging = False
    config.debug.seed = 0
    config.activation_checkpoint = None
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **parallelism)
    config.dump_folder = folder
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    return trainer


def whole(named):
    """The full values of weights of any layout."""
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in named if p is not None}


def saved(name: str, checkpoint: dict):
    """The matrix of a record in the checkpoint that torchtitan makes of the model."""
    stack, bracket, inside = name.partition("[")
    if bracket + inside in PARTS:
        return checkpoint[stack.replace("wqkv.weight", PARTS[bracket + inside])]
    return checkpoint[stack][int(inside.rstrip("]"))] if inside else checkpoint[stack]


def train(model: str, folder: str, parallelism: dict, tracked: bool) -> dict:
    """What is left of a run, with the probe or without."""
    run = trainer(model, folder, parallelism)
    network, last, probe = run.model_parts[0], {}, None
    if tracked:
        options = {"method": "full", "run_dir": f"{folder}/run", "on_record": lambda r: last.update({r.name: r})}
        probe = sosd_fast.track(network, **options)
    run.train()
    found = {"sums": {name: W.double().sum().item() for name, W in whole(network.named_parameters()).items()}}
    checkpoint = whole(network.state_dict().items())
    if probe is not None:
        found |= {"steps": probe.step_count, "names": sorted(last), "text": str(probe)}
        probe.close()
        assert {r.step for r in last.values()} == {STEPS}
        experts = [name for name in last if "experts" in name]
        looked_at = [name for name in last if name not in experts[8:]]
        found["errors"] = {
            name: sd_distance(
                torch.as_tensor(last[name].spectrum), torch.linalg.svdvals(saved(name, checkpoint).double())
            )
            for name in looked_at
        }
    run.close()
    return found


folder, layouts = sys.argv[1], json.loads(sys.argv[2])
for layout, (model, parallelism) in layouts.items():
    for tracked in (False, True):
        found = train(model, f"{folder}/{layout}", parallelism, tracked)
        everything = [None] * dist.get_world_size()
        dist.all_gather_object(everything, found)
        if dist.get_rank() == 0:
            Path(folder, f"{layout} {tracked}.json").write_text(json.dumps(everything))  # stdout is of all ranks
dist.destroy_process_group()
