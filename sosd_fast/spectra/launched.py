"""All singular values by the Triton kernels: matrices of one short side, of several shapes and precisions, at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import backend_of
from sosd_fast.kernels.drift import Products, correct, products
from sosd_fast.kernels.syrk import syrk
from sosd_fast.spectra.gram import gram_eigenvalues_all, singular_values
from sosd_fast.spectra.precision import Method, finished, unit_of

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
        found.append(_reduced(waiting, matrices[0].dtype))
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
    back, ordered = sorted(range(len(order)), key=order.__getitem__), order == sorted(order)
    if not ordered and S.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph would read the indices from the host's memory each time, long after others have it.
        S, bound, sd_error = (torch.stack([t[i] for i in back]) for t in (S, bound, sd_error))
    elif not ordered:
        at = torch.tensor(back, pin_memory=S.is_cuda, device="cpu")
        at = at.to(S.device, non_blocking=True)  # from other memory it would wait for the device
        S, bound, sd_error = (t.index_select(0, at) for t in (S, bound, sd_error))
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
    """Bytes of what is copied of a matrix: as it is, and in another `dtype`."""
    more = dtype.itemsize if torch.float64 in (dtype, W.dtype) and dtype != W.dtype else 0
    return (W.itemsize + more) * W.numel()


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
        if dtype == torch.float32 and W.dtype == torch.float64:
            W = W.float()
        scale = scale.clone()  # aligned, or kernels would be compiled for it once more
        known = products(W, scale)
        if dtype == torch.float32:
            G = syrk(W, scale=scale)
        else:
            W = W * scale[:, None, None]  # float64
            G = W @ W.mT  # `syrk` would copy one triangle to the other; either is as good
        parts.append(_Part(some, max(m, n), G, *known, scale, finite[own]))
    return parts


def _reduced(waiting: dict[Method, list[_Part]], given: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """S, bound and sd_error of all parts in their order. Both precisions share what takes long for few matrices, too.

    `given` is the dtype of the matrices.
    """
    every = [part for parts in waiting.values() for part in parts]
    dtypes = [method.dtype(given) for method, parts in waiting.items() for _ in parts]
    dtype = dtypes[0] if len(waiting) == 1 else _spread([unit_of(d) for d in dtypes], every)
    Gs, drifts, squares = [], [], []
    for parts in waiting.values():
        G, own, cross = map(_joined, zip(*[(part.G, part.squares, part.cross) for part in parts], strict=True))
        drifts.append(correct(G, Products(own, cross), _inner(parts)))
        Gs.append(G)
        squares.append(own)
    backend = backend_of("tridiagonal", Gs[0])
    drift, eigenvalues = _joined(drifts), _joined([values.double() for values in gram_eigenvalues_all(Gs)])
    S, drift = singular_values(eigenvalues / (1 + drift[:, None]), _joined(squares), drift)
    scale, finite = _joined([part.scale for part in every]), _joined([part.finite for part in every])
    return finished(S, next(iter(waiting)), _inner(every), backend, dtype, drift, scale, finite)


def _inner(parts: list[_Part]) -> int | Tensor:
    """The long side of the matrices, as of `sd_error`."""
    inners = [part.inner for part in parts]
    return _spread(inners, parts) if len(set(inners)) > 1 else inners[0]


def _spread(values: Sequence[float], parts: list[_Part]) -> Tensor:
    """One value of each part for all matrices of it, (B,) float64."""
    return torch.cat([part.scale.new_full(part.scale.shape, x) for x, part in zip(values, parts, strict=True)])
