r"""Newton-Schulz iteration for the polar factor, as Muon uses it.

    X <- X / max(|X|_F, eps);   steps times:  A = X X^T,  X <- P X,  P = a I + b A + c A^2     on the short side

The Gram form never touches X in between: all P commute, so A <- P A P = P^2 A and X_last = (P_5 ... P_1) X. At
m:n = 1:4 that is 50 r^3 operations for 5 steps against 90. In half precision it starts again from X after every two
steps (70 r^3), before rounding in A outgrows its small eigenvalues, and after every one whose a exceeds 4, which is
the plain form: noise in A grows by a^2 a step (LOG.md#nearly-rank-one). CUDA takes float16 whatever half precision G
has, for with |X| <= 1.21 its range does.

All r x r products are symmetric, so on CUDA `syrk` computes half of each: 65 r^3 for the plain form at 1:4. The Gram
form is not faster for every shape; the first call on a shape times both and keeps the faster. What is done between
products by cuBLAS, and before and after them all, is in `normalised` and `symmetric`: by torch a third of the time.
On a CPU `_strips` leaves out a third of each.

Source: Jordan et al., Muon (2024), coefficients (3.4445, -4.7750, 2.0315) for "muon"; Amsel et al., The Polar Express
(arXiv 2505.16932) for "polar_express", with its safety factor 1.01.
"""

import contextlib
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sosd_fast import kernels
from sosd_fast.kernels import Backend
from sosd_fast.kernels.normalised import converted, in_range, norm_of, normalised, normalised_by_torch, takes
from sosd_fast.kernels.symmetric import by_quarters, own_product, pays, polynomial, symmetrised
from sosd_fast.kernels.syrk import syrk

HALF = (torch.bfloat16, torch.float16)
RESTART = 2  # steps in the Gram form, in half precision; one where a > STEEP (LOG.md#nearly-rank-one)
STEEP = 4.0
LONGEST = 5  # in others: at once, 8 steps in float32 left the band on a spectrum from 1 to 1e-4, with values of 1.95
ALONE = 512  # rows from which a CPU takes the matrices of a batch one by one: bmm of 768 x 3072 takes 1.3 times as long
STRIP = 256  # rows of a strip of a symmetric product on a CPU

AHEAD = 5_000_000  # cycles of a GPU, about 3 ms, in which the host queues an iteration

COEFFICIENTS = {
    "muon": ((3.4445, -4.7750, 2.0315),),
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.287212, -23.595887, 17.300387),
            (4.107059, -2.947850, 0.544843),
            (3.948691, -2.908902, 0.551819),
            (3.318420, -2.488488, 0.510049),
            (2.300652, -1.668904, 0.418807),
            (1.891301, -1.267996, 0.376804),
        )
    )
    + ((1.875, -1.25, 0.375),),
}


def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: str | tuple = "muon",
    method: str = "auto",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximates the polar factor U V^T of G = U S V^T.

    Args:
        G: (..., m, n), floating point, any strides. Not modified.
        steps: iterations; where `coefficients` names fewer triples than steps, the last one is repeated.
        coefficients: "muon", "polar_express", one triple (a, b, c), or a sequence of triples.
        method: "plain" iterates on X, "gram" on X X^T; "auto" takes "gram" where the long side is at least twice the
            short one, which is where it is faster, and on CUDA in half precision what is faster there.
        eps: the smallest Frobenius norm that is divided by: a smaller G is divided by eps, and its X stays small.
        dtype: that the products run in; None: the dtype of G. Both halves run in float16 on CUDA. On a CPU bfloat16
            runs as such where the CPU multiplies it natively (AVX512_BF16, AMX, Arm's BF16), and else in float32, which
            is faster there; so does float16.

    Returns:
        X, the shape and dtype of G. Differentiable, any number of times: the backward pass computes the iteration again
        by torch's operations, at least in float32.

    On CUDA in half precision the first call on a shape waits for the device, to time the candidates.

    Each matrix is first divided by a power of two, so that no finite one, large or subnormal, is lost to the range of
    its dtype. A matrix that holds NaN or Inf gives NaN and leaves the others of its batch as they are.

    Accuracy:
        "muon" does not converge: with 5 steps, singular values of G above 3e-3 |G|_F end between 0.68 and 1.21,
        smaller ones below that. "polar_express" brings those above 1e-3 |G|_F to within 6e-3 of 1 in 6 steps.
        In float32 "gram" is within 1e-4 |X|_F of the float64 iteration for Gaussian and half-zero spectra, 3e-4 for
        graded ones and 5e-4 for rank one, whose small values drown in A ("plain": 5e-5, and 2e-4 for rank one).
        In float16 both are within 1e-2 |X|_F for Gaussian and 3e-2 for graded spectra. In bfloat16 on CPUs both are
        within 6e-2 and 1.3e-1 (the iteration of torch.optim.Muon 1e-2 and 1.1e-1), and the values of an ordinary
        matrix end as low as 0.64 (all by 5 steps).
        Whatever the spectrum, in up to 6 steps, X is within 2e-2 |X|_F of the float64 iteration in float32 and 1e-10 in
        float64; "gram" errs most, for small values grow by 3.4 or more a step. In half precision rounding moves values
        where the polynomial is steep, but the largest stays that of the polynomial on [0, 1], to 5e-2 of itself in
        float16 and 2e-1 in bfloat16. Calibrated on random matrices: python -m bench.robustness.

    Raises:
        ValueError: a vector, a dtype that is no floating-point one, fewer than one step, unknown coefficients or
            method, a negative eps.
    """
    if not isinstance(G, Tensor) or G.ndim < 2 or not G.is_floating_point():
        got = f"{tuple(G.shape)} {G.dtype}" if isinstance(G, Tensor) else type(G).__name__
        raise ValueError(
            f"newton_schulz: expected a floating-point matrix (..., m, n), got G={got}. Flatten kernels to (out, rest)."
        )
    triples = triples_of(steps, coefficients, eps)
    if method not in ("auto", "plain", "gram"):
        raise ValueError(f"newton_schulz: expected auto, plain or gram, got method={method!r}. Leave it at 'auto'.")
    check_dtype(dtype)
    if not G.numel():
        return G.clone()
    dtype = dtype_of_products(dtype or G.dtype, G.device)
    short, long = sorted(G.shape[-2:])
    symmetric = False
    if dtype in HALF and G.is_cuda and kernels.backend_of("newton_schulz", G) is Backend.TRITON:
        shape = (G.shape[:-2].numel(), short, long)
        form, symmetric = fastest_form(shape, G.dtype, G.device, steps, None if method == "auto" else method)
    elif method == "auto":
        form = "gram" if long >= 2 * short and not (dtype in HALF and G.is_cuda) else "plain"
    else:
        form = method
    if G.device.type == "cpu":  # by AMX only long products pay by strips: `_own_product`
        symmetric = short >= 2 * STRIP and not (dtype in HALF and "amx_bf16" in kernels.cpu_flags())
    differentiate = torch.is_grad_enabled() and G.requires_grad
    return (_Differentiable.apply if differentiate else iterate)(G, triples, eps, form, symmetric, dtype)


def check_dtype(dtype: object, function: str = "newton_schulz", prefix: str = ""):
    """Raises ValueError for a dtype that no iteration runs in; see `triples_of` for the rest."""
    known = (*HALF, torch.float32, torch.float64)
    if dtype is not None and dtype not in known:
        raise ValueError(
            f"{function}: expected bfloat16, float16, float32, float64 or None, got {prefix}dtype={dtype!r}. "
            "Leave it at None."
        )


def dtype_of_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the products run in where `dtype` is asked for: see `newton_schulz`."""
    if dtype not in HALF:
        return dtype
    if device.type == "cuda":
        return torch.float16
    return dtype if dtype == torch.bfloat16 and kernels.multiplies_bfloat16() else torch.float32


def triples_of(
    steps: int, coefficients: str | tuple, eps: float, function: str = "newton_schulz", prefix: str = ""
) -> tuple[tuple[float, float, float], ...]:
    """Returns the coefficients (a, b, c) of each step, after a check of the options of `newton_schulz`.

    Args:
        steps: see `newton_schulz`, as the next two.
        coefficients: of the steps.
        eps: of the norm.
        function: whose options they are.
        prefix: of the names of the first two there.

    Raises:
        ValueError: fewer than one step, unknown coefficients, a negative eps.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{function}: expected at least one step, got {prefix}steps={steps!r}. Muon takes 5.")
    triples: Any = COEFFICIENTS.get(coefficients) if isinstance(coefficients, str) else coefficients
    if _is_triple(triples):
        triples = (triples,)
    if not (isinstance(triples, Sequence) and len(triples) > 0 and all(map(_is_triple, triples))):
        raise ValueError(
            f"{function}: expected one of {', '.join(COEFFICIENTS)}, a triple of numbers or several, got "
            f"{prefix}coefficients={coefficients!r}. Use 'muon'."
        )
    if not (isinstance(eps, int | float) and not isinstance(eps, bool) and 0 <= eps < math.inf):
        raise ValueError(f"{function}: expected a number of at least 0, got eps={eps!r}. 1e-7 is the default.")
    return tuple(tuple(triples[min(i, len(triples) - 1)]) for i in range(steps))


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    )


class _Differentiable(torch.autograd.Function):
    """`iterate`, and the derivative of `newton_schulz_ref`."""

    @staticmethod
    def forward(G: Tensor, triples, eps: float, form: str, symmetric: bool, dtype: torch.dtype) -> Tensor:
        return iterate(G.detach(), triples, eps, form, symmetric, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(inputs[0])
        ctx.triples, ctx.eps = inputs[1:3]

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (G,) = ctx.saved_tensors
        dtype = torch.promote_types(G.dtype, torch.float32)
        power = kernels.power_of_two(kernels.largest_entry(G.detach()).to(dtype))

        def reference(G: Tensor) -> Tensor:
            return newton_schulz_ref(G.to(dtype) / power, ctx.triples, ctx.eps / power)  # whose squares stay in range

        again = torch.is_grad_enabled()  # where the derivative is to be differentiated, too
        with kernels.full_precision(G.device.type), torch.set_grad_enabled(again):
            pull_back = torch.func.vjp(reference, G)[1]
            (found,) = pull_back(grad_outputs[0].to(dtype))
        return found, None, None, None, None, None


def iterate(G: Tensor, triples, eps: float, form: str, symmetric: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Runs one form in one dtype, with half of the symmetric products left out or not."""
    dtype = dtype or dtype_of_products(G.dtype, G.device)
    run = _gram if form == "gram" else _plain
    casts = torch.is_autocast_enabled(G.device.type)  # else not to touch it saves 9 us, 1 % at 256 x 256
    with torch.autocast(G.device.type, enabled=False) if casts else contextlib.nullcontext():
        X = G.mT if G.shape[-2] > G.shape[-1] else G
        fused = dtype == torch.float16 and takes(X)
        count = X.shape[:-2].numel()
        if G.device.type == "cpu" and not fused and (X.shape[-2] >= ALONE or count == 1):
            each = [_alone(x, eps, dtype, run, triples, symmetric) for x in X.reshape(-1, *X.shape[-2:])]
            X = (each[0] if count == 1 else torch.stack(each)).view(X.shape)
        else:
            X = run(normalised(X, eps) if fused else normalised_by_torch(X, eps, dtype), triples, symmetric)
    X = converted(X, G.dtype) if fused else X.to(G.dtype)
    return X.mT if G.shape[-2] > G.shape[-1] else X


def _alone(X: Tensor, eps: float, dtype: torch.dtype, run, triples, symmetric: bool) -> Tensor:
    """Runs a form on one matrix of a CPU; the first step of a large one divides by the norm, which saves passes over X.

    With X / s for X, P is a/s I + b/s^3 A + c/s^5 A^2. Where a power of s could leave the range, X is scaled otherwise.
    A small matrix is divided as it is among others, for in half precision that decides what it is rounded to.
    """
    if X.shape[0] < ALONE or _has_tangent(X):
        return run(normalised_by_torch(X, eps, dtype), triples, symmetric)
    norm = float(norm_of(X, torch.promote_types(X.dtype, torch.float32)))
    for _ in range(2):  # powers of two end at 2^-100, or 2^-900, where subnormal numbers are still small
        if not 1e-6 < norm < 1e6:
            X, power = in_range(X)
            eps /= float(power)
            norm = float(norm_of(X, power.dtype))
    # A zero matrix stays zero; by coefficients of zero, over Inf, BLAS does not multiply.
    s = max(norm, eps) if 0 < norm < math.inf else 1.0 if norm == 0 else math.nan
    return run(X.to(dtype), triples, symmetric, s)


def _has_tangent(X: Tensor) -> bool:  # of forward mode, which neither a number nor `out` passes on
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(X).tangent is not None


def _divided(triples, s: float) -> list[tuple[float, float, float]]:
    """The coefficients of a matrix that is yet to be divided by s."""
    (a, b, c), *others = triples
    cube = s * s * s  # pow would round another power of two otherwise
    return [(a / s, b / cube, c / (cube * s * s)), *others]


def _multiply(A: Tensor, B: Tensor, symmetric: bool) -> Tensor:
    """Returns A B^T, which is symmetric."""
    if not symmetric:
        return A @ B.mT
    return syrk(A, B, out_dtype=A.dtype, rounded=False) if A.is_cuda or kernels.interpreted else _strips(A, B)


def _own_product(X: Tensor, symmetric: bool) -> Tensor:
    """Returns X X^T. By AMX that of 768 x 3072 takes 3.5 ms whole and 1.6 by strips, of 768 x 768 0.64 and 0.75."""
    if not symmetric and _by_triton(X) and by_quarters(X):
        return own_product(X)
    return _multiply(X, X, symmetric or _by_strips(X))


def _by_strips(X: Tensor) -> bool:
    short, long = X.shape[-2:]
    return X.device.type == "cpu" and not kernels.interpreted and short >= 2 * STRIP and long >= 2 * short


def _by_triton(A: Tensor) -> bool:
    """Whether kernels stand for what torch does between the products."""
    return A.dtype == torch.float16 and kernels.backend_of("newton_schulz", A) is Backend.TRITON


def _polynomial(A: Tensor, a: float, b: float, c: float, symmetric: bool) -> Tensor:
    """Returns a I + b A + c A^2, of a symmetric A."""
    if symmetric and (A.is_cuda or kernels.interpreted):
        return syrk(A, C=A, alpha=c, beta=b, shift=a, out_dtype=A.dtype, rounded=False)
    if _by_triton(A) and pays(A, b, c):
        return polynomial(A, a, b, c)
    P = _strips(A, A, A, b, c) if symmetric else _add_product(A, A, A, b, c)
    if a:
        P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def _add_product(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """Returns beta C + alpha A B."""
    if A.ndim <= 3:
        return (torch.addmm if A.ndim == 2 else torch.baddbmm)(C, A, B, beta=beta, alpha=alpha)
    return (A @ B).mul_(alpha).add_(C, alpha=beta)


def _strips(A: Tensor, B: Tensor, C: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Returns beta C + alpha A B^T, which is symmetric: rows in strips up to the diagonal, and their mirror image."""
    r = A.shape[-2]
    out = A.new_empty(*A.shape[:-1], r)
    for i in range(0, r, STRIP):
        rows, done = slice(i, i + STRIP), min(i + STRIP, r)
        left, right = A[..., rows, :], B[..., :done, :].mT
        out[..., rows, :done] = (
            left @ right if C is None else _add_product(C[..., rows, :done], left, right, beta, alpha)
        )
        out[..., :i, rows] = out[..., rows, :i].mT
    return out


def _plain(X: Tensor, triples, symmetric: bool, s: float = 1.0) -> Tensor:
    triples = _divided(triples, s)
    if X.device.type == "cpu" and X.ndim == 2 and not (symmetric or _by_strips(X) or _by_triton(X) or _has_tangent(X)):
        A, P = (X.new_empty(X.shape[0], X.shape[0]) for _ in range(2))
        Y = X.new_empty(X.shape), X.new_empty(X.shape)  # four buffers, not three a step: 0.96 of the time
        for i, (a, b, c) in enumerate(triples):
            torch.mm(X, X.mT, out=A)
            torch.addmm(A, A, A, beta=b, alpha=c, out=P)
            X = torch.addmm(X, P, X, beta=a, out=Y[i % 2])
        return X
    for a, b, c in triples:
        A = _own_product(X, symmetric)
        if _by_triton(A) and (symmetric or pays(A, b, c)):
            X = _polynomial(A, a, b, c, symmetric) @ X  # cuBLAS would copy X first, to add a X
        else:
            X = _add_product(X, _polynomial(A, 0.0, b, c, symmetric), X, a)
    return X


def _gram(X: Tensor, triples, symmetric: bool, s: float = 1.0) -> Tensor:
    first, divided = 0, _divided(triples, s)
    while first < len(triples):
        steep = any(a > STEEP for a, _, _ in triples[first : first + RESTART])
        last = first + (LONGEST if X.dtype not in HALF else 1 if steep else RESTART)
        last = min(last, len(triples))
        A, Q = _own_product(X, symmetric), None
        for i, (a, b, c) in enumerate(divided[first:last], first):
            P = _polynomial(A, a, b, c, symmetric)
            Q = P if Q is None else _multiply(P, Q, symmetric)
            if i + 1 < last:
                A = _multiply(P, _multiply(P, A, symmetric), symmetric)
                if not symmetric:
                    A = symmetrised(A) if _by_triton(A) else (A + A.mT) / 2  # rounding must not grow the other part
        assert Q is not None  # there is at least one triple
        X = Q @ X
        first = last
    return X


@functools.cache
def fastest_form(shape, dtype: torch.dtype, device: torch.device, steps: int, form: str | None) -> tuple[str, bool]:
    """Times each form once a process, on random matrices; returns (form, symmetric)."""
    _, short, long = shape
    candidates = [(f, s) for f in ("plain", "gram") for s in (False, True) if form in (None, f)]
    candidates = [c for c in candidates if form or c[0] == "plain" or long >= 2 * short]
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    own = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
    G = torch.randn(*shape, device=device, dtype=dtype, generator=own)
    triples = COEFFICIENTS["muon"] * steps
    times = {c: [] for c in candidates}
    with torch.cuda.device(device):
        for turn in range(7):
            for c in candidates:
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(AHEAD)  # or the host's time would be compared, which training does not wait for
                began.record()
                iterate(G, triples, 1e-7, *c)
                ended.record()
                ended.synchronize()
                if turn >= 2:  # the first ones compile
                    times[c].append(began.elapsed_time(ended))
    return min(candidates, key=lambda c: statistics.median(times[c]))


def newton_schulz_ref(G: Tensor, triples, eps: float | Tensor = 1e-7) -> Tensor:
    """`newton_schulz` in plain torch, one triple (a, b, c) a step; `eps` of each matrix, or of all."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=eps)
    for a, b, c in triples:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X
