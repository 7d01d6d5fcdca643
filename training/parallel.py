"""Where a run lives: one process, or several under torchrun with DDP, FSDP2 or hybrid sharding."""

import contextlib
import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

KINDS = ("none", "ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Parallel:
    """The processes of a run, and how the model is spread over them."""

    kind: str = "none"
    device: torch.device = torch.device("cpu")
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def wrap(self, model: nn.Module, dtype: str) -> nn.Module:
        """Spreads a Transformer, whose weights are the same on every rank.

        Args:
            model: sharded in place, block by block, with FSDP2.
            dtype: "bfloat16" computes and communicates in it under FSDP2; parameters stay float32.
        """
        if self.kind == "none":
            return model
        if self.kind == "ddp":
            spread = DistributedDataParallel(model)
            spread.broadcast_buffers = False  # they are constants; as an argument torch 2.13 deprecates it
            return spread
        half = torch.bfloat16 if dtype == "bfloat16" else None
        # Inputs keep their dtype: the blocks take the tables of RoPE, which bfloat16 would blur at late positions.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, cast_forward_inputs=False)
        for block in model.h:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        return fully_shard(model, mesh=self.mesh, mp_policy=policy)

    def accumulating(self, model: nn.Module, last: bool):
        """A context in which gradients wait for the last micro-batch before they are averaged over the ranks.

        FSDP2 averages each time instead: what waits would be whole gradients, in the dtype of communication.
        """
        return model.no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place; all of them get the same bits."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value):
        """Rank 0's value, on every rank."""
        if self.ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self):
        """Waits for all ranks."""
        if self.ranks > 1:
            dist.barrier()

    def close(self):
        """Leaves the process group."""
        if self.kind != "none":
            dist.destroy_process_group()


def setup(kind: str, device: str, replicas: int | None = None, timeout: float = 600.0) -> Parallel:
    """Joins the processes that torchrun started.

    Args:
        kind: one of KINDS.
        device: "cpu" communicates by gloo, "cuda" by NCCL, each process on the device of its local rank.
        replicas: with "hsdp", the number of copies of the model; None is one a machine.
        timeout: seconds after which a rank that waits for another gives up.

    Raises:
        ValueError: not under torchrun, several processes without a kind, or replicas that do not divide them.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if ranks > 1:
            raise ValueError(
                f"setup: expected one of ddp, fsdp, hsdp for {ranks} processes, got kind='none'. Pass --parallel=fsdp."
            )
        return Parallel(device=torch.device(device))
    if "RANK" not in os.environ:
        raise ValueError(
            f"setup: expected the environment that torchrun sets, got kind={kind!r} without it. "
            "Start with `torchrun --nproc-per-node=N training/run.py ...`."
        )
    replicas = replicas or max(1, ranks // int(os.environ["LOCAL_WORLD_SIZE"]))
    if kind == "hsdp" and ranks % replicas:
        raise ValueError(
            f"setup: expected replicas that divide the {ranks} processes, got replicas={replicas}. Change --replicas."
        )
    parallel = Parallel(kind, torch.device(device), int(os.environ["RANK"]), ranks)
    if parallel.device.type == "cuda":
        parallel = replace(parallel, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(parallel.device)
    backend = "nccl" if parallel.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    shape, names = ((replicas, ranks // replicas), ("replicate", "shard")) if kind == "hsdp" else ((ranks,), ("shard",))
    mesh = None if kind == "ddp" else init_device_mesh(parallel.device.type, shape, mesh_dim_names=names)
    return replace(parallel, mesh=mesh)
