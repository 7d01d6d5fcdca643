"""Spectra of saved weights: safetensors files, Hugging Face folders, torch checkpoints; no model code, nothing run.

Matrices are read and measured a few at a time, so that memory stays below three times the largest of them and what
torch itself takes.
"""

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sosd_fast.kernels.distribution import Distribution, singular_distribution
from sosd_fast.matrices import DEFAULT_SPLIT, Matrix, matrices_of
from sosd_fast.records import Record
from sosd_fast.svdvals import spectra

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module")  # where training loops put them in a checkpoint
_SUMMARIES = set(Distribution._fields) & set(Record.__dataclass_fields__)
_NOISE = re.compile(r"^(_orig_mod\.|module\.)+")


def analyze(
    checkpoints: Sequence[str | os.PathLike],
    *,
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    method: str = "auto",
    k: int = 32,
) -> Iterator[list[Record]]:
    """Measures the spectra of saved weights.

    Args:
        checkpoints: safetensors files, torch checkpoints, or folders that hold either (in shards or not), in the order
            of training. Torch checkpoints are read with weights_only=True: code in them is not run.
        split: fused matrices and their parts; see `sosd_fast.matrices.find_matrices`.
        method: as in `sosd_fast.svdvals`.
        k: leading values to keep in each record.

    Yields:
        The records of each checkpoint, in the order of its tensors: all singular values in `spectrum`, the SD
        variation from the checkpoint before, and the cosine to the first. The step is the last number in the path's
        name where these increase, else 0, 1, ...; three-dimensional tensors are stacks of matrices, and those of more
        dimensions are convolutions.

    Raises:
        ValueError: nothing there, a damaged file, one with code in it, or one without matrices.
    """
    files = [_Checkpoint(Path(path)) for path in checkpoints]
    previous: dict[str, tuple[int, Tensor]] = {}
    first: dict[str, Tensor] = {}
    for step, checkpoint in zip(_steps([c.path for c in files]), files, strict=True):
        records = []
        order = {key: i for i, key in enumerate(checkpoint.shapes)}
        for keys in checkpoint.batches(torch.get_num_threads()):
            tensors = checkpoint.read(keys)
            views = [(order[key], m) for key in keys for m in _views(key, tensors[key], split)]
            del tensors
            shapes: dict[tuple[int, ...], list[tuple[int, Matrix]]] = {}
            for place, matrix in views:
                shapes.setdefault(tuple(matrix.tensor().shape), []).append((place, matrix))
            for shape, group in shapes.items():
                result = spectra([matrix.tensor() for _, matrix in group], method)
                for j, (place, matrix) in enumerate(group):
                    S, name = result.S[j], matrix.name
                    before = previous.get(name)
                    if before is not None and before[1].shape != S.shape:
                        raise ValueError(
                            f"analyze: expected checkpoints of one model, got {name} with {len(S)} singular values in "
                            f"{checkpoint.path} after {len(before[1])}. Analyze them one by one."
                        )
                    d = singular_distribution(S, before[1] if before else None, first.get(name))
                    values: dict[str, Any] = {
                        f: float(v) for f, v in zip(d._fields, d, strict=True) if f in _SUMMARIES and v is not None
                    }
                    if before is not None and d.variation_l2 is not None:
                        values |= {"interval": step - before[0], "sd_variation": float(d.variation_l2)}
                    record = Record(
                        step, name, (shape[0], shape[1]), result.methods[j], sd_error=float(result.sd_error[j]),
                        topk=tuple(S[:k].tolist()), spectrum=S.numpy(), **values,
                    )  # fmt: skip
                    records.append((place, len(records), record))
                    previous[name] = (step, S)
                    first.setdefault(name, S)
        yield [record for *_, record in sorted(records, key=lambda item: item[:2])]


def parameter_alignment(checkpoints: Sequence[str | os.PathLike]) -> tuple[list[int], list[float]]:
    """Takes the cosine of all matrices' entries, as one vector, to those of the last checkpoint.

    Returns:
        (steps (T,), cosine (T,)).
    """
    files = [_Checkpoint(Path(path)) for path in checkpoints]
    sums = np.zeros((len(files), 2))
    last_norm = 0.0
    for (key,) in files[-1].batches(1):
        last = files[-1].read([key])[key].double()
        last_norm += float(last.square().sum())
        for i, file in enumerate(files):
            if file.shapes.get(key) != tuple(last.shape):
                raise ValueError(f"analyze: expected checkpoints of one model, got {file.path} without {key}.")
            tensor = file.read([key])[key].double()
            sums[i] += float((tensor * last).sum()), float(tensor.square().sum())
    cosines = sums[:, 0] / np.sqrt(sums[:, 1] * last_norm)
    return _steps([f.path for f in files]), cosines.tolist()


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run directory's saved weights, oldest first."""
    found = {
        path
        for pattern in ("checkpoint*", "checkpoints/*", "step*")
        for path in run_dir.glob(pattern)
        if path.suffix in (".safetensors", *_TORCH) or (path.is_dir() and path.name != "checkpoints" and _files(path))
    }
    return sorted(found, key=lambda path: (_number(path) or 0, path.name))


class _Checkpoint:
    """Saved weights: the shapes of its matrices, and their tensors on demand."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            raise ValueError(f"analyze: expected a file or folder of weights, got path={path}. It does not exist.")
        files = _files(path) if path.is_dir() else [path]
        if not files:
            raise ValueError(
                f"analyze: expected a folder with .safetensors, {', '.join(_TORCH)} files, got path={path} with none. "
                "Pass the folder that holds the weights themselves; convert one of torch.distributed.checkpoint by "
                "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
            )
        self._file: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for key, shape, size in _headers(file):
                self._file[key], self._bytes[key], self.shapes[key] = file, size, shape
        if files[0].suffix == ".safetensors":  # which sorts by dtype and name; a state_dict has the model's own order
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
        if file.suffix == ".safetensors":
            with _safe_open(file) as opened:
                return {key: opened.get_tensor(key) for key in keys}
        tensors = dict(_tensors(_torch_load(file)))
        return {key: tensors[key] for key in keys}


def _files(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards that an index names, or else those of the best kind there is."""
    if (folder / ".metadata").exists():
        return []  # of torch.distributed.checkpoint, whose index is a pickle that may hold code
    for pattern in ("*.safetensors", *(f"*{suffix}" for suffix in _TORCH)):
        index = sorted(folder.glob(f"{pattern}.index.json"))
        if index:
            try:
                shards = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"analyze: expected an index with a weight_map, got a damaged {index[0]}.") from None
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
            if not re.search(r"optim|scheduler|rng_state|training_args", path.name)
        )
        if found:
            return found
    return []


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yields (key, shape, bytes) of each floating-point tensor of two or more dimensions."""
    if file.suffix == ".safetensors":
        with _safe_open(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if len(shape) > 1 and 0 not in shape and dtype.startswith(("F", "BF")):
                    bits = int(re.findall(r"\d+", dtype)[0])
                    yield key, shape, int(np.prod(shape)) * bits // 8
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


def _torch_load(file: Path):
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what matters is whether it can be read
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|Unsupported|Trying to).*", str(error))
        raise ValueError(
            f"analyze: expected tensors only, got path={file} with other objects "
            f"({what[0][:200] if what else 'not a checkpoint'}). Nothing in it was run; save model.state_dict()."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
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
            if not re.match(r"optim|ema", str(key)) or isinstance(value, Tensor):
                yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(checkpoint, Tensor) and checkpoint.ndim > 1 and checkpoint.numel():
        if checkpoint.is_floating_point():
            yield prefix, checkpoint


def _views(key: str, tensor: Tensor, split: Mapping) -> list[Matrix]:
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = tensor.float()  # eight-bit floats, exactly
    return matrices_of(_NOISE.sub("", key), tensor, split, flatten=tensor.ndim > 3)


def _natural(key: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _number(path: Path) -> int | None:
    numbers = re.findall(r"\d+", path.name if path.is_dir() else path.stem)
    return int(numbers[-1]) if numbers else None


def _steps(paths: Sequence[Path]) -> list[int]:
    numbers = [n for n in map(_number, paths) if n is not None]
    increasing = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return numbers if len(numbers) == len(paths) and increasing else list(range(len(paths)))
