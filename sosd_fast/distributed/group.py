"""The ranks that measure a model together, and their process group.

The ranks of a model's parameters need not be the world: a pipeline stage has its own, and the stages call `track` when
they like, or not at all. Only the ranks of one model wait for one another, and they know of one another only by the
meshes that they share: rank 0 of the meshes {0, 1} and {0, 2} must find rank 3 of {1, 3} and {2, 3} as well. So each
call is posted in the store that torch's process groups meet in, with the ranks that it knows; whoever reads a call
goes on to the ranks that it names, until nobody new is named. Then every rank knows the same calls, and a vote makes
sure that all of them go on or none does.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store
    from torch.distributed.device_mesh import DeviceMesh

_LONGEST_PAUSE = 0.25  # seconds between looks for others
_AGAINST = 1_000_000  # what a vote against counts, among votes that count 1

_lock = threading.Lock()
_default: "weakref.ref[ProcessGroup] | None" = None  # the default group that what follows belongs to
_defaults = 0  # default groups so far
_board: "_Board | None" = None
_groups: "dict[tuple[int, ...], ProcessGroup]" = {}


def lockstep(
    members: Collection[int],
    digest: Mapping[str, str] | str,
    patience: float = 45.0,
    groups: "Iterable[ProcessGroup]" = (),
) -> "ProcessGroup":
    """Meets the ranks that hold parts of the same matrices, and those that hold parts with these, and so on.

    Each of them calls it as often as the others; no other rank needs to.

    Args:
        members: the ranks that this one shares a parameter with; itself may be among them.
        digest: what must be equal on all of them; of a mapping, the keys that differ are named.
        patience: seconds to wait for the others.
        groups: process groups that exist; one of exactly the ranks is taken, the same on every rank.

    Returns:
        The process group of all ranks that were met, in ascending order.

    Raises:
        ValueError: ranks that did not come in time, or whose digest is another; on all ranks that came.
    """
    import torch.distributed as dist

    with _lock:
        board, rank = _current_board(), dist.get_rank()
        ranks = board.meet(rank, {*members, rank}, digest, patience)
        candidates = [dist.group.WORLD, *groups]
        for group in candidates:
            if group is not None and dist.get_process_group_ranks(group) == ranks:
                return group
        return _group_of_ranks(ranks)


def group_of(mesh: "DeviceMesh", dims: Sequence[int]) -> "ProcessGroup":
    """The process group of the ranks along some dimensions of a mesh that this rank stands on.

    All of these ranks call it at the same place of their programs; the group is made once.

    Args:
        mesh: a mesh that this rank is part of.
        dims: at least one of its dimensions.

    Returns:
        The group; of one dimension the mesh's own, else one whose ranks stand in ascending order.
    """
    import torch.distributed as dist

    if len(set(dims)) == 1:
        return mesh.get_group(dims[0])
    at = mesh.get_coordinate()
    assert at is not None  # this rank is part of it
    along = mesh.mesh[tuple(slice(None) if d in dims else i for d, i in enumerate(at))]
    ranks = sorted(along.flatten().tolist())
    with _lock:
        _current_board()
        world = dist.group.WORLD
        return world if world is not None and world.size() == len(ranks) else _group_of_ranks(ranks)


def _current_board() -> "_Board":
    """The board of the default process group; another default group has another one, and other groups."""
    global _default, _defaults, _board
    import torch.distributed as dist

    world = dist.group.WORLD
    if world is None:
        raise ValueError("track: expected torch.distributed to be initialised, got no process group. Initialise it.")
    if _board is None or _default is None or _default() is not world:
        _groups.clear()
        _default, _defaults, _board = weakref.ref(world), _defaults + 1, _Board(_store())
    return _board


def _group_of_ranks(ranks: Sequence[int]) -> "ProcessGroup":
    """The process group of some ranks, made at the first call, which all of them make at the same time."""
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = _new_group(list(ranks))
    return _groups[key]


def _new_group(ranks: list[int]) -> "ProcessGroup":
    """Makes a process group as `torch.distributed.new_group` does, under a name that its ranks know without the others.

    That function's name counts the groups that a process is in already, which are not as many on every rank: it then
    waits for ever (torch 2.13).
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as private

    world = dist.group.WORLD
    assert world is not None
    names = ("_new_process_group_helper", "_get_default_store", "_world")
    if not all(hasattr(private, name) for name in names) or hasattr(world, "new_group"):
        made: Any = dist.new_group(ranks, use_local_synchronization=True)
        return made
    name: Any = f"sosd_fast {_defaults} {hashlib.sha256(_spell(ranks).encode()).hexdigest()[:16]}"
    place = ranks.index(dist.get_rank())
    backend = dist.Backend(dist.get_backend_config(world))
    # A group that NCCL splits off another must be split off by all ranks of the other.
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        group, _ = private._new_process_group_helper(
            len(ranks), place, ranks, backend, private._get_default_store(), name, timeout=_time_limit(world)
        )
    finally:
        world.bound_device_id = bound
    private._world.pg_group_ranks[group] = {q: i for i, q in enumerate(ranks)}
    return group


def _time_limit(group: "ProcessGroup") -> timedelta:
    """How long the ranks of a group wait for one another."""
    from torch.distributed.constants import default_pg_timeout

    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if isinstance(limit := getattr(options, "_timeout", None), timedelta):
            return limit
    return default_pg_timeout


def _store() -> "Store":
    """The store that the default process group met in."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    find = getattr(distributed_c10d, "_get_default_store", None)  # private: it may go
    if find is not None:
        return dist.PrefixStore("sosd_fast", find())
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        raise ValueError(
            f"track: expected a store that the ranks can meet in, got MASTER_ADDR={host!r} and MASTER_PORT={port!r}. "
            "Set both, as torchrun does."
        )
    return dist.PrefixStore("sosd_fast", dist.TCPStore(host, int(port), is_master=False))


class _Call(NamedTuple):
    """A call of `lockstep` that a rank has posted; one that was withdrawn has no members."""

    members: frozenset[int]
    digest: str  # its hash


class _Board:
    """The calls of all ranks, as they are posted in a store: rank/1, rank/2, ...

    Two ranks that name one another pair their calls by order: the n-th of one that names the other with the n-th of
    the other that names it. A rank posts a call after its last one has ended, so only its last one can still change.
    """

    def __init__(self, store: "Store"):
        self._store = store
        self._calls: dict[int, list[_Call]] = {}  # of each rank, those read; all but the last are as they will stay

    def meet(self, rank: int, members: set[int], digest: Mapping[str, str] | str, patience: float) -> list[int]:
        """Posts a call and returns the ranks that it meets; see `lockstep`."""
        deadline = time.monotonic() + patience
        text = json.dumps(digest if isinstance(digest, str) else dict(digest))
        number = self._store.add(f"{rank}/calls", 1)
        self._store.set(f"{rank}/{number}/digest", text)
        own = _Call(frozenset(members), hashlib.sha256(text.encode()).hexdigest())
        self._post(rank, number, own)
        try:
            met = self._closure(rank, number, deadline, patience)
            self._agree(rank, met, max(deadline, time.monotonic() + patience / 4), patience)
        except BaseException:
            self._post(rank, number, own._replace(members=frozenset()))
            raise
        calls = {q: self._calls[q][n - 1] for q, n in met.items()}
        if len({call.digest for call in calls.values()}) > 1:
            raise self._difference(met, calls)
        with contextlib.suppress(Exception):  # not every store can
            self._store.delete_key(f"{rank}/{number}/digest")
        return sorted(met)

    def _post(self, rank: int, number: int, call: _Call):
        self._store.set(f"{rank}/{number}", json.dumps([_spell(call.members), call.digest]))

    def _closure(self, rank: int, number: int, deadline: float, patience: float) -> dict[int, int]:
        """Finds the calls that belong to a call of this rank, by rank; waits for them."""
        for calls in self._calls.values():
            del calls[-1:]  # it may have been withdrawn
        while len(self._calls.setdefault(rank, [])) < number:
            self._read([rank])
        met: dict[int, int] = {}
        # Whose n-th call it is that names another rank: (the other, n)
        wanted = {rank: (rank, _naming(rank, self._calls[rank]))}
        while wanted:
            found = {q: n for q, by in wanted.items() if (n := self._number(q, *by))}
            met |= found
            for q, n in found.items():
                del wanted[q]
                for other in self._calls[q][n - 1].members - met.keys() - wanted.keys():
                    wanted[other] = q, _naming(other, self._calls[q][:n])
            if not found:
                there = self._await([f"{q}/{len(self._calls.get(q, ())) + 1}" for q in wanted], deadline)
                came = [q for q, is_there in zip(wanted, there, strict=True) if is_there]
                if not came:
                    raise _missing(wanted, met, patience)
                self._read(came)
        return met

    def _number(self, rank: int, other: int, n: int) -> int | None:
        """The number of the n-th call of a rank that names another, where it has been read."""
        naming = [i for i, call in enumerate(self._calls.get(rank, ()), 1) if other in call.members]
        return naming[n - 1] if len(naming) >= n else None

    def _read(self, ranks: Sequence[int]):
        """Reads the next call of some ranks, and once more the one before, which cannot change any more."""
        numbers = [len(self._calls.setdefault(q, [])) + 1 for q in ranks]
        keys = [f"{q}/{n}" for q, n in zip(ranks, numbers, strict=True)]
        keys += [f"{q}/{n - 1}" for q, n in zip(ranks, numbers, strict=True) if n > 1]
        store: Any = self._store
        values = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
        for key, value in zip(keys, values, strict=True):
            q, n = map(int, key.split("/"))
            members, digest = json.loads(value)
            self._calls[q][n - 1 : n] = [_Call(_ranks(members), digest)]

    def _agree(self, rank: int, met: dict[int, int], deadline: float, patience: float):
        """Votes to go on with the calls of `met`; returns where all of them do before somebody gives up."""
        store = self._store
        poll = hashlib.sha256(json.dumps(sorted(met.items())).encode()).hexdigest()
        store.set(f"{poll}/{rank}", "")
        if store.add(f"{poll}/votes", 1) == len(met):  # the last one, and nobody has given up
            store.set(f"{poll}/result", "yes")
        if not self._await([f"{poll}/result"], deadline)[0]:
            against, votes = divmod(store.add(f"{poll}/votes", _AGAINST), _AGAINST)
            if against == 1 and votes < len(met):
                store.set(f"{poll}/result", "no")
            self._await([f"{poll}/result"], time.monotonic() + 1)
        if not store.check([f"{poll}/result"]) or store.get(f"{poll}/result") != b"yes":
            raise _missing([q for q in met if not store.check([f"{poll}/{q}"])], met, patience)

    def _await(self, keys: list[str], deadline: float) -> list[bool]:
        """Waits until all keys are there, or until a time; returns which are."""
        pause = 0.001
        while not (there := self._store.check(keys)) and time.monotonic() < deadline:
            # Not `Store.wait`: a TCPStore's serves no other thread meanwhile, and writes of each that ends in vain.
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return [True] * len(keys) if there else [self._store.check([key]) for key in keys]

    def _difference(self, met: dict[int, int], calls: Mapping[int, _Call]) -> ValueError:
        first = min(calls)
        other = min(q for q in calls if calls[q].digest != calls[first].digest)
        here, there = (json.loads(self._store.get(f"{q}/{met[q]}/digest")) for q in (first, other))
        what = ""
        if isinstance(here, dict) and isinstance(there, dict):
            names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
            each = [f"{name} ({here.get(name, 'none')} and {there.get(name, 'none')})" for name in names[:4]]
            what = f": {', '.join(each)}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            what = what if names else ": the same in another order"
        return ValueError(
            f"track: expected the same matrices on ranks {_list(calls)}, got others on rank {first} than on "
            f"rank {other}{what}. Pass every rank the same arguments and a model of the same form."
        )


def _naming(rank: int, calls: Iterable[_Call]) -> int:
    return sum(rank in call.members for call in calls)


def _missing(ranks: Collection[int], met: Collection[int], patience: float) -> ValueError:
    who = f"no call of track on ranks {_list(ranks)}" if ranks else "some that came too late"
    return ValueError(
        f"track: expected every rank that holds a part of these matrices, for they are measured together, got "
        f"{who} within {patience:g} seconds of the call on ranks {_list(met)}. Call track on every rank, with the same "
        "arguments and at the same place."
    )


def _list(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return ", ".join(map(str, found[:16])) + (f" and {len(found) - 16} more" if len(found) > 16 else "")


def _spell(ranks: Collection[int]) -> str:
    """Ranks as text: [first, end, step] where they are at equal distances, for there may be thousands, or all."""
    found = sorted(ranks)
    step = found[1] - found[0] if len(found) > 1 else 1
    regular = range(found[0], found[-1] + 1, step) if found else range(0)
    if found == list(regular):
        return json.dumps({"start": regular.start, "stop": regular.stop, "step": regular.step})
    return json.dumps(found)


@functools.lru_cache(maxsize=1024)
def _ranks(text: str) -> frozenset[int]:
    spelled: Any = json.loads(text)
    if isinstance(spelled, dict):
        return frozenset(range(spelled["start"], spelled["stop"], spelled["step"]))
    return frozenset(spelled)
