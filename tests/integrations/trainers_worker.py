"""Run by test_parallel.py under torchrun: the real Trainers over several processes, with the callbacks on each."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_trainers import Module, fit, hugging_face, llama
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sosd_fast.integrations.hugging_face import HuggingFaceCallback
from sosd_fast.integrations.lightning import LightningCallback

library, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
main = os.environ["RANK"] == "0"


def weights(model):
    """The whole weights, on every process."""
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: p.detach() for name, p in whole.items()}


def by_hugging_face():
    callback, model = HuggingFaceCallback(run_dir=folder / "run", method="full"), llama()
    if kind != "ddp":  # which accelerate does on GPUs only
        dist.init_process_group("gloo")
    if kind == "fsdp2":
        fully_shard(model)
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tb")
    options = {"report_to": ["tensorboard"], "logging_steps": 2, "remove_unused_columns": kind != "fsdp1"}
    trainer = hugging_face(model, folder, [callback], ddp_backend="gloo", **options)
    if kind != "ddp":
        trainer.accelerator.prepare_model = lambda model, **_: model
    trainer.train()
    assert dist.get_world_size() == 2 and trainer.args.world_size == 2
    return weights(trainer.model)


def by_lightning():
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    class Sharded(Module):
        def configure_model(self):
            if kind == "fsdp2":
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    strategy = DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    callback, module, found = LightningCallback(run_dir=folder / "run", method="full"), Sharded(llama), {}
    module.on_train_end = lambda: found.update(weights(module.model))
    logger = CSVLogger(folder, name="csv", version=0)
    fit(module, folder, [callback], strategy=strategy, devices=2, logger=logger, log_every_n_steps=2)
    return found


found = {"hugging_face": by_hugging_face, "lightning": by_lightning}[library]()
if main:
    torch.save(found, folder / "weights.pt")
if dist.is_initialized():  # or what its threads still do can abort the process at its end
    dist.barrier()
    dist.destroy_process_group()
