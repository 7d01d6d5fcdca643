"""The formats that weights are saved in; code in a file is never run.

`FORMATS` has the suffixes in the order in which a folder is searched; what a file is, its beginning tells.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sosd_fast.checkpoints.dcp import INDEX, DistributedFolder
from sosd_fast.checkpoints.gguf_files import GGUFFile
from sosd_fast.checkpoints.headers import Header, WeightFile
from sosd_fast.checkpoints.refusals import damaged, not_ours
from sosd_fast.checkpoints.torch_files import TorchFile

FORMATS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
_MAX_HEADER = 12 * 2**20  # of safetensors: 190,000 tensors of short names take less than 200 MB to list

# The names of safetensors. torch has no types of less than eight bits that can be computed with.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
_TYPES |= {"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}


class SafetensorsFile:
    """A file of the safetensors library."""

    in_order = False

    def __init__(self, file: Path):
        self._path = file
        self.left_out: dict[str, str] = {}
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if size > _MAX_HEADER and size < file.stat().st_size:
            raise damaged(file, f"a header of {size >> 20} MB")
        self._headers = [self._header(*each) for each in self._slices()]

    def headers(self) -> Iterator[Header]:
        """Yields the header of each tensor."""
        yield from self._headers

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        try:
            with self._open() as opened:
                return {key: opened.get_tensor(key) for key in keys}
        except Exception as error:  # such as a file that was changed
            raise damaged(self._path, error) from error

    def _slices(self) -> list[tuple[str, tuple[int, ...], str]]:
        try:
            with self._open() as opened:
                slices = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118 - not a dict
                return [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices]
        except ImportError:
            raise
        except Exception as error:
            raise damaged(self._path, error) from error

    def _header(self, key: str, shape: tuple[int, ...], name: str) -> Header:
        dtype = _TYPES.get(name, name)
        return Header(key, shape, dtype, math.prod(shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1))

    def _open(self):
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(
                f"analyze: expected safetensors to be installed, got path={self._path}. Run `pip install safetensors`."
            ) from None
        return safe_open(self._path, framework="pt")


def open_weights(file: Path) -> WeightFile:
    """Opens a file by its beginning and its suffix.

    Raises:
        ValueError: it is damaged, has code in it, or is another program's.
    """
    if not file.is_file():
        raise ValueError(f"analyze: expected a file of weights, got path={file}, which is none. Pass a file or folder.")
    if file.name == INDEX:
        return DistributedFolder(file)
    other = not_ours(file)
    if other:
        raise other
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start.startswith(b"GGUF"):
        return GGUFFile(file)
    if file.suffix == ".safetensors" or (start[8:] == b"{" and not start.startswith((b"PK", b"\x80"))):
        return SafetensorsFile(file)
    return TorchFile(file)
