"""Files of torch.save, zip archives and older ones: what they hold without torch.load, and their tensors one by one."""

import io
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from sosd_fast.checkpoints import archives, pickles
from sosd_fast.checkpoints.archives import Part
from sosd_fast.checkpoints.headers import Header
from sosd_fast.checkpoints.pickles import Inert, Refused, Stored
from sosd_fast.checkpoints.refusals import damaged, other_objects

WEIGHTS = ("model", "state_dict", "model_state_dict", "module")  # where training loops put them in a checkpoint
OTHERS = re.compile(r"optim|ema|lr_scheduler|rng|loops$|callbacks$")
_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DEPTH = 64


class TorchFile:
    """A file that torch.save wrote: a state_dict, or a training loop's checkpoint with one in it.

    Args:
        file: the path.
        start: of the part of the file that torch.save wrote.
        length: of that part; by default all.
    """

    in_order = True

    def __init__(self, file: Path, start: int = 0, length: int | None = None):
        self._path = file
        self.left_out: dict[str, str] = {}
        try:
            with open(file, "rb") as opened:
                part = Part(opened, start, file.stat().st_size - start if length is None else length)
                if part.length >= 4 and part.peek(4) == b"PK\3\4":
                    self.value, self._places = _zipped(part)
                else:
                    self.value, self._places = _old(part)
                self._size = part.length
            self._start = start
            self.tensors = self._checked(dict(tensors_of(self.value)))
        except Refused as error:
            raise other_objects(file, str(error)) from None
        except Exception as error:  # a damaged file can fail in any way
            raise damaged(file, error) from error

    def headers(self) -> Iterator[Header]:
        """Yields the header of each tensor, tied ones once."""
        seen: set[tuple[Any, ...]] = set()
        for key, tensor in self.tensors.items():
            place = (tensor.storage.key, *tensor[1:])
            if len(tensor.shape) < 2 or place not in seen:
                yield Header(key, tensor.shape, tensor.dtype, tensor.size)
            seen.add(place)

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors."""
        return {key: self.tensor(self.tensors[key]) for key in keys}

    def tensor(self, stored: Stored) -> Tensor:
        """Reads a tensor."""
        at, _ = self._places[stored.storage.key]
        at += self._start + stored.offset * stored.dtype.itemsize
        if at % stored.dtype.itemsize:  # as in old files
            raw = np.fromfile(self._path, np.uint8, stored.span, offset=at)
        else:
            raw = np.memmap(self._path, np.uint8, "c", at, (stored.span,))
        return torch.from_numpy(raw).view(stored.dtype).as_strided(stored.shape, stored.stride)

    def _checked(self, found: dict[str, object]) -> dict[str, Stored]:
        """The tensors whose values the file has; the others are left out, or it is damaged."""
        kept = {}
        for key, tensor in found.items():
            if not isinstance(tensor, Stored):
                self.left_out[key] = "tensors that are not plain (quantised, sparse, subclasses)"
                continue
            at, size = self._places.get(tensor.storage.key, (0, -1))
            if size < 0 or at + size > self._size or size < tensor.storage.size:
                raise ValueError(f"{key} ends beyond the file")
            end = tensor.offset * tensor.dtype.itemsize + tensor.span
            if max(end, tensor.size) > size:
                self.left_out[key] = "tensors that are larger than their storage (expanded)"
            elif tensor.size:
                kept[key] = tensor
        return kept


def _zipped(part: Part) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The value of a zip archive, and the place and size of each storage."""
    part.seek(0)
    with archives.opened(part) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        pickled = [name for name in infos if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
        if len(pickled) != 1:
            raise ValueError("a zip archive without data.pkl")
        root = pickled[0].removesuffix("data.pkl")
        if f"{root}byteorder" in infos and archive.open(f"{root}byteorder").read(8) == b"big":
            raise ValueError("numbers in big-endian order")
        if infos[pickled[0]].file_size > pickles.MAX_BYTES:
            raise ValueError(f"a pickle of more than {pickles.MAX_BYTES >> 20} MB")
        with archive.open(pickled[0]) as file:
            value = pickles.load(io.BytesIO(file.read(pickles.MAX_BYTES)))
    places = {}
    for name, info in infos.items():
        key = name.removeprefix(f"{root}data/")
        if key != name:
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a zip archive that another tool packed again")
            part.seek(info.header_offset)
            header = part.read(30)
            if header[:4] != b"PK\3\4":
                raise ValueError("a zip archive whose parts are elsewhere")
            places[key] = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)), info.file_size
    return value, places


def _old(part: Part) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The value of a file as torch wrote before 1.6, and the place and size of each storage."""
    first = pickles.load(cast(IO[bytes], part))
    if first != _MAGIC:
        raise ValueError("not a file of torch.save")
    _protocol, system, value, keys = (pickles.load(cast(IO[bytes], part)) for _ in range(4))
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError("numbers in big-endian order")
    storages = {s.key: s for s in _storages(value)}
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        header = part.read(8)
        (count,) = struct.unpack("<q", header)
        storage = storages.get(key) if isinstance(key, str) else None
        size = count * (storage.dtype.itemsize if storage and storage.dtype else 1)
        if storage is None:
            raise ValueError("a storage that no tensor has")
        places[key] = part.tell(), size
        part.seek(part.tell() + max(size, 0))
    return value, places


def _storages(value: object) -> Iterator[pickles.Storage]:
    """Every storage in a value, wherever it stands."""
    waiting, seen = [value], set[int]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, pickles.Storage):
            yield each
        elif isinstance(each, dict | list | tuple | Inert) and id(each) not in seen:
            seen.add(id(each))
            if isinstance(each, Inert):
                waiting += [each.args, each.state]
            else:
                waiting += each.values() if isinstance(each, dict) else each


def tensors_of(checkpoint: object) -> Iterator[tuple[str, object]]:
    """Yields the tensors of nested dicts, without an optimizer's state, and what stands in for tensors.

    Where no tensor stands at the top, the first of the usual entries that holds matrices is taken.
    """
    for _ in range(_MAX_DEPTH):
        if not isinstance(checkpoint, dict) or any(map(is_tensor, checkpoint.values())):
            break
        inner = (checkpoint[key] for key in WEIGHTS if isinstance(checkpoint.get(key), dict))
        found = next((entry for entry in inner if any(_is_matrix(t) for _, t in _nested(entry, "", set(), 0))), None)
        if found is None:
            break
        checkpoint = found
    if isinstance(checkpoint, Inert | Stored):
        if is_tensor(checkpoint):
            yield "", checkpoint
        elif isinstance(checkpoint, Inert):
            raise Refused(_named(checkpoint))
    yield from _nested(checkpoint, "", set(), 0)


def _nested(value: object, prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"dicts that are nested more than {_MAX_DEPTH} deep")
    if not isinstance(value, dict) or id(value) in seen:
        return
    seen.add(id(value))
    for key, each in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if is_tensor(each):
            yield name, each
        elif isinstance(each, dict) and not OTHERS.match(str(key)):
            yield from _nested(each, name, seen, depth + 1)


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or stands in for one that torch rebuilds in another way."""
    return isinstance(value, Stored) or (isinstance(value, Inert) and _named(value).startswith("torch._utils._rebuild"))


def _named(value: Inert) -> str:
    return str(value.of) if isinstance(value.of, pickles.Name) else "an object"


def _is_matrix(value: object) -> bool:
    return isinstance(value, Inert) or (isinstance(value, Stored) and len(value.shape) > 1)
