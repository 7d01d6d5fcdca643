r"""Symmetric band matrices to tridiagonal form, by chasing bulges.

Sweep s clears column s below its off-diagonal with a reflector of BAND rows. Taken to both sides of the diagonal block
of these rows, it fills the square below, whose first column the next step clears, and so down to the end. A sweep may
follow the one before two steps behind. A program takes SWEEPS sweeps at once, in rounds: all steps of a round
are of different places. Group g of sweeps waits, where several programs share a matrix, for the steps of group
g - 1 before it, which need not be of the same program.

In float64 for every matrix: a chase rounds each entry as often as there are columns, and in float32 flat spectra erred
by 1.2 times their bound (LOG.md#two-stage-built).

Source: Haidar, Ltaief & Dongarra, SC 2011.
"""

import functools

import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import tl, triton
from sosd_fast.kernels.turns import cooperative, places

# Shipped configurations. Of many programs to a matrix each takes a sweep, by one warp, and eight fit on a
# multiprocessor; of few, each takes four sweeps, and a multiprocessor: there quarters took 2.3 times as long as whole
# columns (LOG.md#first-h100).
MANY = {"SWEEPS": 1, "QUARTERS": 4, "num_warps": 1, "maxnreg": 255}
FEW = {"SWEEPS": 4, "QUARTERS": 1, "num_warps": 16, "maxnreg": 128}
PER_SM = 65536 // (32 * MANY["num_warps"] * MANY["maxnreg"])
NEGLIGIBLE = 2.0**-1000  # of a sum of squares: what lies below has lost digits, and is no direction to reflect along

if triton is not None:

    @triton.jit(do_not_specialize=["r", "columns", "programs", "groups"])
    def _chase_kernel(
        band_ptr,  # (B, columns, 2 BAND) float64: entry (i, j), i >= j, at [j, i - j]; zeros where there is none
        counter_ptr,  # (B, groups) zeros: rounds that a group has made
        r,
        columns,  # r + 2 BAND or more
        programs,
        groups,
        NEGLIGIBLE: tl.constexpr,
        COOPERATIVE: tl.constexpr,
        BAND: tl.constexpr,
        SWEEPS: tl.constexpr,
        QUARTERS: tl.constexpr,
    ):
        matrix = tl.program_id(0).to(tl.int64)
        band_ptr += matrix * columns * 2 * BAND
        counter_ptr += matrix * groups
        PITCH: tl.constexpr = 2 * BAND - 1  # entry (i, j) is at i + PITCH j
        q = tl.arange(0, SWEEPS)
        n = tl.arange(0, BAND)
        # Tiles are [sweep, column, quarter, row]: a thread has a row of each quarter, for sums from thread to thread
        # are what takes most.
        ROWS: tl.constexpr = BAND // QUARTERS
        column = n[None, :, None, None]
        quarter = tl.arange(0, QUARTERS)
        row_of = quarter[:, None] * ROWS + tl.arange(0, ROWS)[None, :]  # vectors of rows are [sweep, quarter, row]
        row = row_of[None, None, :, :]
        at = row + PITCH * column + 0 * q[:, None, None, None]
        head = (row_of == 0)[None, :, :]

        for group in range(tl.program_id(1), groups, programs):
            sweep = group * SWEEPS + q
            along = tl.zeros([SWEEPS, BAND], tl.float64)  # the last reflectors, by columns
            tau = tl.zeros([SWEEPS], tl.float64)
            seen = 0
            rounds = (r - 2 - group * SWEEPS) // BAND + 1 + 2 * (SWEEPS - 1)
            for turn in range(0, rounds):
                if COOPERATIVE:
                    # rounds of the group before, after which its last sweep is two steps ahead, or all that it has
                    ahead = tl.minimum(turn + 2 * SWEEPS, (r - 2 - group * SWEEPS + SWEEPS) // BAND + 2 * SWEEPS - 1)
                    if (group > 0) & (seen < ahead):
                        last_ptr = counter_ptr + group - 1
                        while seen < ahead:
                            seen = tl.atomic_add(last_ptr, 0, sem="acquire", scope="gpu")
                tl.debug_barrier()
                step = turn - 2 * q
                start = sweep + 1 + step * BAND  # the first row of the square, and of the diagonal block
                live = (step >= 0) & (start < r)
                first = step == 0  # there the square is a column: its others are of the diagonal block
                left = tl.where(first, start - 1, start - BAND)

                square_ptr = band_ptr + (start + PITCH * left)[:, None, None, None] + at
                block_ptr = band_ptr + (start + PITCH * start)[:, None, None, None] + at
                some = (column == 0) | (step > 0)[:, None, None, None]
                lower = row >= column + 0 * q[:, None, None, None]
                present = (row_of >= 0)[None, :, :] & (q >= 0)[:, None, None]
                if SWEEPS > 1:  # a sweep alone is never beyond its end
                    some = some & live[:, None, None, None]
                    lower = lower & live[:, None, None, None]
                    present = present & live[:, None, None]
                # all that is needed is under way together
                column_ptr = band_ptr + (start + PITCH * left)[:, None, None] + row_of[None, :, :]
                v = tl.load(column_ptr, mask=present, other=0.0)
                square = tl.load(square_ptr, mask=some, other=0.0)
                diagonal_ptr = band_ptr + (start + PITCH * start)[:, None, None] + (1 + PITCH) * row_of[None, :, :]
                diagonal = tl.load(diagonal_ptr, mask=present, other=0.0)
                block = tl.load(block_ptr, mask=lower, other=0.0)

                # the square: the last reflectors from the right, which begin with 1
                y = tl.sum(square * along[:, :, None, None], axis=1) * tau[:, None, None]
                square -= along[:, :, None, None] * y[:, None, :, :]

                # the reflectors that clear its first column
                v -= y
                below, alpha = tl.reduce((tl.where(head, 0.0, v * v), tl.where(head, v, 0.0)), 1, _add_both)
                below, alpha = tl.reduce((below, alpha), 1, _add_both)
                turns = ~(below <= NEGLIGIBLE)  # also NaN, to be passed on
                square_norm = tl.where(turns, alpha * alpha + below, 1.0)
                inverse = tl.rsqrt(square_norm)  # a root and a quotient would take twice as long
                beta = tl.where(turns, tl.where(alpha > 0, -1.0, 1.0) * square_norm * inverse, alpha)
                divisor = tl.where(turns, alpha - beta, 1.0)
                tau = tl.where(turns, 1.0 + tl.abs(alpha) * inverse, 0.0)
                v = tl.where(head, 1.0, v * (1.0 / divisor)[:, None, None])
                v = tl.where(turns[:, None, None], v, 0.0)

                # from the left
                products = tl.sum(tl.sum(square * v[:, None, :, :], axis=2), axis=2) * tau[:, None]
                square -= products[:, :, None, None] * v[:, None, :, :]
                cleared = tl.where(head, beta[:, None, None], 0.0)
                square = tl.where(column == 0, cleared[:, None, :, :], square)
                if SWEEPS > 1:  # warps have read entries of others: the column, and the diagonal
                    tl.debug_barrier()
                tl.store(square_ptr, square, mask=some)

                # the diagonal block, from both sides; of its lower half, which takes the diagonal twice
                along = tl.reshape(v, [SWEEPS, BAND])
                across = tl.sum(tl.sum(block * v[:, None, :, :], axis=2), axis=2)
                w = tl.sum(block * along[:, :, None, None], axis=1) - diagonal * v
                w += tl.reshape(across, [SWEEPS, QUARTERS, ROWS])
                gamma = 0.5 * tau * tl.sum(tl.sum(w * v, axis=1), axis=1)
                w = (w - gamma[:, None, None] * v) * tau[:, None, None]
                block -= tl.reshape(w, [SWEEPS, BAND])[:, :, None, None] * v[:, None, :, :]
                block -= along[:, :, None, None] * w[:, None, :, :]
                tl.store(block_ptr, block, mask=lower)

                tl.debug_barrier()
                if COOPERATIVE:
                    tl.atomic_add(counter_ptr + group, 1, sem="release", scope="gpu")

    @triton.jit
    def _add_both(a, b, c, d):
        return a + c, b + d


def chase(band: Tensor, r: int, programs: int | None = None, *, many: bool = True) -> tuple[Tensor, Tensor]:
    """Reduces band matrices, as `band.banded` gives them, which are used up, in their first r columns.

    Returns:
        d and e, (B, r) float64; the last e counts for nothing.
    """
    B, columns, width = len(band), band.shape[1], band.shape[2] // 2
    if r > 2:
        if programs is None:
            room = places(PER_SM, band.device) if band.is_cuda else 1
            many = room > kernels.multiprocessors(band.device)
            # as many as find work, 2 SWEEPS steps behind one another, and are certain to run at once
            programs = max(1, min(room // B, r // (2 * width * (MANY if many else FEW)["SWEEPS"]) + 1))
        config = MANY if many and programs > 1 else FEW
        groups = -(-(r - 2) // config["SWEEPS"])
        arguments = {
            "band_ptr": band,
            "counter_ptr": torch.zeros(B, groups, dtype=torch.int32, device=band.device),
            "r": r,
            "columns": columns,
            "groups": groups,
            "NEGLIGIBLE": NEGLIGIBLE,
            "BAND": width,
        }
        launch = functools.partial(_chase_kernel[(B, programs)], **arguments, programs=programs)
        if programs == 1 or not cooperative(launch, kernels.options_of(config), band.device):
            _chase_kernel[(B, 1)](**arguments, programs=1, COOPERATIVE=False, **kernels.options_of(config))
    return band[:, :r, 0], band[:, :r, 1]
