"""Spectra of matrices whose rows several ranks hold, W = [W_1; W_2; ...] (m, n), the same on every rank.

    m >= n   each rank sends its part W_p^T W_p of the Gram matrix, one triangle, to the matrix's owner, who sums them
             in the order of ranks; the leading values take two sums over ranks, of (k + oversamples) n and its square
    m < n    rows are the short side: they go to the owner, who measures the whole matrix

Owners then tell all ranks the spectra, so that every rank carries the same state and takes the same decisions.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.distributed.exchange import Exchange
from sosd_fast.distributed.layout import assign, cost, shape_of
from sosd_fast.distributed.share import local_rows, row_range
from sosd_fast.matrices import Matrix
from sosd_fast.spectra import gram
from sosd_fast.spectra.precision import Method, choose, climb
from sosd_fast.spectra.products import Products, State, cold_state, stacked
from sosd_fast.spectra.svdvals import Spectra, finished, library_eigenvalues, spectra
from sosd_fast.spectra.topk import iterate, subspace_step, topk_svdvals

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = tuple(Method)
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
        super().__init__(group, matrices[0].parameter.device if matrices else torch.device("cpu"))
        self.matrices = matrices
        self.shapes = [shape_of(m) for m in matrices]
        self.owner = assign([cost(shape) for shape in self.shapes], self.ranks)
        self._triangles: dict[int, Tensor] = {}
        self._said = False  # that a matrix could not be measured
        ranges = [[row_range(m, p, self.ranks) for m in matrices] for p in range(self.ranks)]
        self._counts = [[end - first for first, end in own] for own in ranges]  # [rank][matrix]

    def mine(self, i: int) -> bool:
        """Whether this rank owns a matrix."""
        return self.owner[i] == self.rank

    def local(self, i: int) -> Tensor:
        """This rank's rows of a matrix."""
        return local_rows(self.matrices[i], self.rank, self.ranks)

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
                    nan = found.new_full((r,), torch.nan)
                    missing = nan, nan, nan[0], Method.GRAM32 if method == "auto" else Method(method)
                    for j, values in zip(own, self._survivors(spectra, missing, matrices, method, before), strict=True):
                        keep(j, *values)

        if m < n or method in (Method.EXACT, Method.BIDIAG64):
            whole(range(count), method)
            return self._told(found, r)
        given, on_host = self.matrices[indices[0]].parameter.dtype, self._device.type == "cpu"
        climbs = method == "auto" and on_host
        methods = choose(previous, count, given, on_host=on_host) if method == "auto" else [Method(method)] * count
        scale, finite = self._scales([self.local(i) for i in indices], given)

        def of_grams(G: Tensor, exact: Tensor, scale: Tensor, finite: Tensor, name: Method) -> tuple[Tensor, ...]:
            dtype, known = name.dtype(given), gram.Products(*exact.split([n, exact.shape[1] - n], dim=1))
            drift = gram.correct(G, known, m)
            S, drift = gram.singular_values(library_eigenvalues(G), known, drift)
            return finished(S, name, m, kernels.Backend.TORCH, dtype, drift, scale, finite)

        def compute(plan: dict[Method, list[int]]) -> list[float]:
            nonlocal told
            for name, at in plan.items():
                found[at] = 0
                if name is Method.BIDIAG64:
                    whole(at, name)
                    continue
                dtype = name.dtype(given)
                for chunk in self._chunks(at, dtype.itemsize * n * (n + 1) // 2):
                    own, G, exact = self._grams([indices[j] for j in chunk], scale[chunk], finite[chunk], dtype)
                    if own:
                        mine = [chunk[o] for o in own]
                        missing = exact[0, :r] * torch.nan, exact[0, :r] * torch.nan, exact[0, 0] * torch.nan
                        of = self._survivors(of_grams, missing, G, exact, scale[mine], finite[mine], name)
                        for j, values in zip(mine, of, strict=True):
                            keep(j, *values, name=name)
            told = self._told(found, r)
            return told.sd_error.tolist() if climbs else [0.0] * count

        told = None
        climb(compute, methods)
        assert told is not None
        return told

    def topk(self, indices: Sequence[int], k: int, states: Sequence[State | None]):
        """`topk_svdvals` of matrices of one shape and dtype.

        Returns:
            S (B, k), residual (B, k) and Frobenius norms (B,), NaN where a matrix is not finite, the same on every
            rank, and the states for the next call, None where only the owner has one.
        """
        m, n = self.shapes[indices[0]]
        count, rows = len(indices), [self.local(i) for i in indices]
        dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
        largest = self._largest(rows)
        power = kernels.power_of_two(largest.where(largest > 0, 1.0))  # in float64 its inverse is normal
        squares = torch.stack([(A.double() / p).square().sum() for A, p in zip(rows, power, strict=True)])
        norms = torch.where(largest.isfinite(), self.sum(squares).sqrt() * power, torch.nan)
        if m >= n:
            products = Products(torch, [A[None] for A in rows], largest, self.sum)
            state, b = stacked(states), min(k + 8, n)
            start = state or cold_state(torch, count, b, n, dtype, self._device)
            step = functools.partial(subspace_step, products)
            with kernels.full_precision(self._device.type):
                on_host = self._device.type == "cpu"
                S, residual, V, P = iterate(step, *start, k, cold=state is None, look=on_host)
            return S, residual, norms, [State(*each) for each in zip(V, P, strict=True)]
        found = torch.zeros(2, count, k, dtype=torch.float64, device=self._device)
        kept: list[State | None] = [None] * count
        for at in self._chunks(range(count), 4 * m * n // self.ranks):
            own = [j for j in at if self.mine(indices[j])]
            matrices = self._gather([indices[j] for j in at])
            if own:
                missing = found[0, 0] * torch.nan, found[0, 0] * torch.nan, None
                state = stacked([states[j] for j in own])
                for j, each in zip(own, self._survivors(_leading, missing, matrices, k, state), strict=True):
                    found[0, j], found[1, j], kept[j] = each
        S, residual = self.sum(found)
        return S, residual, norms, kept

    def _survivors(self, function: Callable, missing: tuple, batch, *arguments) -> list[tuple]:
        """The results of a function for each matrix of a batch, `missing` for those for which it raises.

        The other ranks wait for this one at the next collective: an exception must not keep it from there.

        Args:
            function: returns a tuple of sequences over the batch.
            missing: the results for a matrix for which it raises.
            batch: its first argument, which can be sliced.
            arguments: the others; a tensor or a `State` belongs to the batch and is sliced with it.
        """

        def results(at: slice) -> list[tuple]:
            parts = []
            for value in arguments:
                if isinstance(value, State):
                    value = State(*(part[at] for part in value))
                parts.append(value[at] if isinstance(value, Tensor) else value)
            return list(zip(*function(batch[at], *parts), strict=True))

        with contextlib.suppress(Exception):
            return results(slice(None))
        found = []
        for i in range(len(batch)):
            try:
                found += results(slice(i, i + 1))
            except Exception as error:
                found.append(missing)
                if not self._said:
                    self._said = True
                    kernels.log.warning(
                        "sosd_fast: rank %d could not measure a row-sharded matrix, which is recorded as NaN: %r. "
                        "This is said once.", self.rank, error,
                    )  # fmt: skip
        return found

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

    def _grams(self, indices, scale, finite, dtype) -> tuple[list[int], Tensor, Tensor]:
        """The positions of the Gram matrices that this rank owns, their lower triangles, and their exact products."""
        n = self.shapes[indices[0]][1]
        if n not in self._triangles:
            self._triangles[n] = torch.tril_indices(n, n, device=self._device)
        triangle = tuple(self._triangles[n])
        size = n * (n + 1) // 2
        outgoing: list[list[Tensor]] = [[torch.empty(0, dtype=dtype, device=self._device)] for _ in range(self.ranks)]
        exact = torch.zeros(len(indices), n + min(n - 1, gram.PAIRS), dtype=torch.float64, device=self._device)
        with kernels.full_precision(self._device.type):
            for j, i in enumerate(indices):
                if self._counts[self.rank][i]:
                    A = torch.where(finite[j], self.local(i).double() * scale[j], 0.0).to(dtype)
                    outgoing[self.owner[i]].append((A.mT @ A)[triangle])
                    exact[j] = torch.cat(gram.Products.of(A.mT))
        own = [j for j, i in enumerate(indices) if self.mine(i)]
        held = [[j for j in own if self._counts[p][indices[j]]] for p in range(self.ranks)]
        parts = self.all_to_all([torch.cat(part) for part in outgoing], [size * len(js) for js in held])
        packed = torch.zeros(len(own), size, dtype=dtype, device=self._device)
        for part, js in zip(parts, held, strict=True):
            for position, piece in zip(js, part.view(-1, size), strict=True):
                packed[own.index(position)] += piece
        G = torch.zeros(len(own), n, n, dtype=dtype, device=self._device)
        G[:, triangle[0], triangle[1]] = packed
        return own, G, self.sum(exact)[own]

    def _largest(self, rows: list[Tensor]) -> Tensor:
        """The largest entry of each matrix (B,), float64; Inf where one is not finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        largest = torch.stack([torch.linalg.vector_norm(A, torch.inf).double() if A.numel() else zero for A in rows])
        return self.maximum(largest.nan_to_num(torch.inf, torch.inf))

    def _scales(self, rows: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Powers of two that bring the matrices near 1, where they are not, and whether all entries are finite."""
        return kernels.scale_of(self._largest(rows), torch.float64 if dtype == torch.float64 else torch.float32)


def _leading(matrices: list[Tensor], k: int, state: State | None):
    S, residual, state = topk_svdvals(matrices, k, state=state)
    return S.double(), residual.double(), [State(*each) for each in zip(*state, strict=True)]
