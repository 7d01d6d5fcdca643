"""Folders of torch.distributed.checkpoint: their index, and tensors joined from the parts that ranks wrote."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sosd_fast.checkpoints import pickles
from sosd_fast.checkpoints.headers import Header, shown
from sosd_fast.checkpoints.pickles import Inert, Refused, sizes
from sosd_fast.checkpoints.refusals import damaged
from sosd_fast.checkpoints.torch_files import OTHERS, WEIGHTS, TorchFile

INDEX = ".metadata"


class _Chunk(NamedTuple):
    """A part of a tensor: where it begins in the tensor, its shape, and where it stands."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class _Chunked(NamedTuple):
    """A tensor in parts."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


class DistributedFolder:
    """A folder of torch.distributed.checkpoint, by its index; the parts of a tensor are joined."""

    in_order = False

    def __init__(self, file: Path):
        self._folder = file.parent
        self.left_out: dict[str, str] = {}
        self._tensors = {tensor.key: tensor for tensor in _read_index(file)}

    def headers(self) -> Iterator[Header]:
        """Yields the header of each tensor."""
        for key, tensor in self._tensors.items():
            yield Header(key, tensor.shape, tensor.dtype, math.prod(tensor.shape) * tensor.dtype.itemsize)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors, and joins their parts where there are several."""
        return {key: self._joined(self._tensors[key]) for key in keys}

    def _joined(self, tensor: _Chunked) -> Tensor:
        whole = None
        for chunk in tensor.chunks:
            part = self._part(tensor, chunk)
            if chunk.shape == tensor.shape:
                return part
            if whole is None:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype).fill_(math.nan)  # for what parts leave out
            whole[tuple(slice(o, o + e) for o, e in zip(chunk.offsets, chunk.shape, strict=True))] = part
        assert whole is not None  # the parts add up to its size
        return whole

    def _part(self, tensor: _Chunked, chunk: _Chunk) -> Tensor:
        path = self._folder / chunk.file
        file = TorchFile(path, chunk.start, chunk.length)
        stored = file.tensors.get("")
        if stored is None or stored.shape != chunk.shape or stored.dtype != tensor.dtype:
            raise damaged(path, f"{tensor.key} is not the tensor that {INDEX} tells of")
        return file.tensor(stored)


def _read_index(index: Path) -> list[_Chunked]:
    """Reads an index, and checks that its files hold what it says."""
    try:
        with open(index, "rb") as file:
            found = pickles.load(file)
    except Refused as error:
        raise ValueError(
            f"analyze: expected an index of torch.distributed.checkpoint, got path={index} with {error} in it. "
            "Nothing in it was run; save the weights again with torch.distributed.checkpoint.save."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise damaged(index, error) from error
    try:
        return list(_indexed(index.parent, found))
    except ValueError as error:
        raise error if str(error).startswith("analyze:") else damaged(index, error) from error
    except Exception as error:
        raise damaged(index, f"not an index of torch.distributed.checkpoint: {error}") from error


def _indexed(folder: Path, found: Any) -> Iterator[_Chunked]:
    tensors = {key: entry for key, entry in found.state_dict_metadata.items() if hasattr(entry, "chunks")}
    where = {
        (at.fqn, sizes(at.offset)): info
        for at, info in found.storage_data.items()
        if isinstance(at, Inert) and getattr(at, "offset", None) is not None
    }
    paths = _paths(tensors, getattr(found, "planner_data", None) or {})
    top = {path[0] for path in paths.values() if len(path) > 1}
    nested = all(len(path) > 1 for path in paths.values())
    holding = {paths[key][0] for key, entry in tensors.items() if len(entry.size) > 1}
    own = next((key for key in WEIGHTS if key in top & holding), None) if nested else None
    files = _Files(folder)
    for key, entry in tensors.items():
        shape, dtype, path = sizes(entry.size), entry.properties.state[0], paths[key]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{key} has no type")
        if 0 in shape or not shape:
            continue
        if path[0] != own and (own or any(OTHERS.match(part) for part in path[:-1])):
            continue
        chunks = [files.chunk(key, shape, dtype, chunk, where) for chunk in entry.chunks]
        chunks = list({chunk.offsets: chunk for chunk in chunks if chunk}.values())
        places = {(chunk.file, chunk.start) for chunk in chunks}
        if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape) or len(places) != len(chunks):
            raise _missing(folder, f"all parts of {key}")
        if sum(chunk.length for chunk in chunks) > sum(files.size(name) for name in {c.file for c in chunks}):
            raise TypeError(f"{key} has parts that overlap")
        yield _Chunked(".".join(path[1:] if own else path), shape, dtype, chunks)


def _paths(tensors: dict[Any, Any], planned: Any) -> dict[str, tuple[str, ...]]:
    """The path of each tensor in the nested dicts that were saved."""
    found = {}
    for key in tensors:
        path = planned.get(key, (key,))
        if not isinstance(key, str) or not isinstance(path, tuple) or not path or len(path) > 64:
            raise TypeError("a name that is none")
        if not all(isinstance(part, str) or type(part) is int for part in path):
            raise TypeError(f"{key} has a path that is none")
        found[key] = tuple(map(str, path))
    return found


class _Files:
    """The files that an index names: inside its folder, as long as it says."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._sizes: dict[str, int] = {}

    def size(self, name: str) -> int:
        """Bytes of a file, -1 of one that is missing."""
        if name not in self._sizes:
            path = self._folder / name
            self._sizes[name] = path.stat().st_size if path.is_file() else -1
        return self._sizes[name]

    def chunk(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, chunk: Any, where: Any) -> _Chunk | None:
        """A part of a tensor, None of a rank that holds nothing."""
        offsets, extent = sizes(chunk.offsets), sizes(chunk.sizes)
        if 0 in extent:
            return None
        if any(o + e > m for o, e, m in zip(offsets, extent, shape, strict=True)):
            raise TypeError(f"{key} of shape {shape} has a part of {extent} at {offsets}")
        info = where.get((key, offsets))
        if info is None:
            raise _missing(self._folder, f"a place for the part of {key} at {offsets}")
        name, (start, length) = info.relative_path, sizes((info.offset, info.length))
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"analyze: expected files inside {self._folder}, got {INDEX} with relative_path={str(name)[:200]!r}. "
                "Save the weights again with torch.distributed.checkpoint.save."
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"analyze: expected tensors as torch.save writes them, got path={self._folder} with {shown(key)} under "
                f"{shown(info.transform_descriptors)}. Save the weights without extensions."
            )
        if self.size(name) < 0:
            raise _missing(self._folder, name)
        if self.size(name) < start + length:
            raise damaged(self._folder / name, f"{self.size(name)} bytes where {key} ends at {start + length}")
        if length < math.prod(extent) * dtype.itemsize:
            raise TypeError(f"{key} has a part of {extent} in {length} bytes")
        return _Chunk(offsets, extent, name, start, length)


def _missing(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"analyze: expected every rank's file of a torch.distributed.checkpoint, got path={folder} without "
        f"{shown(what)}. Copy them all into one folder."
    )
