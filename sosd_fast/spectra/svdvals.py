r"""All singular values of a matrix, by the Gram matrix of its short side.

    G = W W^T (r x r)  ->  T = Q^T G Q tridiagonal  ->  lambda by bisection  ->  sigma = sqrt(max(lambda, 0))

Squaring costs accuracy in the small values, so each matrix gets the precision that it needs, by the error model of
`sosd_fast.spectra.precision`: the Gram matrix in float32, in float64, or, for deficient rank, no Gram matrix
at all, in float64. The C++ kernels have nearly square matrices without a Gram matrix in float32, too.

CPU tensors take the C++ kernels (kernels/cpu), CUDA tensors the Triton ones, all on the current stream and without
waiting for the device; torch's operations stand in where either is missing. On CUDA nothing is redone, for that would
wait: the precision follows from an earlier spectrum, and matrices of deficient rank are left to method="exact".
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, backend_of
from sosd_fast.kernels.eigh import library
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.syrk import syrk
from sosd_fast.kernels.tridiagonal import tridiagonal
from sosd_fast.spectra.gram import Products, correct, singular_values, whole
from sosd_fast.spectra.precision import MODELS, Method, choose, climb, lapack_error, sd_error, value_bound

METHODS = ("auto", "gram32", "gram64", "exact")

CHUNK_BYTES = 2**30  # of copies of weights and of Gram matrices at a time
_COMPILED = (Method.GRAM32, Method.BIDIAG32, Method.GRAM64, Method.BIDIAG64)  # what the C++ kernels know


class Spectra(NamedTuple):
    """Spectra of a list of B matrices of one short side r."""

    S: Tensor  # (B, r) float64, descending
    bound: Tensor  # (B, r) float64, |S - S_true| is at most this
    sd_error: Tensor  # (B,) float64, |SD - SD_true|_2 is at most this; NaN where there is no distribution
    methods: tuple[Method, ...]  # of each matrix


def svdvals(W: Tensor, *, method: str = "auto", return_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Computes all singular values of a matrix or a batch of matrices.

    Differentiable: dL/dW = U diag(dL/dS) V^T, and forward dS = diag(U^T dW V), whose U and V are computed by
    `torch.linalg.svd` in that pass.

    Args:
        W: (..., m, n), float64, float32, bfloat16 or float16, any strides. Not modified.
        method: "auto" (the cheapest precision that meets the bound), "gram32", "gram64", or "exact"
            (`torch.linalg.svdvals` in the dtype of W, at least float32).
        return_bound: also return an upper bound on the error of each value.

    Returns:
        S, (..., min(m, n)), descending; float64 for float64 input, else float32. With `return_bound` the pair
        (S, bound), both of that shape; no gradient flows through the bound. A matrix that holds NaN or Inf gives NaN,
        and leaves the others as they are.

    Accuracy:
        "auto": |SD - SD_true|_2 <= 1e-6 for SD = S / sum(S), because a precision stands only where its bound on that,
        3 predicted + (5 + 0.1 sqrt(r)) u |SD|, u = eps / 2, is at most 1e-6 (LOG.md#one-planner; the prediction is
        `sosd_fast.spectra.precision.predicted_sd_error`). On CUDA, where nothing is redone, 2e-6 for deficient rank.
        "gram32", "gram64": with d = c * u * S[0]**2, a value s errs by at most d / (s + sqrt(max(s**2 - d, 0))), so
        values below about sqrt(u) * S[0] are lost. With K = max(m, n), c = 32 + max(a sqrt(r), r / 12) + sqrt(K) / 8,
        4 times as much in float64; a is 2 for the C++ kernels (LOG.md#gram-error), 4 for the Triton ones
        (LOG.md#one-planner) and 16 for torch's operations (LOG.md#torch-bounds). "exact":
        (160 + 8 sqrt(r) + sqrt(K)) * u * S[0] (LOG.md#nearly-equal-values). All constants were calibrated against
        float64 and are tested to hold; they are not proofs.

    Raises:
        ValueError: fewer than two dimensions, an integer or complex dtype, an empty matrix, an unknown method.

    Source: Weyl's inequality; Golub & Van Loan, Matrix Computations, 8.6.
    """
    check_matrix("svdvals", W)
    if method not in METHODS:
        raise ValueError(
            f"svdvals: expected one of {', '.join(METHODS)}, got method={method!r}. Use 'auto' unless comparing."
        )
    S, bound = _Differentiable.apply(W, method)
    return (S, bound) if return_bound else S


class _Differentiable(torch.autograd.Function):
    """`svdvals` with its bounds, and its derivative."""

    @staticmethod
    def forward(W: Tensor, method: str) -> tuple[Tensor, Tensor]:
        *batch, m, n = W.shape
        dtype = _returned(W.dtype)
        matrices = W.detach().reshape(-1, m, n)
        if not len(matrices):
            empty = torch.empty(*batch, min(m, n), dtype=dtype, device=W.device)
            return empty, empty.clone()
        found = spectra(matrices, method)
        S = found.S.to(dtype).reshape(*batch, -1)
        limits = torch.finfo(dtype)  # of the conversion: below `tiny` values are multiples of the smallest subnormal
        rounding = torch.clamp(limits.eps / 2 * found.S, min=limits.smallest_normal * limits.eps)
        rounding = rounding.where(found.S[:, :1] != 0, 0)  # also of a value that is too small to be there
        return S, (found.bound + rounding).to(dtype).reshape(S.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # of S and of the bound, which has none
        (W,) = ctx.saved_tensors
        U, Vh, finite = _vectors(W)
        product = (U * grad_outputs[0][..., None, :]) @ Vh
        return torch.where(finite, product, torch.nan).to(W.dtype), None

    @staticmethod
    def jvp(ctx, *grad_inputs: Any) -> tuple[Tensor, None]:  # of W and of the method
        (W,) = ctx.saved_tensors
        U, Vh, finite = _vectors(W)
        product = (U * (grad_inputs[0].to(U.dtype) @ Vh.mT)).sum(-2)  # dS_i = u_i^T dW v_i
        return torch.where(finite[..., 0], product, torch.nan), None

    @staticmethod
    def vmap(info, in_dims, *args):  # noqa: ARG004
        W, method = args
        return _Differentiable.apply(W.movedim(in_dims[0], 0), method), (0, 0)


def _vectors(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors U and V^T of matrices, and which of these are finite, (..., 1, 1)."""
    finite = W.isfinite().all(-1).all(-1)[..., None, None]
    U, _, Vh = torch.linalg.svd(torch.where(finite, W, 0).to(_returned(W.dtype)), full_matrices=False)
    return U, Vh, finite


def _returned(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the values of matrices of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spectra(
    matrices: Sequence[Tensor] | Tensor, method: str | Method = "auto", previous: Tensor | None = None
) -> Spectra:
    """Computes the spectra of B matrices of one dtype and device, read in place.

    Args:
        matrices: B tensors (m, n) of one shape, or, where `mixes_shapes`, of any shapes with one short side; or one
            (B, m, n), which is faster for small matrices on the CPU. Not modified.
        method: as in `svdvals`, or "bidiag32" or "bidiag64", on the CPU.
        previous: (B, r) float64, spectra of the same matrices a little earlier. They tell which precision to start
            from. For CUDA matrices pass them on the CPU: reading them from the device would wait for it.

    Returns:
        A `Spectra`, on the device of the matrices. With "auto" on CUDA nothing is redone, for that would wait for the
        device: the precision is the one that `previous` asks for, float64 without it.
    """
    on_host = matrices[0].device.type == "cpu"
    backend = Backend.TORCH if method == Method.EXACT else backend_of("svdvals", matrices[0])
    if backend is Backend.CPP:
        return _compiled(matrices, method, previous)
    matrices = [*matrices]
    climbs = method == "auto" and on_host and backend is Backend.TORCH
    if method == "auto":
        methods = choose(previous, len(matrices), matrices[0].dtype, on_host=climbs)
    else:
        methods = [Method(method)] * len(matrices)
    if backend is Backend.TRITON:
        return _launched(matrices, [m if m is Method.GRAM32 else Method.GRAM64 for m in methods])
    rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def compute(plan: dict[Method, list[int]]) -> list[float]:
        for method, at in plan.items():
            found = _by_torch([matrices[i] for i in at], method)
            rows.update(zip(at, zip(*found, strict=True), strict=True))
        return [float(rows[i][2]) for i in range(len(matrices))] if climbs else [0.0] * len(matrices)

    methods = climb(compute, methods)
    S, bound, error = (torch.stack(column) for column in zip(*(rows[i] for i in range(len(matrices))), strict=True))
    return Spectra(S, bound, error, methods)


def mixes_shapes(W: Tensor, method: str | Method) -> bool:
    """Whether `spectra` takes matrices of different shapes, those with the short side of W, at once."""
    return method != Method.EXACT and backend_of("svdvals", W) is not Backend.TORCH


def _compiled(matrices: Sequence[Tensor] | Tensor, method: str, previous: Tensor | None) -> Spectra:
    """`spectra` by the C++ kernels, which choose and climb by the same error model."""
    S = torch.empty(len(matrices), min(matrices[0].shape), dtype=torch.float64, device="cpu")
    bound, sd_error = torch.empty_like(S), torch.empty(len(S), dtype=torch.float64, device="cpu")
    methods = kernels._C.svdvals(
        matrices=matrices,
        method=str(method),
        previous=None if previous is None else previous.to(torch.float64).contiguous(),
        S=S,
        bound=bound,
        sd_error=sd_error,
        methods=_COMPILED,
        threads=torch.get_num_threads(),
        model=MODELS[Backend.CPP],
    )
    return Spectra(S, bound, sd_error, methods)


def _launched(matrices: Sequence[Tensor], methods: list[Method]) -> Spectra:
    """`spectra` by the Triton kernels, each matrix by its method; queues work and waits for none of it.

    The matrices need only have their short side in common: those of a model go through the reduction together.
    """
    order: list[int] = []
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for method in sorted(set(methods)):
        parts, size = [], 0
        at = [i for i, other in enumerate(methods) if other == method]
        # what is copied, and what `Products` takes in float64
        for some in _chunks(at, [(method.dtype(W.dtype).itemsize + 8) * W.numel() for W in matrices]):
            more = 8 * len(some) * min(matrices[some[0]].shape) ** 2
            if parts and size + more > CHUNK_BYTES:
                found.append(_reduced(parts, method, matrices[0].dtype))
                parts, size = [], 0
            grams = _grams(matrices, some, method)
            order += [i for part in grams for i in part.at]
            parts += grams
            size += more
        found.append(_reduced(parts, method, matrices[0].dtype))
    S, bound, sd_error = map(_joined, zip(*found, strict=True))
    if order != sorted(order):
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), pin_memory=S.is_cuda, device="cpu")
        back = back.to(S.device, non_blocking=True)  # from other memory it would wait for the device
        S, bound, sd_error = (t.index_select(0, back) for t in (S, bound, sd_error))
    return Spectra(S, bound, sd_error, tuple(methods))


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


def _reduced(parts: Sequence[_Part], method: Method, given: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The `Spectra` of matrices of a dtype, part by part, from one reduction: two take nearly twice as long as one."""
    _, inners, *columns = zip(*parts, strict=True)
    G, squares, cross, scale, finite = map(_joined, columns)
    inner: int | Tensor = inners[0]
    if len(set(inners)) > 1:
        inner = torch.cat([part.scale.new_full(part.scale.shape, part.inner) for part in parts])
    dtype, known = method.dtype(given), Products(squares, cross)
    if dtype == torch.float32:
        known = Products(*(t * scale[:, None].square() for t in known))
    drift = correct(G, known, inner)
    backend = backend_of("tridiagonal", G)
    S = gram_eigenvalues(G).double() / (1 + drift[:, None])
    S, drift = singular_values(S, known.squares, drift)
    return finished(S, method, inner, backend, dtype, drift, scale, finite)


def gram_eigenvalues(G: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices (B, r, r), ascending. G is used up."""
    if backend_of("tridiagonal", G) is Backend.TRITON:
        return sturm(*tridiagonal(G, overwrite=True))
    # LAPACK's float32 eigenvalues err more than a float32 Gram matrix does: the SD of a 611 x 790 matrix by 6e-7, 2.5
    # times its bound, against 1e-9 (LOG.md#one-planner). In float64 they take 1.5 times as long.
    return library("eigvalsh", G.double())


def triangle_eigenvalues(triangles: Tensor, r: int) -> Tensor:
    """Eigenvalues (B, r) of Gram matrices whose upper triangles (B, r (r + 1) / 2) lie row by row, ascending."""
    if backend_of("svdvals", triangles) is Backend.CPP:
        values = torch.empty(len(triangles), r, dtype=torch.float64, device="cpu")
        kernels._C.gram_eigenvalues(triangles=triangles, values=values, threads=torch.get_num_threads())
        return values
    return gram_eigenvalues(whole(triangles.nan_to_num(0, 0, 0), r))  # LAPACK raises at what is not finite


def _by_torch(matrices: Sequence[Tensor], method: Method) -> tuple[Tensor, Tensor, Tensor]:
    """S, bound and sd_error by one method and torch's operations."""
    m, n = matrices[0].shape
    dtype, device = method.dtype(matrices[0].dtype), matrices[0].device
    scale, finite = kernels.scale_of(torch.stack([kernels.largest_entry(W)[0, 0] for W in matrices]), dtype)
    plain = ((scale == 1) & finite).tolist() if device.type == "cpu" else [False] * len(matrices)

    def ready(i: int) -> Tensor:  # (m, n) in dtype, finite, scaled
        W = matrices[i].detach()
        return W.to(dtype) if plain[i] else torch.where(finite[i], W.double() * scale[i], 0.0).to(dtype)

    drift = None
    with kernels.full_precision(device.type):
        if method.squares:
            G = torch.empty(len(matrices), min(m, n), min(m, n), dtype=dtype, device=device)
            known = []
            for i in range(len(matrices)):
                W = ready(i)
                W = W if m <= n else W.mT
                torch.mm(W, W.mT, out=G[i])
                known.append(Products.of(W))
            known = Products(*map(torch.stack, zip(*known, strict=True)))
            drift = correct(G, known, max(m, n))
            S, drift = singular_values(gram_eigenvalues(G).double() / (1 + drift[:, None]), known.squares, drift)
        else:
            upright = [W if m >= n else W.mT for W in map(ready, range(len(matrices)))]  # the faster orientation
            S = torch.stack([torch.linalg.svdvals(W) for W in upright]).double()
    return finished(S, method, max(m, n), Backend.TORCH, dtype, drift, scale, finite)


def finished(
    S: Tensor,
    method: Method,
    inner: int | Tensor,
    backend: Backend,
    dtype: torch.dtype,
    drift: Tensor | None,
    scale: Tensor,
    finite: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """S, bound and sd_error of matrices as they are, from the values S (B, r) of scaled ones; NaN where not finite."""
    bound = value_bound(S, method, inner, backend, dtype=dtype)
    error = sd_error(S, method, inner, dtype=dtype, drift=drift)
    if not method.squares:
        more, more_sd = lapack_error(S, dtype=dtype)
        bound, error = bound + more, error + more_sd
    S, bound = (torch.where(finite[:, None], t / scale[:, None], torch.nan) for t in (S, bound))
    return S, bound, torch.where(finite, error, torch.nan)


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
