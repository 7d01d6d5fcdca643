r"""One step towards the leading singular values of many matrices, in few launches.

With Z = V W^T W, H = Z V^T and rho = diag(H), new directions are D = pace (Z - H V) / rho + P, and Rayleigh-Ritz of
W^T W on span[V, D] gives the next V; its part along D' is the next P, where D' is D made orthogonal to V. What comes
between the products with W (thin.py) and the eigenproblems (eigh.py) is done here: as 160 operations of torch, of 2 to
3 us each, it took as long as the products (LOG.md#topk-cuda-expected).

Columns are divided over several programs a matrix, which leave parts of sums to the next launch. D itself is not made
orthogonal: H, D V^T, D D^T, D Z^T and D W^T W D^T give the matrices of D'. Rows of D' that depend on those before them
are left out by a Cholesky factorisation.
"""

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import thin, tl, triton
from sosd_fast.kernels.eigh import eigh

BLOCK = 32  # columns at a time: tensor cores' partial sums of so many are added by rounding additions
SPAN, PARTS = 128, 8  # columns of a program, at least; programs to a matrix, at most
WARPS = 4
# Of the squared norm 1 of a row of D, what must be left without V and the rows before it: rounding is divided by it.
LEAST = 1e-3
SMALLEST = 64 * torch.finfo(torch.float32).smallest_normal  # a square that is nearly subnormal has few digits
SUMS = 5  # V V^T, H, D V^T, D D^T, D Z^T

if triton is not None:
    from sosd_fast.kernels.tridiagonal import _divide, _sqrt

    @triton.jit
    def _dot(x, y, PRECISION: tl.constexpr):
        """The bound on the sum keeps the compiler from folding an addition that follows into the product."""
        return tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=32)

    @triton.jit
    def _tile(ptr, pitch, rows, columns, height, width):
        """A small matrix, and zeros around it."""
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        return tl.load(ptr + rows[:, None] * pitch + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def _put(ptr, pitch, rows, columns, height, width, values):
        inside = (rows[:, None] < height) & (columns[None, :] < width)
        tl.store(ptr + rows[:, None] * pitch + columns[None, :], values, mask=inside)

    @triton.jit
    def _summed(ptr, parts, step, lanes, b):
        """The sum of the parts of a matrix (b, b)."""
        total = _tile(ptr, b, lanes, lanes, b, b)
        for part in range(1, parts):
            total += _tile(ptr + part * step, b, lanes, lanes, b, b)
        return total

    @triton.jit
    def _inner_kernel(
        X_ptr,  # (B, b, n)
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        norms_ptr,  # (B,) float64; NaN or Inf of a matrix that is not finite
        scale_ptr,  # (B, 4), out: two powers of two, 0 where the matrix acts as zero
        sums_ptr,  # (B, parts, SUMS, b, b), out: X V^T, in the place SLOT
        squares_ptr,  # (B, parts, 2, b), out: of P
        n,
        b,
        span,
        parts,
        SLOT: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        X_ptr += matrix * b * n
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        sums_ptr += ((matrix * parts + part) * SUMS + SLOT) * b * b
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        gram = tl.zeros([WIDTH, WIDTH], tl.float32)
        squares = tl.zeros([WIDTH], tl.float32)
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            if SLOT == 0:
                gram += _dot(v, tl.trans(v), PRECISION)
                p = _tile(P_ptr + k, n, lanes, columns, b, end - k)
                squares += tl.sum(p * p, axis=1)
            else:
                gram += _dot(_tile(X_ptr + k, n, lanes, columns, b, end - k), tl.trans(v), PRECISION)
        _put(sums_ptr, b, lanes, lanes, b, b, gram)
        if SLOT == 0:
            tl.store(squares_ptr + (matrix * parts + part) * 2 * b + lanes, squares, mask=lanes < b)
            # the product of the two is near the norm: each is in the range of float32, the norm need not be
            norm = tl.load(norms_ptr + matrix)
            finite = tl.abs(norm) < float("inf")
            largest = tl.where(finite & (norm > 0), norm, 1.0)
            first = tl.sqrt(largest).to(tl.int64, bitcast=True) & 0x7FF0000000000000
            second = (largest / first.to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True) & 0x7FF0000000000000
            if part == 0:
                scale_ptr += matrix * 4
                tl.store(scale_ptr, (1.0 / first.to(tl.float64, bitcast=True)).to(tl.float32))
                tl.store(scale_ptr + 1, (1.0 / second.to(tl.float64, bitcast=True)).to(tl.float32))
                tl.store(scale_ptr + 2, tl.where(finite, 1.0, 0.0))

    @triton.jit
    def _mend_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        start_ptr,  # (b, n), in the place of rows that are not orthonormal
        sums_ptr,  # (B, parts, SUMS, b, b)
        squares_ptr,  # (B, parts, 2, b)
        V_out_ptr,  # (B, b, n)
        P_out_ptr,  # (B, b, n)
        n,
        b,
        span,
        parts,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        V_out_ptr += matrix * b * n
        P_out_ptr += matrix * b * n
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        gram = _summed(sums_ptr + matrix * parts * SUMS * b * b, parts, SUMS * b * b, lanes, b)
        squares = tl.zeros([WIDTH], tl.float32)
        for each in range(parts):
            squares += tl.load(squares_ptr + (matrix * parts + each) * 2 * b + lanes, mask=lanes < b, other=0.0)
        off = gram - tl.where((lanes[:, None] == lanes[None, :]) & (lanes[:, None] < b), 1.0, 0.0)
        wrong = tl.where(tl.abs(off) < 0.01, 0, 1)  # of NaN too
        sound = (tl.sum(tl.sum(wrong, axis=1), axis=0) + tl.sum(tl.where(squares < 4, 0, 1), axis=0)) == 0
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            p = _tile(P_ptr + k, n, lanes, columns, b, end - k)
            start = _tile(start_ptr + k, n, lanes, columns, b, end - k)
            v -= 0.5 * tl.dot(off, v, input_precision=PRECISION)  # one of Newton's steps, or rounding would stay in V
            _put(V_out_ptr + k, n, lanes, columns, b, end - k, tl.where(sound, v, start))
            _put(P_out_ptr + k, n, lanes, columns, b, end - k, tl.where(sound, p, 0.0))

    @triton.jit
    def _seen(H, lanes, SMALLEST: tl.constexpr):
        """Whether W sees a direction, and a divisor in the place of its quotient.

        A quotient below the rounding of the largest one is rounding itself, and a residual over it could be anything.
        """
        rho = tl.sum(tl.where(lanes[:, None] == lanes[None, :], H, 0.0), axis=1)
        seen = rho > 1.4210854715202004e-14 * tl.max(tl.where(rho > 0, rho, 0.0), axis=0)  # eps^2
        return rho, seen, tl.where(seen & (rho > SMALLEST), rho, 1.0)

    @triton.jit
    def _directions_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        Z_ptr,  # (B, b, n)
        D_ptr,  # (B, p, n), out
        sums_ptr,  # (B, parts, SUMS, b, b); out: D V^T, D D^T and D Z^T
        squares_ptr,  # (B, parts, 2, b), out: of residuals
        n,
        b,
        p,
        span,
        parts,
        pace,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        Z_ptr += matrix * b * n
        D_ptr += matrix * p * n
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        H = _summed(sums_ptr + (matrix * parts * SUMS + 1) * b * b, parts, SUMS * b * b, lanes, b)
        rho, _, divisor = _seen(H, lanes, SMALLEST)
        factor = pace / divisor

        squares = tl.zeros([WIDTH], tl.float32)
        along = tl.zeros([WIDTH, WIDTH], tl.float32)
        inner = tl.zeros([WIDTH, WIDTH], tl.float32)
        image = tl.zeros([WIDTH, WIDTH], tl.float32)
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            z = _tile(Z_ptr + k, n, lanes, columns, b, end - k)
            d = _tile(P_ptr + k, n, lanes, columns, p, end - k)
            rest = z - rho[:, None] * v
            squares += tl.sum(rest * rest, axis=1)
            d += factor[:, None] * (z - tl.dot(H, v, input_precision=PRECISION))
            d = tl.where(lanes[:, None] < p, d, 0.0)
            along += _dot(d, tl.trans(v), PRECISION)
            inner += _dot(d, tl.trans(d), PRECISION)
            image += _dot(d, tl.trans(z), PRECISION)
            _put(D_ptr + k, n, lanes, columns, p, end - k, d)
        tl.store(squares_ptr + ((matrix * parts + part) * 2 + 1) * b + lanes, squares, mask=lanes < b)
        sums_ptr += ((matrix * parts + part) * SUMS + 2) * b * b
        _put(sums_ptr, b, lanes, lanes, b, b, along)
        _put(sums_ptr + b * b, b, lanes, lanes, b, b, inner)
        _put(sums_ptr + 2 * b * b, b, lanes, lanes, b, b, image)

    @triton.jit
    def _basis_kernel(
        sums_ptr,  # (B, parts, SUMS, b, b)
        G_ptr,  # (B, p, p): D W^T W D^T
        A_ptr,  # (B, b + p, b + p), out: W^T W in the basis [V, D'']; -1 for what is left out, after all others
        change_ptr,  # (B, 2, b, b), out: K and L, D'' = K D - L V has orthonormal rows, or zero
        b,
        p,
        parts,
        LEAST: tl.constexpr,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        sums_ptr += matrix * parts * SUMS * b * b
        G_ptr += matrix * p * p
        A_ptr += matrix * (b + p) * (b + p)
        change_ptr += matrix * 2 * b * b
        lanes = tl.arange(0, WIDTH)
        eye = lanes[:, None] == lanes[None, :]
        step = SUMS * b * b

        M = _summed(sums_ptr + 3 * b * b, parts, step, lanes, b)
        squares = tl.sum(tl.where(eye, M, 0.0), axis=1)
        known = squares > SMALLEST
        unit = tl.where(known, _divide(tl.full([WIDTH], 1.0, tl.float32), _sqrt(tl.where(known, squares, 1.0))), 0.0)
        along = unit[:, None] * _summed(sums_ptr + 2 * b * b, parts, step, lanes, b)
        M = unit[:, None] * M * unit[None, :] - tl.dot(along, tl.trans(along), input_precision=PRECISION)  # D' D'^T
        M = 0.5 * (M + tl.trans(M))
        U = tl.where(eye & (lanes[:, None] < p), 1.0, 0.0)
        pivots = tl.full([WIDTH], float("inf"), tl.float32)
        for j in range(p):
            here = lanes == j
            row = tl.sum(tl.where(here[:, None], M, 0.0), axis=0)
            made = tl.sum(tl.where(here[:, None], U, 0.0), axis=0)
            pivot = tl.sum(tl.where(here, row, 0.0), axis=0)
            pivot = tl.where(pivot > LEAST, pivot, float("inf"))  # whose rows take nothing from those after them
            factor = tl.where(lanes > j, row / pivot, 0.0)
            M -= factor[:, None] * row[None, :]
            U -= factor[:, None] * made[None, :]
            pivots = tl.where(here, pivot, pivots)
        U *= _divide(tl.full([WIDTH], 1.0, tl.float32), _sqrt(pivots))[:, None]

        H = _summed(sums_ptr + b * b, parts, step, lanes, b)
        H = 0.5 * (H + tl.trans(H))
        image = unit[:, None] * _summed(sums_ptr + 4 * b * b, parts, step, lanes, b)
        new = image - tl.dot(along, H, input_precision=PRECISION)  # of D' and V
        G = unit[:, None] * _tile(G_ptr, p, lanes, lanes, p, p) * unit[None, :]
        G -= tl.dot(image, tl.trans(along), input_precision=PRECISION)
        G -= tl.dot(along, tl.trans(new), input_precision=PRECISION)
        G = tl.dot(U, 0.5 * (G + tl.trans(G)), input_precision=PRECISION)
        G = tl.dot(G, tl.trans(U), input_precision=PRECISION)
        G = 0.5 * (G + tl.trans(G)) - tl.where(eye & (pivots == float("inf"))[:, None], 1.0, 0.0)
        new = tl.dot(U, new, input_precision=PRECISION)
        q = b + p
        _put(A_ptr, q, lanes, lanes, b, b, H)
        _put(A_ptr + b * q, q, lanes, lanes, p, b, new)
        _put(A_ptr + b, q, lanes, lanes, b, p, tl.trans(new))
        _put(A_ptr + b * q + b, q, lanes, lanes, p, p, G)
        _put(change_ptr, b, lanes, lanes, p, p, U * unit[None, :])
        _put(change_ptr + b * b, b, lanes, lanes, p, b, tl.dot(U, along, input_precision=PRECISION))

    @triton.jit
    def _advance_kernel(
        values_ptr,  # (B, b + p), descending
        vectors_ptr,  # (B, b + p, b + p), rows, of which the first b count
        change_ptr,  # (B, 2, b, b)
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        D_ptr,  # (B, p, n)
        sums_ptr,  # (B, parts, SUMS, b, b)
        squares_ptr,  # (B, parts, 2, b)
        scale_ptr,  # (B, 4)
        S_ptr,  # (B, b), out
        residual_ptr,  # (B, b), out
        next_V_ptr,  # (B, b, n), out
        next_P_ptr,  # (B, b, n), out
        n,
        b,
        p,
        span,
        parts,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        q = b + p
        vectors_ptr += matrix * q * q
        change_ptr += matrix * 2 * b * b
        V_ptr += matrix * b * n
        P_ptr += matrix * b * n
        D_ptr += matrix * p * n
        next_V_ptr += matrix * b * n
        next_P_ptr += matrix * b * n
        finite = tl.load(scale_ptr + matrix * 4 + 2) > 0
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)

        if part == 0:
            one = tl.load(scale_ptr + matrix * 4)
            two = tl.load(scale_ptr + matrix * 4 + 1)
            squares = tl.zeros([WIDTH], tl.float32)
            for each in range(parts):
                at = ((matrix * parts + each) * 2 + 1) * b + lanes
                squares += tl.load(squares_ptr + at, mask=lanes < b, other=0.0)
            H = _summed(sums_ptr + (matrix * parts * SUMS + 1) * b * b, parts, SUMS * b * b, lanes, b)
            _, seen, divisor = _seen(H, lanes, SMALLEST)
            S = tl.load(values_ptr + matrix * q + lanes, mask=lanes < b, other=0.0)
            S = _sqrt(tl.where(S > 0, S, 0.0))
            # of an unseen direction it says nothing of what took its place
            residual = tl.where(seen, _divide(_sqrt(squares), _sqrt(divisor)), S)
            nan = float("nan")
            tl.store(S_ptr + matrix * b + lanes, tl.where(finite, S / one / two, nan), mask=lanes < b)
            tl.store(residual_ptr + matrix * b + lanes, tl.where(finite, residual / one / two, nan), mask=lanes < b)

        E = _tile(vectors_ptr + b, q, lanes, lanes, b, p)
        back = tl.dot(E, _tile(change_ptr + b * b, b, lanes, lanes, p, b), input_precision=PRECISION)
        E = tl.dot(E, _tile(change_ptr, b, lanes, lanes, p, p), input_precision=PRECISION)
        C = _tile(vectors_ptr, q, lanes, lanes, b, b)
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            v = _tile(V_ptr + k, n, lanes, columns, b, end - k)
            d = _tile(D_ptr + k, n, lanes, columns, p, end - k)
            change = tl.dot(E, d, input_precision=PRECISION) - tl.dot(back, v, input_precision=PRECISION)
            after = tl.dot(C, v, input_precision=PRECISION) + change
            before = _tile(P_ptr + k, n, lanes, columns, b, end - k)
            _put(next_V_ptr + k, n, lanes, columns, b, end - k, tl.where(finite, after, v))
            _put(next_P_ptr + k, n, lanes, columns, b, end - k, tl.where(finite, change, before))


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
        S (B, b), descending, residual (B, b), and V and P for the next step, float32. NaN of a matrix that is not
        finite, which keeps V and P.

    Accuracy:
        As `topk_svdvals`.
    """
    B, b, n = V.shape
    p = max(1, min(b, n - b))  # no more directions than there is room for; one that is none is left out
    span = triton.cdiv(triton.cdiv(n, PARTS), SPAN) * SPAN
    parts = triton.cdiv(n, span)
    V, P, start, norms = V.contiguous(), P.contiguous(), start.contiguous(), norms.double().contiguous()
    old_V, old_P, D = torch.empty_like(V), torch.empty_like(V), V.new_empty(B, p, n)
    sums, squares = V.new_empty(B, parts, SUMS, b, b), V.new_empty(B, parts, 2, b)
    scale, change, A = V.new_empty(B, 4), V.new_empty(B, 2, b, b), V.new_empty(B, b + p, b + p)
    S, residual, next_V, next_P = V.new_empty(B, b), V.new_empty(B, b), torch.empty_like(V), torch.empty_like(V)
    small = {"sums_ptr": sums, "b": b, "parts": parts, "SUMS": SUMS, "num_warps": WARPS}
    small |= {"WIDTH": max(16, triton.next_power_of_2(b)), "PRECISION": kernels.precision_of_products()}
    wide = small | {"squares_ptr": squares, "n": n, "span": span, "BLOCK": BLOCK}
    inner = {"P_ptr": P, "norms_ptr": norms, "scale_ptr": scale}
    with torch.cuda.device_of(V):
        _inner_kernel[(parts, B)](X_ptr=V, V_ptr=V, SLOT=0, **inner, **wide)
        _mend_kernel[(parts, B)](V_ptr=V, P_ptr=P, start_ptr=start, V_out_ptr=old_V, P_out_ptr=old_P, **wide)
        products = thin.Thin(matrices, b, scale)
        Z = products.gram_applied(old_V)
        _inner_kernel[(parts, B)](X_ptr=Z, V_ptr=old_V, SLOT=1, **inner, **wide)
        subspace = {"V_ptr": old_V, "P_ptr": old_P, "D_ptr": D, "p": p, "SMALLEST": SMALLEST}
        _directions_kernel[(parts, B)](Z_ptr=Z, pace=pace, **subspace, **wide)
        G = products.inner_gram(D)
        _basis_kernel[(B,)](G_ptr=G, A_ptr=A, change_ptr=change, p=p, LEAST=LEAST, SMALLEST=SMALLEST, **small)
        values, vectors = eigh(A)
        _advance_kernel[(parts, B)](
            values_ptr=values, vectors_ptr=vectors, change_ptr=change, scale_ptr=scale, S_ptr=S, residual_ptr=residual,
            next_V_ptr=next_V, next_P_ptr=next_P, **subspace, **wide,
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
