"""Checkpoints on disk: what the files of each say together, those of a run, tensors on demand."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sosd_fast.checkpoints.dcp import INDEX
from sosd_fast.checkpoints.formats import FORMATS, open_weights
from sosd_fast.checkpoints.headers import Header, WeightFile, shown
from sosd_fast.checkpoints.layouts import Found, files_of, step_of, stepped_folders
from sosd_fast.checkpoints.quantized import Quantized, Weight
from sosd_fast.checkpoints.refusals import damaged

log = logging.getLogger("sosd_fast")
_MAX_CONFIG = 4 * 2**20


class Checkpoint:
    """Saved weights: the shapes of their matrices, and the tensors on demand.

    Args:
        path: a file, or a folder of files.

    Attributes:
        path: as given.
        config: config.json, where transformers saved it beside the weights.
        shapes: name -> shape, of each weight of two or more dimensions.
        notes: sentences on what is left out.

    Raises:
        ValueError: nothing there, a damaged file, one with code in it, the same key in files that no layout joins, or
            no weights.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise ValueError(f"analyze: expected a file or folder of weights, got path={path}. It does not exist.")
        found = files_of(path) if path.is_dir() else Found([path])
        if path.is_dir() and any(path.glob("zero_pp_rank_*_model_states.pt")):
            raise ValueError(
                f"analyze: expected weights, got path={path} of DeepSpeed, whose ZeRO stage 3 keeps them in the files "
                "of its optimizer. Run DeepSpeed's zero_to_fp32.py, which stands in the folder above, and pass what it "
                "writes."
            )
        if not found.files:
            raise ValueError(
                f"analyze: expected a folder with {', '.join(FORMATS)} files or the {INDEX} of "
                f"torch.distributed.checkpoint, got path={path} with none. Pass the folder that holds the weights."
            )
        self.config = _json(path, "config.json")
        self._parts: dict[str, list[WeightFile]] = {}
        self._cut: dict[str, int] = {}  # key -> the dimension along which its parts are joined
        opened = {file: open_weights(file) for file in found.files}
        headers = self._joined(opened, found)
        settings = self.config.get("quantization_config") or _json(path, "quantize_config.json")
        quantized = Quantized(
            headers, settings if isinstance(settings, dict) else {}, lambda key: self._tensors([key])[key]
        )
        weights = quantized.weights
        if not next(iter(opened.values())).in_order:
            weights = sorted(weights, key=lambda weight: _natural(weight.name))
        self._weights = {weight.name: weight for weight in weights}
        if len(self._weights) < len(weights):
            twice = Counter(weight.name for weight in weights).most_common(1)[0][0]
            raise ValueError(
                f"analyze: expected each weight once, got path={path} with {shown(twice)} in two forms. Keep one."
            )
        self.shapes = {name: weight.shape for name, weight in self._weights.items()}
        left_out = dict(quantized.left_out)
        for file in opened.values():
            left_out |= file.left_out
        self.notes = list(_notes(found, left_out))
        deeper = [each for each in stepped_folders(path) if each.is_dir()] if path.is_dir() else []
        if deeper:
            names = ", ".join(sorted((shown(each.name) for each in deeper), key=_natural)[:8])
            self.notes.append(f"left out the checkpoints in folders of it, {names}; pass them to compare them")
        if not self.shapes:
            raise ValueError(
                f"analyze: expected weights, got path={path} without a floating-point matrix"
                f"{' (' + '; '.join(self.notes) + ')' if self.notes else ''}. Pass a checkpoint of a model."
            )

    def batches(self, count: int) -> Iterator[list[str]]:
        """Yields names of weights of one shape and file, up to `count`, together no larger than the largest."""
        largest = max(weight.bytes for weight in self._weights.values())
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, weight in self._weights.items():
            groups.setdefault((weight.shape, id(self._parts[weight.keys[0]][0])), []).append(name)
        for names in groups.values():
            together = max(1, min(count, largest // max(self._weights[names[0]].bytes, 1)))
            for i in range(0, len(names), together):
                yield names[i : i + together]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Reads the values of weights, which are mapped only as long as they live."""
        weights = [self._weights[name] for name in names]
        tensors = self._tensors([key for weight in weights for key in weight.keys])
        return {weight.name: self._values(weight, tensors) for weight in weights}

    def _values(self, weight: Weight, tensors: dict[str, Tensor]) -> Tensor:
        try:
            values = weight.values(tensors)
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            raise damaged(self.path, f"{weight.name}: {error}") from error
        return values.float() if values.dtype.itemsize == 1 else values  # eight-bit floats, exactly

    def _tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors, of each file at once; joins those that are in parts."""
        wanted: dict[int, tuple[WeightFile, list[str]]] = {}
        for key in keys:
            for file in self._parts[key]:
                wanted.setdefault(id(file), (file, []))[1].append(key)
        found = {number: file.read(own) for number, (file, own) in wanted.items()}
        parts = {key: [found[id(file)][key] for file in self._parts[key]] for key in keys}
        return {key: torch.cat(each, self._cut[key]) if key in self._cut else each[0] for key, each in parts.items()}

    def _joined(self, opened: dict[Path, WeightFile], found: Found) -> dict[str, Header]:
        """The headers of all files, of the whole tensor where a layout says how its parts are joined."""
        headers: dict[str, list[Header]] = {}
        names: dict[str, list[str]] = {}
        for path, file in opened.items():
            for header in file.headers():
                if found.home is None or found.home.get(header.key) == path.name:
                    headers.setdefault(header.key, []).append(header)
                    self._parts.setdefault(header.key, []).append(file)
                    names.setdefault(header.key, []).append(
                        str(path.relative_to(self.path)) if path != self.path else ""
                    )
        lost = set(found.home or ()) - set(headers) - {k for file in opened.values() for k in file.left_out}
        if lost:
            raise ValueError(
                f"analyze: expected what the index of path={self.path} names, got files without {shown(min(lost))}. "
                "Download them again."
            )
        vectors = {key: each[0].shape[0] for key, each in headers.items() if len(each[0].shape) == 1}
        return {key: self._whole(key, each, names[key], found, vectors) for key, each in headers.items()}

    def _whole(self, key: str, parts: list[Header], names: list[str], found: Found, vectors: dict[str, int]) -> Header:
        first, layout = parts[0], found.layout
        if (len(parts) == 1 and not layout) or not first.is_matrix:
            return first
        dim = None
        if layout and len(parts) == len(found.files) and len({p.dtype for p in parts}) == 1:
            dim = layout.cut(key, [part.shape for part in parts], vectors)
            if dim is None and len({p.shape for p in parts}) == 1 and self._is_equal(key):
                self._parts[key] = self._parts[key][:1]
                return first
        if dim is None:
            where = f"{names[0]} and {names[-1]}" if len(names) > 1 else f"{names[0]} alone"
            raise ValueError(
                f"analyze: expected each weight in one file, got path={self.path} with {shown(key)} in {where}, and "
                "nothing that says how to join them. Pass one file, join them with the tool that wrote them, or name "
                "the files by their steps to compare them."
            )
        self._cut[key] = dim
        shape = (*first.shape[:dim], sum(p.shape[dim] for p in parts), *first.shape[dim + 1 :])
        return Header(key, shape, first.dtype, sum(p.bytes for p in parts))

    def _is_equal(self, key: str) -> bool:
        first, *others = (file.read([key])[key] for file in self._parts[key])
        return all(_same_bits(first, other) for other in others)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run directory's saved weights, oldest first."""
    found = {
        path
        for pattern in ("checkpoint*", "checkpoints/*", "step*")
        for path in run_dir.glob(pattern)
        if path.suffix in FORMATS or (path.is_dir() and path.name != "checkpoints" and files_of(path).files)
    }
    return sorted(found, key=lambda path: (step_of(path) or 0, _natural(path.name)))


def _notes(found: Found, left_out: dict[str, str]) -> Iterator[str]:
    kinds: dict[str, list[str]] = {}
    for key, why in left_out.items():
        kinds.setdefault(why, []).append(key)
    for why, keys in kinds.items():
        yield f"left out {len(keys)} {why}, such as {shown(keys[0])}"
    for name, why in sorted(found.left_out.items())[:8]:
        yield f"left out the file {name}: {why}"


def _json(path: Path, name: str) -> dict[str, Any]:
    """Settings that stand beside the weights; {} where there are none."""
    file = (path if path.is_dir() else path.parent) / name
    try:
        settings = json.loads(file.read_text()) if file.stat().st_size <= _MAX_CONFIG else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _natural(key: str) -> list[Any]:
    parts = re.split(r"(\d+)", key)
    return [(len(digits := part.lstrip("0")), digits) if i % 2 else part for i, part in enumerate(parts)]
