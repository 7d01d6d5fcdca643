"""Run by test_muon_layouts.py: sosd_fast.Muon on spread matrices against the same on whole ones, on every rank."""

import sys
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sosd_fast
from sosd_fast.testing import sd_distance

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
# (out, in): tall, wide, of odd sizes, fused, with fewer rows or columns than some of the meshes have ranks
SHAPES = {"tall": (48, 32), "wide": (32, 48), "odd": (37, 23), "odd_too": (37, 23), "fused": (102, 34)}
SHAPES |= {"rows": (3, 40), "columns": (40, 3)}
STEPS, LR = 6 if ranks == 4 else 2, 0.02  # FSDP2 + TP is what is promised after six


def conditioned(m, n, seed):
    """A matrix whose singular values are 0.5 to 1.5: what is smaller Muon would amplify, and its rounding with it."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, r, dtype=torch.float64, generator=generator)).Q for size in (m, n))
    return (U * torch.linspace(1.5, 0.5, r, dtype=torch.float64) @ V.mT).float()


def net():
    model = nn.Module()
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        layer = nn.Linear(n, m, bias=False)
        layer.weight = nn.Parameter(conditioned(m, n, 100 + i))
        model.add_module(name, layer)
    model.forward = partial(forward, model)
    return model


@cache
def gradients(step):
    return {name: conditioned(m, n, 1000 * step + i) for i, (name, (m, n)) in enumerate(SHAPES.items())}


def forward(model, step):
    """A loss whose gradients are those of the step."""
    return sum((getattr(model, name)(torch.eye(G.shape[1])) * G.mT).sum() for name, G in gradients(step).items())


def muon(model):
    fused = model.fused.weight
    groups = [{"params": [p for p in model.parameters() if p is not fused]}, {"params": [fused], "split": 3}]
    return sosd_fast.Muon(groups, lr=LR, weight_decay=0.1, ns_dtype=torch.float32)


def distributed(mesh, *placements, but=()):
    """Parameters spread by distribute_tensor, but for some; their gradients are, too."""

    def spread(model):
        for name, layer in model.named_children():
            if name not in but:
                layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))

        def backward(step):
            for name, G in gradients(step).items():
                p = getattr(model, name).weight
                p.grad = distribute_tensor(G, mesh, placements) if isinstance(p, DTensor) else G

        return backward

    return spread


def parallelized(tp, data=None, by_columns=(), by_rows=()):
    """Real tensor parallelism, with real FSDP2 over other dimensions of the mesh."""

    def spread(model):
        plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in by_columns}
        plan |= {name: RowwiseParallel(input_layouts=Replicate()) for name in by_rows}
        parallelize_module(model, tp, plan)
        if data is not None:
            for layer in model.children():
                fully_shard(layer, mesh=data)
            fully_shard(model, mesh=data)
        return lambda step: model(step).backward()

    return spread


def partial_sums(mesh):
    """Copies whose gradients are sums of parts that the ranks hold."""

    def spread(model):
        distributed(mesh, Replicate())(model)

        def backward(step):
            for name, G in gradients(step).items():
                getattr(model, name).weight.grad = DTensor.from_local(G / ranks, mesh, [Partial()])

        return backward

    return spread


def layouts():
    if ranks == 2:
        mesh = init_device_mesh("cpu", (ranks,))
        yield "mixed", distributed(mesh, Shard(1), but=("tall", "odd_too"))
        yield "column TP", parallelized(mesh, by_columns=SHAPES)
        yield "row TP", parallelized(mesh, by_rows=SHAPES)
    elif ranks == 3:
        mesh = init_device_mesh("cpu", (ranks,))
        yield "rows", distributed(mesh, Shard(0))
        yield "columns", distributed(mesh, Shard(1))
        yield "copies", distributed(mesh, Replicate())
        yield "partial sums", partial_sums(mesh)
    elif ranks == 8:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
        # each shape in one of both ways; FSDP2 + TP on four ranks have each in both
        columns, rows = ("tall", "odd", "fused", "rows"), ("wide", "odd_too", "columns")
        yield "HSDP + TP", parallelized(mesh["tp"], mesh["replicate", "shard"], columns, rows)
    else:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("shard", "tp"))
        yield "both sides", distributed(mesh, Shard(0), Shard(1))
        yield "rows twice", distributed(mesh, Shard(0), Shard(0))
        yield "copies of columns", distributed(mesh, Replicate(), Shard(1))
        yield "FSDP2 + ColwiseParallel", parallelized(mesh["tp"], mesh["shard"], by_columns=SHAPES)
        yield "FSDP2 + RowwiseParallel", parallelized(mesh["tp"], mesh["shard"], by_rows=SHAPES)


def copies_agree(tensor, what):
    """Ranks that hold the same part of a DTensor hold the same bits; plain tensors are the same on all."""
    at = ()
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        at = tuple(i for i, each in zip(coordinate, tensor.placements, strict=True) if not each.is_replicate())
        tensor = tensor.to_local()
    told = [None] * ranks
    dist.all_gather_object(told, (at, tensor.detach().numpy().tobytes()))
    assert len({place for place, _ in told}) == len(set(told)), what


expected = net()
one = muon(expected)
for step in range(STEPS):
    expected.zero_grad()
    expected(step).backward()
    one.step()

for layout, spread in layouts():
    model = net()
    backward = spread(model)
    optimizer = muon(model)

    def train(step, model=model, backward=backward, optimizer=optimizer):
        optimizer.zero_grad()
        backward(step)
        parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
        before = [p.grad.to_local().clone() for p in parameters]
        optimizer.step()
        assert all(torch.equal(p.grad.to_local(), G) for p, G in zip(parameters, before, strict=True))

    for step in range(STEPS):
        train(step)
    for name in SHAPES:
        p, ref = getattr(model, name).weight, getattr(expected, name).weight
        momentum = optimizer.state[p]["momentum_buffer"]
        assert isinstance(p, DTensor) == isinstance(momentum, DTensor)
        whole = p
        if isinstance(p, DTensor):
            assert (momentum.device_mesh, momentum.placements) == (p.device_mesh, p.placements)
            whole = p.full_tensor()
        S, S_ref = (torch.linalg.svdvals(W.detach().double()) for W in (whole, ref))
        what = f"{layout}: {name}"
        assert sd_distance(S, S_ref) <= 1e-6, f"{what}: {sd_distance(S, S_ref)}"
        torch.testing.assert_close(whole, ref, rtol=0, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}")
        copies_agree(p, what)
        copies_agree(momentum, what)

    # Saved, one step on, read back into another optimizer, and the same step again
    folder = f"{sys.argv[1]}/{layout}"
    kept = {name: _.clone() for name, _ in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=folder)
    train(STEPS)
    after = {name: _.clone() for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(kept[name])
    optimizer.zero_grad()  # or torch leaves the state of the other one empty
    fresh = muon(model)
    state = get_optimizer_state_dict(model, fresh)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, fresh, state)
    train(STEPS, optimizer=fresh)
    for name, p in model.named_parameters():
        there, back = (t.to_local() if isinstance(t, DTensor) else t for t in (after[name], p))
        assert torch.equal(there, back), f"{layout}: {name} after reading the state back"
    if rank == 0:
        print("as on one process:", layout, flush=True)

# What has no values on any rank
mesh = init_device_mesh("cpu", (ranks,))
odd = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
odd.grad = torch.zeros_like(odd)
try:
    sosd_fast.Muon([odd]).step()
    raise AssertionError("partial sums were updated")
except ValueError as error:
    assert "Muon: expected a parameter that ranks hold parts or copies of, got one of shape (4, 4) that" in str(error)
    assert "Redistribute it" in str(error)
dist.destroy_process_group()
