r"""Householder reduction of symmetric matrices to tridiagonal form, in panels.

Column j of a panel is updated by the panel's finished reflectors, a = A_j - V W_j^T - W V_j^T, and reflected:
v = (a - beta e_1) / (a_1 - beta), tau = (beta - a_1) / beta. Then, with y = A v and the unmodified trailing A,
p = y - V (W^T v) - W (V^T v) and w = tau (p - 1/2 tau (p^T v) v). After the panel A <- A - V W^T - W V^T.

Reading A costs most: r^3 / 6 elements, of one triangle, with zeros left of the diagonal as far as tiles reach and half
of the diagonal, so that no product selects. A warp has rows of its own, whose sums need no other warp. Several programs
share a matrix where there are few. Everything but y, v^T y, V^T v, W^T v and the trailing update is computed by each of
them alike, bit for bit, so that they need to wait for one another once a column only.

Source: Dongarra, Hammarling & Sorensen (1989); LAPACK sytrd and latrd.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import Backend, band, tl, triton
from sosd_fast.kernels.chase import chase
from sosd_fast.kernels.turns import at_once, cooperative, places

PANEL = 16
ALIGNED = 32  # elements: passes over rows begin at a multiple, and matrices are padded to one; rows of a strip
# Shipped configurations: tiles of ROWS x COLUMNS a warp with four of a row (two in float64) to a thread, so that
# sums over rows stay inside a thread. One more program to a multiprocessor, with fewer registers each, spills (sm_80).
CONFIGS = {
    torch.float32: {"ROWS": 8, "WARPS": 4, "COLUMNS": 128, "num_warps": 4, "maxnreg": 128},
    torch.float64: {"ROWS": 8, "WARPS": 4, "COLUMNS": 64, "num_warps": 4, "maxnreg": 168},
}
# programs that fit on a multiprocessor, by its 65536 registers
PER_SM = {dtype: 65536 // (32 * config["num_warps"] * config["maxnreg"]) for dtype, config in CONFIGS.items()}
# the side from which matrices go by way of bands (LOG.md#first-h100)
BAND_FROM = {torch.float32: 768, torch.float64: 512}
MOST = 2 * PANEL - 1  # programs to a matrix: what they give is added up by vectors of 2 PANEL

if triton is not None:
    from sosd_fast.kernels.rounded import divide, sqrt

    @triton.jit
    def _wait(counter_ptr, arrivals, COOPERATIVE: tl.constexpr):
        """Waits for all threads of the matrix; the counter has then seen that many arrivals."""
        tl.debug_barrier()
        if COOPERATIVE:
            tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
            while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < arrivals:
                pass
            # Once: an acquire for each look would empty the multiprocessor's first cache, for other kernels too. Its
            # result is compared because Triton 3.6 leaves out an acquire whose result nobody uses.
            while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
                pass
            tl.debug_barrier()

    @triton.jit(do_not_specialize=["programs", "last_event"])
    def _tridiagonal_kernel(
        A_ptr,  # (B, r, r) contiguous; the upper triangle is read, and all is overwritten
        out_ptr,  # (B, 3, r): d, e, tau
        rows_ptr,  # (B, 2 PANEL + 2 (programs + 1) + (WARPS + 1) programs, pitch), as follows
        t_ptr,  # (B, 2, 1 + WARPS, 2 PANEL): W_0^T v, V_0^T v, W_1^T v ..., and parts of 1/2 v^T A v
        counter_ptr,  # (B, 32) zeros
        r,  # a multiple of ALIGNED
        pitch,
        programs,
        first_event,
        last_event,
        COOPERATIVE: tl.constexpr,
        PANEL: tl.constexpr,
        ALIGNED: tl.constexpr,
        ROWS: tl.constexpr,
        WARPS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        program = tl.program_id(1)
        dtype = A_ptr.dtype.element_ty
        WIDTH: tl.constexpr = WARPS * COLUMNS
        A_ptr += matrix * r * r
        out_ptr += matrix * 3 * r
        parts = programs + 1
        panel_ptr = rows_ptr + matrix * (2 * PANEL + 2 * parts + (WARPS + 1) * programs) * pitch  # V_0 W_0 V_1 W_1 ...
        t_ptr += matrix * 2 * (1 + WARPS) * 2 * PANEL
        counter_ptr += matrix * 32
        lanes = tl.arange(0, WIDTH)
        strip = tl.arange(0, ROWS)
        warps = tl.arange(0, WARPS)
        rows = warps[:, None] * ROWS + strip[None, :]  # of a tile of the product with v; a warp has ROWS of them
        columns = tl.arange(0, COLUMNS)
        both = tl.arange(0, 2 * PANEL)

        # zeros left of the diagonal, and half of it: then y = A v + A^T v. The first column is read at once, as it is
        if first_event == 1:
            for s in range(program, r // ALIGNED, programs):
                k = s * ALIGNED + tl.arange(0, ALIGNED)
                tile_ptr = A_ptr + k[:, None] * r + k[None, :]
                diagonal = tl.load(tile_ptr, mask=k[None, :] == k[:, None], other=0.0)
                tl.store(tile_ptr, 0.5 * diagonal, mask=(k[None, :] <= k[:, None]) & (k[:, None] > 0))

        # Masks end at multiples of 16, so that accesses stay 16 bytes wide; what lies left of column j is selected
        # away. An event is a column, or the update before the first column of a panel.
        for event in range(first_event, last_event):
            if event > first_event:
                _wait(counter_ptr, programs * (event - first_event), COOPERATIVE)
            block = event // (PANEL + 1)
            step = event % (PANEL + 1)
            updates = step == 0
            j = block * PANEL + tl.maximum(step - 1, 0)
            finished = tl.where(updates, PANEL, step - 1)  # reflectors in the panel, the last one still without its w
            q = tl.maximum(finished - 1, 0)
            start = j // ALIGNED * ALIGNED
            # parts of A v, of this event and the last, and rows of this program alone
            y_now = panel_ptr + (2 * PANEL + (event % 2) * parts) * pitch
            y_last = panel_ptr + (2 * PANEL + (event + 1) % 2 * parts) * pitch
            own_ptr = panel_ptr + (2 * PANEL + 2 * parts + (WARPS + 1) * program) * pitch
            head_ptr = own_ptr + WARPS * pitch
            t_now = t_ptr + (event % 2) * (1 + WARPS) * 2 * PANEL
            t_last = t_ptr + ((event + 1) % 2) * (1 + WARPS) * 2 * PANEL

            # the last reflector's w, from y = A v; V goes with W's coefficients, and W with V's
            tau = tl.zeros([], dtype)
            half_dot = tl.zeros([], dtype)  # 1/2 tau p^T v
            w_j = tl.zeros([], dtype)
            if finished > 0:
                tau = tl.load(out_ptr + 2 * r + j - 1)
                earlier = both < 2 * q
                t = tl.load(t_last + both, mask=earlier, other=0.0)
                other = tl.load(t_last + (both ^ 1), mask=earlier, other=0.0)
                row = tl.load(panel_ptr + both * pitch + j, mask=earlier, other=0.0)
                dots = -0.5 * t * other
                for warp in tl.static_range(WARPS):
                    dots += tl.load(t_last + 2 * PANEL * (1 + warp) + both, mask=both < programs, other=0.0)
                y_j = tl.load(y_last + both * pitch + j, mask=both <= programs, other=0.0)
                half_dot, w_j = tl.split(tl.sum(tl.join(dots, y_j - row * t), axis=0))
                half_dot *= tau
                w_j = tau * (w_j - half_dot)
                tl.store(head_ptr + (both ^ 1), row)
                tl.debug_barrier()

            # one pass over the panel: w, and column j of the updated matrix into `own`, but not while others update it
            squares = tl.zeros([WIDTH], dtype)
            subhead = tl.zeros([WIDTH], dtype)
            for i0 in range(start, r, WIDTH):
                i = i0 + lanes
                inside = i < r
                a = tl.load(A_ptr + j * r + i, mask=inside & (step > 0), other=0.0)
                a = tl.where((i == j) & (j > 0), 2.0 * a, a)
                if finished > 0:
                    v = tl.load(panel_ptr + 2 * q * pitch + i, mask=inside, other=0.0)
                    w = tl.zeros([WIDTH], dtype)
                    tile_at = strip[:, None] * pitch + i[None, :]
                    for part in range(0, parts, ROWS):
                        some = (part + strip < parts)[:, None] & inside[None, :]
                        w += tl.sum(tl.load(y_last + part * pitch + tile_at, mask=some, other=0.0), axis=0)
                    for m0 in range(0, 2 * q, ROWS):
                        m = m0 + strip
                        some = (m < 2 * q)[:, None] & inside[None, :]
                        tile = tl.load(panel_ptr + m0 * pitch + tile_at, mask=some, other=0.0)
                        # where there is no reflector yet, numbers that meet zeros
                        w -= tl.sum(tile * tl.load(t_last + m)[:, None], axis=0)
                        a -= tl.sum(tile * tl.load(head_ptr + m)[:, None], axis=0)
                    w = tl.where(i >= j, tau * (w - half_dot * v), 0.0)
                    tl.store(panel_ptr + (2 * q + 1) * pitch + i, w, mask=inside)
                    a -= v * w_j + w  # v_j is 1
                tl.store(own_ptr + i, a, mask=inside)
                squares += tl.where(i > j + 1, a * a, 0.0)
                subhead += tl.where(i == j + 1, a, 0.0)

            if updates:
                tl.debug_barrier()
                # the trailing matrix, each program its strips of rows: V goes with W, and W with V
                for s in range(j // ROWS + program, r // ROWS, programs):
                    k = s * ROWS + strip
                    for i0 in range(s * ROWS // ALIGNED * ALIGNED, r, WIDTH):
                        i = i0 + lanes
                        inside = i[None, :] < r
                        tile_ptr = A_ptr + (k[:, None] * r + i[None, :])
                        tile = -tl.load(tile_ptr, mask=inside)  # or each product would be negated
                        for m in range(0, 2 * PANEL, 2):
                            v_k = tl.load(panel_ptr + m * pitch + k)
                            w_k = tl.load(panel_ptr + (m + 1) * pitch + k)
                            v_i = tl.load(panel_ptr + m * pitch + i, mask=i < r)
                            w_i = tl.load(panel_ptr + (m + 1) * pitch + i, mask=i < r)
                            tile += v_k[:, None] * w_i[None, :]
                            tile += w_k[:, None] * v_i[None, :]
                        # the diagonal was and is half: doubling it before the loop cost sm_100 57 instructions
                        tile = tl.where(i[None, :] == k[:, None], 0.5 * (tile - tl.load(tile_ptr, mask=inside)), tile)
                        tl.store(tile_ptr, tl.where(i[None, :] >= k[:, None], -tile, 0.0), mask=inside)
            else:
                square, alpha = tl.split(tl.sum(tl.join(squares, subhead), axis=0))
                live = square != 0  # also NaN, to be passed on
                beta = tl.where(live, tl.where(alpha > 0, -1.0, 1.0) * sqrt(alpha * alpha + square), alpha)
                divisor = tl.where(live, alpha - beta, 1.0)
                inverse = tl.where(live, divide(1.0, divisor), 0.0)
                tau = tl.where(live, divide(-divisor, tl.where(live, beta, 1.0)), 0.0)
                if program == 0:
                    tl.store(out_ptr + r + j, beta)
                    tl.store(out_ptr + 2 * r + j, tau)
                v_ptr = panel_ptr + 2 * finished * pitch
                for i0 in range(start, r, WIDTH):
                    i = i0 + lanes
                    inside = i < r
                    a = tl.load(own_ptr + i, mask=inside, other=0.0)  # this thread's own
                    if program == 0:
                        tl.store(out_ptr + i, a, mask=i == j)
                    v = tl.where(i > j + 1, a * inverse, tl.where(i == j + 1, 1.0, 0.0)).to(dtype)
                    tl.store(v_ptr + i, v, mask=inside)
                    for warp in tl.static_range(WARPS):
                        tl.store(own_ptr + warp * pitch + i, tl.zeros([WIDTH], dtype), mask=inside)
                tl.debug_barrier()

                # V^T v and W^T v, each program some of them, each warp one
                for m0 in range(program * WARPS, 2 * finished, programs * WARPS):
                    m = m0 + warps
                    earlier = m < 2 * finished
                    products = tl.zeros([WARPS, WARPS, COLUMNS], dtype)
                    for i0 in range(start, r, WIDTH):
                        i = i0 + (0 * warps[:, None, None] + warps[None, :, None] * COLUMNS + columns[None, None, :])
                        inside = i < r
                        v = tl.load(v_ptr + i, mask=inside, other=0.0)
                        row_ptr = panel_ptr + m[:, None, None] * pitch + i
                        products += v * tl.load(row_ptr, mask=earlier[:, None, None] & inside, other=0.0)
                    tl.store(t_now + (m ^ 1), tl.sum(tl.sum(products, axis=1), axis=1), mask=earlier)

                # y = A v from the upper triangle, each program its strips of rows: part 0 of y gets what a row gives
                # itself, part `program` + 1 what it gives the columns right of it
                dots = tl.zeros([WARPS], dtype)  # 1/2 v^T A v
                for s in range((j + 1) // ALIGNED + program, r // ALIGNED, programs):
                    k = s * ALIGNED + rows
                    v_rows = tl.load(v_ptr + k)
                    sums = tl.zeros([WARPS, ROWS, COLUMNS], dtype)
                    # from the same column, up to whole tiles, for all strips: a thread adds to what it stored itself
                    for i0 in range(start + (s * ALIGNED - start) // COLUMNS * COLUMNS, r, COLUMNS):
                        i = i0 + columns
                        inside = ((i < r) & (i >= s * ALIGNED))[None, :]
                        tile = tl.load(A_ptr + k[:, :, None] * r + i[None, None, :], mask=inside[None, :, :], other=0.0)
                        v = tl.load(v_ptr + i[None, :] + 0 * warps[:, None], mask=inside, other=0.0)
                        mine_ptr = own_ptr + warps[:, None] * pitch + i[None, :]
                        old = tl.load(mine_ptr, mask=inside, other=0.0)
                        sums += tile * v[:, None, :]
                        tl.store(mine_ptr, old + tl.sum(tile * v_rows[:, :, None], axis=1), mask=inside)
                    y_rows = tl.sum(sums, axis=2)
                    dots += tl.sum(v_rows * y_rows, axis=1)
                    tl.store(y_now + k, y_rows)
                tl.store(t_now + 2 * PANEL * (1 + warps) + program, dots)
                for i0 in range(start, r, WIDTH):
                    tl.debug_barrier()
                    i = i0 + lanes
                    inside = i < r
                    mine = tl.load(own_ptr + warps[:, None] * pitch + i[None, :], mask=inside[None, :], other=0.0)
                    tl.store(y_now + (program + 1) * pitch + i, tl.sum(mine, axis=0), mask=inside)


def tridiagonal(
    A: Tensor, *, overwrite: bool = False, programs: int | None = None, band_from: int | None = None
) -> tuple[Tensor, Tensor]:
    """Reduces symmetric matrices to tridiagonal ones with the same eigenvalues.

    Args:
        A: (..., r, r), float32 or float64, symmetric: one triangle is read. Not modified, unless `overwrite`.
        overwrite: A may be used as workspace, which saves a copy if it is contiguous and r a multiple of 64.
        programs: to share a matrix, on a GPU; None takes as many as fit.
        band_from: the side from which matrices go by way of bands, in two stages; None as is faster on an H100.

    Returns:
        d (..., r) and e (..., r - 1), the diagonal and the off-diagonal (of either sign) of T = Q^T A Q.

    Accuracy:
        Backward stable: the eigenvalues of T are those of A within a modest multiple of eps |A|_2. A matrix that holds
        NaN or Inf gives NaN and leaves the others as they are.

    Raises:
        ValueError: another dtype, no square matrix.
    """
    if not isinstance(A, Tensor) or A.dtype not in CONFIGS or A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        got = f"{tuple(A.shape)} {A.dtype}" if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(
            f"tridiagonal: expected square float32 or float64 matrices (..., r, r), got A={got}. Pass a Gram matrix."
        )
    *batch, r = A.shape[:-1]
    if not A.numel() or kernels.backend_of("tridiagonal", A) is not Backend.TRITON:
        return tridiagonal_ref(A)
    two_stages = r >= (BAND_FROM[A.dtype] if band_from is None else band_from)
    with torch.cuda.device_of(A):
        work = _workspace(A.detach().reshape(-1, r, r), band.ALIGNED if two_stages else ALIGNED, overwrite)
        if two_stages:
            d, e = (t.to(A.dtype) for t in chase(band.banded(work), r, programs))
        else:
            d, e = _launch(work, r, programs)
    return d[:, :r].reshape(*batch, r), e[:, : r - 1].reshape(*batch, r - 1)


def tridiagonal_all(batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`tridiagonal` of batches (B, r, r) of one r and several dtypes, which are used up.

    Bands of all of them are chased at once: a chase takes as long as its columns, one after another, need.
    """
    r = batches[0].shape[-1]
    if len(batches) == 1 or not all(
        kernels.backend_of("tridiagonal", A) is Backend.TRITON and r >= BAND_FROM[A.dtype] for A in batches
    ):
        return [tridiagonal(A, overwrite=True) for A in batches]
    with torch.cuda.device_of(batches[0]):
        work = [_workspace(A, band.ALIGNED, True) for A in batches]
        # A few matrices take as long as many: each panel waits for the one before.
        bands = at_once([functools.partial(band.banded, A) for A in work], [len(A) for A in work], work[0].device)
        d, e = (t.split([len(A) for A in batches]) for t in chase(torch.cat(bands), r))
    return [(x.to(A.dtype), y[:, : r - 1].to(A.dtype)) for A, x, y in zip(batches, d, e, strict=True)]


def _workspace(A: Tensor, aligned: int, overwrite: bool) -> Tensor:
    """A (B, r, r), or a copy of it, padded to a multiple of `aligned` with zeros.

    These change nothing, and rows that begin anywhere would be read an element at a time.
    """
    more = -A.shape[-1] % aligned
    if more:
        return torch.nn.functional.pad(A, (0, more, 0, more))
    return A.contiguous() if overwrite else A.clone(memory_format=torch.contiguous_format)


def _launch(A: Tensor, columns: int, programs: int | None) -> tuple[Tensor, Tensor]:
    """Reduces the first `columns` columns of A (B, r, r), which is overwritten; r is a multiple of ALIGNED."""
    B, r, _ = A.shape
    if programs is None:
        programs = _programs(B, r, A.dtype, A.device) if A.is_cuda else 1
    programs = min(programs, MOST)
    warps, pitch = CONFIGS[A.dtype]["WARPS"], r
    out = A.new_empty(B, 3, r)
    arguments = {
        "A_ptr": A,
        "out_ptr": out,
        "rows_ptr": A.new_empty(B, 2 * PANEL + 2 * (programs + 1) + (warps + 1) * programs, pitch),
        "t_ptr": A.new_zeros(B, 2, 1 + warps, 2 * PANEL),
        "counter_ptr": torch.zeros(B, 32, dtype=torch.int32, device=A.device),
        "r": r,
        "pitch": pitch,
        "programs": programs,
        "PANEL": PANEL,
        "ALIGNED": ALIGNED,
        **kernels.options_of(CONFIGS[A.dtype]),
    }
    last = (columns - 1) // PANEL * (PANEL + 1) + (columns - 1) % PANEL + 2
    launch = _tridiagonal_kernel[(B, programs)]
    if programs == 1:
        launch(**arguments, first_event=1, last_event=last, COOPERATIVE=False)
    elif A.is_cuda:
        if not cooperative(launch, arguments | {"first_event": 1, "last_event": last}, A.device):
            return _launch(A, columns, 1)
    else:  # the interpreter runs programs in turn: none could wait for another
        for event in range(1, last):
            launch(**arguments, first_event=event, last_event=event + 1, COOPERATIVE=False)
    return out[:, 0], out[:, 1]


def _programs(B: int, r: int, dtype: torch.dtype, device: torch.device) -> int:
    """As many programs a matrix as are of use and certain to run at once."""
    # A column of n entries costs each of p programs 3.6 n^2 / 2 p instructions for its strips, and 3.1 p n to add up
    # what all gave (by count, on sm_90), the least where p^2 is 0.58 n; n = 3/4 r stands for all columns.
    return max(1, min(places(PER_SM[dtype], device) // B, math.isqrt(7 * r // 16), r // ALIGNED, MOST))


def tridiagonal_ref(A: Tensor) -> tuple[Tensor, Tensor]:
    """`tridiagonal` in plain torch, a column at a time."""
    A = A.detach().clone()
    r = A.shape[-1]
    for j in range(r - 2):
        a = A[..., j + 1 :, j]
        alpha, norm = a[..., :1], torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        beta = torch.where(alpha > 0, -norm, norm)
        v = a.clone()
        v[..., :1] -= beta
        square = v.square().sum(-1, keepdim=True)
        v = v * torch.where(square == 0, 0.0, (2 / square).sqrt())  # H = I - v v^T
        trailing = A[..., j + 1 :, j + 1 :]
        p = (trailing @ v.unsqueeze(-1)).squeeze(-1)
        w = p - 0.5 * (p * v).sum(-1, keepdim=True) * v
        trailing -= v.unsqueeze(-1) * w.unsqueeze(-2) + w.unsqueeze(-1) * v.unsqueeze(-2)
        A[..., j + 1 : j + 2, j] = beta
    return A.diagonal(dim1=-2, dim2=-1).clone(), A.diagonal(offset=-1, dim1=-2, dim2=-1).clone()
