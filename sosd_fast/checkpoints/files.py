"""Files of saved weights, read a few matrices at a time; code in them is not run.

safetensors, Hugging Face folders, torch files, and folders of torch.distributed.checkpoint, whose shards are joined.
"""

import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from torch import Tensor

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".metadata"  # of a folder of torch.distributed.checkpoint
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module")  # where training loops put them in a checkpoint
_OTHERS = r"optim|ema"


class Checkpoint:
    """Saved weights: the shapes of their matrices, and the tensors on demand.

    Args:
        path: a file, or a folder of files.

    Attributes:
        path: as given.
        shapes: key -> shape, of each floating-point tensor of two or more dimensions.

    Raises:
        ValueError: nothing there, a damaged file, one with code in it, or one without matrices.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise ValueError(f"analyze: expected a file or folder of weights, got path={path}. It does not exist.")
        files = files_of(path) if path.is_dir() else [path]
        if not files:
            raise ValueError(
                f"analyze: expected a folder with .safetensors, {', '.join(_TORCH)} files or the {_INDEX} of "
                f"torch.distributed.checkpoint, got path={path} with none. Pass the folder that holds the weights."
            )
        self._file: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self._chunks: dict[str, _Chunked] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            if file.name == _INDEX:
                self._chunks = {each.key: each for each in _distributed(file)}
                headers = ((key, each.shape, each.bytes) for key, each in self._chunks.items())
            else:
                headers = _headers(file)
            for key, shape, size in headers:
                self._file[key], self._bytes[key], self.shapes[key] = file, size, shape
        if files[0].suffix == ".safetensors" or self._chunks:  # whose order is not the model's, as a state_dict's is
            self.shapes = dict(sorted(self.shapes.items(), key=lambda item: _natural(item[0])))
        if not self.shapes:
            raise ValueError(
                f"analyze: expected weights, got path={path} without a floating-point matrix. "
                "Pass a checkpoint of a model."
            )

    def batches(self, count: int) -> Iterator[list[str]]:
        """Yields keys of tensors of one shape and file, up to `count`, together no larger than the largest tensor."""
        largest = max(self._bytes.values())
        groups: dict[tuple, list[str]] = {}
        for key, shape in self.shapes.items():
            groups.setdefault((shape, self._file[key]), []).append(key)
        for keys in groups.values():
            together = max(1, min(count, largest // max(self._bytes[keys[0]], 1)))
            for i in range(0, len(keys), together):
                yield keys[i : i + together]

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors of one file, which is mapped only as long as they live."""
        file = self._file[keys[0]]
        if file.name == _INDEX:
            return {key: _stitched(file.parent, self._chunks[key]) for key in keys}
        if file.suffix == ".safetensors":
            with _safe_open(file) as opened:
                return {key: opened.get_tensor(key) for key in keys}
        tensors = dict(_tensors(_torch_load(file)))
        return {key: tensors[key] for key in keys}


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run directory's saved weights, oldest first."""
    found = {
        path
        for pattern in ("checkpoint*", "checkpoints/*", "step*")
        for path in run_dir.glob(pattern)
        if path.suffix in (".safetensors", *_TORCH) or (path.is_dir() and path.name != "checkpoints" and files_of(path))
    }
    return sorted(found, key=lambda path: (number(path) or 0, path.name))


def number(path: Path) -> int | None:
    """The last number in a path's name, which is usually the step."""
    numbers = re.findall(r"\d+", path.name if path.is_dir() else path.stem)
    return int(numbers[-1]) if numbers else None


def files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards that an index names, or else those of the best kind there is."""
    if (folder / _INDEX).is_file():
        return [folder / _INDEX]
    for pattern in ("*.safetensors", *(f"*{suffix}" for suffix in _TORCH)):
        index = sorted(folder.glob(f"{pattern}.index.json"))
        if index:
            try:
                shards = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"analyze: expected an index with a weight_map, got a damaged {index[0]}.") from None
            outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
            if outside:
                raise ValueError(
                    f"analyze: expected files inside {folder}, got {index[0].name} with {outside[0]!r}. "
                    "Move the shards beside their index."
                )
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(
                    f"analyze: expected all shards of {index[0].name}, got path={folder} without {', '.join(missing)}. "
                    "Download them."
                )
            return [folder / shard for shard in shards]
        found = sorted(
            path
            for path in folder.glob(pattern)
            if not re.search(r"optim|scheduler|scaler|rng_state|training_args", path.name)
        )
        if found:
            return found
    return sorted(folder.glob(f"pytorch_model_fsdp*/{_INDEX}"))[:1]  # as the Trainer saves what FSDP sharded


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yields (key, shape, bytes) of each floating-point tensor of two or more dimensions."""
    if file.suffix == ".safetensors":
        with _safe_open(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if len(shape) > 1 and 0 not in shape and dtype.startswith(("F", "BF")):
                    bits = int(re.findall(r"\d+", dtype)[0])
                    yield key, shape, math.prod(shape) * bits // 8
    else:
        for key, tensor in _tensors(_torch_load(file)):
            yield key, tuple(tensor.shape), tensor.numel() * tensor.element_size()


def _safe_open(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            f"analyze: expected safetensors to be installed, got path={file}. Run `pip install sosd_fast[analyze]`."
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


def _natural(key: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


class _Chunked(NamedTuple):
    """A tensor in a folder of torch.distributed.checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]  # offsets, sizes; file, start and length

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
                    f"analyze: expected files inside {folder}, got {_INDEX} with relative_path={name!r}. "
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
            raise _damaged(folder / name, f"{tensor.key} is not the tensor that {_INDEX} tells of")
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
