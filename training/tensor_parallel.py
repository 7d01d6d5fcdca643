"""Tensor parallelism of the project's Transformer: heads, features and vocabulary divided over the ranks of a mesh.

Of each pair of products the first is divided by its outputs and the second by its inputs, so that a block needs one sum
over the ranks for attention and one for the feed-forward layer. What flows between blocks is whole on every rank.

Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd  # the differentiable one
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from training.model import Transformer

BLOCK = {
    "attn.c_attn": ColwiseParallel,
    "attn.c_proj": RowwiseParallel,
    "mlp.c_fc": ColwiseParallel,
    "mlp.c_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def split_heads(model: Transformer, mesh: DeviceMesh):
    """Divides a Transformer, whose weights are the same on every rank, over a mesh of one dimension, in place.

    Args:
        model: its heads, and the features between two products of the feed-forward layer, are multiples of the ranks.
        mesh: the ranks that share every product.
    """
    tied = model.lm_head.weight is model.wte.weight
    whole = Replicate()
    parallelize_module(
        model,
        mesh,
        {"wte": RowwiseParallel(input_layouts=whole), "lm_head": ColwiseParallel(output_layouts=whole)},
    )
    if tied:
        model.lm_head.weight = model.wte.weight
    for block in model.h:
        parallelize_module(block, mesh, {n: style() for n, style in BLOCK.items() if _has(block, n)})
        block.attn.c_attn.register_forward_hook(partial(_to_heads, mesh=mesh))
    for norm in [model.norm, *(norm for block in model.h for norm in (block.attn_norm, block.mlp_norm))]:
        if norm.weight is not None:  # as a DTensor on the mesh of the matrices, it can share an optimizer with them
            distribute_module(norm, mesh, None, _spread, _join)


def _has(block: nn.Module, name: str) -> bool:
    return any(name == found for found, _ in block.named_modules())


def _spread(_module, inputs, mesh):
    return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)


def _join(_module, output, _mesh):
    return output.to_local()


def _to_heads(_module, _inputs, output: Tensor, *, mesh: DeviceMesh) -> Tensor:
    """From a rank's share (B, T, 3 c) of the outputs q, k, v one after the other to q, k, v of its own heads.

    With q, k, v cut into pieces of the c features of a rank's heads, rank r has computed pieces 3 r to 3 r + 2 of 3 t
    and needs pieces r, t + r and 2 t + r: piece b goes to rank b % t. Weights stay in the order of one process, so that
    checkpoints and spectra are the same.
    """
    r, t = mesh.get_local_rank(), mesh.size()
    B, T, _ = output.shape
    going = sorted(range(3), key=lambda i: (3 * r + i) % t)
    sent = [sum((3 * r + i) % t == q for i in range(3)) for q in range(t)]
    received = [sum((3 * q + i) % t == r for i in range(3)) for q in range(t)]
    pieces = output.reshape(B, T, 3, -1).permute(2, 0, 1, 3)[going]  # (3, B, T, c)
    pieces = all_to_all_single_autograd(pieces, received, sent, mesh.get_group())
    return torch.cat(tuple(pieces), -1)
