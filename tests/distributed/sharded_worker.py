"""Run by test_sharded.py on several ranks: a checkpoint of rows, values out of range, owners that fail.

The arguments are "rows" or "hybrid", and a folder for the checkpoint.
"""

import sys
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sosd_fast import kernels
from sosd_fast.distributed import layout
from sosd_fast.distributed import share as sharing
from sosd_fast.distributed import spectra as module
from sosd_fast.distributed.spectra import Shards
from sosd_fast.matrices import find_matrices
from sosd_fast.testing import sd_distance

dist.init_process_group("gloo")
ranks = dist.get_world_size()
hybrid = sys.argv[1] == "hybrid"
mesh = init_device_mesh("cpu", (2, ranks // 2) if hybrid else (ranks,))
placements = [Replicate(), Shard(0)] if hybrid else [Shard(0)]


def together(share):
    return Shards(share.matrices, [each.boxes[share.rank] for each in share.common], share.spreads, share.group)


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


tensors = {
    "tall": noisy(67, 20),  # uneven
    "wide": noisy(20, 67),
    "attn.c_attn.weight": noisy(3 * 34, 34),  # a rank's rows lie in more than one part
    "experts": noisy(2, 30, 20),  # fewer than four ranks: some hold nothing
    "rows": noisy(2, 50),  # some ranks hold none
    "columns": noisy(50, 2),
    "neox.query_key_value.weight": noisy(3 * 36, 20),  # a rank's rows lie in parts that alternate
    "bf16": noisy(50, 30).bfloat16(),
    "fp64": noisy(50, 30).double(),
    "zero": torch.zeros(41, 30),
    "nan": noisy(41, 30).index_fill(0, torch.tensor([40]), torch.nan),
}


class GPTNeoXAttention(nn.Module):
    num_attention_heads = 4


model = nn.Module()
whole = nn.Module()
model.neox, whole.neox = GPTNeoXAttention(), GPTNeoXAttention()
for name, W in tensors.items():
    for root, value in ((whole, W), (model, distribute_tensor(W, mesh, placements))):
        *path, last = name.split(".")
        for part in path:
            root.add_module(part, getattr(root, part, nn.Module()))
            root = getattr(root, part)
        root.register_parameter(last, nn.Parameter(value.clone()))
whole.conv = nn.Conv2d(2, 13, 3, bias=False)
whole.conv.weight.data = noisy(13, 2, 3, 3)
model.conv = nn.Conv2d(2, 13, 3, bias=False)
model.conv.weight = nn.Parameter(distribute_tensor(noisy(13, 2, 3, 3), mesh, placements))

state = {"model": model.state_dict(), "optimizers": {"state": {"tall.exp_avg": model.tall}}}
dcp.save(state, checkpoint_id=f"{sys.argv[2]}/shards")
if dist.get_rank() == 0:
    torch.save(whole.state_dict(), f"{sys.argv[2]}/whole.pt")

# A forward pass without a backward leaves the root's parameters whole
if not hybrid:
    net = fully_shard(nn.Sequential(nn.Linear(6, 9, bias=False)), mesh=mesh)
    with torch.no_grad():
        net(torch.ones(2, 6))
    assert not layout.is_sharded(net[0].weight)
    assert sharing.share(net, find_matrices(net)).group is not None and layout.is_sharded(net[0].weight)

# What is beyond the range of squares and of sums of products, and float64 that is so
extremes = nn.Module()
for name, W in {
    "huge": noisy(45, 30) * 2.7e37,  # the largest value is 3.3e38, near the end of the range
    "huge_wide": noisy(30, 45) * 2.7e37,
    "huge64": noisy(45, 30).double() * 1e300,
    "tiny64": noisy(45, 30).double() * 1e-300,
    "subnormal": noisy(45, 30) * 1e-39,
}.items():
    extremes.register_parameter(name, nn.Parameter(distribute_tensor(W, mesh, placements)))
    setattr(whole, name, nn.Parameter(W))
found = find_matrices(extremes)
held = sharing.share(extremes, found)
shards = together(held)
for i, m in enumerate(held.matrices):
    W = dict(whole.named_parameters())[m.name].detach()
    scale = float(W.abs().max())
    S_ref = torch.linalg.svdvals(W.double() / scale)
    states = [None]
    for _ in range(3):
        S, residual, norms, states = shards.topk([i], 3, states)
        assert residual.isfinite().all(), m.name
    assert ((S[0].double() / scale - S_ref[:3]).abs() <= 1e-4 * S_ref[0]).all(), (m.name, S[0].double() / scale, S_ref)
    assert abs(norms[0] / scale - S_ref.norm()) <= 1e-5 * S_ref.norm(), m.name
    spectrum = shards.spectra([i])
    assert ((spectrum.S[0] / scale - S_ref).abs() <= spectrum.bound[0] / scale + 1e-12).all(), m.name

# More ranks than matrices
lone = nn.Module()
lone.weight = nn.Parameter(distribute_tensor(noisy(9, 5), mesh, placements))
few = sharing.share(lone, find_matrices(lone))
few_shards = together(few)
if few.matrices:
    S = few_shards.spectra([0]).S[0]
    assert sd_distance(S, torch.linalg.svdvals(noisy(9, 5).double())) < 1e-6
count = [None] * ranks
dist.all_gather_object(count, sum(few_shards.mine(i) for i in range(len(few.matrices))))
assert sum(count) == 1

# An owner that fails answers NaN for that matrix, and nobody waits for it
failing = nn.Module()
for name, (*shape, seed) in {"a": (30, 20, 0), "b": (30, 20, 1), "wide": (20, 30, 0), "wide2": (20, 30, 1)}.items():
    failing.register_parameter(name, nn.Parameter(distribute_tensor(noisy(*shape, seed=seed), mesh, placements)))
held = sharing.share(failing, find_matrices(failing))
shards = together(held)
warnings = []
kernels.log.addFilter(lambda record: warnings.append(record.getMessage()))
names = [m.name for m in held.matrices]


def fails_for(function, bad):
    """A function of a batch that raises where the batch holds a matrix of this trace."""

    def broken(batch, *arguments, **options):
        if any(torch.allclose(A.diagonal().sum(), bad.to(A.dtype)) for A in batch):
            raise torch.linalg.LinAlgError("did not converge")
        return function(batch, *arguments, **options)

    return broken


for shape, pair in {(30, 20): ("a", "b"), (20, 30): ("wide", "wide2")}.items():
    at = [i for i, name in enumerate(names) if name in pair]
    if not at:  # the other replica's
        continue
    W = getattr(failing, names[at[0]]).full_tensor().detach()
    good = shards.spectra(at).S
    top = shards.topk(at, 3, [None] * len(at))[0]
    bad, bad_gram = W.diagonal().sum(), (W.mT @ W).tril().diagonal().sum()
    with (
        mock.patch.object(module, "spectra", fails_for(module.spectra, bad)),
        mock.patch.object(module, "topk_svdvals", fails_for(module.topk_svdvals, bad)),
        mock.patch.object(torch.linalg, "eigvalsh", fails_for(torch.linalg.eigvalsh, bad_gram)),
    ):
        result = shards.spectra(at)
        S, _, _, states = shards.topk(at, 3, [None] * len(at))
    assert result.S[0].isnan().all() and result.sd_error[0].isnan() and torch.equal(result.S[1:], good[1:])
    if shape[0] < shape[1]:  # the others have no owner
        assert S[0].isnan().all() and states[0] is None and torch.equal(S[1:], top[1:])
told = [None] * ranks
dist.all_gather_object(told, warnings)
assert any(told) and all(len(own) <= 1 for own in told), told
assert all("recorded as NaN: _LinAlgError('did not converge')" in text for own in told for text in own), told

# So does a rank that fails at its part of a Gram matrix
tall = nn.Module()
tall.weight = nn.Parameter(distribute_tensor(noisy(2000, 16), mesh, placements))
held = sharing.share(tall, find_matrices(tall))
shards = together(held)
computed = module.gram.triangles
for extension in (kernels._C, None):
    if not held.matrices:  # the other replica's
        break
    with mock.patch.object(kernels, "_C", extension), mock.patch.object(kernels, "warn_missing", lambda _: None):
        good = shards.spectra([0]).S
        fails = MemoryError("no more") if dist.get_rank() in shards.spreads[0].senders[1:] else computed
        with mock.patch.object(module.gram, "triangles", side_effect=fails):
            assert shards.spectra([0]).S.isnan().all()
        assert good.isfinite().all() and torch.equal(shards.spectra([0]).S, good)

print("all as in one process", flush=True)
dist.destroy_process_group()
