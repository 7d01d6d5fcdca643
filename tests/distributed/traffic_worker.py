"""Run by test_layouts.py on four ranks: what full measurements send, and what a rank holds at most meanwhile."""

from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sosd_fast.distributed import blocks
from sosd_fast.distributed.layout import boxes_on, mesh_of, spread
from sosd_fast.distributed.share import share
from sosd_fast.distributed.spectra import Shards
from sosd_fast.distributed.ways import full_bytes
from sosd_fast.matrices import find_matrices
from sosd_fast.testing import sd_distance

dist.init_process_group("gloo")
torch.set_num_threads(1)
ranks = dist.get_world_size()


class Live(TorchDispatchMode):
    """The most bytes of tensors that operations have made and that were there at once."""

    def __init__(self, there_before):
        super().__init__()
        self.most, self._before = 0, {W.untyped_storage()._cdata for W in there_before}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # noqa: ARG002
        result = function(*arguments, **(options or {}))
        self._made = {key: each for key, each in self._made.items() if not each[0].expired()}
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self._before:
                storage = each.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), len(storage)
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


with Live([]) as live:
    for _ in range(2):
        kept = torch.ones(1000)
        torch.ones(500).view(250, 2)
        del kept
assert live.most == 6000


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def together(model):
    found = share(model, find_matrices(model))
    boxes = [each.boxes[found.rank] for each in found.common]
    return found, Shards(found.matrices, boxes, found.spreads, found.group)


def total(value):
    summed = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed)


MESHES = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "rows twice": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
}
shapes = [(128, 128)] * 6 + [(512, 128)] * 2 + [(128, 512)] * 2 + [(2048, 128)]
for name, (shape, placements) in MESHES.items():
    mesh = init_device_mesh("cpu", shape)
    model = nn.Module()
    for i, (m, n) in enumerate(shapes):
        if name == "rows twice":  # as fully_shard makes it after parallelize_module
            W = distribute_tensor(noisy(m, n, seed=i), mesh, [Shard(0), Shard(0)])
            local = noisy(m, n, seed=i).chunk(2)[mesh.get_local_rank(1)].chunk(2)[mesh.get_local_rank(0)]
            W = type(W).from_local(local, mesh, placements, shape=(m, n), stride=(n, 1))
        else:
            W = distribute_tensor(noisy(m, n, seed=i), mesh, placements)
        model.register_parameter(f"w{i}", nn.Parameter(W))
    found, shards = together(model)
    size = sum(4 * m * n for m, n in shapes)
    before = shards.sent_bytes
    for shape in dict.fromkeys(shapes):
        at = [i for i, each in enumerate(shards.shapes) if each == shape]
        S = shards.spectra(at).S
        assert sd_distance(S[0], torch.linalg.svdvals(noisy(*shape, seed=at[0]).double())) <= 1e-6
    sent = total(shards.sent_bytes - before)
    boxes = [list(boxes_on(p.shape, mesh_of(p), p.placements).values()) for p in model.parameters()]
    stated = full_bytes(found.matrices, spread(found.matrices, boxes, [mesh_of(p) for p in model.parameters()]))
    assert abs(sent - stated) <= 0.01 * stated, (name, sent, stated)
    assert sent <= 1.1 * size, (name, sent / size)
    print(name, round(sent / size, 3), flush=True)

# A matrix larger than a chunk comes in pieces of it
chunk = 2**18
mesh = init_device_mesh("cpu", (ranks,))
for dim in (0, 1):
    model = nn.Module()
    for i in range(ranks + 1):
        model.register_parameter(f"w{i}", nn.Parameter(distribute_tensor(noisy(512, 2048, seed=i), mesh, [Shard(dim)])))
    found, shards = together(model)
    whole = 4 * 512 * 2048  # 16 chunks
    with mock.patch.object(blocks, "CHUNK_BYTES", chunk):
        chunks = shards.chunks(range(ranks + 1), shards.moved)
        assert sorted(map(len, chunks)) == [1, ranks]  # each owner has one at a time
        for at in chunks:
            gathered = None
            with Live([p.to_local() for p in model.parameters()]) as live:
                gathered = shards.gather(at)
            own = [i for i in at if shards.mine(i)]
            assert len(gathered) == len(own) <= 1
            # One buffer for what is sent and one for what comes, each of a chunk, and of a row more of each of three
            # blocks at most, for their rows are moved whole
            row = 4 * model.w0.to_local().shape[1]
            assert live.most <= len(own) * whole + 2 * (chunk + 3 * row), (dim, live.most, len(own) * whole, chunk)
            assert not own or torch.equal(gathered[0], noisy(512, 2048, seed=own[0]))
print("all within bounds", flush=True)
dist.destroy_process_group()
