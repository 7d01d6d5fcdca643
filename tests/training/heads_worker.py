"""Run by test_tensor_parallel.py: a Transformer over several ranks against the same on one, on every rank."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training.model import Config, Transformer
from training.parallel import Parallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
tp = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
parallel = Parallel("tp", torch.device("cpu"), rank, ranks, tp, ranks)
torch.set_default_dtype(torch.float64)
heads = 2 * ranks
for options in ({}, {"activation": "swiglu", "norm_gain": True, "tied": False}):
    config = Config(1, heads, 4 * heads, 5 * ranks, context=9, vocab=35, **options)
    torch.manual_seed(0)
    whole, model = Transformer(config), Transformer(config)
    model.load_state_dict(whole.state_dict())
    parallel.wrap(model, "float32")
    assert (model.lm_head.weight is model.wte.weight) == config.tied
    seen = []
    attend = nn.functional.scaled_dot_product_attention

    def counting(q, k, v, attend=attend, seen=seen, **keywords):
        seen.append((q.shape, k.shape, v.shape))
        return attend(q, k, v, **keywords)

    x = torch.randint(35, (3, 10))
    torch.testing.assert_close(model(x[:, :-1]), whole(x[:, :-1]))
    nn.functional.scaled_dot_product_attention = counting
    model(x[:, :-1], x[:, 1:]).backward()
    nn.functional.scaled_dot_product_attention = attend
    assert seen == [((3, 2, 9, 4),) * 3], seen  # each rank attends with its own heads
    whole(x[:, :-1], x[:, 1:]).backward()
    for (name, p), ref in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(p, DTensor), name  # one optimizer may hold them all
        torch.testing.assert_close(
            p.grad.full_tensor(), ref.grad.to_dense(), msg=lambda text, name=name: f"{name} {text}"
        )
        torch.testing.assert_close(p.full_tensor(), ref)  # in the order of one process
        assert p.to_local().numel() <= math.ceil(p.shape[0] / ranks) * p[0].numel() or p.ndim == 1, name

# The norm of gradients that are spread in several ways
line = init_device_mesh("cpu", (ranks,), mesh_dim_names=("line",))
grads = [torch.randn(7, 5), torch.randn(4, 6), torch.randn(3)]
dist.broadcast_object_list(grads, src=0)
spread = nn.ParameterList(
    [
        nn.Parameter(distribute_tensor(torch.zeros(7, 5), line, [Shard(0)])),
        nn.Parameter(distribute_tensor(torch.zeros(4, 6), tp, [Shard(1)])),
        nn.Parameter(torch.zeros(3)),
    ]
)
norm = torch.cat([G.flatten() for G in grads]).norm()
for most, factor in ((1.0, 1 / norm), (1e3, 1.0)):
    for p, G in zip(spread, grads, strict=True):
        p.grad = distribute_tensor(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G.clone()
    torch.testing.assert_close(parallel.clip(spread, most), norm)
    for p, G in zip(spread, grads, strict=True):
        found = p.grad.full_tensor() if isinstance(p, DTensor) else p.grad
        torch.testing.assert_close(found, factor * G, rtol=1e-5, atol=0)
print("as on one process")
dist.destroy_process_group()
