"""Where a run lives: one process, or several under torchrun with DDP, FSDP2, hybrid sharding or tensor parallelism."""

import contextlib
import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.tensor_parallel import split_heads

KINDS = ("none", "ddp", "fsdp", "hsdp", "tp", "fsdp+tp", "hsdp+tp")


@dataclass(frozen=True)
class Parallel:
    """The processes of a run, and how the model is spread over them."""

    kind: str = "none"
    device: torch.device = torch.device("cpu")
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None
    tp: int = 1  # ranks that share every product; their numbers follow each other

    @property
    def data_rank(self) -> int:
        """Which share of a batch is this rank's; the ranks that share products compute the same one."""
        return self.rank // self.tp

    @property
    def data_ranks(self) -> int:
        """How many shares a batch has."""
        return self.ranks // self.tp

    @property
    def main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def wrap(self, model: nn.Module, dtype: str) -> nn.Module:
        """Spreads a Transformer, whose weights are the same on every rank.

        Args:
            model: spread in place: heads, features and vocabulary over "tp", then, block by block with FSDP2, rows.
            dtype: "bfloat16" computes and communicates in it under FSDP2; parameters stay float32.
        """
        if self.kind == "none":
            return model
        if self.kind == "ddp":
            spread = DistributedDataParallel(model)
            spread.broadcast_buffers = False  # they are constants; as an argument torch 2.13 deprecates it
            return spread
        assert self.mesh is not None
        if "tp" in self.kind:
            split_heads(model, self.mesh["tp"])
        if self.kind == "tp":
            return model
        half = torch.bfloat16 if dtype == "bfloat16" else None
        mesh = self.mesh[("replicate", "shard") if "hsdp" in self.kind else ("shard",)]
        # Inputs keep their dtype: the blocks take the tables of RoPE, which bfloat16 would blur at late positions.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, cast_forward_inputs=False)
        for block in model.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def accumulating(self, model: nn.Module, last: bool):
        """A context in which gradients wait for the last micro-batch before they are averaged over the ranks.

        FSDP2 averages each time instead: what waits would be whole gradients, in the dtype of communication.
        """
        return model.no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext()

    def clip(self, model: nn.Module, most: float) -> Tensor:
        """Scales gradients so that their norm over the whole model is at most `most`.

        Returns:
            The norm before, a tensor of no dimension, the same bits on every rank.
        """
        if self.mesh is None:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]
        norms = torch.stack(torch._foreach_norm(grads)).double()
        square = self.sum((norms.square() / torch.tensor([self._copies(grad) for grad in found]).to(norms)).sum())
        torch._foreach_mul_(grads, (most / (square.sqrt() + 1e-6)).clamp(max=1).to(grads[0].dtype))
        return square.sqrt()

    def _copies(self, tensor: Tensor) -> int:
        """How many ranks hold each entry of a tensor."""
        if not isinstance(tensor, DTensor):
            return self.ranks
        shards = [tensor.device_mesh.size(d) for d, each in enumerate(tensor.placements) if not each.is_replicate()]
        return self.ranks // math.prod(shards)

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


def mesh_sizes(kind: str, ranks: int, replicas: int | None = None, tp: int | None = None) -> dict[str, int]:
    """The size of each dimension of the mesh that a kind of KINDS asks for, by name, their product `ranks`.

    Args:
        kind: one of KINDS.
        ranks: how many processes there are.
        replicas: with hsdp, the number of copies of the model; None is one a machine.
        tp: with tp, the number of ranks that share every product; None is all of them, or 2 beside fsdp or hsdp.

    Raises:
        ValueError: sizes that do not divide the processes.
    """
    if "tp" not in kind:
        tp = 1
    elif tp is None:
        tp = ranks if kind == "tp" else 2
    if kind == "tp" and tp != ranks:
        raise ValueError(
            f"mesh_sizes: expected all {ranks} processes to share every product, got --tp-size={tp}. "
            "Leave --tp-size out, or take --parallel=fsdp+tp."
        )
    if ranks % tp:
        raise ValueError(
            f"mesh_sizes: expected a number that divides the {ranks} processes, got --tp-size={tp}. Change --tp-size, "
            "or torchrun's --nproc-per-node."
        )
    replicas = (replicas or max(1, ranks // int(os.environ["LOCAL_WORLD_SIZE"]))) if "hsdp" in kind else 1
    if ranks // tp % replicas:
        raise ValueError(
            f"mesh_sizes: expected a number that divides {ranks} processes / {tp} that share products, got "
            f"--replicas={replicas}. Change --replicas."
        )
    sizes = {"replicate": replicas} if "hsdp" in kind else {}
    sizes |= {"shard": ranks // tp // replicas} if "fsdp" in kind or "hsdp" in kind else {}
    return sizes | ({"tp": tp} if "tp" in kind else {})


def setup(
    kind: str, device: str, replicas: int | None = None, timeout: float = 600.0, tp: int | None = None
) -> Parallel:
    """Joins the processes that torchrun started.

    Args:
        kind: one of KINDS.
        device: "cpu" communicates by gloo, "cuda" by NCCL, each process on the device of its local rank.
        replicas: with hsdp, the number of copies of the model; None is one a machine.
        timeout: seconds after which a rank that waits for another gives up.
        tp: with tp, the number of ranks that share every product; see `mesh_sizes`.

    Raises:
        ValueError: not under torchrun, several processes without a kind, or sizes that do not divide.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        if ranks > 1:
            raise ValueError(
                f"setup: expected one of {', '.join(KINDS[1:])} for {ranks} processes, got kind='none'. "
                "Pass --parallel=fsdp."
            )
        return Parallel(device=torch.device(device))
    if "RANK" not in os.environ:
        raise ValueError(
            f"setup: expected the environment that torchrun sets, got kind={kind!r} without it. "
            "Start with `torchrun --nproc-per-node=N training/run.py ...`."
        )
    sizes = mesh_sizes(kind, ranks, replicas, tp)
    parallel = Parallel(kind, torch.device(device), int(os.environ["RANK"]), ranks, tp=sizes.get("tp", 1))
    if parallel.device.type == "cuda":
        parallel = replace(parallel, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(parallel.device)
    backend = "nccl" if parallel.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if sizes:
        mesh = init_device_mesh(parallel.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        parallel = replace(parallel, mesh=mesh)
    return parallel
