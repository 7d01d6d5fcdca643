r"""One step towards the leading singular values of many matrices, in few launches: what is small, one program a matrix.

With Z = V W^T W, H = Z V^T and rho = diag(H), new directions are D = pace (Z - H V) / rho + P, made orthogonal to V, and
Rayleigh-Ritz of W^T W on span[V, D] gives the next V; its part along D is the next P. What comes between the products
with W (thin.py) and the eigenproblems (eigh.py) is done here: about 160 operations of torch, of 2 to 3 us each, took
longer than the products (LOG.md#topk-cuda-expected).

Rows of D that depend on the rows before them are left out by a Cholesky factorisation of their Gram matrix, which costs
a fifth of its eigenvectors.
"""

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import thin, tl, triton
from sosd_fast.kernels.eigh import eigh

BLOCK = 32  # columns at a time: tensor cores' partial sums of so many are added by rounding additions
WARPS = 8
# Of the squared norm 1 of a row of D, what must be left without the rows before it: rounding of H is divided by it.
LEAST = 1e-2
SMALLEST = 64 * torch.finfo(torch.float32).smallest_normal  # a square that is nearly subnormal has few digits

if triton is not None:
    from sosd_fast.kernels.tridiagonal import _divide, _sqrt

    @triton.jit
    def _dot(x, y, PRECISION: tl.constexpr):
        """A bound on the sum keeps the compiler from folding the addition that follows into the product."""
        return tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=32)

    @triton.jit
    def _tile(ptr, pitch, rows, columns, height, width):
        """A small matrix, and zeros around it."""
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        return tl.load(ptr + rows[:, None] * pitch + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _prepare_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        start_ptr,  # (b, n), in the place of rows that are not orthonormal
        norms_ptr,  # (B,) float64; NaN or Inf of a matrix that is not finite
        V_out_ptr,  # (B, b, n)
        P_out_ptr,  # (B, b, n)
        small_ptr,  # (B, 6, b, b): V V^T goes first
        scale_ptr,  # (B, 4)
        n,
        b,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        V_out_ptr += matrix * b * n
        P_out_ptr += matrix * b * n
        small_ptr += matrix * 6 * b * b
        scale_ptr += matrix * 4
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)

        # two powers of two, whose product is near the norm: each is in the range of float32, the norm need not be
        norm = tl.load(norms_ptr + matrix)
        finite = tl.abs(norm) < float("inf")
        largest = tl.where(finite & (norm > 0), norm, 1.0)
        first = tl.sqrt(largest).to(tl.int64, bitcast=True) & 0x7FF0000000000000
        second = (largest / first.to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True) & 0x7FF0000000000000
        tl.store(scale_ptr, (1.0 / first.to(tl.float64, bitcast=True)).to(tl.float32))
        tl.store(scale_ptr + 1, (1.0 / second.to(tl.float64, bitcast=True)).to(tl.float32))
        tl.store(scale_ptr + 2, tl.where(finite, 1.0, 0.0))

        gram = tl.zeros([WIDTH, WIDTH], tl.float32)
        squares = tl.zeros([WIDTH], tl.float32)
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            p = _tile(P_ptr + k, n, lanes, columns, b, n - k)
            gram += _dot(v, tl.trans(v), PRECISION)
            squares += tl.sum(p * p, axis=1)
        inside = (lanes[:, None] < b) & (lanes[None, :] < b)
        eye = tl.where((lanes[:, None] == lanes[None, :]) & inside, 1.0, 0.0)
        wrong = tl.where(tl.abs(gram - eye) < 0.01, 0, 1)  # of NaN too
        off = gram - eye
        sound = (tl.sum(tl.sum(wrong, axis=1), axis=0) + tl.sum(tl.where(squares < 4, 0, 1), axis=0)) == 0
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            p = _tile(P_ptr + k, n, lanes, columns, b, n - k)
            start = _tile(start_ptr + k, n, lanes, columns, b, n - k)
            at = lanes[:, None] * n + k + columns[None, :]
            mask = (lanes[:, None] < b) & (columns[None, :] < n - k)
            # a step of Newton's, or what rounding did to V once would stay
            tl.store(V_out_ptr + at, tl.where(sound, v - 0.5 * tl.dot(off, v, input_precision=PRECISION), start), mask)
            tl.store(P_out_ptr + at, tl.where(sound, p, 0.0), mask=mask)
        gram = eye - tl.where(sound, 0.75 * tl.dot(off, off, input_precision=PRECISION), 0.0)
        tl.store(small_ptr + lanes[:, None] * b + lanes[None, :], gram, mask=inside)

    @triton.jit
    def _unit(squares, SMALLEST: tl.constexpr):
        """What rows with these squared norms are divided by, inverted; 0 where the norm is not known."""
        known = squares > SMALLEST
        return tl.where(known, 1.0 / _sqrt(tl.where(known, squares, 1.0)), 0.0)

    @triton.jit
    def _directions_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        Z_ptr,  # (B, b, n)
        D_ptr,  # (B, p, n), out
        small_ptr,  # (B, 6, b, b), out: H, D V^T, D D^T and D Z^T, after V V^T
        residual_ptr,  # (B, b), out: of scaled matrices; -1 of a direction that W does not see
        n,
        b,
        p,
        pace,
        SMALLEST: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        Z_ptr += matrix * b * n
        D_ptr += matrix * p * n
        small_ptr += matrix * 6 * b * b
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)

        H = tl.zeros([WIDTH, WIDTH], tl.float32)
        rho = tl.zeros([WIDTH], tl.float32)
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            z = _tile(Z_ptr + k, n, lanes, columns, b, n - k)
            H += _dot(z, tl.trans(v), PRECISION)
            rho += tl.sum(z * v, axis=1)
        # A quotient below the rounding of the largest one is rounding itself, and its residual could be anything.
        largest = tl.max(tl.where(rho > 0, rho, 0.0), axis=0)
        seen = rho > 1.4210854715202004e-14 * largest  # eps^2
        divisor = tl.where(seen & (rho > SMALLEST), rho, 1.0)
        factor = pace / divisor

        squares = tl.zeros([WIDTH], tl.float32)
        lengths = tl.zeros([WIDTH], tl.float32)
        along = tl.zeros([WIDTH, WIDTH], tl.float32)  # D V^T
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            z = _tile(Z_ptr + k, n, lanes, columns, b, n - k)
            d = _tile(P_ptr + k, n, lanes, columns, p, n - k)
            rest = z - rho[:, None] * v
            squares += tl.sum(rest * rest, axis=1)
            d += factor[:, None] * (z - _dot(H, v, PRECISION))
            d = tl.where(lanes[:, None] < p, d, 0.0)
            lengths += tl.sum(d * d, axis=1)
            along += _dot(d, tl.trans(v), PRECISION)
            mask = (lanes[:, None] < p) & (columns[None, :] < n - k)
            tl.store(D_ptr + lanes[:, None] * n + k + columns[None, :], d, mask=mask)
        residual = tl.where(seen, _divide(_sqrt(squares), _sqrt(divisor)), -1.0)
        tl.store(residual_ptr + matrix * b + lanes, residual, mask=lanes < b)
        tl.debug_barrier()

        # twice: the first leaves rounding along V, which is all there is of D where V has everything
        unit = _unit(lengths, SMALLEST)
        coefficients = unit[:, None] * along
        lengths = tl.zeros([WIDTH], tl.float32)
        along = tl.zeros([WIDTH, WIDTH], tl.float32)
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            d = _tile(D_ptr + k, n, lanes, columns, p, n - k)
            d = unit[:, None] * d - _dot(coefficients, v, PRECISION)
            lengths += tl.sum(d * d, axis=1)
            along += _dot(d, tl.trans(v), PRECISION)
            mask = (lanes[:, None] < p) & (columns[None, :] < n - k)
            tl.store(D_ptr + lanes[:, None] * n + k + columns[None, :], d, mask=mask)
        tl.debug_barrier()
        unit = _unit(lengths, SMALLEST)
        coefficients = unit[:, None] * along
        along = tl.zeros([WIDTH, WIDTH], tl.float32)
        inner = tl.zeros([WIDTH, WIDTH], tl.float32)  # D D^T
        image = tl.zeros([WIDTH, WIDTH], tl.float32)  # D Z^T
        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            z = _tile(Z_ptr + k, n, lanes, columns, b, n - k)
            d = _tile(D_ptr + k, n, lanes, columns, p, n - k)
            d = unit[:, None] * d - _dot(coefficients, v, PRECISION)
            along += _dot(d, tl.trans(v), PRECISION)
            inner += _dot(d, tl.trans(d), PRECISION)
            image += _dot(d, tl.trans(z), PRECISION)
            mask = (lanes[:, None] < p) & (columns[None, :] < n - k)
            tl.store(D_ptr + lanes[:, None] * n + k + columns[None, :], d, mask=mask)
        at = small_ptr + lanes[:, None] * b + lanes[None, :]
        inside = (lanes[:, None] < b) & (lanes[None, :] < b)
        tl.store(at + b * b, H, mask=inside)
        tl.store(at + 2 * b * b, along, mask=inside)
        tl.store(at + 3 * b * b, inner, mask=inside)
        tl.store(at + 4 * b * b, image, mask=inside)

    @triton.jit
    def _basis_kernel(
        small_ptr,  # (B, 6, b, b): as above; out: U, the last, so that rows of U D are orthonormal or zero
        G_ptr,  # (B, p, p): D W^T W D^T
        A_ptr,  # (B, b + p, b + p), out: W^T W in the basis [V, U D]; -1 for what is left out, after all others
        b,
        p,
        LEAST: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        small_ptr += matrix * 6 * b * b
        G_ptr += matrix * p * p
        A_ptr += matrix * (b + p) * (b + p)
        lanes = tl.arange(0, WIDTH)
        eye = lanes[:, None] == lanes[None, :]

        M = _tile(small_ptr + 3 * b * b, b, lanes, lanes, p, p)
        M = 0.5 * (M + tl.trans(M))
        U = tl.where(eye & (lanes[:, None] < p), 1.0, 0.0)
        pivots = tl.full([WIDTH], float("inf"), tl.float32)
        for j in range(p):
            here = lanes == j
            row = tl.sum(tl.where(here[:, None], M, 0.0), axis=0)
            column = tl.sum(tl.where(here[None, :], M, 0.0), axis=1)
            made = tl.sum(tl.where(here[:, None], U, 0.0), axis=0)
            pivot = tl.sum(tl.where(here, row, 0.0), axis=0)
            pivot = tl.where(pivot > LEAST, pivot, float("inf"))  # whose rows take nothing from those after them
            factor = tl.where(lanes > j, column / pivot, 0.0)
            M -= factor[:, None] * row[None, :]
            U -= factor[:, None] * made[None, :]
            pivots = tl.where(here, pivot, pivots)
        U *= _divide(tl.full([WIDTH], 1.0, tl.float32), _sqrt(pivots))[:, None]

        image = _tile(small_ptr + 4 * b * b, b, lanes, lanes, p, b)
        G = _tile(G_ptr, p, lanes, lanes, p, p)
        image = _dot(U, image, PRECISION)
        G = _dot(_dot(U, 0.5 * (G + tl.trans(G)), PRECISION), tl.trans(U), PRECISION)
        G = 0.5 * (G + tl.trans(G)) - tl.where(eye & (pivots == float("inf"))[:, None], 1.0, 0.0)
        H = _tile(small_ptr + b * b, b, lanes, lanes, b, b)
        H = 0.5 * (H + tl.trans(H))
        q = b + p
        old = lanes < b
        new = lanes < p
        tl.store(A_ptr + lanes[:, None] * q + lanes[None, :], H, mask=old[:, None] & old[None, :])
        tl.store(A_ptr + (b + lanes)[:, None] * q + lanes[None, :], image, mask=new[:, None] & old[None, :])
        tl.store(A_ptr + lanes[None, :] * q + (b + lanes)[:, None], image, mask=new[:, None] & old[None, :])
        tl.store(A_ptr + (b + lanes)[:, None] * q + (b + lanes)[None, :], G, mask=new[:, None] & new[None, :])
        tl.store(small_ptr + 5 * b * b + lanes[:, None] * b + lanes[None, :], U, mask=new[:, None] & new[None, :])

    @triton.jit
    def _quotients(C, E, old, between, new, PRECISION: tl.constexpr):
        """The diagonal of [C, E] [[old, between^T], [between, new]] [C, E]^T."""
        mixed = _dot(C, old, PRECISION) + 2.0 * _dot(E, between, PRECISION)
        return tl.sum(mixed * C, axis=1) + tl.sum(_dot(E, new, PRECISION) * E, axis=1)

    @triton.jit
    def _advance_kernel(
        vectors_ptr,  # (B, b + p, b + p), rows, of which the first b count
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        D_ptr,  # (B, p, n)
        small_ptr,  # (B, 6, b, b)
        G_ptr,  # (B, p, p)
        scale_ptr,  # (B, 4)
        S_ptr,  # (B, b), out, descending
        residual_ptr,  # (B, b), scaled; out: of the matrices
        next_V_ptr,  # (B, b, n), out
        next_P_ptr,  # (B, b, n), out
        n,
        b,
        p,
        SMALLEST: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        q = b + p
        vectors_ptr += matrix * q * q
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        D_ptr += matrix * p * n
        small_ptr += matrix * 6 * b * b
        G_ptr += matrix * p * p
        next_V_ptr += matrix * b * n
        next_P_ptr += matrix * b * n
        one = tl.load(scale_ptr + matrix * 4)
        two = tl.load(scale_ptr + matrix * 4 + 1)
        finite = tl.load(scale_ptr + matrix * 4 + 2) > 0
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)

        C = _tile(vectors_ptr, q, lanes, lanes, b, b)
        E = _tile(vectors_ptr + b, q, lanes, lanes, b, p)
        E = _dot(E, _tile(small_ptr + 5 * b * b, b, lanes, lanes, p, p), PRECISION)
        old = _tile(small_ptr, b, lanes, lanes, b, b)
        between = _tile(small_ptr + 2 * b * b, b, lanes, lanes, p, b)
        new = _tile(small_ptr + 3 * b * b, b, lanes, lanes, p, p)
        mass = _quotients(C, E, old, between, new, PRECISION)
        mass = tl.where(mass > SMALLEST, mass, 1.0)
        old = _tile(small_ptr + b * b, b, lanes, lanes, b, b)
        between = _tile(small_ptr + 4 * b * b, b, lanes, lanes, p, b)
        new = _tile(G_ptr, p, lanes, lanes, p, p)
        squares = _divide(_quotients(C, E, old, between, new, PRECISION), mass)
        unit = _divide(tl.full([WIDTH], 1.0, tl.float32), _sqrt(mass))
        C *= unit[:, None]
        E *= unit[:, None]

        S = _sqrt(tl.where((squares > 0) & (lanes < b), squares, 0.0))
        # by rank, in which equal ones keep their order: the quotients may be in another one than the eigenvalues
        # of which they are better estimates; sums along both dimensions give S as a row and as a column
        across = tl.sum(tl.where(lanes[:, None] == lanes[None, :], S[:, None], 0.0), axis=0)
        before = (across[None, :] > S[:, None]) | ((across[None, :] == S[:, None]) & (lanes[None, :] < lanes[:, None]))
        place = tl.sum((before & (lanes[None, :] < b)).to(tl.int32), axis=1)
        chosen = (place[:, None] == lanes[None, :]) & (lanes[:, None] < b)
        S = tl.sum(tl.where(chosen, S[:, None], 0.0), axis=0)
        residual = tl.load(residual_ptr + matrix * b + lanes, mask=lanes < b, other=0.0)
        residual = tl.where(residual < 0, S, residual)  # of an unseen direction it says nothing of what took its place
        nan = float("nan")
        tl.store(S_ptr + matrix * b + lanes, tl.where(finite, S / one / two, nan), mask=lanes < b)
        tl.store(residual_ptr + matrix * b + lanes, tl.where(finite, residual / one / two, nan), mask=lanes < b)

        for k in range(0, n, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, n - k)
            d = _tile(D_ptr + k, n, lanes, columns, p, n - k)
            step = _dot(E, d, PRECISION)
            v = tl.where(finite, _dot(C, v, PRECISION) + step, v)
            step = tl.where(finite, step, _tile(P_ptr + k, n, lanes, columns, b, n - k))
            at = lanes[:, None] * n + k + columns[None, :]
            mask = (lanes[:, None] < b) & (columns[None, :] < n - k)
            tl.store(next_V_ptr + at, v, mask=mask)
            tl.store(next_P_ptr + at, step, mask=mask)


def leading_step(
    matrices: list[Tensor], V: Tensor, P: Tensor, start: Tensor, norms: Tensor, pace: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes one step towards the leading singular values; nothing waits for the GPU.

    Args:
        matrices: B tensors (m_i, n_i) on a GPU, of `thin.DTYPES`, alike, with one short side n. Not modified.
        V: (B, b, n) float32, directions as rows, b at most `thin.MOST`; those of a matrix that are not orthonormal, or
            whose last change is longer than 2, are replaced by `start`, and that change by zero. Not modified.
        P: (B, b, n) float32, their last change. Not modified.
        start: (b, n) float32, orthonormal rows.
        norms: (B,), Frobenius norms, or anything near; NaN or Inf of a matrix that is not finite.
        pace: weight of the residual against P.

    Returns:
        S (B, b), residual (B, b), and V and P for the next step, float32. NaN of a matrix that is not finite, which
        keeps V and P.

    Accuracy:
        As `topk_svdvals`.
    """
    B, b, n = V.shape
    p = max(1, min(b, n - b))  # no more directions than there is room for; one that is none is left out
    width = {"WIDTH": max(16, triton.next_power_of_2(b)), "PRECISION": kernels.precision_of_products()}
    options = width | {"num_warps": WARPS}
    V, P = V.contiguous(), P.contiguous()
    old_V, old_P, D = torch.empty_like(V), torch.empty_like(V), V.new_empty(B, p, n)
    small, scale = V.new_empty(B, 6, b, b), V.new_empty(B, 4)
    S, residual, A = V.new_empty(B, b), V.new_empty(B, b), V.new_empty(B, b + p, b + p)
    next_V, next_P = torch.empty_like(V), torch.empty_like(V)
    with torch.cuda.device_of(V):
        _prepare_kernel[(B,)](
            V_ptr=V, P_ptr=P, start_ptr=start.contiguous(), norms_ptr=norms.double(), V_out_ptr=old_V, P_out_ptr=old_P,
            small_ptr=small, scale_ptr=scale, n=n, b=b, BLOCK=BLOCK, **options,
        )  # fmt: skip
        products = thin.Thin(matrices, b, scale)
        _directions_kernel[(B,)](
            V_ptr=old_V, P_ptr=old_P, Z_ptr=products.gram_applied(old_V), D_ptr=D, small_ptr=small,
            residual_ptr=residual, n=n, b=b, p=p, pace=pace, SMALLEST=SMALLEST, BLOCK=BLOCK, **options,
        )  # fmt: skip
        G = products.inner_gram(D)
        _basis_kernel[(B,)](small_ptr=small, G_ptr=G, A_ptr=A, b=b, p=p, LEAST=LEAST, **options)
        _advance_kernel[(B,)](
            vectors_ptr=eigh(A)[1], V_ptr=old_V, P_ptr=old_P, D_ptr=D, small_ptr=small, G_ptr=G, scale_ptr=scale,
            S_ptr=S, residual_ptr=residual, next_V_ptr=next_V, next_P_ptr=next_P, n=n, b=b, p=p, SMALLEST=SMALLEST,
            BLOCK=BLOCK, **options,
        )  # fmt: skip
    return S, residual, next_V, next_P


def leading_step_ref(matrices, V, P, start, norms, pace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`leading_step` in plain torch, for float64."""
    b, n = V.shape[1:]
    p = max(1, min(b, n - b))
    finite = norms.isfinite()[:, None]
    size = torch.where(finite & (norms[:, None] > 0), norms[:, None], 1.0).to(V.dtype)
    eye = torch.eye(b, dtype=V.dtype, device=V.device)
    sound = (((V @ V.mT - eye).abs() < 0.01).all(-1).all(-1) & (P.square().sum(-1) < 4).all(-1))[:, None, None]
    V, P = torch.where(sound, V, start), torch.where(sound, P, 0.0)

    def product(X):
        """X W^T W."""
        parts = []
        for W, x, scale, is_finite in zip(matrices, X, size, finite, strict=True):
            W = torch.where(is_finite, W.detach().to(V.dtype) / scale, 0.0)
            W = W if W.shape[0] >= W.shape[1] else W.mT
            parts.append(x @ W.mT @ W)
        return torch.stack(parts)

    Z = product(V)
    rho = (Z * V).sum(-1, keepdim=True)
    seen = rho > torch.finfo(torch.float32).eps ** 2 * rho.amax(1, keepdim=True).clamp(min=0)
    divisor = torch.where(seen & (rho > SMALLEST), rho, 1.0)
    residual = ((Z - rho * V).norm(dim=-1, keepdim=True) / divisor.sqrt())[..., 0]
    D = (pace * (Z - (Z @ V.mT) @ V) / divisor + P)[:, :p]
    for _ in range(2):
        D = torch.nn.functional.normalize(D, dim=-1)
        D = D - (D @ V.mT) @ V
    lengths, U = torch.linalg.eigh(D @ D.mT)
    taken = lengths > LEAST
    D = torch.where(taken[..., None], U.mT @ D / lengths.clamp(min=LEAST).sqrt()[..., None], 0.0)
    basis = torch.cat([V, D], 1)
    left_out = torch.nn.functional.pad((~taken).to(V.dtype), (b, 0))
    squares, C = torch.linalg.eigh(basis @ product(basis).mT - torch.diag_embed(left_out))
    squares, C = squares.flip(-1)[:, :b], C.mT.flip(-2)[:, :b]
    S = squares.clamp(min=0).sqrt()
    residual = torch.where(seen[..., 0], residual, S)
    step = C[..., b:] @ D
    new_V, nan = C[..., :b] @ V + step, torch.nan
    finite = finite[..., None]
    S, residual = (torch.where(finite[..., 0], x * size, nan) for x in (S, residual))
    return S, residual, torch.where(finite, new_V, V), torch.where(finite, step, P)
