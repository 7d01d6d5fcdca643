"""Weights that are kept in fewer bits: what of a file's tensors makes one weight, and the values that it stands for.

Each form is told by the names and shapes of its tensors. What looks quantised and is of no form here is left out with
its scales and zeros, and said.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sosd_fast.checkpoints.headers import Header
from sosd_fast.checkpoints.unpack import awq, bnb_4bit, bnb_state, by_group, e2m1, fields, gptq, scaled
from sosd_fast.stored import by_scale, scale_names

Tensors = Mapping[str, Tensor]


class Weight(NamedTuple):
    """A weight, and the tensors of a file that make it.

    Attributes:
        name: of the weight.
        keys: of its tensors.
        shape: of its values.
        bytes: of its values, as they are measured.
        values: makes the values from the tensors by their keys.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    bytes: int
    values: Callable[[Tensors], Tensor]


class Quantized:
    """What a file's tensors are: weights, parts of weights, and others.

    Args:
        headers: key -> header, of all tensors.
        settings: quantization_config, as transformers saves it.
        read: reads a small tensor, such as one that tells a shape.

    Attributes:
        weights: in the order of their first tensors.
        left_out: key -> what it is, of matrices that are no weights, or cannot be read.
    """

    def __init__(self, headers: Mapping[str, Header], settings: Mapping[str, Any], read: Callable[[str], Tensor]):
        self._headers, self._settings, self._read = headers, settings, read
        self.left_out: dict[str, str] = {}
        self._modules: dict[str, list[str]] = {}
        for key in headers:
            self._modules.setdefault(key.rpartition(".")[0], []).append(key)
        found: dict[str, Weight] = {}  # by the first key
        used: set[str] = set()
        for key in headers:
            for form in _FORMS:
                if key not in used and (weight := form(self, key)):
                    if isinstance(weight, str):
                        self._leave_with_scales(key, weight, used)
                        break
                    found[key] = weight
                    used |= set(weight.keys) | set(self._beside(weight))
        for key, header in headers.items():
            if key not in used and header.is_matrix and not header.is_float and not header.is_eight_bit_float:
                packed = isinstance(header.dtype, str) or header.dtype in _PACKED
                if packed:
                    self._leave_with_scales(key, f"tensors of {_type(header)}, quantised in an unknown form", used)
                else:
                    self.left_out[key] = f"tensors of {_type(header)}"
        for key, header in headers.items():
            if key not in used and header.is_matrix and (header.is_float or header.is_eight_bit_float):
                found[key] = Weight(key, (key,), header.shape, header.bytes, lambda tensors, key=key: tensors[key])
        self.weights = [found[key] for key in headers if key in found]

    def _leave_with_scales(self, key: str, why: str, used: set[str]):
        """Leaves a tensor out, and what stands in the same module: its scales and zeros."""
        module = key.rpartition(".")[0]
        for each in self._modules[module] if module else [key]:
            if each == key or each not in used:
                used.add(each)
                if self._headers[each].is_matrix:
                    self.left_out[each] = why

    def _beside(self, weight: Weight) -> Iterator[str]:
        """What else a form keeps for a weight, which is no weight itself."""
        for name in ("input_scale", "input_global_scale", "weight_zero_point", "weight_g_idx", "weight_format"):
            yield f"{weight.name.rpartition('.')[0]}.{name}"

    def _sibling(self, key: str, *names: str) -> list[Header | None]:
        module = key.rpartition(".")[0]
        return [self._headers.get(f"{module}.{name}".lstrip(".")) for name in names]

    def _setting(self, name: str) -> Any:
        """A setting, also where compressed-tensors keeps it: of its groups, where they agree."""
        groups = self._settings.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        inner = [g["weights"].get(name) for g in groups if isinstance(g, dict) and isinstance(g.get("weights"), dict)]
        own = self._settings.get(name)
        return own if own is not None else inner[0] if inner and all(i == inner[0] for i in inner) else None

    # Each form returns None for a tensor that is not of it, a reason where its values cannot be told.

    def _gptq_or_awq(self, key: str) -> Weight | str | None:
        if not re.search(r"(^|\.)qweight$", key):
            return None
        zeros, scales, order = self._sibling(key, "qzeros", "scales", "g_idx")
        packed = self._headers[key]
        if not zeros or not scales or not all(len(h.shape) == 2 for h in (packed, zeros, scales)):
            return "tensors of GPTQ or AWQ without zeros or scales"
        (rows, columns), (groups, out) = packed.shape, scales.shape
        bits = 32 * zeros.shape[1] // max(out, 1)
        if bits not in (2, 4, 8) or zeros.shape != (groups, out * bits // 32) or packed.dtype != torch.int32:
            return f"tensors of GPTQ or AWQ in {self._setting('bits') or bits} bits"
        keys = tuple(h.key for h in (packed, zeros, scales, order) if h)
        if columns == out and (order is None or order.shape == (rows * 32 // bits,)):
            size = rows * 32 // bits
            offset = 0 if self._setting("checkpoint_format") == "gptq_v2" else 1

            def values(tensors: Tensors) -> Tensor:
                return gptq(*(tensors[k] for k in keys), bits=bits, offset=offset)  # pyright: ignore[reportCallIssue]
        elif columns * 32 == out * bits and bits == 4:
            size, keys = rows, keys[:3]

            def values(tensors: Tensors) -> Tensor:
                return awq(*(tensors[k] for k in keys))  # pyright: ignore[reportCallIssue]
        else:
            return "tensors of GPTQ or AWQ whose shapes do not fit"
        if size % groups:
            return "tensors of GPTQ or AWQ whose shapes do not fit"
        return self._weight(key, "weight", keys, (out, size), values)

    def _bitsandbytes_4bit(self, key: str) -> Weight | str | None:
        found = re.search(r"^(.*)\.quant_state\.bitsandbytes__(nf4|fp4)$", key)
        if not found:
            return None
        base = found[1]
        names = (base, f"{base}.absmax", f"{base}.quant_map", f"{base}.nested_absmax", f"{base}.nested_quant_map")
        state = bnb_state(self._small(key))
        packed = self._headers.get(base)
        keys = tuple(name for name in names if name in self._headers)
        if not packed or len(keys) not in (3, 5) or not state or math.prod(packed.shape) * 2 != math.prod(state.shape):
            return "tensors of bitsandbytes in four bits whose state does not fit"
        if state.nested != (len(keys) == 5):
            return "tensors of bitsandbytes in four bits whose state does not fit"
        weight = self._weight(base, None, keys, state.shape, lambda t: bnb_4bit([t[k] for k in keys], state))
        return weight._replace(keys=(*keys, key))

    def _bitsandbytes_8bit(self, key: str) -> Weight | str | None:
        if not re.search(r"(^|\.)SCB$", key):
            return None
        (packed,) = self._sibling(key, "weight")
        scale = self._headers[key]
        if not packed or packed.dtype != torch.int8 or len(packed.shape) != 2 or scale.shape != packed.shape[:1]:
            return "tensors of bitsandbytes in eight bits whose scale does not fit"
        keys = (packed.key, key)
        return self._weight(
            key, "weight", keys, packed.shape, lambda t: t[keys[0]].float() * (t[keys[1]].float() / 127)[:, None]
        )

    def _compressed(self, key: str) -> Weight | str | None:
        """Integers of compressed-tensors, packed in 32 bits; its and ModelOpt's numbers of four bits."""
        packed = self._headers[key]
        own = key.rpartition(".")[2]
        if own not in ("weight_packed", "weight") or packed.dtype not in (torch.int32, torch.uint8):
            return None
        if len(packed.shape) != 2:
            return None
        scale, shape, zero, order = self._sibling(
            key, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"
        )
        if packed.dtype == torch.uint8:
            return self._e2m1(key, packed, scale)
        if own != "weight_packed" or not scale or len(scale.shape) != 2:
            return None
        bits = self._setting("num_bits")
        size = int(self._small(shape.key)[-1]) if shape and math.prod(shape.shape) == 2 else 0
        rows, words = packed.shape
        bits = bits if isinstance(bits, int) else 32 * words // max(size, 1)
        if bits not in (2, 4, 8) or -(-size * bits // 32) != words or scale.shape[0] != rows:
            return f"tensors of compressed-tensors packed in {bits} bits"
        groups = scale.shape[1]
        if size % groups or (order and order.shape != (size,)):
            return "tensors of compressed-tensors whose groups do not fit"
        if zero and zero.shape not in ((-(-rows * bits // 32), groups), (rows, groups)):
            return "tensors of compressed-tensors whose zeros do not fit"
        keys = tuple(h.key for h in (packed, scale, zero, order) if h)

        def values(tensors: Tensors) -> Tensor:
            W = fields(tensors[packed.key], bits, 1)[:, :size]
            zeros: Tensor | float = 2 ** (bits - 1)
            if zero:
                Z = tensors[zero.key]
                zeros = fields(Z, bits, 0)[:rows] if Z.dtype == torch.int32 else Z.float() + zeros
            return by_group(W, tensors[scale.key], zeros, tensors[order.key] if order else None)

        weight = self._weight(key, "weight", keys, (rows, size), values)
        return weight._replace(keys=(*keys, *([shape.key] if shape else [])))

    def _e2m1(self, key: str, packed: Header, scale: Header | None) -> Weight | None:
        divisor, factor = self._sibling(key, "weight_global_scale", "weight_scale_2")
        last = divisor or factor
        rows, size = packed.shape[0], 2 * packed.shape[1]
        if not scale or not last or math.prod(last.shape) != 1 or scale.shape[:1] != (rows,) or len(scale.shape) != 2:
            return None
        if not scale.is_eight_bit_float or size % scale.shape[1]:
            return None
        keys = (packed.key, scale.key, last.key)

        def values(tensors: Tensors) -> Tensor:
            whole = tensors[last.key].float().reshape(())
            scales = tensors[scale.key].float()
            return by_group(e2m1(tensors[packed.key]), scales / whole if divisor else scales * whole, 0, None)

        return self._weight(key, "weight", keys, (rows, size), values)

    def _mxfp4(self, key: str) -> Weight | None:
        """gpt-oss's experts (E, out, blocks, 16), which its model has transposed: (E, in, out)."""
        if not key.endswith("_blocks"):
            return None
        blocks, scale = self._headers[key], self._headers.get(f"{key.removesuffix('_blocks')}_scales")
        if not scale or blocks.dtype != torch.uint8 or scale.dtype != torch.uint8 or blocks.shape[:-1] != scale.shape:
            return None
        if len(blocks.shape) != 4:
            return None
        experts, out, count, half = blocks.shape
        keys = (key, scale.key)

        def values(tensors: Tensors) -> Tensor:
            W = e2m1(tensors[key]).flatten(2)
            exponents = tensors[scale.key].float() - 127
            return by_group(W.flatten(0, 1), exponents.exp2().flatten(0, 1), 0, None).view_as(W).transpose(1, 2)

        return self._weight(key.removesuffix("_blocks"), None, keys, (experts, count * half * 2, out), values)

    def _scaled(self, key: str) -> Weight | str | None:
        """Floats or integers of eight bits with a scale beside them: of the tensor, of each row, or of each block."""
        header = self._headers[key]
        if not header.is_matrix or not (header.is_eight_bit_float or header.dtype == torch.int8):
            return None
        path, _, own = key.rpartition(".")
        data = re.fullmatch(r"_(\w+)_qdata", own)  # torchao's
        names = [f"_{data[1]}_scale"] if data else [*scale_names(own), *(["scale"] if own == "weight" else [])]
        scales = [h for h in self._sibling(key, *names) if h and (h.is_float or h.is_eight_bit_float)]
        if not scales:
            if header.is_eight_bit_float and not data:
                return None
            return f"tensors of {_type(header)}, quantised in an unknown form"
        blocks = self._setting("weight_block_size") or self._setting("block_structure")
        reader = None
        if len(scales) == 1:
            scale = scales[0]
            blocks = blocks if isinstance(blocks, list) else _blocks(header.shape, scale.shape)
            # Of a square, a vector of scales could belong to rows or to columns; every form known has rows.
            reader = by_scale(torch.Size(header.shape), torch.empty(scale.shape, device="meta"), blocks)
        if not reader:
            return f"tensors of {_type(header)} with scales that do not tell their blocks"
        keys = (key, scales[0].key)
        zero = next((h for h in self._sibling(key, f"{own}_zero_point") if h), None)
        if zero and not self._is_zero(zero):
            return f"tensors of {_type(header)} with zero points"

        def values(tensors: Tensors) -> Tensor:
            return scaled(tensors[keys[0]], tensors[keys[1]].float(), blocks)

        return self._weight(key, data[1] if data else own, keys, header.shape, values)

    def _is_zero(self, header: Header) -> bool:
        return math.prod(header.shape) <= 2**24 and not self._read(header.key).float().any()

    def _weight(
        self,
        key: str,
        own: str | None,
        keys: tuple[str, ...],
        shape: tuple[int, ...],
        values: Callable[[Tensors], Tensor],
    ) -> Weight:
        name = key if own is None else f"{key.rpartition('.')[0]}.{own}".lstrip(".")
        return Weight(name, keys, tuple(shape), 4 * math.prod(shape), values)

    def _small(self, key: str) -> Tensor:
        """Reads a tensor that tells of others."""
        if math.prod(self._headers[key].shape) > 2**16:
            return torch.empty(0, dtype=torch.uint8)
        return self._read(key)


_FORMS: tuple[Callable[[Quantized, str], Weight | str | None], ...] = (
    Quantized._gptq_or_awq, Quantized._bitsandbytes_4bit, Quantized._bitsandbytes_8bit, Quantized._compressed,
    Quantized._mxfp4, Quantized._scaled,
)  # fmt: skip
_PACKED = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32}


def _type(header: Header) -> str:
    return str(header.dtype).removeprefix("torch.")


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...]) -> list[int] | None:
    """The block sizes that are powers of two, where the last block may be cut: one at most fits a number of blocks."""
    if len(shape) != len(scales):
        return None
    fitting = [
        [2**i for i in range(3, 16) if -(-size // 2**i) == count] if count not in (1, size) else [0]
        for size, count in zip(shape, scales, strict=True)
    ]
    return [each[0] for each in fitting] if all(len(each) == 1 for each in fitting) else None
