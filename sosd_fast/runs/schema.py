"""What a record holds, and the line of JSON that it becomes.

A new metric is a field of `Record` with None as its default: columns, tables, Parquet files and lines of JSON take
their names from the fields, and older run directories go on being read.
"""

import dataclasses
import math
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_VALUES = 2**24  # in a list that a line gives the length of

Line = dict[str, Any]  # a record as JSON, or as a row of a Parquet file


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What was measured of one matrix at one step; None where it was not measured, NaN where it does not exist."""

    step: int
    name: str
    shape: tuple[int, int]
    method: str  # topk, gram32, bidiag32, gram64, bidiag64 (direct64 in records of 0.1.0) or exact
    interval: int | None = None  # steps since the measurement that sd_variation compares with
    sd_variation: float | None = None  # |SD_t - SD_s|_2
    # What of it lies in the k leading values. Where method is topk, their sum is not known: `_topk` and `_carried`, the
    # same with all values, take the others to be shaped as in the last full spectrum (1 to 3 % off with AdamW, up to
    # 70 % early in training with Muon; LOG.md#topk-tail); `_floor` holds whatever they are, as far as the leading
    # values do.
    sd_variation_topk: float | None = None
    sd_variation_carried: float | None = None
    sd_variation_floor: float | None = None  # sd_variation is at least this
    # To the reference spectrum: the first one that is not zero and holds no NaN, or a given one. None before there is
    # one (LoRA's B is zero at first); NaN while the matrix is zero or holds NaN, or where the given one is zero.
    cosine: float | None = None
    nuclear_norm: float | None = None
    frobenius_norm: float | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    spectral_entropy: float | None = None  # nats
    participation_ratio: float | None = None
    sd_error: float | None = None  # |SD - SD_true|_2 is at most this
    audit_error: float | None = None  # |SD - SD_true|_2, where the spectrum was audited
    theory_bound: float | None = None  # on sd_variation, from the size of the update
    lr: float | None = None  # learning rate of this step, as the optimizer's group has it
    # Leading singular values, descending; empty where a run directory left them out.
    topk: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    residual: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)  # of each, where method is topk
    # All singular values, descending.
    spectrum: NDArray[np.float32 | np.float64] | None = dataclasses.field(default=None, compare=False, repr=False)


INTEGERS = ("step",)
STRINGS = ("name", "method")
LISTS = ("shape", "topk", "residual", "spectrum")  # the last one points to the values: chunk, offset, length
FLOATS = tuple(f.name for f in dataclasses.fields(Record) if f.type == float | None)


def to_line(record: Record, pointer: list[int] | None) -> Line:
    """Makes an object of JSON, which has no NaN: such values are left out, and "nan" lists their names."""
    line: Line = {f: getattr(record, f) for f in Record.__dataclass_fields__ if f != "spectrum"}
    nan = [f for f in FLOATS if line[f] is not None and not math.isfinite(line[f])]
    line = {f: v for f, v in line.items() if v is not None and f not in nan and not (f == "topk" and not v)}
    for f in ("topk", "residual"):
        if f in line and not all(map(math.isfinite, line[f])):
            nan.append(f)
            line[f] = [len(line[f])]
    return line | ({"nan": nan} if nan else {}) | ({"spectrum": pointer} if pointer else {})


def checked(line: Line) -> bool:
    """Whether a line, or a row of a Parquet file, has what a record must have, each of its type."""
    marks = _listed(line, "nan")
    if not _integers([line.get("step"), *_listed(line, "shape")], 3) or not all(
        type(line.get(f)) is str for f in STRINGS
    ):
        return False
    if not all(type(line[f]) in (float, int, NoneType) for f in FLOATS if f in line):
        return False
    if type(line.get("interval")) not in (int, NoneType) or not (
        line.get("spectrum") is None or _integers(_listed(line, "spectrum"), 3)
    ):
        return False
    if type(line.get("nan", marks)) is not list or not _may_be_nan(marks):
        return False
    for f in ("topk", "residual"):
        if f in line and not (type(line[f]) is list and all(type(v) in (float, int) for v in line[f])):
            return False
        if f in marks and not (_integers(_listed(line, f), 1) and line[f][0] <= MOST_VALUES):
            return False
    return True


def _may_be_nan(marks: list[Any]) -> bool:
    return all(f in FLOATS or f in ("topk", "residual") for f in marks)


def _listed(line: Line, field: str) -> list[Any]:
    values: Any = line.get(field)
    return values if type(values) is list else []  # pyright: ignore[reportUnknownVariableType]


def _integers(values: list[Any], count: int) -> bool:
    return len(values) == count and all(type(v) is int and 0 <= v < 2**63 for v in values)


def from_line(line: Line) -> Record:
    """Makes a record of the dict that a segment yields."""
    values = {f: line[f] for f in Record.__dataclass_fields__ if f in line and f != "spectrum"}
    for f in ("shape", "topk", "residual"):
        if f in values:
            values[f] = tuple(values[f])
    return Record(**values)
