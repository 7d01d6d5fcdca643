r"""All singular values of a matrix, by the Gram matrix of its short side.

    G = W W^T (r x r)  ->  T = Q^T G Q tridiagonal  ->  lambda by bisection  ->  sigma = sqrt(max(lambda, 0))

Squaring costs accuracy in the small values, so the precision is chosen per matrix: float32 stands when the predicted
error of its singular distribution is well below `SD_TOLERANCE`, otherwise the matrix is redone in float64, and where
that is not enough either (a matrix of deficient rank) directly from W, without the Gram matrix, in float64.

CPU tensors take the C++ kernels (kernels/cpu), CUDA tensors the Triton ones, all on the current stream and without
waiting for the device; torch's operations stand in where either is missing. On CUDA nothing is redone, for that would
wait: the precision follows from an earlier spectrum, and the third step is left to method="exact".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels.eigh import library
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.syrk import syrk
from sosd_fast.kernels.tridiagonal import tridiagonal

METHODS = ("auto", "gram32", "gram64", "exact")
SD_TOLERANCE = 1e-6  # on |SD - SD_true|_2; published variations settle near 1e-5

LARGEST_REDUCED = 2048  # sides of Gram matrices that the Triton kernels take; beyond, cuSOLVER is faster
CHUNK_BYTES = 2**30  # of copies of weights and of Gram matrices at a time

_LADDER = ("gram32", "gram64", "direct64")
_PRECISIONS = {"gram32": 0, "gram64": 1, "auto": 2, "direct64": 3}


class Spectra(NamedTuple):
    """Spectra of a list of B matrices of one shape (m, n), r = min(m, n)."""

    S: Tensor  # (B, r) float64, descending
    bound: Tensor  # (B, r) float64, |S - S_true| is at most this
    sd_error: Tensor  # (B,) float64, |SD - SD_true|_2 is at most this
    methods: tuple[str, ...]  # of each matrix: gram32, gram64, direct64 (float64, without the Gram matrix) or exact


def svdvals(W: Tensor, *, method: str = "auto", return_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Computes all singular values of a matrix or a batch of matrices.

    Args:
        W: (..., m, n), float64, float32, bfloat16 or float16, any strides. Not modified.
        method: "auto" (the cheapest precision that meets the bound), "gram32", "gram64", or "exact"
            (`torch.linalg.svdvals` in the dtype of W, at least float32).
        return_bound: also return an upper bound on the error of each value.

    Returns:
        S, (..., min(m, n)), descending; float64 for float64 input, else float32. With `return_bound` the pair
        (S, bound), both of that shape. A matrix that holds NaN or Inf gives NaN, and leaves the others as they are.

    Accuracy:
        "auto": |SD - SD_true|_2 <= 1e-6 for SD = S / sum(S); on CUDA 2e-6 for deficient rank. "gram32", "gram64": with
        d = c * eps * S[0]**2, a value s errs by at most d / (s + sqrt(max(s**2 - d, 0))), so values below about
        sqrt(eps) * S[0] are lost; "exact": c * eps * S[0]. In units of eps / 2 and with K = max(m, n),
        c = 32 + max(2 sqrt(r), r / 12) + sqrt(K) / 8 for the C++ kernels and 32 + 16 sqrt(r) for torch's operations.
        Both were calibrated against float64 (LOG.md) and are tested to hold; they are not proofs.

    Raises:
        ValueError: fewer than two dimensions, an integer or complex dtype, an empty matrix, an unknown method.

    Source: Weyl's inequality; Golub & Van Loan, Matrix Computations, 8.6.
    """
    check_matrix("svdvals", W)
    if method not in METHODS:
        raise ValueError(
            f"svdvals: expected one of {', '.join(METHODS)}, got method={method!r}. Use 'auto' unless comparing."
        )
    *batch, m, n = W.shape
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    matrices = W.detach().reshape(-1, m, n).unbind(0)
    if not matrices:
        empty = torch.empty(*batch, min(m, n), dtype=dtype, device=W.device)
        return (empty, empty.clone()) if return_bound else empty
    found = spectra(matrices, method)
    S = found.S.to(dtype).reshape(*batch, -1)
    if not return_bound:
        return S
    rounding = torch.finfo(dtype).eps / 2 * found.S  # of the conversion to dtype
    return S, (found.bound + rounding).to(dtype).reshape(S.shape)


def spectra(matrices: Sequence[Tensor], method: str = "auto", previous: Tensor | None = None) -> Spectra:
    """Computes the spectra of B matrices of one shape, dtype and device, read in place.

    Args:
        matrices: B tensors (m, n), on CUDA of any shapes with one short side. Not modified.
        method: as in `svdvals`.
        previous: (B, r) float64, spectra of the same matrices a little earlier. They tell which precision to start
            from. For CUDA matrices pass them on the CPU: reading them from the device would wait for it.

    Returns:
        A `Spectra`, on the device of the matrices. With "auto" on CUDA nothing is redone, for that would wait for the
        device: the precision is the one that `previous` asks for, float64 without it.
    """
    if matrices[0].device.type == "cpu" and method != "exact" and not kernels.interpreted:
        if kernels._C is not None:
            return _compiled(matrices, method, previous)
        kernels.warn_no_extension()
    m, n = matrices[0].shape
    count, r, device = len(matrices), min(m, n), matrices[0].device
    methods = [method] * count
    launched = method != "exact" and kernels.on_triton(matrices[0])
    if method == "auto":
        lowest = "gram64" if matrices[0].dtype == torch.float64 else "gram32"
        methods = ["gram64" if launched or device.type != "cpu" else lowest] * count
        if previous is not None:
            methods = _sufficient(previous, max(map(max, (W.shape for W in matrices))), lowest)
    if launched:
        return _launched(matrices, ["gram64" if name == "direct64" else name for name in methods])
    S = torch.empty(count, r, dtype=torch.float64, device=device)
    bound, sd_error = torch.empty_like(S), torch.empty_like(S[:, 0])
    todo = range(count)
    while todo:
        for name in sorted({methods[i] for i in todo}):
            at = [i for i in todo if methods[i] == name]
            S[at], bound[at], sd_error[at] = _spectra([matrices[i] for i in at], name)
        todo = []
        if method == "auto" and device.type == "cpu":
            errors = sd_error.tolist()
            todo = [i for i in range(count) if errors[i] > SD_TOLERANCE and methods[i] != _LADDER[-1]]
            methods = [_LADDER[_LADDER.index(name) + 1] if i in todo else name for i, name in enumerate(methods)]
    return Spectra(S, bound, sd_error, tuple(methods))


def _compiled(matrices: Sequence[Tensor], method: str, previous: Tensor | None) -> Spectra:
    """`spectra` by the C++ kernels."""
    m, n = matrices[0].shape
    S = torch.empty(len(matrices), min(m, n), dtype=torch.float64, device="cpu")
    bound = torch.empty_like(S)
    found = kernels._C.svdvals(
        matrices=matrices,
        precision=_PRECISIONS[method],
        previous=None if previous is None else previous.to(torch.float64).contiguous(),
        S=S,
        bound=bound,
        threads=torch.get_num_threads(),
    )
    names = list(_PRECISIONS)
    methods = tuple(next(name for name in names if _PRECISIONS[name] == used) for used, _ in found)
    # The prediction is a root mean square, exceeded by up to 2.2 times; an error common to all values, which it leaves
    # out, was at most 2 units of |SD| (LOG.md).
    host = {"dtype": torch.float64, "device": "cpu"}  # whatever torch.set_default_device says
    eps = torch.tensor([2.0**-24 if name == "gram32" else 2.0**-53 for name in methods], **host)
    predicted = torch.tensor([error for _, error in found], **host)
    sd_error = 3 * predicted + 4 * eps * S.norm(dim=-1) / S.sum(-1)
    direct = torch.tensor([name == "direct64" for name in methods], device="cpu")
    if direct.any():
        sd_error[direct] = _bounds(S[direct], 2.0**-52, max(m, n), squared=False)[1]
    return Spectra(S, bound, sd_error, methods)


def _launched(matrices: Sequence[Tensor], methods: list[str]) -> Spectra:
    """`spectra` by the Triton kernels, each matrix by its method; queues work and waits for none of it.

    The matrices need only have their short side in common: those of a model go through the reduction together.
    """
    rows: dict[int, tuple[Tensor, ...]] = {}
    for name in sorted(set(methods)):
        dtype = torch.float32 if name == "gram32" else torch.float64
        chunk, size = [], 0
        for i in (i for i, other in enumerate(methods) if other == name):
            m, n = matrices[i].shape
            size += dtype.itemsize * (m * n + min(m, n) ** 2)
            if chunk and size > CHUNK_BYTES:
                rows |= _launched_alike(matrices, chunk, dtype)
                chunk, size = [], dtype.itemsize * (m * n + min(m, n) ** 2)
            chunk.append(i)
        rows |= _launched_alike(matrices, chunk, dtype)
    S, bound, sd_error = (torch.stack(column) for column in zip(*(rows[i] for i in sorted(rows)), strict=True))
    return Spectra(S, bound, sd_error, tuple(methods))


def _launched_alike(matrices: Sequence[Tensor], at: list[int], dtype: torch.dtype) -> dict[int, tuple[Tensor, ...]]:
    """The rows of the `Spectra` of some of the matrices, by their index."""
    shapes: dict[torch.Size, list[int]] = {}
    for i in at:
        shapes.setdefault(matrices[i].shape, []).append(i)
    grams, scales = [], []
    for (m, n), some in shapes.items():
        given = [matrices[i].detach() for i in some]
        finite, scale = _scales(torch.stack(torch._foreach_norm(given, torch.inf)), dtype)
        W = torch.stack(given)  # (B, m, n)
        W = W if m <= n else W.mT
        if W.dtype == torch.float16:  # its squares stay in range, and scaling could round its small values
            scale = torch.ones_like(scale)
        if dtype == torch.float32:
            grams.append(syrk(W.float() if W.dtype == torch.float64 else W, scale=scale))
        else:
            grams.append(syrk(W.double() * scale[:, None, None]))
        scales.append((finite, scale))
    S = _eigenvalues(torch.cat(grams) if len(grams) > 1 else grams.pop()).flip(-1).double().clamp(min=0).sqrt()
    rows: dict[int, tuple[Tensor, ...]] = {}
    values = S.split([len(some) for some in shapes.values()])
    for (shape, some), part, (finite, scale) in zip(shapes.items(), values, scales, strict=True):
        found = _unscaled(part, torch.finfo(dtype).eps, max(shape), True, finite, scale)
        rows |= dict(zip(some, zip(*(t.unbind(0) for t in found), strict=True), strict=True))
    return rows


def _eigenvalues(G: Tensor) -> Tensor:
    """Eigenvalues of Gram matrices (B, r, r), ascending. G is used up."""
    if G.shape[-1] <= LARGEST_REDUCED and kernels.on_triton(G):
        return sturm(*tridiagonal(G, overwrite=True))
    return library("eigvalsh", G)


def _sufficient(previous: Tensor, inner: int, lowest: str) -> list[str]:
    """The cheapest methods that would have met the tolerance on earlier spectra."""
    errors = {}
    for name, dtype in (("gram32", torch.float32), ("gram64", torch.float64)):
        errors[name] = _bounds(previous, torch.finfo(dtype).eps, inner, squared=True)[1].tolist()
    ladder = _LADDER[_LADDER.index(lowest) :]
    return [
        next((name for name in ladder[:-1] if errors[name][i] <= SD_TOLERANCE), ladder[-1])
        for i in range(len(previous))
    ]


def check_matrix(function: str, W):
    """Raises ValueError unless W is a floating-point tensor of non-empty matrices."""
    if not isinstance(W, Tensor):
        raise ValueError(
            f"{function}: expected a tensor, got W={type(W).__name__}. Convert it with torch.as_tensor(W)."
        )
    if W.ndim < 2:
        raise ValueError(
            f"{function}: expected a matrix (..., m, n), got W.shape={tuple(W.shape)}. "
            "A vector has no spectrum; reshape it if it holds a matrix."
        )
    if not W.is_floating_point() or W.dtype.itemsize < 2:
        raise ValueError(
            f"{function}: expected float64, float32, bfloat16 or float16, got W.dtype={W.dtype}. "
            "Convert it with .float()."
        )
    if 0 in W.shape[-2:]:
        raise ValueError(
            f"{function}: expected at least one row and one column, got W.shape={tuple(W.shape)}. "
            "Leave empty matrices out."
        )


def _spectra(matrices: Sequence[Tensor], method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one method; see `Spectra` for what it returns."""
    given = matrices[0].dtype
    dtype = {"gram32": torch.float32, "gram64": torch.float64, "direct64": torch.float64}.get(method)
    dtype = dtype or (given if given.itemsize >= 4 else torch.float32)
    m, n = matrices[0].shape
    r = min(m, n)
    largest = torch.stack([torch.linalg.vector_norm(W, torch.inf) for W in matrices]).to(torch.float64)
    finite, scale = _scales(largest, dtype)
    if matrices[0].device.type == "cpu":
        plain = [bool(p) for p in finite & (largest > 2.0**-30) & (largest < 2.0**30)]
        scale = torch.where(torch.tensor(plain, device="cpu"), 1.0, scale)
    else:
        plain = [False] * len(matrices)

    def ready(i):  # matrix i, in dtype, finite, scaled
        W = matrices[i].to(dtype)
        if not plain[i]:
            W = torch.where(finite[i], W * scale[i].to(dtype), 0.0)
        return W

    with kernels.full_precision(matrices[0].device.type):
        if method in ("exact", "direct64"):
            upright = [W if m >= n else W.mT for W in map(ready, range(len(matrices)))]  # the faster orientation
            S = torch.stack([torch.linalg.svdvals(W) for W in upright]).double()
        else:
            G = torch.empty(len(matrices), r, r, dtype=dtype, device=matrices[0].device)
            for i in range(len(matrices)):
                W = ready(i)
                torch.mm(W, W.mT, out=G[i]) if m <= n else torch.mm(W.mT, W, out=G[i])
            S = library("eigvalsh", G).flip(-1).double().clamp(min=0).sqrt()

    return _unscaled(S, torch.finfo(dtype).eps, max(m, n), method not in ("exact", "direct64"), finite, scale)


def _scales(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which matrices are finite, and the powers of two that bring entries to where their squares stay in range."""
    largest = largest.double()
    finite = torch.isfinite(largest)
    limit = 126 if dtype == torch.float32 else 1022
    exponent = torch.frexp(torch.where(finite & (largest > 0), largest, 1.0)).exponent.clamp(-limit, limit)
    return finite, torch.ldexp(torch.ones_like(largest), -exponent)


def _unscaled(
    S: Tensor, eps: float, inner: int, squared: bool, finite: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The values S of scaled matrices and their bounds, of the matrices as they are; NaN where not finite."""
    bound, sd_error = _bounds(S, eps, inner, squared)
    rows = finite[:, None]
    S, bound = (torch.where(rows, t / scale[:, None], torch.nan) for t in (S, bound))
    return S, bound, torch.where(finite, sd_error, torch.nan)


def _bounds(S: Tensor, eps: float, inner: int, squared: bool) -> tuple[Tensor, Tensor]:
    """Bounds on the values of S (B, r) and on |SD - SD_true|_2; constants calibrated in LOG.md, 2026-11-22."""
    top = S[:, :1]

    def value_error(constant):
        if not squared:
            return (constant * eps * top).expand_as(S)
        d = constant * eps * top.square()  # error of an eigenvalue of the Gram matrix
        upwards = d / ((S.square() + d).sqrt() + S)
        downwards = torch.minimum(S.square(), d) / (S + (S.square() - d).clamp(min=0).sqrt())
        return torch.maximum(upwards.nan_to_num(0.0), downwards.nan_to_num(0.0))  # 0/0 where the value is zero

    bound = value_error(16 + 8 * S.shape[1] ** 0.5)
    typical_constant = 0.5 * (1 + inner**0.5 / 32) ** 2
    typical = value_error(typical_constant)
    noise = top * (typical_constant * eps) ** (0.5 if squared else 1.0)
    total = S.sum(-1)
    sd_norm = S.norm(dim=-1) / total
    # Values at the noise floor err upwards only, so their errors add up in the sum instead of averaging out.
    floor = (bound * (S < 4 * noise)).sum(-1)
    sd_error = 3 * (typical.norm(dim=-1) + sd_norm * floor) / total + 16 * eps * sd_norm
    return bound, sd_error
