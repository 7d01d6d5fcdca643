"""Run by test_layouts.py on several ranks: spectra of matrices that ranks hold, against those of one process.

The arguments are the layouts, one after the other. Matrices of unusual values and types are measured in the first of up
to four ranks: who holds which part of a matrix says nothing of the values in it.
"""

import functools
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sosd_fast.distributed import blocks, ways
from sosd_fast.distributed import spectra as module
from sosd_fast.distributed.layout import is_sharded
from sosd_fast.distributed.share import share
from sosd_fast.distributed.spectra import Shards
from sosd_fast.distributed.ways import Way, leading_way
from sosd_fast.matrices import find_matrices
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.spectra.topk import topk_svdvals
from sosd_fast.testing import matrix, sd_distance

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, ranks = dist.get_rank(), dist.get_world_size()


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "tall": noisy(67, 20),
    "tall_again": noisy(67, 20, seed=1),
    "very_tall": noisy(480, 9),
    "wide": noisy(20, 67),
    "very_wide": noisy(9, 480),
    "square": noisy(40, 40),
    "attn.c_attn": noisy(3 * 34, 34),
    "graded": matrix("log4", 60, 40),
    "rank_one": matrix("rank_one", 60, 40),
    "tiny": noisy(45, 30) * 1e-30,
    "huge_wide": noisy(30, 45) * 1e30,
    "bf16": noisy(50, 30).bfloat16(),
    "fp64": noisy(50, 30).double(),
    "zero": torch.zeros(41, 30),
    "nan": noisy(41, 30).index_fill(0, torch.tensor([40]), torch.nan),
    "lone": noisy(3, 2),
    "rows": noisy(2, 50),  # some ranks hold none
    "columns": noisy(50, 2),
    "neox.query_key_value": noisy(3 * 36, 20),  # a rank's rows lie in parts that alternate
}
ROW_WISE = ("tall_again", "wide", "very_wide", "rank_one", "fp64", "huge_wide")  # the others column-wise
PLAIN = ("square", "tiny")
VALUES = ("graded", "rank_one", "tiny", "huge_wide", "zero", "nan", "bf16", "fp64", "lone")
DENSE = ("tall", "tall_again", "very_tall", "wide", "rows")  # beside experts; three ranks hold the others by rows, too


class GPTNeoXAttention(nn.Module):
    num_attention_heads = 4


class Experts(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.weight = nn.Parameter(W)


def model_of(values=True, kind=None):
    model = nn.Module()
    model.neox = GPTNeoXAttention()
    for name, W in WEIGHTS.items():
        if (name in VALUES and not values) or (kind == "ep" and name not in DENSE):
            continue
        *path, last = name.split(".")
        at = model
        for part in path:
            at.add_module(part, getattr(at, part, nn.Module()))
            at = getattr(at, part)
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(W.clone())
        at.add_module(last, linear)
    model.conv = nn.Conv2d(2, 13, 3, bias=False)
    model.conv.weight.data = noisy(13, 2, 3, 3)
    model.experts = Experts(noisy(4, 30, 20, seed=3))
    return model


def leaves(model):
    return [m for m in model.modules() if m._parameters]


def parallelized(model, mesh):
    """By the real plans of tensor parallelism, but for what is left plain."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in PLAIN}
    plan = {name: RowwiseParallel() if name in ROW_WISE else ColwiseParallel() for name in linear}
    return parallelize_module(model, mesh, plan)


def placed(model, mesh, placements):
    for leaf in leaves(model):
        for name, p in list(leaf.named_parameters(recurse=False)):
            some = [Shard(each.dim % p.ndim) if isinstance(each, Shard) else each for each in placements]
            setattr(leaf, name, nn.Parameter(distribute_tensor(p.data, mesh, some)))
    return model


def fsdp(model, mesh, root=True):
    for leaf in leaves(model):
        fully_shard(leaf, mesh=mesh)
    return fully_shard(model, mesh=mesh) if root else model


def build(model, kind):
    if kind == "rows":
        return placed(model, init_device_mesh("cpu", (ranks,)), [Shard(0)])
    if kind == "hybrid":
        return placed(model, init_device_mesh("cpu", (2, ranks // 2)), [Replicate(), Shard(0)])
    if kind == "tp":
        return parallelized(model, init_device_mesh("cpu", (ranks,)))
    if kind == "fsdp+tp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        return fsdp(parallelized(model, mesh["tp"]), mesh["dp"])
    if kind == "hsdp+tp":
        mesh = init_device_mesh("cpu", (2, 2, ranks // 4), mesh_dim_names=("copies", "dp", "tp"))
        return fsdp(parallelized(model, mesh["tp"]), mesh["copies", "dp"])
    if kind == "columns":
        return placed(model, init_device_mesh("cpu", (ranks,)), [Shard(1)])
    if kind == "last":  # of a kernel's dimensions and a stack's, which stand apart in the matrix
        return placed(model, init_device_mesh("cpu", (2, ranks // 2)), [Shard(-1), Shard(0)])
    if kind == "copies":
        return placed(model, init_device_mesh("cpu", (ranks,)), [Replicate()])
    if kind == "experts":  # over all ranks, beside dense ones: on another mesh, plain, or of FSDP2 without its root
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("fsdp", "ep"))
        experts = model.experts
        del model.experts
        kept = {name: getattr(model, name) for name in PLAIN if hasattr(model, name)}
        for name in kept:
            delattr(model, name)
        fsdp(model, init_device_mesh("cpu", (ranks,)), root=False)
        for name, child in kept.items():
            model.add_module(name, child)
        experts.weight = nn.Parameter(distribute_tensor(experts.weight.data, mesh["ep"], [Shard(0)]))
        model.experts = fully_shard(experts, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(1))
        return model
    if kind == "ep":  # copies of experts in each half of the ranks, which know nothing of one another's mesh
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "ep"))
        W = distribute_tensor(model.experts.weight.data, mesh["ep"], [Shard(0)])
        del model.experts
        placed(model, init_device_mesh("cpu", (ranks,)), [Shard(0)])
        model.experts = Experts(W)
        return model
    raise ValueError(kind)


def gathered(value):
    everyone = [None] * ranks
    dist.all_gather_object(everyone, value)
    return everyone


def together(model):
    found = share(model, find_matrices(model))
    return found, Shards(found.matrices, [each.boxes[found.rank] for each in found.common], found.spreads, found.group)


def local(p):
    return p.to_local() if is_sharded(p) else p.detach()


expected = {m.name: m.tensor() for m in find_matrices(model_of())}
leading_ways = set()


def noted(*arguments):
    way, sent = leading_way(*arguments)
    leading_ways.add(way)
    return way, sent


@functools.cache
def exact(names):
    """Of matrices of one shape."""
    return spectra([W.double() if W.isfinite().all() else W for W in (expected[name] for name in names)], "exact")


@functools.cache
def alone(names, k):
    """The leading values of one process, cold, then warm."""
    cold = topk_svdvals([expected[name] for name in names], k)
    return cold, topk_svdvals([expected[name] for name in names], k, state=cold.state)


def check(kind):
    leading_ways.clear()
    values = kind == sys.argv[1] and ranks <= 4
    model = build(model_of(values, kind), kind)
    known = {m.name for m in find_matrices(model_of(values, kind))}
    before = [local(p).clone() for p in model.parameters()]
    found, shards = together(model)
    names = [m.name for m in found.matrices]
    assert sorted(names) == sorted(known) and not found.left_out, (names, found.left_out)
    assert all(other == names for other in gathered(names))
    owned = gathered([name for i, name in enumerate(names) if shards.mine(i)])
    assert sorted(name for own in owned for name in own) == sorted(names)
    if kind == "copies":
        assert all(each.senders == (each.owner,) for each in found.spreads)
    if kind in ("ep", "experts"):
        stack = [i for i, name in enumerate(names) if name.startswith("experts")]
        assert [names[i] for i in stack] == [f"experts.weight[{e}]" for e in range(4)]
        moving = [found.spreads[i].senders != (found.spreads[i].owner,) for i in stack]
        assert moving == [kind == "experts"] * 4  # whole ones are measured where they are
        assert kind == "experts" or len({found.spreads[i].owner for i in stack}) == 4
    groups = {}
    for i, m in enumerate(found.matrices):
        groups.setdefault((shards.shapes[i], m.parameter.dtype), []).append(i)
    bits, methods = {}, {}
    for at in groups.values():
        those = tuple(names[i] for i in at)
        matrices = [expected[name] for name in those]
        assert tuple(matrices[0].shape) == shards.shapes[at[0]]
        ref = exact(those)
        result = shards.spectra(at)
        small = functools.partial(mock.patch.object, attribute="CHUNK_BYTES", new=4000)
        with small(blocks), small(module):  # many chunks, and matrices larger than one
            again = shards.spectra(at, previous=result.S)
            whole = shards.spectra(at, "exact")
        for j, name in enumerate(those):
            bits[name] = result.S[j].numpy().tobytes(), str(result.methods[j])
            methods[name] = result.methods[j]
            if name == "nan.weight":
                assert result.S[j].isnan().all() and whole.S[j].isnan().all()
            elif name == "zero.weight":
                assert (result.S[j] == 0).all()
            else:
                assert result.methods[j] == spectra([matrices[j]]).methods[0], name
                for each in (result, again, whole):
                    assert sd_distance(each.S[j], ref.S[j]) <= min(1e-6, float(each.sd_error[j])), name
                    assert ((each.S[j] - ref.S[j]).abs() <= each.bound[j] * 1.01 + 1e-30).all(), name
        for k, pays in ((min(3, *matrices[0].shape), False), (1, True)):  # of such small ones products never pay
            states = [None] * len(at)
            for one in alone(those, k):
                with (
                    mock.patch.object(module, "leading_way", noted),
                    mock.patch.object(ways, "products_pay", lambda *_, pays=pays: pays),
                ):
                    S, residual, norms, states = shards.topk(at, k, states)
                for j, name in enumerate(those):
                    if name == "nan.weight":
                        assert S[j].isnan().all() and norms[j].isnan()
                        continue
                    top = ref.S[j, 0]
                    assert ((S[j].double() - one.S[j].double()).abs() <= 2e-5 * top).all(), (name, S[j], one.S[j])
                    assert abs(norms[j] - matrices[j].double().norm()) <= 1e-6 * top, name
    found_methods = [methods[f"{name}.weight"] for name in ("tall", "graded", "rank_one")[: 3 if values else 1]]
    assert found_methods == ["gram32", "gram64", "bidiag64"][: len(found_methods)]
    full_ways = {
        ways.full_way(shape, m.parameter.dtype.itemsize, each)[0]
        for shape, m, each in zip(shards.shapes, found.matrices, found.spreads, strict=True)
    }
    assert full_ways >= {"copies": {Way.WHOLE}, "last": {Way.GATHER}}.get(kind, {Way.LONG, Way.GATHER}), full_ways
    by_products = {"copies": set(), "last": {Way.THIN}}.get(kind, {Way.LONG, Way.THIN})
    assert leading_ways >= (by_products | {Way.GATHER} if by_products else {Way.WHOLE}), leading_ways
    assert all(other == bits for other in gathered(bits))  # the same on every rank
    for p, earlier in zip(model.parameters(), before, strict=True):
        assert torch.equal(local(p).nan_to_num(7), earlier.nan_to_num(7))
    print(f"{kind}: as in one process", flush=True)


for kind in sys.argv[1:]:
    check(kind)
dist.destroy_process_group()
