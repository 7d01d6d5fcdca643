"""All singular values by the Triton kernels: matrices of one short side, of several shapes and precisions, at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import backend_of
from sosd_fast.kernels.syrk import syrk
from sosd_fast.spectra.gram import PAIRS, Products, correct, gram_eigenvalues_all, singular_values
from sosd_fast.spectra.precision import Method, finished

CHUNK_BYTES = 2**30  # of copies of weights and of Gram matrices at a time


def launched(matrices: Sequence[Tensor], methods: list[Method]) -> tuple[Tensor, Tensor, Tensor]:
    """S, bound and sd_error of matrices, each by its method, as of `spectra`; queues work and waits for none of it.

    The matrices need only have their short side in common: those of a model go through the reduction together.
    """
    order: list[int] = []
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    waiting: dict[Method, list[_Part]] = {}  # for a reduction
    size = 0

    def reduce():
        order.extend(i for parts in waiting.values() for part in parts for i in part.at)
        found.extend(_reduced(waiting, matrices[0].dtype))
        waiting.clear()

    for method in sorted(set(methods)):
        at, dtype = [i for i, other in enumerate(methods) if other == method], method.dtype(matrices[0].dtype)
        for some in _chunks(at, [_copied(W, dtype) for W in matrices]):
            more = dtype.itemsize * len(some) * min(matrices[some[0]].shape) ** 2
            if waiting and size + more > CHUNK_BYTES:
                reduce()
                size = 0
            waiting.setdefault(method, []).extend(_grams(matrices, some, method))
            size += more
    reduce()
    S, bound, sd_error = map(_joined, zip(*found, strict=True))
    if order != sorted(order):
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), pin_memory=S.is_cuda, device="cpu")
        back = back.to(S.device, non_blocking=True)  # from other memory it would wait for the device
        S, bound, sd_error = (t.index_select(0, back) for t in (S, bound, sd_error))
    return S, bound, sd_error


def _chunks(at: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Indices in their order, as many at a time as take CHUNK_BYTES, or one."""
    chunk, size = [], 0
    for i in at:
        if chunk and size + sizes[i] > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += sizes[i]
    yield chunk


def _copied(W: Tensor, dtype: torch.dtype) -> int:
    """Bytes of what is copied of a matrix: as it is, in another `dtype`, and the rows that `Products` multiplies."""
    short, long = sorted(W.shape)
    more = dtype.itemsize * short if torch.float64 in (dtype, W.dtype) and dtype != W.dtype else 0
    return (W.itemsize * short + more + 8 * min(short, PAIRS + 1)) * long


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, without a copy of one that is alone."""
    return torch.cat([*parts]) if len(parts) > 1 else parts[0]


class _Part(NamedTuple):
    """Matrices of one shape, by their indices, and what is known of them before their reduction."""

    at: list[int]
    inner: int
    G: Tensor
    squares: Tensor
    cross: Tensor
    scale: Tensor
    finite: Tensor


def _grams(matrices: Sequence[Tensor], at: list[int], method: Method) -> list[_Part]:
    """Gram matrices of some of the matrices, by shapes."""
    shapes: dict[torch.Size, list[int]] = {}
    for i in at:
        shapes.setdefault(matrices[i].shape, []).append(i)
    every = [matrices[i].detach() for some in shapes.values() for i in some]
    dtype = method.dtype(every[0].dtype)
    scales, finite = kernels.scale_of(torch.stack(torch._foreach_norm(every, torch.inf)), dtype)
    if every[0].dtype == torch.float16:  # its squares stay in range, and scaling could round its small values
        scales = torch.ones_like(scales)
    parts, first = [], 0
    for (m, n), some in shapes.items():
        own = slice(first, first + len(some))
        first, scale = own.stop, scales[own]
        W = torch.stack(every[own])  # (B, m, n)
        W = W if m <= n else W.mT
        if dtype == torch.float32:
            W = W.float() if W.dtype == torch.float64 else W
            G = syrk(W, scale=scale.clone())  # aligned, or the kernel would be compiled for it once more
        else:
            W = W * scale[:, None, None]  # float64
            G = W @ W.mT  # `syrk` would copy one triangle to the other; either is as good
        parts.append(_Part(some, max(m, n), G, *Products.of(W), scale, finite[own]))
    return parts


def _reduced(waiting: dict[Method, list[_Part]], given: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """S, bound and sd_error by each method, part by part, from one reduction: two take nearly twice as long.

    `given` is the dtype of the matrices.
    """
    whole = []
    for method, parts in waiting.items():
        _, inners, *columns = zip(*parts, strict=True)
        G, squares, cross, scale, finite = map(_joined, columns)
        inner: int | Tensor = inners[0]
        if len(set(inners)) > 1:
            inner = torch.cat([part.scale.new_full(part.scale.shape, part.inner) for part in parts])
        dtype, known = method.dtype(given), Products(squares, cross)
        if dtype == torch.float32:
            known = Products(*(t * scale[:, None].square() for t in known))
        whole.append((method, inner, dtype, G, known, correct(G, known, inner), scale, finite))
    found = []
    eigenvalues = gram_eigenvalues_all([G for _, _, _, G, *_ in whole])
    for (method, inner, dtype, G, known, drift, scale, finite), values in zip(whole, eigenvalues, strict=True):
        S, drift = singular_values(values.double() / (1 + drift[:, None]), known.squares, drift)
        found.append(finished(S, method, inner, backend_of("tridiagonal", G), dtype, drift, scale, finite))
    return found
