"""Spectra of weights that several ranks hold: whole ones (DDP), rows of them (FSDP2), or both (hybrid sharding).

Replicas share the matrices out by cost and need not communicate. With rows over ranks, W = [W_1; W_2; ...] (m, n):

    m >= n   each rank sends its part W_p^T W_p of the Gram matrix, one triangle, to the matrix's owner, who sums them
             in the order of ranks; the leading values take two sums over ranks, of (k + oversamples) n and its square
    m < n    rows are the short side: they go to the owner, who measures the whole matrix

Owners then tell all ranks the spectra, so that every rank carries the same state and takes the same decisions.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from sosd_fast import kernels
from sosd_fast.matrices import Matrix
from sosd_fast.spectra.gram import PAIRS, Products, correct, singular_values
from sosd_fast.spectra.precision import Method, choose, climb
from sosd_fast.spectra.svdvals import Spectra, finished, library_eigenvalues, spectra
from sosd_fast.spectra.topk import State, iterate, stacked, topk_svdvals

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

METHODS = tuple(Method)
CHUNK_BYTES = 64 * 2**20  # sent at a time

# Models that the ranks of a group hold copies of, though nothing about them says so: what a Trainer passes to callbacks
copies: "weakref.WeakKeyDictionary[nn.Module, ProcessGroup]" = weakref.WeakKeyDictionary()


class Share(NamedTuple):
    """What one rank measures of a model's matrices."""

    matrices: list[Matrix]  # those of this rank's replica
    parameters: list[Tensor]  # of all matrices
    rows: "RowShards | None"  # where they are sharded
    rank: int  # of all ranks
    ranks: int


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a `torch.distributed.tensor.DTensor`."""
    return hasattr(tensor, "placements")


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """The (m, n) of a matrix, without touching its values."""
    whole = torch.empty(matrix.parameter.shape, device="meta")
    m, n = dataclasses.replace(matrix, parameter=whole).tensor().shape
    return m, n


def cost(shape: tuple[int, int]) -> float:
    """What the full spectrum of an (m, n) matrix costs, in units of a product's operations (LOG.md, CPU)."""
    r = min(shape)
    return r * r * max(shape) + 2.2 * r**3


def assign(costs: Sequence[float], parts: int) -> list[int]:
    """Shares work out: the longest first, each to the part that has least so far.

    Args:
        costs: of each item.
        parts: how many.

    Returns:
        The part of each item. No part has more than 4/3 - 1/(3 parts) times the best maximum.

    Source: Graham, Bounds on Multiprocessing Timing Anomalies (1969).
    """
    total, part = [0.0] * parts, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        part[i] = min(range(parts), key=total.__getitem__)
        total[part[i]] += costs[i]
    return part


def share(model: nn.Module, matrices: list[Matrix]) -> Share:
    """Finds what this rank measures.

    Args:
        model: DistributedDataParallel, among `copies`, sharded by `fully_shard`, or none of these.
        matrices: all of its matrices, in the same order on every rank.

    Raises:
        ValueError: a parameter that is sharded other than by rows over one dimension of a mesh, or parameters on
            several meshes.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = [m.parameter for m in matrices]
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        group = model.process_group if ddp else copies.get(model)
        if group is None:
            return Share(matrices, parameters, None, 0, 1)
        rank, ranks = group.rank(), group.size()
        return Share(_own(matrices, rank, ranks), parameters, None, rank, ranks)
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    for m in matrices:
        p = m.parameter
        rows = [d for d, each in enumerate(getattr(p, "placements", ())) if each.is_shard(0)]
        if not is_sharded(p) or len(rows) != 1 or p.placements != placements or p.device_mesh != mesh:
            raise ValueError(
                f"track: expected every parameter sharded by rows over one mesh, got {m.name} with "
                f"placements={getattr(p, 'placements', None)}. Use fully_shard, or exclude the parameter."
            )
    if any(not (p.is_shard(0) or p.is_replicate()) for p in placements) or mesh.ndim > 2:
        raise ValueError(
            f"track: expected rows sharded over one dimension and copies over another, got placements={placements}. "
            "Use fully_shard with a mesh of one or two dimensions."
        )
    at = next(d for d, each in enumerate(placements) if each.is_shard(0))
    replica, replicas = (mesh.get_local_rank(1 - at), mesh.size(1 - at)) if mesh.ndim == 2 else (0, 1)
    group = mesh.get_group(at)
    own = _own(matrices, replica, replicas)
    rank = replica * group.size() + group.rank()
    return Share(own, parameters, RowShards(own, group), rank, replicas * group.size())


def _own(matrices, part, parts):
    parts_of = assign([cost(shape_of(m)) for m in matrices], parts)
    return [m for m, p in zip(matrices, parts_of, strict=True) if p == part]


def held(matrix: Matrix, rank: int, ranks: int) -> tuple[int, int]:
    """The rows (first, end) of a matrix that a rank holds, by the rule of Shard(0): ceil(rows / ranks) each."""
    rows = matrix.parameter.shape[0]
    chunk = -(-rows // ranks)
    start, stop = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
    if matrix.index:  # a stack: the rank has the whole matrix or nothing of it
        return (0, shape_of(matrix)[0]) if start <= matrix.index[0] < stop else (0, 0)
    if matrix.part is None or matrix.part[0] == 1:
        return start, stop
    _, offset, length = matrix.part
    first, end = (min(max(row - offset, 0), length) for row in (start, stop))
    return first, end


def local_rows(matrix: Matrix, rank: int, ranks: int) -> Tensor:
    """This rank's rows of a matrix of a row-sharded parameter, (m_p, n); none where it holds none."""
    p = matrix.parameter
    assert is_sharded(p)
    local, start = p.to_local().detach(), rank * -(-p.shape[0] // ranks)
    first, end = held(matrix, rank, ranks)
    if matrix.index:
        return local[(matrix.index[0] - start, *matrix.index[1:])] if end else local.new_empty(0, p.shape[-1])
    if matrix.flatten:
        return local.flatten(1)
    if matrix.part is None:
        return local
    dim, offset, length = matrix.part
    if dim == 1:
        return local.narrow(1, offset, length)
    return local.narrow(0, offset + first - start if end > first else 0, end - first)


class RowShards:
    """Matrices whose rows the ranks of a group hold. All ranks make the same calls, in the same order.

    Args:
        matrices: of row-sharded parameters.
        group: the ranks.

    Attributes:
        owner: of each matrix, its rank in the group.
        sent_bytes: what this rank has sent to others so far.
    """

    def __init__(self, matrices: list[Matrix], group: "ProcessGroup"):
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.ranks = group.rank(), group.size()
        self.matrices = matrices
        self.shapes = [shape_of(m) for m in matrices]
        self.owner = assign([cost(shape) for shape in self.shapes], self.ranks)
        self.sent_bytes = 0
        self._triangles: dict[int, Tensor] = {}
        self._device = matrices[0].parameter.device if matrices else torch.device("cpu")
        ranges = [[held(m, p, self.ranks) for m in matrices] for p in range(self.ranks)]
        self._counts = [[end - first for first, end in own] for own in ranges]  # [rank][matrix]

    def mine(self, i: int) -> bool:
        """Whether this rank owns a matrix."""
        return self.owner[i] == self.rank

    def local(self, i: int) -> Tensor:
        """This rank's rows of a matrix."""
        return local_rows(self.matrices[i], self.rank, self.ranks)

    def agree(self, value):
        """The first rank's value, on every rank."""
        values = [value]
        self._dist.broadcast_object_list(values, group=self._group, group_src=0, device=self._device)
        return values[0]

    def spectra(self, indices: Sequence[int], method: str | Method = "auto", previous: Tensor | None = None) -> Spectra:
        """`sosd_fast.spectra.svdvals.spectra` of matrices of one shape and dtype, the same on every rank."""
        m, n = self.shapes[indices[0]]
        r, count = min(m, n), len(indices)
        found = torch.zeros(count, 2 * r + 2, dtype=torch.float64, device=self._device)  # S, bound, error, method

        def keep(j, S, bound, sd_error, name):
            found[j] = torch.cat([S, bound, sd_error[None], S.new_tensor([METHODS.index(name)])])

        def whole(positions, method):
            for at in self._chunks(positions, 4 * m * n // self.ranks):
                own = [j for j in at if self.mine(indices[j])]
                matrices = self._gather([indices[j] for j in at])
                if own:
                    before = None if previous is None else previous[own]
                    for j, *values in zip(own, *spectra(matrices, method, before), strict=True):
                        keep(j, *values)

        if m < n or method in (Method.EXACT, Method.BIDIAG64):
            whole(range(count), method)
            return self._told(found, r)
        given, on_host = self.matrices[indices[0]].parameter.dtype, self._device.type == "cpu"
        climbs = method == "auto" and on_host
        methods = choose(previous, count, given, on_host=on_host) if method == "auto" else [Method(method)] * count
        scale, finite = self._scales([self.local(i) for i in indices], given)

        def compute(plan: dict[Method, list[int]]) -> list[float]:
            nonlocal told
            for name, at in plan.items():
                found[at] = 0
                if name is Method.BIDIAG64:
                    whole(at, name)
                    continue
                dtype = name.dtype(given)
                for chunk in self._chunks(at, dtype.itemsize * n * (n + 1) // 2):
                    own, G, known = self._grams([indices[j] for j in chunk], scale[chunk], finite[chunk], dtype)
                    if own:
                        mine = [chunk[o] for o in own]
                        drift = correct(G, known, m)
                        S, drift = singular_values(library_eigenvalues(G), known, drift)
                        of = finished(S, name, m, kernels.Backend.TORCH, dtype, drift, scale[mine], finite[mine])
                        for j, S, bound, sd_error in zip(mine, *of, strict=True):
                            keep(j, S, bound, sd_error, name)
            told = self._told(found, r)
            return told.sd_error.tolist() if climbs else [0.0] * count

        told = None
        climb(compute, methods)
        assert told is not None
        return told

    def topk(self, indices: Sequence[int], k: int, states: Sequence[State | None]):
        """`topk_svdvals` of matrices of one shape and dtype.

        Returns:
            S (B, k), residual (B, k) and Frobenius norms (B,), the same on every rank, and the states for the next
            call, None where only the owner has one.
        """
        m, n = self.shapes[indices[0]]
        rows = [self.local(i) for i in indices]
        norms = self.sum(torch.stack([A.double().square().sum() for A in rows])).sqrt()
        if m >= n:
            dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
            operator = _RowOperator([A.to(dtype) for A in rows], self)
            state = stacked(states)
            with kernels.full_precision(self._device.type):
                S, residual, V, P = iterate(torch, operator, (len(rows),), n, k, min(k + 8, n), state)
            return S, residual, norms, [State(*each) for each in zip(V, P, strict=True)]
        found = torch.zeros(2, len(rows), k, dtype=torch.float64, device=self._device)
        kept: list[State | None] = [None] * len(rows)
        for at in self._chunks(range(len(rows)), 4 * m * n // self.ranks):
            own = [j for j in at if self.mine(indices[j])]
            matrices = self._gather([indices[j] for j in at])
            if own:
                S, residual, state = topk_svdvals(matrices, k, state=stacked([states[j] for j in own]))
                found[0, own], found[1, own] = S.double(), residual.double()
                for j, *each in zip(own, *state, strict=True):
                    kept[j] = State(*each)
        S, residual = self.sum(found)
        return S, residual, norms, kept

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        self._dist.all_reduce(values, group=self._group)
        self.sent_bytes += 2 * values.nbytes * (self.ranks - 1) // self.ranks  # a ring's
        return values

    def _told(self, found: Tensor, r: int) -> Spectra:
        told = self.sum(found.clone())
        names = tuple(METHODS[int(name)] for name in told[:, -1].tolist())
        return Spectra(told[:, :r], told[:, r : 2 * r], told[:, -2], names)

    def _chunks(self, positions, size: int) -> list[list[int]]:
        step = max(1, CHUNK_BYTES // max(size, 1))
        positions = list(positions)
        return [positions[i : i + step] for i in range(0, len(positions), step)]

    def _exchange(self, outgoing: list[Tensor], sizes: list[int]) -> list[Tensor]:
        self.sent_bytes += sum(part.nbytes for q, part in enumerate(outgoing) if q != self.rank)
        return _exchange(self._group, outgoing, sizes)

    def _gather(self, indices: Sequence[int]) -> list[Tensor]:
        """The whole matrices that this rank owns among those given."""
        n = self.shapes[indices[0]][1]
        rows = {i: self.local(i).reshape(-1) for i in indices}
        of = [[i for i in indices if self.owner[i] == q] for q in range(self.ranks)]
        empty = next(iter(rows.values()))[:0]
        outgoing = [torch.cat([empty, *(rows[i] for i in of[q])]) for q in range(self.ranks)]
        own = of[self.rank]
        counts = [[self._counts[p][i] * n for i in own] for p in range(self.ranks)]
        parts = self._exchange(outgoing, list(map(sum, counts)))
        pieces = [part.split(sizes) for part, sizes in zip(parts, counts, strict=True)] if own else []
        return [torch.cat([pieces[p][j] for p in range(self.ranks)]).view(-1, n) for j in range(len(own))]

    def _grams(self, indices, scale, finite, dtype) -> tuple[list[int], Tensor, Products]:
        """The Gram matrices (lower triangles) that this rank owns among those given, their positions and products."""
        n = self.shapes[indices[0]][1]
        if n not in self._triangles:
            self._triangles[n] = torch.tril_indices(n, n, device=self._device)
        triangle = tuple(self._triangles[n])
        size = n * (n + 1) // 2
        outgoing: list[list[Tensor]] = [[torch.empty(0, dtype=dtype, device=self._device)] for _ in range(self.ranks)]
        exact = torch.zeros(len(indices), n + min(n - 1, PAIRS), dtype=torch.float64, device=self._device)
        with kernels.full_precision(self._device.type):
            for j, i in enumerate(indices):
                if self._counts[self.rank][i]:
                    A = torch.where(finite[j], self.local(i).double() * scale[j], 0.0).to(dtype)
                    outgoing[self.owner[i]].append((A.mT @ A)[triangle])
                    exact[j] = torch.cat(Products.of(A.mT))
        own = [j for j, i in enumerate(indices) if self.mine(i)]
        held = [[j for j in own if self._counts[p][indices[j]]] for p in range(self.ranks)]
        parts = self._exchange([torch.cat(part) for part in outgoing], [size * len(js) for js in held])
        packed = torch.zeros(len(own), size, dtype=dtype, device=self._device)
        for part, js in zip(parts, held, strict=True):
            for position, piece in zip(js, part.view(-1, size), strict=True):
                packed[own.index(position)] += piece
        G = torch.zeros(len(own), n, n, dtype=dtype, device=self._device)
        G[:, triangle[0], triangle[1]] = packed
        return own, G, Products(*self.sum(exact)[own].split([n, exact.shape[1] - n], dim=1))

    def _scales(self, rows: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Powers of two that bring the matrices near 1, where they are not, and whether all entries are finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        largest = torch.stack([kernels.largest_entry(A)[0, 0].double() if A.numel() else zero for A in rows])
        largest = largest.nan_to_num(torch.inf, torch.inf)
        self._dist.all_reduce(largest, self._dist.ReduceOp.MAX, group=self._group)
        return kernels.scale_of(largest, torch.float64 if dtype == torch.float64 else torch.float32)


class _RowOperator:
    """Products with row-sharded matrices, as `sosd_fast.spectra.topk` takes them; of W V^T each rank has its rows."""

    def __init__(self, rows: list[Tensor], shards: RowShards):
        self.rows, self.shards = rows, shards
        self.scale, self.finite = shards._scales(rows, rows[0].dtype)
        self.plain = bool((self.finite & (self.scale == 1)).all())
        self.like = rows[0]

    def advance(self, V: Tensor, P: Tensor | None) -> None:  # noqa: ARG002
        """There is no fused step over ranks."""

    def unscaled(self, x: Tensor) -> Tensor:
        """Values of the scaled matrices, (B, b), as values of the matrices."""
        return x / self.scale[:, None].to(x.dtype)

    def rescale(self):
        """The scale is known from the start; what it does not mend remains."""

    def mul(self, V: Tensor) -> list[Tensor]:
        """This rank's columns of (W V^T)^T."""
        Y = [v @ A.mT for v, A in zip(V, self.rows, strict=True)]
        if self.plain:
            return Y
        scale = self.scale.to(V.dtype)
        return [torch.where(ok, y * s, 0.0) for y, s, ok in zip(Y, scale, self.finite, strict=True)]

    def tmul(self, Y: list[Tensor]) -> Tensor:
        """(W^T Y^T)^T, summed over the ranks."""
        Z = self.shards.sum(torch.stack([y @ A for y, A in zip(Y, self.rows, strict=True)]))
        if self.plain:
            return Z
        return torch.where(self.finite[:, None, None], Z * self.scale[:, None, None].to(Z.dtype), 0.0)

    def gram(self, Y: list[Tensor]) -> Tensor:
        """(W V^T)^T (W V^T), summed over the ranks."""
        return self.shards.sum(torch.stack([y @ y.mT for y in Y]))


def on_whole(rows: list[Tensor], like: "DTensor", function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Applies a function of whole matrices to row-sharded ones of one shape, each rank to its share of them.

    Args:
        rows: (m_p, n), this rank's rows of each. Not modified.
        like: a DTensor (m, n) that is sharded as they are.
        function: (B, m, n) -> (B, m, n), of any B.

    Returns:
        This rank's rows of the results.
    """
    m, n = like.shape
    group = like.device_mesh.get_group(next(d for d, each in enumerate(like.placements) if each.is_shard(0)))
    rank, ranks = group.rank(), group.size()
    ends = [min(p * -(-m // ranks), m) for p in range(ranks + 1)]
    counts = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    of = [rows[q::ranks] for q in range(ranks)]
    own = len(of[rank])
    empty = rows[0].reshape(-1)[:0]
    outgoing = [torch.cat([empty, *(each.reshape(-1) for each in share)]) for share in of]
    parts = _exchange(group, outgoing, [own * count * n for count in counts])
    whole = torch.cat([part.view(own, count, n) for part, count in zip(parts, counts, strict=True)], dim=1)
    done = (function(whole) if own else whole).split(counts, dim=1)
    parts = _exchange(group, [part.reshape(-1) for part in done], [len(share) * counts[rank] * n for share in of])
    result = list(rows)
    for q, part in enumerate(parts):
        result[q::ranks] = part.view(len(of[q]), counts[rank], n).unbind(0)
    return result


def _exchange(group: "ProcessGroup", outgoing: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Sends outgoing[q] to rank q and returns what came from each, of the sizes given."""
    import torch.distributed as dist

    flat = torch.cat(outgoing)
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [len(part) for part in outgoing], group=group)
    return list(received.split(sizes))
