r"""Products of a few rows with many matrices that stay where they are: Z = X W^T W, and X W^T W X^T.

Each matrix is taken upright, (m, n) with m >= n, at its address: one launch reads all whose entries lie side by side
in the same direction, of any m. A list of tiles says what each program does. Both ways, X W^T and then times W, a
program multiplies a tile of W with all rows of X; long sums are divided into parts, which a last launch adds up.

W is scaled by powers of two as it is read, so that no entry leaves the range of float32. Products are three of TF32's
on NVIDIA's tensor cores, and their partial sums are added by rounding additions, as in `syrk`. The rows of a product
are those of X, at most 32, so that its factors come from registers (mma.sync). As wgmma takes them, a tile of W went
through shared memory six times, which took three times as long as its way from memory (LOG.md#topk-thin-registers).
"""

# pyright: reportPossiblyUnboundVariable=false
# A second tile of X is there where MORE says so.

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sosd_fast import kernels
from sosd_fast.kernels import tl, triton
from sosd_fast.kernels.launch import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 64  # rows of X
ROWS = 32  # of X in one product
# Three programs are on an H100's multiprocessor at once: what 168 registers allow. Code for other GPUs, and of shapes
# that are no multiples of ALIGNED, whose copies are of single entries, would spill with so few.
CONFIG = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}
REGISTERS, MOST_REGISTERS = 168, 255
PART = 1024  # rows of W in one sum: a column of tiles for each fills a GPU better, and the embedding of GPT-2 has 50257
GRAM_PART = 512  # columns of X W^T in a part of its Gram matrix
ALIGNED = 16  # elements

if triton is not None:
    from sosd_fast.kernels.split import dot

    @triton.jit
    def _thin_kernel(
        W_ptr,  # only its type counts: a matrix is at its address
        where_ptr,  # (B, 4): address, m, pitch, where its X W^T begins
        tiles_ptr,  # (programs, 5): matrix, first column of the result, first and last of the sum, part
        scale_ptr,  # (B, 4): two powers of two, and whether all is finite
        X_ptr,  # (B, b, n), or X W^T
        out_ptr,  # X W^T, or (parts, b, n)
        n,
        b,
        BACK: tl.constexpr,  # whether X W^T is multiplied, with W
        UNIT: tl.constexpr,  # 1: entries of a column of upright W lie side by side; 2: of a row
        EVEN: tl.constexpr,  # whether everything begins at multiples of ALIGNED
        WIDTH: tl.constexpr,  # rows of X in one product, and in another: a power of two each, b together or more
        MORE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        tiles_ptr += tl.program_id(0) * 5
        matrix = tl.load(tiles_ptr)
        first = tl.load(tiles_ptr + 1).to(tl.int32)
        begin = tl.load(tiles_ptr + 2).to(tl.int32)
        end = tl.load(tiles_ptr + 3).to(tl.int32)
        part = tl.load(tiles_ptr + 4)
        address = tl.load(where_ptr + matrix * 4)
        m = tl.load(where_ptr + matrix * 4 + 1).to(tl.int32)
        pitch = tl.load(where_ptr + matrix * 4 + 2)
        start = tl.load(where_ptr + matrix * 4 + 3)
        if EVEN:
            address = tl.multiple_of(address, 16)
            first = tl.multiple_of(first, 16)
            begin = tl.multiple_of(begin, 16)
            end = tl.multiple_of(end, 16)
            m = tl.multiple_of(m, 16)
            pitch = tl.multiple_of(pitch, 16)
        start = tl.multiple_of(start, 16)
        wide = (m + 15) // 16 * 16  # the pitch of X W^T
        A_ptr = address.to(W_ptr.dtype)
        if EVEN:
            A_ptr = tl.multiple_of(A_ptr, 16)  # of the address it is forgotten, and copies would be of 4 bytes
        # As tiles: a scalar's conversion to one would keep copies of W from going straight into a product's operand.
        scale_ptr += matrix * 4 + tl.zeros([1, 1], tl.int32)
        one = tl.load(scale_ptr)
        two = tl.load(scale_ptr + 1)
        finite = tl.load(scale_ptr + 2)

        rows = first + tl.arange(0, BLOCK)
        inner = begin + tl.arange(0, BLOCK_K)
        lanes = tl.arange(0, WIDTH)
        if BACK:
            limit = n
            X_ptr += start
            x_pitch = wide
            out_ptr += part * b * n
            out_pitch = n
        else:
            limit = m
            X_ptr += matrix * b * n
            x_pitch = n
            out_ptr += start
            out_pitch = wide
        if BACK == (UNIT == 2):
            A_ptr += rows[None, :] + inner[:, None] * pitch
            step = BLOCK_K * pitch
        else:
            A_ptr += rows[None, :] * pitch + inner[:, None]
            step = BLOCK_K
        SHORT: tl.constexpr = W_ptr.dtype.element_ty != tl.float32
        x_ptr = X_ptr + lanes[:, None] * x_pitch + inner[None, :]
        total = tl.zeros([WIDTH, BLOCK], tl.float32)
        if MORE > 0:
            others = WIDTH + tl.arange(0, MORE)
            y_ptr = X_ptr + others[:, None] * x_pitch + inner[None, :]
            other = tl.zeros([MORE, BLOCK], tl.float32)
        for k in range(begin, end, BLOCK_K):
            left = end - k + begin
            a = tl.load(A_ptr, mask=(rows[None, :] < limit) & (inner[:, None] < left), other=0.0)
            x = tl.load(x_ptr, mask=(lanes[:, None] < b) & (inner[None, :] < left), other=0.0)
            a = (a.to(tl.float32) * one) * two
            total += dot(x, a, PRECISION, SHORT)
            if MORE > 0:
                y = tl.load(y_ptr, mask=(others[:, None] < b) & (inner[None, :] < left), other=0.0)
                other += dot(y, a, PRECISION, SHORT)
                y_ptr += BLOCK_K
            A_ptr += step
            x_ptr += BLOCK_K
        total = tl.where(finite > 0, total, 0.0)
        to_ptr = out_ptr + lanes[:, None] * out_pitch + rows[None, :]
        tl.store(to_ptr, total, mask=(lanes[:, None] < b) & (rows[None, :] < limit))
        if MORE > 0:
            other = tl.where(finite > 0, other, 0.0)
            to_ptr = out_ptr + others[:, None] * out_pitch + rows[None, :]
            tl.store(to_ptr, other, mask=(others[:, None] < b) & (rows[None, :] < limit))

    @triton.jit
    def _thin_gram_kernel(
        where_ptr,  # as above
        tiles_ptr,  # (parts, 3): matrix, first and last column
        Y_ptr,  # X W^T of all
        out_ptr,  # (parts, b, b)
        b,
        EVEN: tl.constexpr,
        WIDTH: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        part = tl.program_id(0).to(tl.int64)
        matrix = tl.load(tiles_ptr + part * 3)
        begin = tl.load(tiles_ptr + part * 3 + 1).to(tl.int32)
        end = tl.load(tiles_ptr + part * 3 + 2).to(tl.int32)
        m = tl.load(where_ptr + matrix * 4 + 1).to(tl.int32)
        start = tl.multiple_of(tl.load(where_ptr + matrix * 4 + 3), 16)
        begin = tl.multiple_of(begin, 16)
        if EVEN:
            end = tl.multiple_of(end, 16)
        wide = (m + 15) // 16 * 16
        lanes = tl.arange(0, WIDTH)
        inner = begin + tl.arange(0, BLOCK_K)
        Y_ptr += start + lanes[:, None] * wide + inner[None, :]
        total = tl.zeros([WIDTH, WIDTH], tl.float32)
        for k in range(begin, end, BLOCK_K):
            y = tl.load(Y_ptr, mask=(lanes[:, None] < b) & (inner[None, :] < end - k + begin), other=0.0)
            total += dot(y, tl.trans(y), PRECISION)
            Y_ptr += BLOCK_K
        out_ptr += part * b * b + lanes[:, None] * b + lanes[None, :]
        tl.store(out_ptr, total, mask=(lanes[:, None] < b) & (lanes[None, :] < b))

    @triton.jit(do_not_specialize=["size"])
    def _sum_kernel(
        parts_ptr,  # (parts, size)
        firsts_ptr,  # (B + 1): the parts of a matrix
        out_ptr,  # (B, size)
        size,
        BLOCK: tl.constexpr,
    ):
        matrix = tl.program_id(1).to(tl.int64)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(firsts_ptr + matrix)
        last = tl.load(firsts_ptr + matrix + 1)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(first, last):
            total += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)
        tl.store(out_ptr + matrix * size + at, total, mask=at < size)


class _Launch(NamedTuple):
    """The tiles of one launch, among all numbers, and what its kernel is told of them."""

    tiles: slice
    unit: int
    even: bool


class _Plan(NamedTuple):
    """What the shapes alone say."""

    numbers: Tensor  # int64, on the host; pinned, for a copy of other memory would wait for the device
    forth: list[_Launch]
    back: list[_Launch]
    sums: tuple[int, slice]  # how many parts X W^T W has, and the first one of each matrix
    gram: _Launch
    gram_sums: tuple[int, slice]
    starts: list[int]  # where X W^T of a matrix begins, for one row of X; and the end of all


def _power(b: int) -> int:
    """The power of two from b on, as tiles' sides are."""
    return max(16, 1 << (b - 1).bit_length())


def _pieces(sizes: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(which, first) of pieces of some length of ranges, one after the other."""
    counts = -(-sizes // step)
    which = np.repeat(np.arange(len(sizes)), counts)
    return which, (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * step


@functools.lru_cache(maxsize=64)
def _plan(shapes: tuple[tuple[int, int, bool], ...], n: int, pinned: bool) -> _Plan:
    """Plans the launches for matrices given by m, unit and even."""
    m, block = np.array([shape[0] for shape in shapes]), CONFIG["BLOCK"]
    kinds = sorted({shape[1:] for shape in shapes})
    kind = np.array([kinds.index(shape[1:]) for shape in shapes])
    arrays: list[np.ndarray] = []

    def put(*columns) -> slice:
        first, numbers = sum(map(len, arrays)), np.stack(np.broadcast_arrays(*columns), -1).reshape(-1)
        # each begins at a multiple of 16 bytes, or a kernel would be compiled anew where one does not
        arrays.append(np.pad(numbers, (0, len(numbers) % 2)))
        return slice(first, first + len(numbers))

    def launched(*columns) -> list[_Launch]:
        of = kind[columns[0]]
        columns = np.broadcast_arrays(*columns)
        return [_Launch(put(*(x[of == i] for x in columns)), *each) for i, each in enumerate(kinds)]

    def sums(which) -> tuple[int, slice]:
        return len(which), put(np.searchsorted(which, np.arange(len(m) + 1)))

    which, first = _pieces(m, block)
    forth = launched(which, first, 0, n, 0)
    which, begin = _pieces(m, PART)
    end = np.minimum(m[which], begin + PART)
    part = np.argsort(begin - end, kind="stable")  # the longest first
    tiles = (-(-n // block),)
    back = launched(
        *(np.repeat(x[part], tiles) for x in (which,)), np.tile(np.arange(*tiles) * block, len(part)),
        *(np.repeat(x[part], tiles) for x in (begin, end, np.arange(len(part)))),
    )  # fmt: skip
    of_z = sums(which)
    which, begin = _pieces(m, GRAM_PART)
    gram = _Launch(put(which, begin, np.minimum(m[which], begin + GRAM_PART)), 0, not (m % ALIGNED).any())
    of_gram = sums(which)
    numbers = torch.from_numpy(np.concatenate(arrays))
    starts = np.cumsum([0, *(-(-m // ALIGNED) * ALIGNED)]).tolist()
    return _Plan(numbers.pin_memory() if pinned else numbers, forth, back, of_z, gram, of_gram, starts)


class _Placed(NamedTuple):
    """Matrices where they lie, as kernels are told of them."""

    plan: _Plan
    where: Tensor  # (B, 4) int64, on the device
    numbers: Tensor  # of the plan, on the device
    copies: list[Tensor]  # of matrices without a stride of 1


_KEPT = 16  # tables that stay on devices: a training step asks for the same ones each time
_placed: dict[tuple, _Placed] = {}


def _place(matrices: list[Tensor], b: int, device: torch.device) -> _Placed:
    """Tells kernels where matrices lie; tables of the same places are copied to a device once for each stream."""
    on_gpu, stream = device.type == "cuda", kernels.stream_of(device)
    key = (stream, b, *[(W.data_ptr(), W.shape, W.stride()) for W in matrices])
    if (found := _placed.get(key)) is not None:
        return found
    n, copies, shapes, where = min(matrices[0].shape), list[Tensor](), [], []
    for W in matrices:
        W = W.detach() if W.shape[0] >= W.shape[1] else W.detach().mT
        if 1 not in W.stride():
            W = W.contiguous()
            copies.append(W)
        unit = 2 if W.stride(1) == 1 else 1
        address, m, pitch = W.data_ptr(), W.shape[0], W.stride(2 - unit)
        shapes.append((m, unit, not (m % ALIGNED or n % ALIGNED or pitch % ALIGNED or address % 16)))
        where.append((address, m, pitch))
    plan = _plan(tuple(shapes), n, on_gpu)
    places = [(*each, start * b) for each, start in zip(where, plan.starts, strict=False)]
    places = torch.tensor(places, dtype=torch.int64, device="cpu")
    places = places.pin_memory() if on_gpu else places
    numbers = plan.numbers.to(device, non_blocking=True)
    placed = _Placed(plan, places.to(device, non_blocking=True), numbers, copies)
    if stream is not None and not copies:
        if len(_placed) >= _KEPT:
            _placed.pop(next(iter(_placed)), None)
        _placed[key] = placed
    return placed


class Thin:
    """Products of b rows with matrices on a device.

    Args:
        matrices: (m_i, n_i), of DTYPES, alike, of one short side n. Not modified; one without a stride of 1 is copied.
        b: at most MOST.
        scale: (B, 4) float32: two powers of two that a matrix is multiplied by, and 0 where it acts as zero. It may be
            filled after this.
    """

    def __init__(self, matrices: list[Tensor], b: int, scale: Tensor):
        self._b, self._n, self._scale, self._matrices = b, min(matrices[0].shape), scale, matrices
        self._plan, self._where, self._numbers, self._copies = _place(matrices, b, scale.device)
        self._hopper = kernels.is_hopper(scale.device)
        first = min(ROWS, _power(b))
        self._widths = {"WIDTH": first, "MORE": _power(b - first) if b > first else 0}
        self._width, self._precision = _power(b), {"PRECISION": kernels.precision_of_products()}

    def gram_applied(self, X: Tensor) -> Tensor:
        """X W^T W, (B, b, n) float32, for X of that kind."""
        Z = X.new_empty(self._plan.sums[0], self._b, self._n)
        self._launch(self._plan.back, self._forth(X), Z, self._b, True)
        return Z if len(Z) == len(X) else self._summed(Z, self._plan.sums[1])

    def inner_gram(self, X: Tensor) -> Tensor:
        """X W^T W X^T, (B, p, p) float32, for X (B, p, n), p <= b."""
        Y, p = self._forth(X), X.shape[1]
        count, firsts = self._plan.gram_sums
        parts, gram = X.new_empty(count, p, p), self._plan.gram
        launch(
            _thin_gram_kernel, (count,),
            where_ptr=self._where, tiles_ptr=self._numbers[gram.tiles], Y_ptr=Y, out_ptr=parts, b=p, EVEN=gram.even,
            BLOCK_K=32, WIDTH=self._width, num_warps=4, num_stages=3, **self._precision,
        )  # fmt: skip
        return self._summed(parts, firsts)

    def _forth(self, X: Tensor) -> Tensor:
        Y = X.new_empty(self._plan.starts[-1] * self._b)
        self._launch(self._plan.forth, X, Y, X.shape[1], False)
        return Y

    def _launch(self, launches: list[_Launch], X: Tensor, out: Tensor, b: int, back: bool):
        for tiles, unit, even in launches:
            registers = REGISTERS if even and self._hopper else MOST_REGISTERS
            launch(
                _thin_kernel, ((tiles.stop - tiles.start) // 5,),
                W_ptr=self._matrices[0], where_ptr=self._where, tiles_ptr=self._numbers[tiles], scale_ptr=self._scale,
                X_ptr=X, out_ptr=out, n=self._n, b=b, BACK=back, UNIT=unit, EVEN=even, **self._widths,
                **self._precision, **kernels.options_of(CONFIG | {"maxnreg": registers}),
            )  # fmt: skip

    def _summed(self, parts: Tensor, firsts: slice) -> Tensor:
        count, size = firsts.stop - firsts.start - 1, parts[0].numel()
        out = parts.new_empty(count, *parts.shape[1:])
        launch(
            _sum_kernel, (-(-size // 1024), count),
            parts_ptr=parts, firsts_ptr=self._numbers[firsts], out_ptr=out, size=size, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return out
