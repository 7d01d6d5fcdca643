"""The formats that weights are saved in, a class each; code in a file is never run.

`WeightFile` says what they are; `FORMATS` has the class of each suffix, in the order in which a folder is searched.
"""

import io
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast

import torch
from torch import Tensor

INDEX = ".metadata"  # of a folder of torch.distributed.checkpoint
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module")  # where training loops put them in a checkpoint
_OTHERS = r"optim|ema"


class Header(NamedTuple):
    """What a file says of one of its tensors before the tensor is read."""

    key: str
    shape: tuple[int, ...]
    bytes: int


class WeightFile(Protocol):
    """A file of weights, or a folder that is read as one.

    Attributes:
        in_order: whether the tensors come in the model's order, as a state_dict's do.
    """

    in_order: bool

    def __init__(self, file: Path): ...

    def headers(self) -> Iterator[Header]:
        """Yields the header of each floating-point tensor of two or more dimensions."""
        ...

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors, which are mapped only as long as they live."""
        ...


class SafetensorsFile:
    """A file of the safetensors library."""

    in_order = False

    def __init__(self, file: Path):
        self._path = file

    def headers(self) -> Iterator[Header]:
        """Yields the header of each matrix."""
        with _safe_open(self._path) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if len(shape) > 1 and 0 not in shape and dtype.startswith(("F", "BF")):
                    bits = int(re.findall(r"\d+", dtype)[0])
                    yield Header(key, shape, math.prod(shape) * bits // 8)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        with _safe_open(self._path) as opened:
            return {key: opened.get_tensor(key) for key in keys}


class TorchFile:
    """A file that torch.save wrote: a state_dict, or a training loop's checkpoint with one in it."""

    in_order = True

    def __init__(self, file: Path):
        self._path = file

    def headers(self) -> Iterator[Header]:
        """Yields the header of each matrix; of those in one memory that of the first."""
        seen = set()
        for key, tensor in _tensors(_torch_load(self._path)):
            where = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if where not in seen:
                yield Header(key, tuple(tensor.shape), tensor.numel() * tensor.element_size())
            seen.add(where)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        tensors = dict(_tensors(_torch_load(self._path)))
        return {key: tensors[key] for key in keys}


class DistributedFolder:
    """A folder of torch.distributed.checkpoint, by its index; the parts of a tensor are joined."""

    in_order = False

    def __init__(self, file: Path):
        self._folder = file.parent
        self._tensors = {tensor.key: tensor for tensor in _distributed(file)}

    def headers(self) -> Iterator[Header]:
        """Yields the header of each matrix."""
        for key, tensor in self._tensors.items():
            yield Header(key, tensor.shape, math.prod(tensor.shape) * tensor.dtype.itemsize)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        return {key: _stitched(self._folder, self._tensors[key]) for key in keys}


FORMATS: dict[str, type[WeightFile]] = {
    ".safetensors": SafetensorsFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
    ".bin": TorchFile,
    ".ckpt": TorchFile,
}


def open_weights(file: Path) -> WeightFile:
    """Opens a file by its name; one of an unknown suffix as torch does."""
    return DistributedFolder(file) if file.name == INDEX else FORMATS.get(file.suffix, TorchFile)(file)


def _safe_open(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            f"analyze: expected safetensors to be installed, got path={file}. Run `pip install safetensors`."
        ) from None
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _torch_load(file: Path, part: IO[bytes] | None = None):
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what matters is whether it can be read
            mmap = part is None and zipfile.is_zipfile(file)
            return torch.load(part or file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|Unsupported|Trying to).*", str(error))
        raise ValueError(
            f"analyze: expected tensors only, got path={file} with other objects "
            f"({what[0][:200] if what else 'not a checkpoint'}). Nothing in it was run; save model.state_dict()."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception | str) -> ValueError:
    return ValueError(
        f"analyze: expected a whole file of weights, got path={file}, which cannot be read "
        f"({(str(error) or type(error).__name__).splitlines()[0]}). It may be truncated: copy or download it again."
    )


def _tensors(checkpoint, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the floating-point matrices of nested dicts, without an optimizer's state."""
    if not prefix and isinstance(checkpoint, Mapping) and not any(isinstance(v, Tensor) for v in checkpoint.values()):
        checkpoint = next((checkpoint[key] for key in _WEIGHTS if key in checkpoint), checkpoint)
    if isinstance(checkpoint, Mapping):
        for key, value in checkpoint.items():
            if not re.match(_OTHERS, str(key)) or isinstance(value, Tensor):
                yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(checkpoint, Tensor) and checkpoint.ndim > 1 and checkpoint.numel():
        if checkpoint.is_floating_point():
            yield prefix, checkpoint


class _Chunked(NamedTuple):
    """A tensor in a folder of torch.distributed.checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]  # offsets, sizes; file, start and length


class _Inert:
    """Stands in for the objects in an index: keeps what it is given, does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Refused(pickle.UnpicklingError):
    pass


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index without calling anything of what it names: its classes become `_Inert`, others are refused."""

    _classes = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if name in self._classes.get(module, ()):
            return _Inert
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _Refused(f"{module}.{name}")


def _distributed(index: Path) -> list[_Chunked]:
    """Reads the index of a folder of torch.distributed.checkpoint, and checks that its files hold what it says."""
    try:
        with open(index, "rb") as file:
            found = _IndexUnpickler(file).load()
    except _Refused as error:
        raise ValueError(
            f"analyze: expected an index of torch.distributed.checkpoint, got path={index} with {error} in it. "
            "Nothing in it was run; save the weights again with torch.distributed.checkpoint.save."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise _damaged(index, error) from error
    try:
        return list(_indexed(index.parent, found))
    except (AttributeError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise _damaged(index, f"not an index of torch.distributed.checkpoint: {error}") from error


def _indexed(folder: Path, found) -> Iterator[_Chunked]:
    tensors = {key: entry for key, entry in found.state_dict_metadata.items() if hasattr(entry, "chunks")}
    where = {(at.fqn, tuple(at.offset)): info for at, info in found.storage_data.items() if hasattr(at, "offset")}
    paths = found.planner_data or {}  # key -> its path in nested dicts
    paths = {key: tuple(map(str, paths.get(key, (key,)))) for key in tensors}
    top = {path[0] for path in paths.values() if len(path) > 1}
    own = next((key for key in _WEIGHTS if key in top), None) if all(len(p) > 1 for p in paths.values()) else None
    sizes: dict[str, int] = {}
    for key, entry in tensors.items():
        shape, dtype, path = tuple(entry.size), entry.properties.state[0], paths[key]
        if len(shape) < 2 or 0 in shape or not dtype.is_floating_point:
            continue
        if path[0] != own and (own or any(re.match(_OTHERS, part) for part in path[:-1])):
            continue
        chunks = {}
        for chunk in entry.chunks:
            offsets, extent = tuple(chunk.offsets), tuple(chunk.sizes)
            if 0 in extent:  # of a rank that holds nothing
                continue
            if any(not 0 <= o <= o + e <= m for o, e, m in zip(offsets, extent, shape, strict=True)):
                raise TypeError(f"{key} of shape {shape} has a part of {extent} at {offsets}")
            info = where.get((key, offsets))
            if info is None:
                raise _missing(folder, f"a place for the part of {key} at {offsets}")
            name, end = info.relative_path, info.offset + info.length
            if Path(name).name != name:
                raise ValueError(
                    f"analyze: expected files inside {folder}, got {INDEX} with relative_path={name!r}. "
                    "Save the weights again with torch.distributed.checkpoint.save."
                )
            if getattr(info, "transform_descriptors", None):
                raise ValueError(
                    f"analyze: expected tensors as torch.save writes them, got path={folder} with {key} under "
                    f"{info.transform_descriptors}. Save the weights without extensions."
                )
            if name not in sizes:
                sizes[name] = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if sizes[name] < 0:
                raise _missing(folder, name)
            if sizes[name] < end:
                raise _damaged(folder / name, f"{sizes[name]} bytes where {key} ends at {end}")
            chunks[offsets] = (offsets, extent, name, info.offset, info.length)
        if sum(math.prod(extent) for _, extent, *_ in chunks.values()) != math.prod(shape):
            raise _missing(folder, f"all parts of {key}")
        yield _Chunked(".".join(path[1:] if own else path), shape, dtype, list(chunks.values()))


def _missing(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"analyze: expected every rank's file of a torch.distributed.checkpoint, got path={folder} without {what}. "
        "Copy them all into one folder."
    )


def _stitched(folder: Path, tensor: _Chunked) -> Tensor:
    """Reads the parts of a tensor, and joins them where there are several."""
    whole = None
    for offsets, extent, name, start, length in tensor.chunks:
        with open(folder / name, "rb") as file:
            part = _torch_load(folder / name, cast(IO[bytes], _Part(file, start, length)))
        if not isinstance(part, Tensor) or tuple(part.shape) != extent or part.dtype != tensor.dtype:
            raise _damaged(folder / name, f"{tensor.key} is not the tensor that {INDEX} tells of")
        if extent == tensor.shape:
            return part
        if whole is None:
            whole = part.new_empty(tensor.shape).fill_(math.nan)  # what overlapping parts would leave out
        whole[tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))] = part
    assert whole is not None  # the parts add up to its size
    return whole


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[:size])
        self._at += count
        return count
