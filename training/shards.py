"""Token shards of the public GPT-2 recipe: 256 int32 of header (magic, version, token count), then the tokens.

Magic 20240520 (version 1) means uint16 tokens, magic 20240801 (version 7) uint32; both little-endian.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMATS = {20240520: ((1,), np.dtype("<u2")), 20240801: ((1, 7), np.dtype("<u4"))}  # magic: versions, token dtype
HEADER_BYTES = 4 * 256
CHECKED_AT_ONCE = 2**20  # tokens


class Shard(NamedTuple):
    """A file of token shards: its tokens are read when asked, not mapped, for a file that shrinks would end us."""

    path: Path
    dtype: np.dtype
    count: int

    def __len__(self):
        return self.count

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads tokens start .. start + count - 1, fewer at the end; (count,) uint16 or uint32.

        Raises:
            ValueError: the file has been cut off since it was opened.
        """
        count = max(0, min(count, self.count - start))
        found = np.fromfile(self.path, self.dtype, count, offset=HEADER_BYTES + start * self.dtype.itemsize)
        if len(found) < count:
            raise ValueError(
                f"Shards.read: expected {self.count} tokens, got a file that was cut off meanwhile, {self.path}. "
                "Write or fetch it again, and resume."
            )
        return found


def open_shard(path: str | Path) -> Shard:
    """Reads the header of one shard.

    Raises:
        ValueError: no shard, or a truncated one, by name.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"read_shard: expected a file, got {path}, which is none. Pass token shards.")
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise ValueError(
            f"read_shard: expected a header of {HEADER_BYTES} bytes, got {path} with {path.stat().st_size}. "
            "Write it again."
        )
    magic, version, count = (int(v) for v in header[:3])
    versions, dtype = FORMATS.get(magic, ((), None))
    if version not in versions:
        known = " or ".join(f"magic {m}, version {v[-1]}" for m, (v, _) in FORMATS.items())
        raise ValueError(
            f"read_shard: expected {known}, got magic {magic}, version {version} in {path}. "
            "Pass token shards, such as `python -m training.prepare` writes."
        )
    size, expected = path.stat().st_size, HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise ValueError(
            f"read_shard: expected {expected} bytes for {count} tokens, got {size} bytes in {path}. "
            "It is truncated or corrupt; write or fetch it again."
        )
    return Shard(path, dtype, count)


def read_shard(path: str | Path) -> np.ndarray:
    """Reads the tokens of one shard, (count,) uint16 or uint32.

    Raises:
        ValueError: no shard, or a truncated one, by name.
    """
    shard = open_shard(path)
    return shard.read(0, len(shard))


def write_shard(path: str | Path, tokens: np.ndarray):
    """Writes one shard, whole or not at all; token ids from 65,536 on take the uint32 format.

    Args:
        path: of the file.
        tokens: (count,) integers.
    """
    path = Path(path)
    magic = 20240801 if len(tokens) and int(tokens.max()) >= 2**16 else 20240520
    versions, dtype = FORMATS[magic]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, versions[-1], len(tokens)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype=dtype).tobytes())
    temporary.replace(path)


class Shards:
    """Token shards end to end as one read-only sequence.

    Args:
        paths: the files, in their order.
        vocab: token ids must be below it; checked as they are read. None checks nothing.
    """

    def __init__(self, paths: Iterable[str | Path], vocab: int | None = None):
        self.paths = [Path(path) for path in paths]
        self.vocab = vocab
        self._parts = [open_shard(path) for path in self.paths]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> Tensor:
        """Copies tokens start .. start + count - 1, int64, across the shards' borders.

        Raises:
            ValueError: a token id beyond the vocabulary, naming the file.
        """
        out, filled = np.empty(count, dtype=np.int64), 0
        part = int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            first = start + filled - (int(self._ends[part - 1]) if part else 0)
            piece = self._parts[part].read(first, count - filled)
            if self.vocab is not None and len(piece) and (largest := int(piece.max())) >= self.vocab:
                raise ValueError(
                    f"Shards.read: expected token ids below vocab={self.vocab}, got {largest} in {self.paths[part]}. "
                    "The shard was written with another tokenizer, or is corrupt."
                )
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            part += 1
        return torch.from_numpy(out)

    def check(self):
        """Reads all tokens once.

        Raises:
            ValueError: a token id beyond the vocabulary, naming the file.
        """
        for start in range(0, len(self), CHECKED_AT_ONCE):
            self.read(start, min(CHECKED_AT_ONCE, len(self) - start))
