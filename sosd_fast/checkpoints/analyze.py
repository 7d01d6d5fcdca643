"""Spectra of saved weights, without the model's code, which checkpoints.py reads.

Matrices are read and measured a few at a time, so that memory stays below three times the largest of them and what
torch itself takes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sosd_fast.checkpoints.files import Checkpoint, number
from sosd_fast.fused import fused_by_config
from sosd_fast.kernels.distribution import Distribution, singular_distribution
from sosd_fast.matrices import DEFAULT_SPLIT, Matrix, matrices_of
from sosd_fast.places import plain_name
from sosd_fast.runs.records import Record
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.stored import by_scale, scale_names

_SUMMARIES = set(Distribution._fields) & set(Record.__dataclass_fields__)


def analyze(
    checkpoints: Sequence[str | os.PathLike],
    *,
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    method: str = "auto",
    k: int = 32,
) -> Iterator[list[Record]]:
    """Measures the spectra of saved weights.

    Args:
        checkpoints: safetensors files, torch checkpoints, folders that hold either (in shards or not), or folders of
            torch.distributed.checkpoint, in the order of training. Code in them is not run.
        split: fused matrices and their parts; see `sosd_fast.matrices.find_matrices`.
        method: as in `sosd_fast.svdvals`.
        k: leading values to keep in each record.

    Yields:
        The records of each checkpoint, in the order of its tensors: all singular values in `spectrum`, the SD
        variation from the checkpoint before, and the cosine to the first. The step is the last number in the path's
        name where these increase, else 0, 1, .... Matrices and their names are those of `sosd_fast.track`, as far as
        names, shapes and a config.json in the same folder tell.

    Raises:
        ValueError: nothing there, a damaged file, one with code in it, or one without matrices.
    """
    files = [Checkpoint(Path(path)) for path in checkpoints]
    previous: dict[str, tuple[int, Tensor]] = {}
    first: dict[str, Tensor] = {}
    for step, checkpoint in zip(_steps([c.path for c in files]), files, strict=True):
        records = []
        order = {key: i for i, key in enumerate(checkpoint.shapes)}
        config, scales = _config(checkpoint.path), _scales(checkpoint)
        for keys in checkpoint.batches(torch.get_num_threads()):
            tensors = checkpoint.read(keys)
            views = []
            for key in keys:
                if key not in scales.values():
                    scale = checkpoint.read([scales[key]])[scales[key]] if key in scales else None
                    views += [(order[key], m) for m in _views(key, tensors[key], scale, split, config)]
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
        if not records:
            raise ValueError(
                f"analyze: expected weights, got path={checkpoint.path} in which no tensor is a matrix. "
                "Pass a checkpoint of a model."
            )
        yield [record for *_, record in sorted(records, key=lambda item: item[:2])]


def parameter_alignment(checkpoints: Sequence[str | os.PathLike]) -> tuple[list[int], list[float]]:
    """Takes the cosine of all matrices' entries, as one vector, to those of the last checkpoint.

    Returns:
        (steps (T,), cosine (T,)).
    """
    files = [Checkpoint(Path(path)) for path in checkpoints]
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


def _views(key: str, tensor: Tensor, scale: Tensor | None, split: Mapping, config: dict[str, Any]) -> list[Matrix]:
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        settings = config.get("quantization_config")
        blocks = settings.get("weight_block_size") if isinstance(settings, dict) else None
        scaled = by_scale(tensor.shape, scale, blocks) if scale is not None else None
        tensor = scaled(tensor, ()) if scaled else tensor.float()  # eight-bit floats, exactly
    name, original = plain_name(key)
    fused = fused_by_config(name, tensor.shape, config)
    found = matrices_of(name, tensor, split, fused=fused, original=original)
    return [] if isinstance(found, str) else found


def _scales(checkpoint: Checkpoint) -> dict[str, str]:
    """The scales by row or block of eight-bit weights, by the weights."""
    found = {}
    for key in filter(checkpoint.has_eight_bits, checkpoint.shapes):
        path, _, own = key.rpartition(".")
        beside = [f"{path}.{name}".strip(".") for name in scale_names(own)]
        present = [scale for scale in beside if scale in checkpoint.shapes]
        if len(present) == 1:
            found[key] = present[0]
    return found


def _config(path: Path) -> dict[str, Any]:
    """The model's settings, where transformers saved them beside the weights."""
    try:
        config = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _steps(paths: Sequence[Path]) -> list[int]:
    numbers = [n for n in map(number, paths) if n is not None]
    increasing = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return numbers if len(numbers) == len(paths) and increasing else list(range(len(paths)))
