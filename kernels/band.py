r"""Symmetric matrices to band matrices with the same eigenvalues, by blocks of reflectors.

Panel k, the BAND columns from BAND k on, is made upper triangular below the diagonal block: Q = I - V T V^T. With
Z = A V and the trailing A, W = (Z - 1/2 V T^T V^T Z) T; then A <- A - V W^T - W V^T. A is read twice and written once
for a panel, where the reduction to tridiagonal form reads it for each column. Only tiles on and right of the diagonal
are kept. Products round: by three of TF32's, whose sums are truncated, small eigenvalues of Gaussian matrices erred by
five times as much (LOG.md#first-h100).

Source: Bischof, Lang & Sun (2000); LAPACK sytrd_sy2sb.
"""

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import tl, triton
from sosd_fast.kernels.launch import Launcher

BAND = 32  # columns beside the diagonal
ALIGNED = 64  # what sides are padded to a multiple of, and so of each TILE
# Shipped configurations: tiles of A of TILE x TILE; a panel is read ROWS of its columns and WIDTH of its rows at a
# time. Larger ones spill.
CONFIGS = {
    torch.float32: {"TILE": 64, "ROWS": 8, "WIDTH": 1024, "num_warps": 4},
    torch.float64: {"TILE": 32, "ROWS": 8, "WIDTH": 512, "num_warps": 4},
}
FACTOR = {"num_warps": 16, "maxnreg": 128}
UPDATE, MOST_REGISTERS = {"maxnreg": 168}, {"maxnreg": 255}  # three programs on a multiprocessor; else some spill
TRIANGLE = {"TOGETHER": 4, "num_warps": 4}  # tiles that one turn of a sum takes
# of a sum of squares: what lies below has lost digits, and is no direction to reflect along
NEGLIGIBLE = {torch.float32: 2.0**-110, torch.float64: 2.0**-1000}

if triton is not None:
    from sosd_fast.kernels.rounded import divide, sqrt
    from sosd_fast.kernels.triangle import place

    @triton.jit(do_not_specialize=["panel"])
    def _factor_kernel(
        A_ptr,  # (B, r, r): rows of the panel are used up
        band_ptr,  # (B, r + 2 BAND, 2 BAND) float64, as `chase` takes it
        V_ptr,  # (B, r, BAND): rows of the trailing matrix's tiles are written
        done_ptr,  # (B, BAND, r): workspace
        tau_ptr,  # (B, BAND)
        sums_ptr,  # (B, 2, BAND)
        r,
        panel,
        NEGLIGIBLE: tl.constexpr,
        BAND: tl.constexpr,
        TILE: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        ONCE: tl.constexpr,  # whether WIDTH takes all rows
    ):
        matrix = tl.program_id(0).to(tl.int64)
        dtype = A_ptr.dtype.element_ty
        k = panel * BAND
        rows_ptr = A_ptr + matrix * r * r + k * r  # the panel, a column of it a row
        band_ptr += (matrix * (r + 2 * BAND) + k) * 2 * BAND
        V_ptr += matrix * r * BAND
        done_ptr += matrix * r * BAND
        tau_ptr += matrix * BAND
        dots_ptr = sums_ptr + matrix * 2 * BAND
        w_ptr = dots_ptr + BAND
        lanes = tl.arange(0, WIDTH)
        c = tl.arange(0, BAND)
        strip = tl.arange(0, ROWS)
        begin = (k + BAND) // TILE * TILE

        block = tl.load(rows_ptr + c[:, None] * r + k + c[None, :], mask=c[:, None] <= c[None, :], other=0.0)
        to = band_ptr + c[:, None] * (2 * BAND - 1) + c[None, :]
        tl.store(to, block.to(tl.float64), mask=c[:, None] <= c[None, :])

        if k + BAND < r:
            rows_ptr += k + BAND  # rows below the diagonal block, from 0 to m
            m = r - k - BAND
            # sums of products with column j + 1 below row j + 1, and reflector j taken to what is right of it; the new
            # column j + 1 goes to `done`, for all threads still read the old one
            scales = tl.zeros([BAND], dtype)
            for j in range(-1, BAND):
                if j >= 0:
                    dots = tl.load(dots_ptr + c)
                    top = tl.load(rows_ptr + c * r + j, mask=c > j, other=0.0)
                    alpha = tl.load(done_ptr + j * r + j)
                    below = tl.load(dots_ptr + j)
                    turns = ~(below <= NEGLIGIBLE)  # also NaN, to be passed on
                    beta = tl.where(turns, tl.where(alpha > 0, -1.0, 1.0) * sqrt(alpha * alpha + below), alpha)
                    divisor = tl.where(turns, alpha - beta, 1.0)
                    scale = tl.where(turns, divide(1.0, divisor), 0.0)
                    tau = tl.where(turns, divide(-divisor, tl.where(turns, beta, 1.0)), 0.0)
                    scales = tl.where(c == j, scale, scales)
                    change = tl.where(c > j, tau * (top + scale * dots), 0.0)
                    upper = tl.where(c == j, beta, top - change)
                    tl.store(band_ptr + c * (2 * BAND - 1) + BAND + j, upper.to(tl.float64), mask=c >= j)
                    tl.store(tau_ptr + j, tau)
                    tl.store(w_ptr + c, change * scale)
                    tl.debug_barrier()
                if j + 1 < BAND:
                    known = j >= 0
                    next_ptr = rows_ptr + (j + 1) * r
                    w_next = tl.load(w_ptr + j + 1, mask=known, other=0.0)
                    begins = (j + 1) // 16 * 16
                    first_strip = (j + 1) // ROWS * ROWS
                    for first in range(first_strip, BAND, ROWS):
                        rows = first + strip
                        w = tl.load(w_ptr + rows, mask=(rows > j) & known, other=0.0)
                        sums = tl.zeros([ROWS, WIDTH], dtype)
                        for i0 in range(begins, begins + 1 if ONCE else m, WIDTH):
                            i = i0 + lanes
                            tile_ptr = rows_ptr + rows[:, None] * r + i[None, :]
                            tile = tl.load(tile_ptr, mask=(i < m)[None, :], other=0.0)
                            x = tl.load(done_ptr + j * r + i, mask=(i < m) & known, other=0.0)
                            x = tl.where(i > j, x, 0.0)
                            y = tl.load(next_ptr + i, mask=i < m, other=0.0) - w_next * x
                            tile -= w[:, None] * x[None, :]
                            sums += tile * tl.where(i > j + 1, y, 0.0)[None, :]
                            tl.store(tile_ptr, tile, mask=(rows > j + 1)[:, None] & (i < m)[None, :])
                            tl.store(done_ptr + (j + 1) * r + i, y, mask=(i < m) & (first == first_strip))
                        tl.store(dots_ptr + rows, tl.sum(sums, axis=1))
                tl.debug_barrier()
            # V, with zeros above
            for i0 in range(begin - k - BAND, m, TILE):
                i = i0 + tl.arange(0, TILE)
                some = (i[None, :] > c[:, None]) & (i < m)[None, :]
                v = tl.load(done_ptr + c[:, None] * r + i[None, :], mask=some, other=0.0)
                v *= scales[:, None]
                v = tl.where((i[None, :] == c[:, None]) & (scales != 0)[:, None], 1.0, v)
                at = (i + k + BAND)[None, :] * BAND + c[:, None]
                tl.store(V_ptr + at, v, mask=(i < m)[None, :])

    @triton.jit(do_not_specialize=["panel"])
    def _product_kernel(
        A_ptr,  # (B, r, r)
        V_ptr,  # (B, r, BAND)
        Z_ptr,  # (B, r, BAND): Z = A V
        inner_ptr,  # (B, tiles, 2, BAND, BAND): parts of V^T Z and V^T V
        r,
        panel,
        BAND: tl.constexpr,
        TILE: tl.constexpr,
    ):
        matrix = tl.program_id(1).to(tl.int64)
        k = panel * BAND
        begin = (k + BAND) // TILE
        own = begin + tl.program_id(0)
        A_ptr += matrix * r * r
        V_ptr += matrix * r * BAND
        c = tl.arange(0, BAND)
        n = tl.arange(0, TILE)
        rows = own * TILE + n
        inner_ptr += (matrix * (r // TILE) + own) * 2 * BAND * BAND + c[:, None] * BAND + c[None, :]
        v = tl.load(V_ptr + rows[:, None] * BAND + c[None, :])
        tl.store(inner_ptr + BAND * BAND, tl.dot(tl.trans(v), v, input_precision="ieee"))
        # Each tile's sums begin at zero. Added up, they would be made one long chain of sums by the compiler, of which
        # small eigenvalues erred by two to three times as much (LOG.md#sums-of-tiles); it leaves differences alone.
        total = tl.zeros([TILE, BAND], A_ptr.dtype.element_ty)
        for tile in range(begin, own):  # as columns
            other = tile * TILE + n
            a = tl.load(A_ptr + other[:, None] * r + rows[None, :])
            v = tl.load(V_ptr + other[:, None] * BAND + c[None, :])
            total -= tl.dot(tl.trans(a), v, input_precision="ieee")
        for tile in range(own + 1, r // TILE):
            other = tile * TILE + n
            a = tl.load(A_ptr + rows[:, None] * r + other[None, :])
            v = tl.load(V_ptr + other[:, None] * BAND + c[None, :])
            total -= tl.dot(a, v, input_precision="ieee")
        a = tl.load(A_ptr + rows[:, None] * r + rows[None, :])
        a = tl.where(n[:, None] <= n[None, :], a, tl.trans(a))
        v = tl.load(V_ptr + rows[:, None] * BAND + c[None, :])
        total = tl.dot(a, v, input_precision="ieee") - total
        total = tl.where((rows >= k + BAND)[:, None], total, 0.0)
        tl.store(Z_ptr + matrix * r * BAND + rows[:, None] * BAND + c[None, :], total)
        tl.store(inner_ptr, tl.dot(tl.trans(v), total, input_precision="ieee"))

    @triton.jit(do_not_specialize=["panel"])
    def _triangle_kernel(
        inner_ptr,  # (B, tiles, 2, BAND, BAND): parts of V^T Z and V^T V
        tau_ptr,  # (B, BAND)
        factor_ptr,  # (B, 3, BAND, BAND): T, T^T V^T Z, and V^T V
        r,
        panel,
        BAND: tl.constexpr,
        TILE: tl.constexpr,
        TOGETHER: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        begin = (panel + 1) * BAND // TILE
        c = tl.arange(0, BAND)
        at = c[:, None] * BAND + c[None, :]
        inner_ptr += matrix * (r // TILE) * 2 * BAND * BAND + at
        tau_ptr += matrix * BAND
        factor_ptr += matrix * 3 * BAND * BAND
        dtype = inner_ptr.dtype.element_ty
        inner = tl.zeros([BAND, BAND], dtype)
        square = tl.zeros([BAND, BAND], dtype)
        for first in range(begin, r // TILE, TOGETHER):
            for i in tl.static_range(TOGETHER):  # under way at once
                some = (at >= 0) & (first + i < r // TILE)
                part_ptr = inner_ptr + (first + i) * 2 * BAND * BAND
                inner += tl.load(part_ptr, mask=some, other=0.0)
                square += tl.load(part_ptr + BAND * BAND, mask=some, other=0.0)
        tl.store(factor_ptr + 2 * BAND * BAND + at, square)
        tl.debug_barrier()
        # T from tau and V^T V, a column at a time; a row of V^T V comes from memory as all threads need it
        factor = tl.zeros([BAND, BAND], dtype)
        for j in range(BAND):
            tau = tl.load(tau_ptr + j)
            row = tl.load(factor_ptr + (2 * BAND + j) * BAND + 0 * c[:, None] + c[None, :])
            products = tl.where(c[None, :] < j, factor * row, 0.0)
            column = tl.where(c == j, tau, -tau * tl.sum(products, axis=1))
            factor = tl.where(c[None, :] == j, column[:, None], factor)
        tl.store(factor_ptr + at, factor)
        tl.store(factor_ptr + BAND * BAND + at, tl.dot(tl.trans(factor), inner, input_precision="ieee"))

    @triton.jit(do_not_specialize=["panel"])
    def _other_factor_kernel(
        V_ptr,  # (B, r, BAND)
        W_ptr,  # (B, r, BAND): Z, and then W
        factor_ptr,  # (B, 3, BAND, BAND)
        r,
        panel,
        BAND: tl.constexpr,
        TILE: tl.constexpr,
    ):
        matrix = tl.program_id(1).to(tl.int64)
        c = tl.arange(0, BAND)
        rows = ((panel + 1) * BAND // TILE + tl.program_id(0)) * TILE + tl.arange(0, TILE)
        factor_ptr += matrix * 3 * BAND * BAND + c[:, None] * BAND + c[None, :]
        at = matrix * r * BAND + rows[:, None] * BAND + c[None, :]
        w = tl.load(W_ptr + at)
        w -= 0.5 * tl.dot(tl.load(V_ptr + at), tl.load(factor_ptr + BAND * BAND), input_precision="ieee")
        tl.store(W_ptr + at, tl.dot(w, tl.load(factor_ptr), input_precision="ieee"))

    @triton.jit(do_not_specialize=["panel"])
    def _update_kernel(
        A_ptr,  # (B, r, r)
        V_ptr,  # (B, r, BAND)
        W_ptr,  # (B, r, BAND)
        r,
        panel,
        BAND: tl.constexpr,
        TILE: tl.constexpr,
    ):
        column, row = place(tl.program_id(0))
        matrix = tl.program_id(1).to(tl.int64)
        k = panel * BAND
        begin = (k + BAND) // TILE
        n = tl.arange(0, TILE)
        rows = (begin + row) * TILE + n
        columns = (begin + column) * TILE + n
        c = tl.arange(0, BAND)
        V_ptr += matrix * r * BAND
        W_ptr += matrix * r * BAND
        left = rows[:, None] * BAND + c[None, :]
        right = columns[None, :] * BAND + c[:, None]
        tile_ptr = A_ptr + matrix * r * r + rows[:, None] * r + columns[None, :]
        v = tl.load(V_ptr + left)
        w = tl.load(W_ptr + right)
        total = tl.dot(v, w, input_precision="ieee")
        a = tl.load(tile_ptr)  # earlier, it would cost a program on each multiprocessor
        w = tl.load(W_ptr + left)
        v = tl.load(V_ptr + right)
        total += tl.dot(w, v, input_precision="ieee")
        tl.store(tile_ptr, a - total)


def banded(A: Tensor) -> Tensor:
    """Reduces A (B, r, r), which is used up, to bands; r is a multiple of ALIGNED, and only one triangle is read.

    Returns:
        (B, r + 2 BAND, 2 BAND) float64: entry (i, j), i >= j, of a matrix at [j, i - j].
    """
    B, r, _ = A.shape
    config = CONFIGS[A.dtype]
    tile, panels = config["TILE"], r // BAND
    tiles = r // tile
    band = torch.zeros(B, r + 2 * BAND, 2 * BAND, dtype=torch.float64, device=A.device)
    V, W = (A.new_empty(B, r, BAND) for _ in range(2))
    launch = Launcher(
        A_ptr=A, band_ptr=band, V_ptr=V, W_ptr=W, done_ptr=W, Z_ptr=W, tau_ptr=A.new_empty(B, BAND),
        inner_ptr=A.new_empty(B, tiles, 2, BAND, BAND), sums_ptr=A.new_empty(B, 2, BAND),
        factor_ptr=A.new_empty(B, 3, BAND, BAND),
    )  # fmt: skip
    sizes = {"r": r, "BAND": BAND, "TILE": tile}
    shared = sizes | {"num_warps": config["num_warps"], "num_stages": 3}
    hopper = kernels.is_hopper(A.device)
    factor = kernels.options_of(FACTOR) | {"NEGLIGIBLE": NEGLIGIBLE[A.dtype]} | sizes
    update = kernels.options_of(UPDATE if hopper else MOST_REGISTERS) | shared
    for panel in range(panels):
        rows = r - (panel + 1) * BAND
        launch(_factor_kernel, (B,), panel=panel, **_passes(A.dtype, rows, hopper), **factor)
        if rows:
            count = tiles - (panel + 1) * BAND // tile
            launch(_product_kernel, (count, B), panel=panel, **shared)
            launch(_triangle_kernel, (B,), panel=panel, **TRIANGLE, **sizes)
            launch(_other_factor_kernel, (count, B), panel=panel, num_warps=4, **sizes)
            launch(_update_kernel, (count * (count + 1) // 2, B), panel=panel, **update)
    return band


def _passes(dtype: torch.dtype, rows: int, hopper: bool) -> dict:
    """How `_factor_kernel` reads the rows of a panel: all at once where they fit, and as few as hold them."""
    width = CONFIGS[dtype]["WIDTH"]
    if rows > width:
        return {"ROWS": CONFIGS[dtype]["ROWS"], "WIDTH": width, "ONCE": False}
    more = dtype == torch.float32 and hopper  # else they spill
    return {"ROWS": 16 if more else 8, "WIDTH": width if 2 * rows > width else width // 2, "ONCE": True}
