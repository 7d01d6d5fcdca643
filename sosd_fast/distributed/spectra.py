"""Spectra of matrices that several ranks hold parts of, W (m, n), the same on every rank.

`sosd_fast.distributed.ways` says how each is brought together. Where its long side is split, upright, A = W or W^T:

    all values      A^T A = sum_p A_p^T A_p: each sender gives one triangle of its part to the owner, who sums them in
                    the order of ranks
    leading values  two sums over ranks, of (k + oversamples) min(m, n) entries and of its square

Else the blocks go to the owner, who measures the whole matrix, or, where that is less, the leading values take sums of
(k + oversamples) (m + n) entries. Owners then tell all ranks the spectra, so that every rank carries the same state and
takes the same decisions.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.distributed.blocks import CHUNK_BYTES, Blocks
from sosd_fast.distributed.layout import Block, Box, Spread
from sosd_fast.distributed.thin import BlockProducts
from sosd_fast.distributed.ways import Way, full_way, leading_way
from sosd_fast.matrices import Matrix
from sosd_fast.spectra import gram
from sosd_fast.spectra.norms import frobenius_norms
from sosd_fast.spectra.precision import Method, choose, climb
from sosd_fast.spectra.products import Products, State, cold_state, stacked
from sosd_fast.spectra.svdvals import Spectra, finished, spectra, triangle_eigenvalues
from sosd_fast.spectra.topk import iterate, subspace_step, topk_svdvals

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

METHODS = tuple(Method)


class Shards(Blocks):
    """The spectra of `Blocks`."""

    def __init__(
        self, matrices: list[Matrix], boxes: Sequence[Box | None], spreads: Sequence[Spread], group: "ProcessGroup"
    ):
        super().__init__(matrices, boxes, spreads, group)
        self._said = False  # that a matrix could not be measured
        self._full = [full_way(*each)[0] for each in zip(self.shapes, self.sizes, spreads, strict=True)]

    def _upright(self, i: int) -> Tensor:
        """`local` with the long side first; (0, r) where there is none."""
        m, n = self.shapes[i]
        A = self.local(i) if m >= n else self.local(i).mT
        return A if A.numel() else A.new_empty(0, min(m, n))

    def spectra(self, indices: Sequence[int], method: str | Method = "auto", previous: Tensor | None = None) -> Spectra:
        """`sosd_fast.spectra.svdvals.spectra` of matrices of one shape and dtype, the same on every rank."""
        r = min(self.shapes[indices[0]])
        found = torch.zeros(len(indices), 2 * r + 2, dtype=torch.float64, device=self._device)
        ways = [self._full[i] for i in indices]
        if method != "auto" and not Method(method).squares:
            ways = [Way.GATHER if way is Way.LONG else way for way in ways]
        by_products = [j for j, way in enumerate(ways) if way is Way.LONG]
        others = [j for j, way in enumerate(ways) if way is not Way.LONG]
        if others:
            self._of_whole([indices[j] for j in others], others, method, previous, found)
            self._tell(found, others, [self.owner[indices[j]] for j in others])
        if by_products:
            self._of_products(indices, by_products, method, previous, found)
        names = tuple(METHODS[int(name)] for name in found[:, -1].tolist())
        return Spectra(found[:, :r], found[:, r : 2 * r], found[:, -2], names)

    def _of_whole(self, indices: Sequence[int], rows: Sequence[int], method, previous: Tensor | None, found: Tensor):
        """Writes the spectra of the matrices that this rank owns among some into their rows of `found`."""
        r = min(self.shapes[indices[0]])
        nan = found.new_full((r,), torch.nan)
        missing = nan, nan, nan[0], Method.GRAM32 if method == "auto" else Method(method)
        for chunk in self.chunks(indices, self.moved):
            matrices = self.gather([indices[j] for j in chunk])
            own = [rows[j] for j in chunk if self.mine(indices[j])]
            if own:
                before = None if previous is None else previous[own]
                for row, values in zip(own, self._survivors(spectra, missing, matrices, method, before), strict=True):
                    _write(found, row, *values)

    def _of_products(self, indices: Sequence[int], rows: list[int], method, previous: Tensor | None, found: Tensor):
        """Writes the spectra of matrices whose Gram matrices are summed into their rows of `found`, on every rank."""
        of = [indices[row] for row in rows]
        shape, owners = self.shapes[of[0]], [self.owner[i] for i in of]
        inner, n = max(shape), min(shape)
        given, on_host = self.matrices[of[0]].parameter.dtype, self._device.type == "cpu"
        climbs = method == "auto" and on_host
        known = None if previous is None else previous[rows]
        methods = choose(known, len(of), given, on_host=on_host) if method == "auto" else [Method(method)] * len(of)
        scale, finite = self._scales([self.local(i) for i in of], given)

        def of_sums(T: Tensor, exact: Tensor, scale: Tensor, finite: Tensor, name: Method) -> tuple[Tensor, ...]:
            squares, drift = exact[:, :n], exact[:, n] / exact[:, :n].sum(-1)
            gram.set_diagonal(T, squares)
            S, drift = gram.singular_values(triangle_eigenvalues(T, n).double(), squares, drift)
            finite = finite & exact.isfinite().all(-1)  # NaN is what a rank that failed has sent
            return finished(S, name, inner, kernels.Backend.TORCH, name.dtype(given), drift, scale, finite)

        def compute(plan: dict[Method, list[int]]) -> list[float]:
            for name, at in plan.items():
                if name is Method.BIDIAG64:
                    self._of_whole([of[j] for j in at], [rows[j] for j in at], name, previous, found)
                    continue
                dtype = name.dtype(given)
                at_once = max(1, CHUNK_BYTES // (dtype.itemsize * n * (n + 1) // 2))  # that a sender sends
                for chunk in self.chunks([of[j] for j in at], lambda _, size=dtype.itemsize * n * n: size):
                    mine, parts = list[int](), list[tuple[Tensor, Tensor]]()
                    for first in range(0, len(chunk), at_once):
                        some = [at[c] for c in chunk[first : first + at_once]]
                        own, *sums = self._sums([of[j] for j in some], scale[some], dtype)
                        mine += [some[o] for o in own]
                        parts.append((sums[0], sums[1]))
                    if mine:
                        T, exact = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
                        missing = exact[0, :n] * torch.nan, exact[0, :n] * torch.nan, exact[0, 0] * torch.nan
                        results = self._survivors(of_sums, missing, T, exact, scale[mine], finite[mine], name)
                        for j, values in zip(mine, results, strict=True):
                            _write(found, rows[j], *values, name=name)
            self._tell(found, rows, owners)
            return found[rows, -2].tolist() if climbs else [0.0] * len(of)

        climb(compute, methods)

    def topk(self, indices: Sequence[int], k: int, states: Sequence[State | None]):
        """`topk_svdvals` of matrices of one shape and dtype.

        Returns:
            S (B, k), residual (B, k) and Frobenius norms (B,), NaN where a matrix is not finite, the same on every
            rank, and the states for the next call, None where only the owner has one.
        """
        shape = self.shapes[indices[0]]
        b = min(k + 8, *shape)
        itemsize = self.sizes[indices[0]]
        ways = [leading_way(shape, itemsize, self.spreads[i], b)[0] for i in indices]
        found = torch.zeros(len(indices), 2 * k + 1, dtype=torch.float64, device=self._device)
        kept: list[State | None] = [None] * len(indices)
        others = [j for j, way in enumerate(ways) if way in (Way.WHOLE, Way.GATHER)]
        missing = found.new_full((k,), torch.nan), found.new_full((k,), torch.nan), found.new_tensor(torch.nan), None
        for chunk in self.chunks([indices[j] for j in others], self.moved):
            at = [others[c] for c in chunk]
            matrices = self.gather([indices[j] for j in at])
            own = [j for j in at if self.mine(indices[j])]
            if own:
                state = stacked([states[j] for j in own])
                for j, values in zip(own, self._survivors(_leading, missing, matrices, k, state), strict=True):
                    *numbers, kept[j] = values
                    found[j] = torch.cat([each.reshape(-1) for each in numbers])
        if others:
            self._tell(found, others, [self.owner[indices[j]] for j in others])
        for way in (Way.LONG, Way.THIN):
            if at := [j for j, each in enumerate(ways) if each is way]:
                *numbers, after = self._by_products([indices[j] for j in at], k, [states[j] for j in at], way)
                found[at] = torch.cat([each.double().view(len(at), -1) for each in numbers], dim=1)
                for j, state in zip(at, after, strict=True):
                    kept[j] = state
        return found[:, :k], found[:, k : 2 * k], found[:, -1], kept

    def _by_products(self, indices: Sequence[int], k: int, states: Sequence[State | None], way: Way):
        """`topk` by thin products with each rank's blocks, which all ranks add up."""
        m, n = self.shapes[indices[0]]
        own = [self._upright(i) for i in indices]
        largest = self._largest(own)
        norms = self._norms(own, largest)
        if way is Way.LONG:
            products = Products(torch, [A[None] for A in own], largest, self.sum)
        else:
            blocks = [self.spreads[i].blocks[self.rank] for i in indices]
            blocks = [Block(*reversed(block)) if m < n else block for block in blocks]
            products = BlockProducts(own, blocks, (max(m, n), min(m, n)), largest, self.sum)
        dtype = torch.float64 if own[0].dtype == torch.float64 else torch.float32
        state, on_host = stacked(states), self._device.type == "cpu"
        start = state or cold_state(torch, len(own), min(k + 8, m, n), min(m, n), dtype, self._device)
        step = functools.partial(subspace_step, products)
        with kernels.full_precision(self._device.type):
            S, residual, V, P = iterate(step, *start, k, cold=state is None, look=on_host)
        return S, residual, norms, [State(*each) for each in zip(V, P, strict=True)]

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
                self._warn(error)
        return found

    def _warn(self, error: Exception):
        if not self._said:
            self._said = True
            kernels.log.warning(
                "sosd_fast: rank %d could not measure a matrix, which is recorded as NaN: %r. This is said once.",
                self.rank,
                error,
            )

    def _tell(self, found: Tensor, rows: Sequence[int], owners: Sequence[int]):
        """Gives all ranks the rows that each owner has."""
        held = [[row for row, owner in zip(rows, owners, strict=True) if owner == p] for p in range(self.ranks)]
        own, width = found[held[self.rank]], found.shape[1]
        parts = self.deliver([[own]] * self.ranks, [len(of) * width for of in held], found)
        for of, part in zip(held, parts, strict=True):
            found[of] = part.view(-1, width)

    def _sums(self, indices, scale, dtype) -> tuple[list[int], Tensor, Tensor]:
        """The positions of the matrices whose Gram matrices this rank owns, and what it is sent of these, added up.

        Returns:
            The positions, B; upper triangles (B, n (n + 1) / 2), row by row; and float64 (B, n + 1): the diagonals, and
            the traces times the drift that was taken out.
        """
        n = min(self.shapes[indices[0]])
        sending = [j for j, i in enumerate(indices) if self.rank in self.spreads[i].senders]
        sending.sort(key=lambda j: self.owner[indices[j]])
        to = [sum(self.owner[indices[j]] == p for j in sending) for p in range(self.ranks)]
        sent = tuple(
            torch.empty(len(sending), size, dtype=kind, device=self._device)
            for size, kind in ((n * (n + 1) // 2, dtype), (n + 1, torch.float64))
        )
        if sending:
            try:
                parts = [self._upright(indices[j]) for j in sending]
                sent[1][:, :n], drift = gram.triangles(parts, scale[sending], sent[0])
                sent[1][:, n] = drift.abs() * sent[1][:, :n].sum(-1)
            except Exception as error:  # the others wait for what this rank sends
                self._warn(error)
                for each in sent:
                    each.fill_(torch.nan)
        own = [j for j, i in enumerate(indices) if self.mine(i)]
        held = [[o for o, j in enumerate(own) if p in self.spreads[indices[j]].senders] for p in range(self.ranks)]
        sums = []
        for each in sent:
            size = each.shape[1]
            sums.append(total := each.new_zeros(len(own), size))
            received = self.exchange(each.view(-1), [count * size for count in to], [size * len(of) for of in held])
            for part, of in zip(received, held, strict=True):
                total[of if len(of) < len(own) else slice(None)] += part.view(-1, size)
        return own, sums[0], sums[1]

    def _norms(self, own: list[Tensor], largest: Tensor) -> Tensor:
        """Frobenius norms (B,), float64, from each rank's entries."""
        power = kernels.power_of_two(largest.where(largest > 0, 1.0))  # in float64 its inverse is normal
        squares = torch.stack([_norm(A, p).square() for A, p in zip(own, power, strict=True)])
        return torch.where(largest.isfinite(), self.sum(squares).sqrt() * power, torch.nan)

    def _largest(self, rows: list[Tensor]) -> Tensor:
        """The largest entry of each matrix (B,), float64; Inf where one is not finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        largest = torch.stack([kernels.largest_entry(A).double().view(()) if A.numel() else zero for A in rows])
        return self.maximum(largest.nan_to_num(torch.inf, torch.inf))

    def _scales(self, rows: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Powers of two that bring the matrices near 1, where they are not, and whether all entries are finite."""
        return kernels.scale_of(self._largest(rows), torch.float64 if dtype == torch.float64 else torch.float32)


def _write(found: Tensor, row: int, S: Tensor, bound: Tensor, sd_error: Tensor, name: Method):
    found[row] = torch.cat([S, bound, sd_error[None], S.new_tensor([METHODS.index(name)])])


def _norm(A: Tensor, power: Tensor) -> Tensor:
    """The Frobenius norm of A, a matrix of any size, over a power of two near its largest entry, float64."""
    if A.dtype == torch.float64:
        return torch.linalg.vector_norm(A / power)
    return torch.linalg.vector_norm(A, dtype=torch.float64) / power


def _leading(matrices: list[Tensor], k: int, state: State | None):
    norms = frobenius_norms(matrices)
    S, residual, state = topk_svdvals(matrices, k, state=state)
    return S.double(), residual.double(), norms, [State(*each) for each in zip(*state, strict=True)]
