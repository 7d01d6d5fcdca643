"""The values of weights in four bits and the like, by the published formulas of each form.

A weight is made in place, a part of its bits or rows at a time: beside it stands at most an eighth of it.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sosd_fast.stored import by_scale

_ROWS = 1024
# Where AutoAWQ puts column i of eight in a word.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The values of sign, two bits of exponent and one of mantissa, by OCP's specification of microscaling formats 1.0.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fields(packed: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Takes the numbers out of 32-bit words along a dimension of a matrix, the lowest bits first: float32."""
    count = 32 // bits
    shape = [size * (count if i == dim else 1) for i, size in enumerate(packed.shape)]
    values = torch.empty(shape, dtype=torch.float32)
    for i in range(count):
        at = order[i] if order else i
        into = values[at::count] if dim == 0 else values[:, at::count]
        into.copy_((packed >> (bits * i)) & (2**bits - 1))
    return values


def e2m1(packed: Tensor) -> Tensor:
    """Takes two numbers out of each byte along the last dimension, the lower bits first: float32."""
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
    shape, packed = packed.shape, packed.flatten(0, -2)
    values = torch.empty(len(packed), 2 * shape[-1])
    for i in range(2):
        for start in range(0, len(packed), _ROWS):
            part = packed[start : start + _ROWS]
            values[start : start + _ROWS, i::2] = table[((part >> (4 * i)) & 15).int()]
    return values.view(*shape[:-1], 2 * shape[-1])


def scaled(W: Tensor, scale: Tensor, blocks: Sequence[int] | None) -> Tensor:
    """Multiplies eight-bit numbers by their scale, as `by_scale` does, some rows at a time: float32."""
    rows = len(scale) if scale.numel() > 1 else 1
    each = blocks[0] if blocks and len(blocks) == W.ndim and rows not in (1, len(W)) else 1
    if rows not in (1, len(W)) and each * rows < len(W):
        each = len(W)  # all at once
    step = each * max(1, _ROWS // each)
    values = torch.empty(W.shape)
    for start in range(0, len(W), step):
        part = W[start : start + step]
        own = scale[start // each : (start + step) // each] if rows > 1 else scale
        read = by_scale(part.shape, own, blocks)
        assert read is not None  # the shapes fit as a whole
        values[start : start + step] = read(part, ())
    return values


def by_group(W: Tensor, scales: Tensor, zeros: Tensor | float, order: Tensor | None) -> Tensor:
    """Subtracts zeros from a matrix (rows, columns), and multiplies by scales (rows, groups), in place.

    Args:
        W: float32.
        scales: of groups of columns.
        zeros: as scales, or one number.
        order: the group of each column; by default equal groups in order.
    """
    size = W.shape[1] // scales.shape[1]
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        for values, change in ((zeros, W[rows].sub_), (scales, W[rows].mul_)):
            if isinstance(values, Tensor):
                part = values[rows].float()
                part = part[:, order.long()] if order is not None else part.repeat_interleave(size, 1)
                change(part)
            else:
                change(values)
    return W


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, order: Tensor | None = None, *, bits: int, offset: int
) -> Tensor:
    """GPTQ's: qweight (in / n, out), qzeros (groups, out / n), scales (groups, out), g_idx (in): (out, in)."""
    W = fields(qweight, bits, 0).T
    return by_group(W, scales.T, fields(qzeros, bits, 1).T + offset, order)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ's: qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out): (out, in)."""
    W = fields(qweight, 4, 1, _AWQ_ORDER).T
    return by_group(W, scales.T, fields(qzeros, 4, 1, _AWQ_ORDER).T, None)


class BnbState(NamedTuple):
    """How bitsandbytes keeps a weight."""

    shape: tuple[int, ...]
    block: int
    nested: bool
    nested_block: int
    nested_offset: float


def bnb_state(packed: Tensor) -> BnbState | None:
    """Reads what bitsandbytes keeps as JSON in a tensor of bytes."""
    try:
        state = json.loads(bytes(packed.to(torch.uint8).flatten().tolist()))
        found = BnbState(
            tuple(state["shape"]),
            state["blocksize"],
            "nested_offset" in state,
            state.get("nested_blocksize", 256),
            float(state.get("nested_offset", 0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = (*found.shape, found.block, found.nested_block)
    return found if all(type(n) is int and 0 < n < 2**40 for n in numbers) and len(found.shape) == 2 else None


def bnb_4bit(parts: list[Tensor], state: BnbState) -> Tensor:
    """Bitsandbytes': bytes of two indices, the higher bits first, into a table of 16, times each block's largest."""
    packed, absmax, table, *nested = parts
    absmax = absmax.flatten()
    if nested:
        values = nested[1].float()[absmax.int()]
        absmax = values * nested[0].float()[torch.arange(len(values)) // state.nested_block] + state.nested_offset
    W = torch.empty(math.prod(state.shape))
    packed, table, absmax = packed.flatten(), table.float(), absmax.float()
    for start in range(0, len(packed), 2**18):
        part = packed[start : start + 2**18].int()
        values = W[2 * start : 2 * (start + len(part))]
        values[::2], values[1::2] = table[part >> 4], table[part & 15]
        values *= absmax[torch.arange(2 * start, 2 * (start + len(part))) // state.block]
    return W.view(state.shape)
