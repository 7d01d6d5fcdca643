"""Files of llama.cpp; the gguf package turns the blocks of quantised tensors into values.

The header is read here: gguf 0.19 keeps two arrays for each word of the vocabulary, and goes on counting where a length
in the header lies beyond the file's end.
"""

import io
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sosd_fast.checkpoints.headers import Header
from sosd_fast.checkpoints.refusals import damaged

_MAX_COUNT = 2**20  # of tensors, and of settings
_MAX_NAME = 2**16
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a setting, by its type
_STRING, _ARRAY = 8, 9


class _Blocks(NamedTuple):
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """A GGUF file; quantised tensors are read as the values that their blocks stand for."""

    in_order = True

    def __init__(self, file: Path):
        self._path = file
        self.left_out: dict[str, str] = {}
        try:
            with open(file, "rb") as opened:
                found, start = _read_header(opened, file.stat().st_size)
            self._gguf = _package(file)  # not asked for where the header is damaged
            self._tensors = dict(self._placed(found, start, file.stat().st_size))
        except ImportError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise damaged(file, error) from error

    def headers(self) -> Iterator[Header]:
        """Yields the header of each tensor, with the type that its values are read as."""
        for key, (shape, *_) in self._tensors.items():
            yield Header(key, shape, torch.float32, 4 * math.prod(shape))

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        return {key: self._read(self._tensors[key]) for key in keys}

    def _can_read(self, type_: Any) -> bool:
        """Whether gguf knows a type's values: it is asked for those of one block of zeros."""
        _, size = self._gguf.GGML_QUANT_SIZES[type_]
        try:
            self._gguf.quants.dequantize(np.zeros((1, size), np.uint8), type_)
        except NotImplementedError:
            return False
        return True

    def _read(self, tensor: _Blocks) -> Tensor:
        rows = math.prod(tensor.shape[:-1])
        raw = np.memmap(self._path, np.uint8, "r", tensor.start, (rows, tensor.size // rows))
        values = self._gguf.quants.dequantize(raw, tensor.type)
        return torch.from_numpy(np.require(values, np.float32, "W")).view(tensor.shape)

    def _placed(
        self, found: dict[str, tuple[tuple[int, ...], int, int]], start: int, length: int
    ) -> Iterator[tuple[str, _Blocks]]:
        for name, (shape, kind, offset) in found.items():
            type_ = self._gguf.GGMLQuantizationType(kind)
            values, size = self._gguf.GGML_QUANT_SIZES[type_]
            if shape[-1] % values:
                raise ValueError(f"{name} of {shape} in blocks of {values}")
            size = math.prod(shape) // values * size
            if start + offset + size > length:
                raise ValueError(f"{name} ends beyond the file")
            if self._can_read(type_):
                yield name, _Blocks(shape, type_, start + offset, size)
            else:
                self.left_out[name] = f"tensors of GGUF's type {type_.name}"


def _package(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError(f"analyze: expected gguf to be installed, got path={file}. Run `pip install gguf`.") from None
    return gguf


def _read_header(file: io.BufferedReader, length: int) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], int]:
    """Reads each tensor's shape, type and place, and where places are counted from."""
    version, tensors, settings = struct.unpack("<4xIQQ", file.read(24))
    if version not in (2, 3) or max(tensors, settings) > _MAX_COUNT:
        raise ValueError(f"version {version} with {tensors} tensors and {settings} settings")
    alignment = 32
    for _ in range(settings):
        name = _string(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if name == b"general.alignment" and kind == 4:
            (alignment,) = struct.unpack("<I", file.read(4))
        else:
            _skip(file, kind, length)
    found = {}
    for _ in range(tensors):
        name = _string(file).decode()
        (dims,) = struct.unpack("<I", file.read(4))
        if dims > 4 or name in found:
            raise ValueError(f"{name} of {dims} dimensions, or twice")
        *shape, kind, offset = struct.unpack(f"<{dims}QIQ", file.read(8 * dims + 12))
        found[name] = tuple(reversed(shape)) or (1,), kind, offset
    return found, -(-file.tell() // alignment) * alignment


def _string(file: io.BufferedReader) -> bytes:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > _MAX_NAME:
        raise ValueError(f"a name of {size} bytes")
    return file.read(size)


def _skip(file: io.BufferedReader, kind: int, length: int):
    """Passes a setting, which may be a list of strings; lists of lists do not occur."""
    count = 1
    if kind == _ARRAY:
        kind, count = struct.unpack("<IQ", file.read(12))
    if kind == _STRING:
        for _ in range(count):
            (size,) = struct.unpack("<Q", file.read(8))
            file.seek(size, io.SEEK_CUR)
            if file.tell() > length:
                raise ValueError("a setting ends beyond the file")
    else:
        file.seek(_SIZES[kind] * count, io.SEEK_CUR)
