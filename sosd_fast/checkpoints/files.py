"""Checkpoints on disk: the files of each, the series that a run directory holds, and their tensors a few at a time."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sosd_fast.checkpoints.formats import FORMATS, INDEX, WeightFile, open_weights
from sosd_fast.matrices import kind
from sosd_fast.places import plain_name


class Checkpoint:
    """Saved weights: the shapes of their matrices, and the tensors on demand.

    Args:
        path: a file, or a folder of files.

    Attributes:
        path: as given.
        shapes: key -> shape, of each floating-point tensor of two or more dimensions, tied ones once.

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
                f"analyze: expected a folder with {', '.join(FORMATS)} files or the {INDEX} of "
                f"torch.distributed.checkpoint, got path={path} with none. Pass the folder that holds the weights."
            )
        self._file: dict[str, WeightFile] = {}
        self._bytes: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        opened = [open_weights(file) for file in files]
        for weights in opened:
            for key, shape, size in weights.headers():
                self._file[key], self._bytes[key], self.shapes[key] = weights, size, shape
        if not opened[0].in_order:
            self.shapes = dict(sorted(self.shapes.items(), key=lambda item: _natural(item[0])))
        if not self.shapes:
            raise ValueError(
                f"analyze: expected weights, got path={path} without a floating-point matrix. "
                "Pass a checkpoint of a model."
            )
        self._drop_tied()

    def _drop_tied(self):
        """Leaves out copies of embeddings and heads that hold the same values, as what shares memory is saved."""
        groups: dict[tuple, list[str]] = {}
        for key, shape in self.shapes.items():
            if kind(plain_name(key)[0]) in ("embedding", "head"):
                groups.setdefault((shape, self._bytes[key]), []).append(key)
        for keys in groups.values():
            # A model names what is tied where it comes first: before a head, and before an encoder's own.
            keys.sort(key=lambda key: (kind(plain_name(key)[0]) == "head", key.count(".")))
            for i, key in enumerate(keys[1:], 1):
                if any(first in self.shapes and self._tied(first, key) for first in keys[:i]):
                    del self.shapes[key]

    def _tied(self, first: str, key: str) -> bool:
        a, b = self.read([first])[first], self.read([key])[key]
        return a.dtype == b.dtype and torch.equal(a, b) and bool((a != a.flatten()[0]).any())  # zeros tie nothing

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

    def has_eight_bits(self, key: str) -> bool:
        """Whether a tensor holds eight-bit floats."""
        return self._bytes[key] == math.prod(self.shapes[key])

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors of one file, which is mapped only as long as they live."""
        return self._file[keys[0]].read(keys)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run directory's saved weights, oldest first."""
    found = {
        path
        for pattern in ("checkpoint*", "checkpoints/*", "step*")
        for path in run_dir.glob(pattern)
        if path.suffix in FORMATS or (path.is_dir() and path.name != "checkpoints" and files_of(path))
    }
    return sorted(found, key=lambda path: (number(path) or 0, path.name))


def number(path: Path) -> int | None:
    """The last number in a path's name, which is usually the step."""
    numbers = re.findall(r"\d+", path.name if path.is_dir() else path.stem)
    return int(numbers[-1]) if numbers else None


def files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards that an index names, or else those of the best kind there is."""
    if (folder / INDEX).is_file():
        return [folder / INDEX]
    for pattern in (f"*{suffix}" for suffix in FORMATS):
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
    return sorted(folder.glob(f"pytorch_model_fsdp*/{INDEX}"))[:1]  # as the Trainer saves what FSDP sharded


def _natural(key: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
