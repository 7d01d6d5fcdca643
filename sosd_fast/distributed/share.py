"""What each rank measures of a model: its share of copies (DDP), or of what ranks hold parts of, together.

Where a parameter is a DTensor, the ranks of all meshes of the model measure together, in lockstep. Each tells the
others once which part of which matrix it holds; the plan of who sends what to whom, and who owns the result, follows
from that on every rank alike.
"""

import contextlib
import dataclasses
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sosd_fast import kernels
from sosd_fast.distributed.group import lockstep
from sosd_fast.distributed.layout import (
    Box,
    Mesh,
    Spread,
    assign,
    box_of,
    cost,
    is_sharded,
    mesh_of,
    shape_of,
    spread,
)
from sosd_fast.matrices import Matrix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Models that the ranks of a group hold copies of, though nothing about them says so: what a Trainer passes to callbacks
copies: "weakref.WeakKeyDictionary[nn.Module, ProcessGroup]" = weakref.WeakKeyDictionary()


class Held(NamedTuple):
    """What a rank tells the others of one of its matrices."""

    name: str
    shape: tuple[int, ...]  # of the parameter
    dtype: torch.dtype
    view: tuple  # what of the parameter is the matrix: its index, part, flatten and period
    box: Box  # what the rank holds of the parameter
    mesh: Mesh | None  # None: a plain parameter
    why: str = ""  # it cannot be measured
    fingerprint: int = 0  # of the values of a plain parameter


class Common(NamedTuple):
    """A matrix that ranks measure together."""

    name: str
    held: Held  # by one of them
    places: tuple[int | None, ...]  # of the matrix among each rank's own; None where a rank does not have it
    boxes: tuple[Box | None, ...]  # what each rank holds of its parameter
    mesh: Mesh | None  # by numbers in the group


class RankAssignment(NamedTuple):
    """What one rank measures of a model's matrices."""

    matrices: list[Matrix]  # its own, or those of all ranks of the group
    parameters: list[Tensor]  # of all matrices of its model
    group: "ProcessGroup | None"  # the ranks that measure together
    rank: int  # of all ranks
    ranks: int
    # Where there is a group
    common: Sequence[Common] = ()
    spreads: Sequence[Spread] = ()
    left_out: Mapping[str, str] = {}  # parameters that cannot be measured, and why
    told: Sequence[Held] = ()  # what this rank told the others, but for fingerprints


def share(model: nn.Module, matrices: list[Matrix], known: RankAssignment | None = None) -> RankAssignment:
    """Finds what this rank measures. Where a parameter is a DTensor, all ranks of its mesh make this call.

    Args:
        model: DistributedDataParallel, among `copies`, with DTensors as parameters, or none of these.
        matrices: all of its matrices.
        known: what was found before. Where nothing but values has changed, no rank waits for another.

    Raises:
        ValueError: no matrix of the ranks can be measured, or the ranks do not come together.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = [m.parameter for m in matrices]
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    group = model.process_group if ddp else copies.get(model)
    sharded = [p for p in parameters if is_sharded(p)]
    if sharded:
        return _together(matrices, {p for each in sharded for p in mesh_of(each).ranks}, group, known)
    if group is None:
        return RankAssignment(matrices, parameters, None, 0, 1)
    rank, ranks = group.rank(), group.size()
    parts = assign([cost(shape_of(m)) for m in matrices], ranks)
    own = [m for m, part in zip(matrices, parts, strict=True) if part == rank]
    return RankAssignment(own, parameters, None, rank, ranks)


def _together(
    matrices: list[Matrix], members: set[int], group: "ProcessGroup | None", known: RankAssignment | None
) -> RankAssignment:
    """What the ranks of a group measure together."""
    import torch.distributed as dist  # not every torch is built with it

    meshes: dict[Mesh, Mesh] = {}  # each is pickled once
    told, parameters = [_held(m, meshes) for m in matrices], [m.parameter for m in matrices]
    if known is not None and known.told == told:
        found = [
            m if (place := each.places[known.rank]) is None else dataclasses.replace(matrices[place], name=m.name)
            for m, each in zip(known.matrices, known.common, strict=True)
        ]
        return known._replace(matrices=found, parameters=parameters)
    if group is not None:  # copies of models whose matrices are spread
        members = members | set(dist.get_process_group_ranks(group))
    standing = {p.device_mesh: None for p in parameters if is_sharded(p) and p.device_mesh.get_coordinate() is not None}
    groups = [mesh.get_group(d) for mesh in standing for d in range(mesh.ndim)]
    digest = {each.name: f"{each.shape} {each.dtype}" for each in told if each.mesh}
    group = lockstep(members, digest, groups=groups)
    device = next(p.device for p in parameters if is_sharded(p))
    prints: dict[int, int] = {}
    for p, m in ((id(m.parameter), m) for m in matrices if not is_sharded(m.parameter)):
        if p not in prints:
            prints[p] = fingerprint(m.read(m.parameter) if m.read else m.parameter)
    complete = [
        each._replace(fingerprint=prints.get(id(m.parameter), 0)) for each, m in zip(told, matrices, strict=True)
    ]
    everyone: list[list[Held]] = [[] for _ in range(group.size())]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        dist.all_gather_object(everyone, complete, group=group)
    common, left_out = agreed(everyone, dist.get_process_group_ranks(group))
    if not common:
        name, why = next(iter(left_out.items()))
        raise ValueError(f"track: expected at least one matrix that can be measured, got {name}, which {why}.")
    rank, found = group.rank(), []
    different = [each.name for each in common if each.name.endswith("]") and "[rank " in each.name]
    if different and rank == 0:
        kernels.log.warning(
            "sosd_fast: plain parameters differ from rank to rank, and each rank's own are recorded under its number: "
            "%s%s. Make them equal, or DTensors, to have one record of each.",
            ", ".join(different[:4]), ", ..." if len(different) > 4 else "",
        )  # fmt: skip
    for each in common:
        if (place := each.places[rank]) is not None:
            found.append(dataclasses.replace(matrices[place], name=each.name))
        else:
            index, part, flatten, period = each.held.view
            nothing = torch.zeros((), dtype=each.held.dtype, device=device).expand(each.held.shape)  # takes no memory
            found.append(Matrix(each.name, nothing, index, part, flatten, period))
    spreads = spread(found, [each.boxes for each in common], [each.mesh for each in common])
    return RankAssignment(found, parameters, group, rank, group.size(), common, spreads, left_out, told)


def _held(m: Matrix, meshes: dict[Mesh, Mesh]) -> Held:
    p, why = m.parameter, ""
    box, mesh = tuple((0, size) for size in p.shape), None
    if is_sharded(p):
        mesh = mesh_of(p)
        mesh = meshes.setdefault(mesh, mesh)
        try:
            box = box_of(p)
        except ValueError as error:
            why = str(error)
    return Held(m.name, tuple(p.shape), p.dtype, (m.index, m.part, m.flatten, m.period), box, mesh, why)


def agreed(everyone: Sequence[Sequence[Held]], ranks: Sequence[int]) -> tuple[list[Common], dict[str, str]]:
    """The matrices of all ranks of a group, in one order, and the parameters that are left out.

    Plain parameters are taken for copies where their values are equal; where they differ, each rank's own is a matrix
    of its own, with its rank in its name.

    Args:
        everyone: what each rank of the group told.
        ranks: the numbers of these ranks among all.
    """
    own = [{each.name: (place, each) for place, each in enumerate(told)} for told in everyone]
    number = {rank: p for p, rank in enumerate(ranks)}
    common, left_out = [], dict[str, str]()
    for name in dict.fromkeys(each.name for told in everyone for each in told):
        having = {p: own[p][name] for p in range(len(ranks)) if name in own[p]}
        alike: dict[object, list[int]] = {}
        spread_out = any(each.mesh for _, each in having.values())
        for p, (_, each) in having.items():
            key = None if spread_out else (each.shape, each.dtype, each.view, each.fingerprint)
            alike.setdefault(key, []).append(p)
        for those in alike.values():
            some = set(those)
            shown = name if len(alike) == 1 else f"{name}[rank {ranks[those[0]]}]"
            held = having[those[0]][1]
            boxes = tuple(having[p][1].box if p in some else None for p in range(len(ranks)))
            if why := _why_not([having[p][1] for p in those]):
                left_out[re.sub(r"\[[^]]*\]$", "", name)] = why
                continue
            places = tuple(having[p][0] if p in some else None for p in range(len(ranks)))
            mesh = _joined([having[p][1].mesh for p in those], number)
            common.append(Common(shown, held, places, boxes, mesh))
    return common, left_out


def _why_not(held: Sequence[Held]) -> str:
    """Why a matrix cannot be measured; empty where it can be."""
    first = held[0]
    if why := next((each.why for each in held if each.why), ""):
        return why
    if any((each.shape, each.dtype, each.view) != (first.shape, first.dtype, first.view) for each in held):
        return "has another shape or dtype on another rank"
    parts = {each.box for each in held}
    if sum(math.prod(stop - start for start, stop in box) for box in parts) != math.prod(first.shape):
        return f"is not held whole by the {len(held)} ranks that have it"
    return ""


def _joined(meshes: Sequence[Mesh | None], number: Mapping[int, int]) -> Mesh | None:
    """One mesh, by numbers in a group, for several of one shape that share no rank."""
    given = list(dict.fromkeys(mesh for mesh in meshes if mesh))
    ranks = tuple(number[rank] for mesh in given for rank in mesh.ranks)
    if len({mesh.shape for mesh in given}) != 1 or len(set(ranks)) < len(ranks):
        return None
    return Mesh(given[0].shape if len(given) == 1 else (len(given), *given[0].shape), ranks)


def fingerprint(values: Tensor) -> int:
    """A number that tensors of different values hardly ever have in common; NaN and the sign of zero count."""
    flat = values.detach().reshape(-1)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first, chunk in enumerate(flat.split(2**20)):
        weights = torch.arange(len(chunk), device=flat.device) * 2 + 2 * first + 1
        total += (chunk.view(integers).long() * weights).sum()
    return int(total)
