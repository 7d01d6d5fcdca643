"""Spectra of matrices whose rows several ranks hold, W = [W_1; W_2; ...] (m, n), the same on every rank.

    m >= n   each rank sends its part W_p^T W_p of the Gram matrix, one triangle, to the matrix's owner, who sums them
             in the order of ranks; the leading values take two sums over ranks, of (k + oversamples) n and its square
    m < n    rows are the short side: they go to the owner, who measures the whole matrix

Owners then tell all ranks the spectra, so that every rank carries the same state and takes the same decisions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.distributed.exchange import Exchange
from sosd_fast.distributed.layout import assign, cost, local_rows, row_range, shape_of
from sosd_fast.matrices import Matrix
from sosd_fast.spectra.svdvals import SD_TOLERANCE, Spectra, _bounds, _sufficient, spectra
from sosd_fast.spectra.topk import State, iterate, stacked, topk_svdvals

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = ("gram32", "gram64", "direct64", "exact")
CHUNK_BYTES = 64 * 2**20  # sent at a time


class RowShards(Exchange):
    """Matrices whose rows the ranks of a group hold. All ranks make the same calls, in the same order.

    Args:
        matrices: of row-sharded parameters.
        group: the ranks.

    Attributes:
        shapes: (m, n) of each matrix.
        owner: of each matrix, its rank in the group.
    """

    def __init__(self, matrices: list[Matrix], group: "ProcessGroup"):
        super().__init__(group)
        self.matrices = matrices
        self.shapes = [shape_of(m) for m in matrices]
        self.owner = assign([cost(shape) for shape in self.shapes], self.ranks)
        self._triangles: dict[int, Tensor] = {}
        self._device = matrices[0].parameter.device if matrices else torch.device("cpu")
        ranges = [[row_range(m, p, self.ranks) for m in matrices] for p in range(self.ranks)]
        self._counts = [[end - first for first, end in own] for own in ranges]  # [rank][matrix]

    def mine(self, i: int) -> bool:
        """Whether this rank owns a matrix."""
        return self.owner[i] == self.rank

    def local(self, i: int) -> Tensor:
        """This rank's rows of a matrix."""
        return local_rows(self.matrices[i], self.rank, self.ranks)

    def broadcast_object(self, value):
        """The first rank's value, on every rank."""
        return super().broadcast_object(value, self._device)

    def spectra(self, indices: Sequence[int], method: str = "auto", previous: Tensor | None = None) -> Spectra:
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

        if m < n or method in ("exact", "direct64"):
            whole(range(count), method)
            return self._told(found, r)
        double = self.matrices[indices[0]].parameter.dtype == torch.float64
        lowest, on_host = "gram64" if double else "gram32", self._device.type == "cpu"
        names = [lowest if on_host else "gram64"] * count
        if previous is not None:
            names = _sufficient(previous, m, lowest)
        if method == "gram64":
            names = ["gram64"] * count
        scale, finite = self._scales([self.local(i) for i in indices])
        todo = list(range(count))
        while todo:
            for name in sorted({names[j] for j in todo}):
                at = [j for j in todo if names[j] == name]
                if name == "direct64":
                    whole(at, "direct64")
                    continue
                dtype = torch.float32 if name == "gram32" else torch.float64
                for chunk in self._chunks(at, dtype.itemsize * n * (n + 1) // 2):
                    own, G = self._grams([indices[j] for j in chunk], scale[chunk], finite[chunk], dtype)
                    if own:
                        S = torch.linalg.eigvalsh(G).flip(-1).double().clamp(min=0).sqrt()
                        bound, sd_error = _bounds(S, torch.finfo(dtype).eps, m, squared=True)
                        for j, *values in zip([chunk[o] for o in own], S, bound, sd_error, strict=True):
                            values = [torch.where(finite[j], v, torch.nan) for v in values]
                            keep(j, values[0] / scale[j], values[1] / scale[j], values[2], name)
            told = self._told(found, r)
            todo = [j for j in todo if on_host and told.sd_error[j] > SD_TOLERANCE and names[j] != "direct64"]
            names = [METHODS[METHODS.index(name) + 1] if j in todo else name for j, name in enumerate(names)]
            found[todo] = 0
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

    def _told(self, found: Tensor, r: int) -> Spectra:
        told = self.sum(found.clone())
        names = tuple(METHODS[int(name)] for name in told[:, -1].tolist())
        return Spectra(told[:, :r], told[:, r : 2 * r], told[:, -2], names)

    def _chunks(self, positions, size: int) -> list[list[int]]:
        step = max(1, CHUNK_BYTES // max(size, 1))
        positions = list(positions)
        return [positions[i : i + step] for i in range(0, len(positions), step)]

    def _gather(self, indices: Sequence[int]) -> list[Tensor]:
        """The whole matrices that this rank owns among those given."""
        n = self.shapes[indices[0]][1]
        rows = {i: self.local(i).reshape(-1) for i in indices}
        of = [[i for i in indices if self.owner[i] == q] for q in range(self.ranks)]
        empty = next(iter(rows.values()))[:0]
        outgoing = [torch.cat([empty, *(rows[i] for i in of[q])]) for q in range(self.ranks)]
        own = of[self.rank]
        counts = [[self._counts[p][i] * n for i in own] for p in range(self.ranks)]
        parts = self.all_to_all(outgoing, list(map(sum, counts)))
        pieces = [part.split(sizes) for part, sizes in zip(parts, counts, strict=True)] if own else []
        return [torch.cat([pieces[p][j] for p in range(self.ranks)]).view(-1, n) for j in range(len(own))]

    def _grams(self, indices, scale, finite, dtype) -> tuple[list[int], Tensor]:
        """The Gram matrices (lower triangles) that this rank owns among those given, and their positions."""
        n = self.shapes[indices[0]][1]
        if n not in self._triangles:
            self._triangles[n] = torch.tril_indices(n, n, device=self._device)
        triangle = tuple(self._triangles[n])
        size = n * (n + 1) // 2
        outgoing: list[list[Tensor]] = [[torch.empty(0, dtype=dtype, device=self._device)] for _ in range(self.ranks)]
        with kernels.full_precision(self._device.type):
            for j, i in enumerate(indices):
                if self._counts[self.rank][i]:
                    A = torch.where(finite[j], self.local(i).to(dtype) * scale[j].to(dtype), 0.0)
                    outgoing[self.owner[i]].append((A.mT @ A)[triangle])
        own = [j for j, i in enumerate(indices) if self.mine(i)]
        held = [[j for j in own if self._counts[p][indices[j]]] for p in range(self.ranks)]
        parts = self.all_to_all([torch.cat(part) for part in outgoing], [size * len(js) for js in held])
        packed = torch.zeros(len(own), size, dtype=dtype, device=self._device)
        for part, js in zip(parts, held, strict=True):
            for position, piece in zip(js, part.view(-1, size), strict=True):
                packed[own.index(position)] += piece
        G = torch.zeros(len(own), n, n, dtype=dtype, device=self._device)
        G[:, triangle[0], triangle[1]] = packed
        return own, G

    def _scales(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Powers of two that bring the matrices near 1, where they are not, and whether all entries are finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        largest = torch.stack([torch.linalg.vector_norm(A, torch.inf).double() if A.numel() else zero for A in rows])
        largest = largest.nan_to_num(torch.inf, torch.inf)
        finite = torch.isfinite(self.maximum(largest))
        tame = (largest > 2.0**-30) & (largest < 2.0**30)
        # Beyond 2^-126 a float32 power has no inverse.
        exponent = torch.frexp(torch.where(finite & (largest > 0), largest, 1.0)).exponent.clamp(-126, 126)
        return torch.where(tame, 1.0, torch.ldexp(torch.ones_like(largest), -exponent)), finite


class _RowOperator:
    """Products with row-sharded matrices, as `sosd_fast.spectra.topk` takes them; of W V^T each rank has its rows."""

    def __init__(self, rows: list[Tensor], shards: RowShards):
        self.rows, self.shards = rows, shards
        self.scale, self.finite = shards._scales(rows)
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
