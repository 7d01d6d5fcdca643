"""Run by test_group.py on several ranks: whom a rank meets, and what it is told of others.

The arguments are a folder and cases, one after the other.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sosd_fast.distributed.group import group_of, lockstep

folder, *cases = sys.argv[1:]
torch.set_num_threads(1)


def ranks_of(group):
    return dist.get_process_group_ranks(group)


def total(group):
    """What the ranks of a group sum their numbers to, in a collective that they alone make."""
    value = torch.tensor([dist.get_rank()])
    dist.all_reduce(value, group=group)
    return int(value)


def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("nobody was missed")


def crossing(rank, ranks):
    tp, ep = ({0, 1} if rank in (0, 1) else {2, 3}), {rank % 2, rank % 2 + 2}
    for members in (tp | ep, tp if rank % 2 else tp | ep, tp | ep):  # nobody knows the one across
        group = lockstep(members, {"weight": "8 x 8"})
        assert group is dist.group.WORLD
    assert total(group) == 6


def stages(rank, ranks):
    mine = {0, 1} if rank < 2 else {2, 3}
    if rank < 2:
        dist.new_group([rank], use_local_synchronization=True)  # the stages have made other groups, and as many
        for _ in range(rank):  # as they liked
            dist.new_group([rank], use_local_synchronization=True)
        group = lockstep(mine, "stage 0")
        assert group is lockstep(mine, "stage 0") and ranks_of(group) == [0, 1] and total(group) == 1
        note("stages", rank)
    else:
        await_notes("stages", range(2))  # the other stage has gone on
        given = dist.new_group([2, 3], use_local_synchronization=True)
        group = lockstep(mine, "stage 1", groups=[given])
        assert group is given and ranks_of(group) == [2, 3] and total(group) == 5
    assert lockstep(range(ranks), "all") is dist.group.WORLD  # another model, of both
    if rank in (0, 3):
        assert ranks_of(lockstep({0, 3}, "two of them")) == [0, 3]
    assert total(lockstep(mine, "stage")) == (1 if rank < 2 else 5)
    assert ranks_of(lockstep({rank}, "alone")) == [rank]


def note(case, rank):
    Path(folder, f"{case}-{rank}").touch()


def await_notes(case, ranks):
    while not all(Path(folder, f"{case}-{q}").exists() for q in ranks):
        time.sleep(0.01)


def missing(rank, ranks):
    late = ranks - 1
    if rank == late:
        await_notes("missing", range(late))  # the others have given up
    text = refused(lockstep, range(ranks), "all", patience=1.0)
    said = re.search(r"no call of track on ranks ([\d, ]+) within 1 seconds of the call on ranks [\d, ]+\.", text)
    assert said, text
    absent = set(map(int, said[1].split(", ")))  # on a busy machine others come late, too
    assert rank not in absent and (rank == late or late in absent), text
    assert "Call track on every rank" in text
    note("missing", rank)
    await_notes("missing", range(ranks))
    assert lockstep(range(ranks), "all") is dist.group.WORLD  # what failed does not shift what follows
    assert total(dist.group.WORLD) == ranks * (ranks - 1) // 2


def others(rank, ranks):
    digest = {"a": "3 x 4", "b": "5 x 5" if rank == 1 else "5 x 6"} | ({"c": "1 x 1"} if rank == 1 else {})
    text = refused(lockstep, range(ranks), digest)
    assert "got others on rank 0 than on rank 1: b (5 x 6 and 5 x 5), c (none and 1 x 1)." in text, text
    assert "got others on rank 0 than on rank 1. Pass" in refused(lockstep, range(ranks), str(rank == 1))
    order = [("a", ""), ("b", "")]
    assert "another order" in refused(lockstep, range(ranks), dict(order if rank else reversed(order)))
    assert lockstep(range(ranks), {"a": "3 x 4"}) is dist.group.WORLD


def meshes(rank, ranks):
    mesh = init_device_mesh("cpu", (2, 1, 2))
    assert ranks_of(group_of(mesh, (2,))) == ([0, 1] if rank < 2 else [2, 3])
    assert group_of(mesh, (0, 2)) is group_of(mesh, (2, 1, 0)) is dist.group.WORLD
    first = group_of(mesh, (0, 1))
    assert first is group_of(mesh, [1, 0]) and ranks_of(first) == [rank % 2, rank % 2 + 2]
    assert total(first) == 2 * (rank % 2) + 2


def stores(rank, ranks):
    for again in range(2):
        shared = dist.FileStore(f"{folder}/store{again}", ranks)
        dist.init_process_group("gloo", store=dist.PrefixStore("one", shared), rank=rank, world_size=ranks)
        crossing(rank, ranks)
        if rank:
            lockstep(range(1, ranks), "")
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert lockstep({0}, "alone") is dist.group.WORLD
    dist.destroy_process_group()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        assert lockstep([], "alone") is dist.group.WORLD
        dist.destroy_process_group()


def without_private_names(rank, ranks):
    from torch.distributed import distributed_c10d

    del distributed_c10d._get_default_store
    assert lockstep(range(ranks), "all") is dist.group.WORLD
    assert total(lockstep({rank, rank ^ 1}, "")) == (1 if rank < 2 else 5)


rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for case in cases:
    if case != "stores" and not dist.is_initialized():
        dist.init_process_group("gloo")
    globals()[case](rank, ranks)
    print(f"{case}: met as it should be", flush=True)
dist.destroy_process_group()
