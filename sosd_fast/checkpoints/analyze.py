"""Spectra of saved weights, without the model's code, which checkpoints.py reads.

Matrices are read and measured a few at a time, so that memory stays below three times the largest of them and what
torch itself takes.
"""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sosd_fast.checkpoints.files import Checkpoint
from sosd_fast.checkpoints.headers import shown
from sosd_fast.checkpoints.layouts import series, step_of
from sosd_fast.fused import fused_by_config
from sosd_fast.kernels.distribution import Distribution, singular_distribution
from sosd_fast.matrices import DEFAULT_SPLIT, Matrix, kind, matrices_of
from sosd_fast.places import plain_name
from sosd_fast.runs.records import Record
from sosd_fast.spectra.svdvals import spectra

log = logging.getLogger("sosd_fast")
_SUMMARIES = set(Distribution._fields) & set(Record.__dataclass_fields__)


def expand(checkpoints: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Lists checkpoints, and instead of a folder that holds a series of them, those in the order of their steps.

    Raises:
        ValueError: a folder with two checkpoints of one step.
    """
    return [each for path in checkpoints for each in series(Path(path))]


def analyze(
    checkpoints: Sequence[str | os.PathLike],
    *,
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    stack: Sequence[str] = (),
    flatten: Sequence[str] = (),
    method: str = "auto",
    k: int = 32,
    notes: dict[str, list[str]] | None = None,
    progress: Callable[[Path, int, int], object] | None = None,
) -> Iterator[list[Record]]:
    """Measures the spectra of saved weights.

    Args:
        checkpoints: files of safetensors, torch or GGUF, folders that hold them (in shards or not), or folders of
            torch.distributed.checkpoint, in the order of training; a folder that holds a series of checkpoints stands
            for them. Code in them is not run. Quantised weights are measured as the values that they stand for.
        split: fused matrices and their parts; see `sosd_fast.matrices.find_matrices`.
        stack: shell patterns of weights of three or more dimensions that are stacks of matrices.
        flatten: the same of those that are one matrix (out, rest). Where neither fits, the rule of `find_matrices`
            holds, and what is a convolution is told by its name and by four dimensions.
        method: as in `sosd_fast.svdvals`.
        k: leading values to keep in each record.
        notes: takes what was left out of each checkpoint, by its path; it is logged, too.
        progress: called with a checkpoint's path, and how many of its weights' numbers are read, of how many.

    Yields:
        The records of each checkpoint, in the order of its tensors: all singular values in `spectrum`, the SD
        variation from the checkpoint before, and the cosine to the first. The step is the one that the path's name
        tells (`step-100`, `checkpoint_100`) where all tell one and these increase, else 0, 1, .... Matrices and their
        names are those of `sosd_fast.track`, as far as names, shapes and a config.json in the same folder tell; a head
        that is saved beside an embedding with the same bits is tied to it and counts once.

    Raises:
        ValueError: nothing there, a damaged file, one with code in it or of another program, one without matrices, the
            same weight in several files without a word how to join them, or a pattern that fits no weight.
    """
    files = [Checkpoint(path) for path in expand(checkpoints)]
    previous: dict[str, tuple[int, Tensor]] = {}
    first: dict[str, Tensor] = {}
    for step, checkpoint in zip(_steps([c.path for c in files]), files, strict=True):
        chosen = _Chosen(checkpoint, split, stack, flatten)
        records = []
        order = {name: i for i, name in enumerate(checkpoint.shapes)}
        tied = _tied(checkpoint)
        sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
        done, total = 0, sum(sizes.values())
        for names in checkpoint.batches(torch.get_num_threads()):
            if progress is not None:
                progress(checkpoint.path, done, total)
            done += sum(sizes[name] for name in names)
            kept = [name for name in names if name not in tied]
            for each in _measured(checkpoint.read(kept), chosen, method):
                name, S = each.name, each.S
                before = previous.get(name)
                if before is not None and before[1].shape != S.shape:
                    raise ValueError(
                        f"analyze: expected checkpoints of one model, got {shown(name)} with {len(S)} singular values "
                        f"in {checkpoint.path} after {len(before[1])}. Analyze them one by one."
                    )
                d = singular_distribution(S, before[1] if before else None, first.get(name))
                values: dict[str, Any] = {
                    f: float(v) for f, v in zip(d._fields, d, strict=True) if f in _SUMMARIES and v is not None
                }
                if before is not None and d.variation_l2 is not None:
                    values |= {"interval": step - before[0], "sd_variation": float(d.variation_l2)}
                record = Record(
                    step, name, each.shape, each.method, sd_error=each.sd_error, topk=tuple(S[:k].tolist()),
                    spectrum=S.numpy(), **values,
                )  # fmt: skip
                records.append((order[each.weight], len(records), record))
                previous[name] = (step, S)
                first.setdefault(name, S)
        said = [
            *checkpoint.notes,
            *(f"left out {shown(name)}, which is tied to {shown(other)}" for name, other in tied.items()),
        ]
        for note in said:
            log.warning("analyze: %s: %s.", checkpoint.path, note)
        if notes is not None:
            notes[str(checkpoint.path)] = said
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


class _Measured(NamedTuple):
    weight: str
    name: str
    shape: tuple[int, int]
    S: Tensor
    method: str
    sd_error: float


def _measured(tensors: dict[str, Tensor], chosen: "_Chosen", method: str) -> list[_Measured]:
    """Measures the matrices in tensors, those of one shape together; keeps none of them."""
    found: list[_Measured] = []
    shapes: dict[tuple[int, int], list[tuple[str, Matrix]]] = {}
    for weight, tensor in tensors.items():
        for matrix in chosen.matrices(weight, tensor):
            m, n = matrix.tensor().shape
            shapes.setdefault((m, n), []).append((weight, matrix))
    for shape, group in shapes.items():
        result = spectra([matrix.tensor() for _, matrix in group], method)
        for j, (weight, matrix) in enumerate(group):
            error = float(result.sd_error[j])
            found.append(_Measured(weight, matrix.name, shape, result.S[j], result.methods[j], error))
    return found


class _Chosen:
    """The matrices in a checkpoint's weights, as its user wants them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: Mapping[str, int | Sequence[int]],
        stack: Sequence[str],
        flatten: Sequence[str],
    ):
        self._config, self._split = checkpoint.config, split
        self._stack, self._flatten = ((p,) if isinstance(p, str) else tuple(p) for p in (stack, flatten))
        deep = [plain_name(name)[0] for name, shape in checkpoint.shapes.items() if len(shape) > 2]
        for option, patterns in (("stack", self._stack), ("flatten", self._flatten)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in deep):
                    raise ValueError(
                        f"analyze: expected a pattern that fits a weight of three or more dimensions, got "
                        f"{option}={pattern!r}. {checkpoint.path} has {', '.join(map(shown, deep[:8])) or 'none'}."
                    )

    def matrices(self, key: str, tensor: Tensor) -> list[Matrix]:
        name, original = plain_name(key)
        if tensor.ndim > 2 and any(fnmatchcase(name, pattern) for pattern in self._stack):
            shown = name + (original and f"[{original}]")
            indices = np.ndindex(tensor.shape[:-2])
            found = [Matrix(f"{shown}[{','.join(map(str, i))}]", tensor, index=i) for i in indices]
            return found if min(tensor.shape[-2:]) > 1 else []
        fused = fused_by_config(name, tensor.shape, self._config)
        kernel = tensor.ndim if tensor.ndim > 2 and any(fnmatchcase(name, p) for p in self._flatten) else None
        found = matrices_of(name, tensor, self._split, kernel=kernel, fused=fused, original=original)
        return [] if isinstance(found, str) else found


def _tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Heads and embeddings that hold the same bits as another: a copy of a tied weight, which is one for `track`.

    Other weights may be equal without being tied: layers that were copied, or begin as zeros.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in checkpoint.shapes.items():
        told = kind(plain_name(name)[0])
        if len(shape) == 2 and min(shape) > 1 and told in ("embedding", "head"):
            groups.setdefault(shape, []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        first: dict[bytes, str] = {}
        names.sort(key=lambda name: (kind(plain_name(name)[0]) == "head", name.count(".")))
        for name in names if len(names) > 1 else ():
            values = checkpoint.read([name])[name]
            if bool((values == values[0, 0]).all()):
                continue  # zeros tie nothing
            bits = values.contiguous().view(torch.uint8).numpy()
            same = first.setdefault(hashlib.blake2b(bits.data).digest(), name)
            if same != name:
                found[name] = same
    return found


def _steps(paths: Sequence[Path]) -> list[int]:
    numbers = [n for n in map(step_of, paths) if n is not None]
    increasing = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return numbers if len(numbers) == len(paths) and increasing else list(range(len(paths)))
