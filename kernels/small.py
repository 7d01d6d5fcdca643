"""Small products of the rows of a subspace, and a basis of what is new in it, one program a matrix.

D is not made orthogonal to V: the matrices of D', which is D without its part along V, in rows of norm 1, follow from
H = V W^T W V^T, D V^T, D D^T, D Z^T and D W^T W D^T. Rows of D' that depend on those before them are left out by a
Cholesky factorisation. Products of small matrices are taken from memory, in steps: as whole tiles they would spill.
"""

from sosd_fast.kernels import tl, triton

if triton is not None:
    from sosd_fast.kernels.rounded import inverse_sqrt
    from sosd_fast.kernels.split import dot

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
    def _times(
        X_ptr, pitch, Y_ptr, row, column, lanes, columns, b, width, PRECISION: tl.constexpr, STEP: tl.constexpr
    ):  # fmt: skip
        """X Y, for X (b, b) and Y (b, width), whose rows and columns are so far apart."""
        total = tl.zeros([lanes.shape[0], columns.shape[0]], tl.float32)
        inner = tl.arange(0, STEP)
        for k in range(0, b, STEP):
            x = _tile(X_ptr + k, pitch, lanes, inner, b, b - k)
            inside = (inner[:, None] < b - k) & (columns[None, :] < width)
            y = tl.load(Y_ptr + (k + inner[:, None]) * row + columns[None, :] * column, mask=inside, other=0.0)
            total += dot(x, y, PRECISION)
        return total

    @triton.jit(do_not_specialize=["parts", "slot"])
    def _inner_kernel(
        V_ptr,  # (B, b, n)
        P_ptr,  # (B, b, n)
        Z_ptr,  # (B, b, n)
        D_ptr,  # (B, b, n)
        parts_ptr,  # (B, parts, SUMS, b, b), out: those from `slot` on, one to a program
        n,
        b,
        span,
        parts,
        slot,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        part = tl.program_id(0)
        matrix = tl.program_id(1).to(tl.int64)
        slot += tl.program_id(2)
        X_ptr = V_ptr
        Y_ptr = V_ptr
        if slot == 1:
            X_ptr = P_ptr
            Y_ptr = P_ptr
        if slot == 2:
            X_ptr = Z_ptr
        if slot >= 3:
            X_ptr = D_ptr
        if slot == 4:
            Y_ptr = D_ptr
        if slot == 5:
            Y_ptr = Z_ptr
        X_ptr += matrix * b * n
        Y_ptr += matrix * b * n
        lanes = tl.arange(0, WIDTH)
        columns = tl.arange(0, BLOCK)
        total = tl.zeros([WIDTH, WIDTH], tl.float32)
        end = tl.minimum(n, part * span + span)
        for k in range(part * span, end, BLOCK):
            x = _tile(X_ptr + k, n, lanes, columns, b, end - k)
            y = _tile(Y_ptr + k, n, lanes, columns, b, end - k)
            total += dot(x, tl.trans(y), PRECISION)
        _put(parts_ptr + ((matrix * parts + part) * SUMS + slot) * b * b, b, lanes, lanes, b, b, total)

    @triton.jit(do_not_specialize=["first", "last", "size", "parts"])
    def _total_kernel(
        parts_ptr,  # (B, parts, size)
        sums_ptr,  # (B, size), out
        first,  # of the places that are summed
        last,
        size,
        parts,
        BLOCK: tl.constexpr,
    ):
        matrix = tl.program_id(1).to(tl.int64)
        at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        parts_ptr += matrix * parts * size + at
        for _ in range(parts):
            total += tl.load(parts_ptr, mask=at < last, other=0.0)
            parts_ptr += size
        tl.store(sums_ptr + matrix * size + at, total, mask=at < last)

    @triton.jit
    def _cholesky_kernel(
        sums_ptr,  # (B, SUMS, b, b)
        change_ptr,  # (B, 5, b, b), out: K, where the rows of D'' = K (D - D V^T V) are orthonormal or zero
        pivots_ptr,  # (B, b), out: inf where a row is left out
        b,
        LEAST: tl.constexpr,
        SMALLEST: tl.constexpr,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        STEP: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        along_ptr = sums_ptr + (matrix * SUMS + 3) * b * b  # D V^T
        inner_ptr = along_ptr + b * b  # D D^T
        K_ptr = change_ptr + matrix * 5 * b * b
        lanes = tl.arange(0, WIDTH)
        squares = tl.load(inner_ptr + lanes * (b + 1), mask=lanes < b, other=0.0)
        known = squares > SMALLEST
        unit = tl.where(known, inverse_sqrt(tl.where(known, squares, 1.0)), 0.0)
        M = _tile(inner_ptr, b, lanes, lanes, b, b)
        M -= _times(along_ptr, b, along_ptr, 1, b, lanes, lanes, b, b, PRECISION, STEP)  # D' D'^T
        M = unit[:, None] * M * unit[None, :]
        # columns of the symmetric M, and of U^T: sums along rows stay inside of a warp
        UT = tl.where(lanes[:, None] == lanes[None, :], 1.0, 0.0)
        pivots = tl.full([WIDTH], float("inf"), tl.float32)
        for j in range(b):
            here = lanes[None, :] == j
            column = tl.sum(tl.where(here, M, 0.0), axis=1)
            made = tl.sum(tl.where(here, UT, 0.0), axis=1)
            pivot = tl.sum(tl.where(lanes == j, column, 0.0), axis=0)
            pivot = tl.where(pivot > LEAST, pivot, float("inf"))  # whose rows take nothing from those after them
            factor = tl.where(lanes > j, column / pivot, 0.0)
            M -= column[:, None] * factor[None, :]
            UT -= made[:, None] * factor[None, :]
            pivots = tl.where(lanes == j, pivot, pivots)
        tl.store(pivots_ptr + matrix * b + lanes, pivots, mask=lanes < b)
        kept = pivots < float("inf")
        UT *= unit[:, None] * tl.where(kept, inverse_sqrt(tl.where(kept, pivots, 1.0)), 0.0)[None, :]
        inside = (lanes[:, None] < b) & (lanes[None, :] < b)
        tl.store(K_ptr + lanes[None, :] * b + lanes[:, None], UT, mask=inside)

    @triton.jit
    def _basis_kernel(
        sums_ptr,  # (B, SUMS, b, b)
        G_ptr,  # (B, b, b): D W^T W D^T
        A_ptr,  # (B, 2 b, 2 b), out: W^T W in the basis [V, D'']; -1 for what is left out, after all others
        change_ptr,  # (B, 5, b, b): K; out: L, where D'' = K D - L V; then workspace
        pivots_ptr,  # (B, b)
        b,
        SUMS: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        STEP: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        H_ptr = sums_ptr + (matrix * SUMS + 2) * b * b
        along_ptr = H_ptr + b * b  # D V^T
        image_ptr = H_ptr + 3 * b * b  # D Z^T
        G_ptr += matrix * b * b
        A_ptr += matrix * 4 * b * b
        K_ptr = change_ptr + matrix * 5 * b * b
        mixed_ptr = K_ptr + 2 * b * b  # of D' and V
        work_ptr = K_ptr + 3 * b * b
        lanes = tl.arange(0, WIDTH)
        inside = (lanes[:, None] < b) & (lanes[None, :] < b)
        mixed = _times(along_ptr, b, H_ptr, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(mixed_ptr, b, lanes, lanes, b, b, _tile(image_ptr, b, lanes, lanes, b, b) - mixed)
        L = _times(K_ptr, b, along_ptr, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(K_ptr + b * b, b, lanes, lanes, b, b, L)
        tl.debug_barrier()
        G = _times(image_ptr, b, along_ptr, 1, b, lanes, lanes, b, b, PRECISION, STEP)
        G += _times(along_ptr, b, mixed_ptr, 1, b, lanes, lanes, b, b, PRECISION, STEP)
        _put(work_ptr, b, lanes, lanes, b, b, _tile(G_ptr, b, lanes, lanes, b, b) - G)
        mixed = _times(K_ptr, b, mixed_ptr, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(A_ptr + 2 * b * b, 2 * b, lanes, lanes, b, b, mixed)
        tl.store(A_ptr + b + lanes[None, :] * 2 * b + lanes[:, None], mixed, mask=inside)
        tl.debug_barrier()
        G = _times(K_ptr, b, work_ptr, b, 1, lanes, lanes, b, b, PRECISION, STEP)
        _put(work_ptr + b * b, b, lanes, lanes, b, b, G)
        tl.debug_barrier()
        G = _times(work_ptr + b * b, b, K_ptr, 1, b, lanes, lanes, b, b, PRECISION, STEP)
        left_out = tl.load(pivots_ptr + matrix * b + lanes, mask=lanes < b, other=0.0) == float("inf")
        G -= tl.where((lanes[:, None] == lanes[None, :]) & left_out[:, None], 1.0, 0.0)
        _put(A_ptr + 2 * b * b + b, 2 * b, lanes, lanes, b, b, G)  # symmetric but for its rounding, as is H
        _put(A_ptr, 2 * b, lanes, lanes, b, b, _tile(H_ptr, b, lanes, lanes, b, b))
