r"""All singular values of a matrix, by the Gram matrix of its short side.

    G = W W^T (r x r)  ->  T = Q^T G Q tridiagonal  ->  eigenvalues lambda of T  ->  sigma = sqrt(max(lambda, 0))

Squaring costs accuracy in the small values, so each matrix gets the precision that it needs, by the error model of
`sosd_fast.spectra.precision`: the Gram matrix in float32, in float64, or, for deficient rank, no Gram matrix
at all, in float64. The C++ kernels have nearly square matrices without a Gram matrix in float32, too.

CPU tensors take the C++ kernels (kernels/cpu), CUDA tensors the Triton ones, all on the current stream and without
waiting for the device; torch's operations stand in where either is missing. On CUDA nothing is redone, for that would
wait: the precision follows from an earlier spectrum, and matrices of deficient rank are left to method="exact".
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sosd_fast import kernels
from sosd_fast.kernels import Backend, backend_of
from sosd_fast.kernels.drift import Products, correct, products
from sosd_fast.spectra.gram import gram_eigenvalues, singular_values, whole
from sosd_fast.spectra.launched import launched
from sosd_fast.spectra.precision import MODELS, Method, choose, climb, finished

METHODS = ("auto", "gram32", "gram64", "exact")

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
        "auto": |SD - SD_true|_2 <= 1e-6 for SD = S / sum(S), because a precision stands only where its bound on that
        is at most 1e-6 (`sosd_fast.spectra.precision.sd_error`, LOG.md#one-planner, LOG.md#clusters; less where C++
        knows that it rounded less, LOG.md#reduction-noise). On CUDA, where nothing is redone, 2e-6 for deficient rank.
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
    if _may_be_differentiated(W):
        S, bound = _Differentiable.apply(W, method)
    else:
        S, bound = _values(W, method, with_bound=return_bound)
    return (S, bound) if return_bound else S


def _may_be_differentiated(W: Tensor) -> bool:
    """Whether anyone may ask for a derivative: `_Differentiable.apply` takes longer than small matrices."""
    return (
        (W.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or forward_ad.unpack_dual(W).tangent is not None
    )


def _values(W: Tensor, method: str, *, with_bound: bool) -> tuple[Tensor, Tensor]:
    """S and its bounds as `svdvals` returns them; in place of the bounds S, where they are not asked for."""
    *batch, m, n = W.shape
    dtype = _returned(W.dtype)
    count = math.prod(batch)
    if not count:
        empty = torch.empty(*batch, min(m, n), dtype=dtype, device=W.device)
        return empty, empty.clone()
    matrices = W if type(W) is Tensor else W.detach()  # the extension takes no subclasses
    matrices = matrices if len(batch) == 1 else matrices.reshape(-1, m, n)
    if not with_bound and method != Method.EXACT and backend_of("svdvals", W) is Backend.CPP:
        S = torch.empty(count, min(m, n), dtype=dtype, device="cpu")
        _compiled(matrices, method, S)  # nothing else: after other work an operation of torch takes 20 us
        S = S if len(batch) == 1 else S.reshape(*batch, -1)
        return S, S
    found = spectra(matrices.detach(), method)
    S = found.S.to(dtype).reshape(*batch, -1)
    if not with_bound:
        return S, S
    limits = torch.finfo(dtype)  # of the conversion: below `tiny` values are multiples of the smallest subnormal
    rounding = torch.clamp(limits.eps / 2 * found.S, min=limits.smallest_normal * limits.eps)
    rounding = rounding.where(found.S[:, :1] != 0, 0)  # also of a value that is too small to be there
    return S, (found.bound + rounding).to(dtype).reshape(S.shape)


class _Differentiable(torch.autograd.Function):
    """`svdvals` with its bounds, and its derivative."""

    @staticmethod
    def forward(W: Tensor, method: str) -> tuple[Tensor, Tensor]:
        return _values(W, method, with_bound=True)

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
    W = matrices if isinstance(matrices, Tensor) else matrices[0]
    on_host = W.device.type == "cpu"
    backend = Backend.TORCH if method == Method.EXACT else backend_of("svdvals", W)
    if backend is Backend.CPP:
        S = torch.empty(len(matrices), min(W.shape[-2:]), dtype=torch.float64, device="cpu")
        bound, sd_error = torch.empty_like(S), torch.empty(len(S), dtype=torch.float64, device="cpu")
        return Spectra(S, bound, sd_error, _compiled(matrices, method, S, bound, sd_error, previous))
    matrices = [*matrices]
    climbs = method == "auto" and on_host and backend is Backend.TORCH
    if method == "auto":
        methods = choose(previous, len(matrices), matrices[0].dtype, on_host=climbs)
    else:
        methods = [Method(method)] * len(matrices)
    if backend is Backend.TRITON:
        methods = [m if m is Method.GRAM32 else Method.GRAM64 for m in methods]
        return Spectra(*launched(matrices, methods), tuple(methods))
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


def _compiled(
    matrices: Sequence[Tensor] | Tensor,
    method: str,
    S: Tensor,
    bound: Tensor | None = None,
    sd_error: Tensor | None = None,
    previous: Tensor | None = None,
) -> tuple[Method, ...]:
    """Fills what is given of a `Spectra` by the C++ kernels, which choose and climb by the same error model.

    S may be float32: its values are rounded to it.
    """
    return kernels._C.svdvals(
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
                known.append(products(W))
            known = Products(*map(torch.stack, zip(*known, strict=True)))
            drift = correct(G, known, max(m, n))
            S, drift = singular_values(gram_eigenvalues(G).double() / (1 + drift[:, None]), known.squares, drift)
        else:
            upright = [W if m >= n else W.mT for W in map(ready, range(len(matrices)))]  # the faster orientation
            S = torch.stack([torch.linalg.svdvals(W) for W in upright]).double()
    return finished(S, method, max(m, n), Backend.TORCH, dtype, drift, scale, finite)


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
