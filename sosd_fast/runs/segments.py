"""The files that hold a run's records: written and cut as JSON lines, kept as Parquet where pyarrow is installed.

`records.jsonl` is being written; `records-NNNNN.jsonl` or `.parquet` are closed, oldest first. Where a kill left both
forms of a segment, the Parquet one is whole and counts.

A reader beside the writer takes a `snapshot`: the open file that is being written, and the closed ones before it.
"""

import contextlib
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs import tables
from sosd_fast.runs.lines import JsonLines, complete_end, damaged, lines, opened
from sosd_fast.runs.schema import INTEGERS, LISTS, STRINGS, Line, checked

LIVE = "records.jsonl"
TRIES = 1000  # to list a folder whose writer closes segments all the time

Source = Path | BinaryIO
T = TypeVar("T")


def paths(run_dir: Path) -> list[Path]:
    """Lists the segments, oldest first, the one that is being written last."""
    live = run_dir / LIVE
    found: dict[int, Path] = {}
    for path in sorted(run_dir.glob("records-*")):  # .parquet after .jsonl, whose place it takes
        if path.suffix in (".jsonl", ".parquet") and re.fullmatch(r"records-[0-9]{1,18}", path.stem):
            found[number(path)] = path
    closed = [found[n] for n in sorted(found)]
    with contextlib.suppress(FileNotFoundError):
        if closed and os.path.samestat(closed[-1].stat(), live.stat()):
            closed.pop()  # it is being closed, and has both names
    return [*closed, *([live] if live.is_file() else [])]


def number(path: Path) -> int:
    """The number of a closed segment."""
    return int(path.stem.removeprefix("records-"))


@contextlib.contextmanager
def snapshot(run_dir: Path) -> Iterator[list[Source]]:
    """Yields the segments as of one moment: closed ones by their paths, the one that is being written open."""
    for _ in range(TRIES):
        live = _open_live(run_dir)
        try:
            closed = [path for path in paths(run_dir) if path.name != LIVE]
            if _is_live(live, run_dir) if live else closed == paths(run_dir):
                yield [*closed, *([live] if live else [])]
                return
        finally:
            if live:
                live.close()
    raise restless(run_dir)


def _open_live(run_dir: Path) -> BinaryIO | None:
    with contextlib.suppress(FileNotFoundError):
        if (run_dir / LIVE).is_file():  # a pipe would be waited for
            return open(run_dir / LIVE, "rb")
    return None


def _is_live(file: BinaryIO, run_dir: Path) -> bool:
    """Whether a file still is the one that is being written: then nothing was closed since it was opened."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), (run_dir / LIVE).stat())
    return False


def consistent(run_dir: Path, read: Callable[[list[Source]], T]) -> T:
    """Reads a snapshot, once more where a writer that resumed has removed one of its files meanwhile."""
    for _ in range(TRIES):
        with snapshot(run_dir) as sources, contextlib.suppress(FileNotFoundError):
            return read(sources)
    raise restless(run_dir)


@contextlib.contextmanager
def segment(source: Source) -> Iterator[BinaryIO]:
    """Opens a segment, as Parquet where its writer has made that of it meanwhile."""
    if isinstance(source, Path) and not source.exists():
        source = source.with_suffix(".parquet")
    with opened(source) as file:
        yield file


def rows(source: Source) -> Iterator[Line]:
    """Yields the records of a segment as dicts of what was measured, without a torn step."""
    with segment(source) as file:
        if tables.is_parquet(file):
            for row in tables.parquet_rows(file):
                if not checked(row):
                    raise tables.damaged(file, "a row that is no record")
                yield row
            return
        end = complete_end(file)
        for n, (line, _, stop) in enumerate(lines(file), 1):
            if stop > end:
                return
            if not checked(line):
                raise damaged(file.name, f"line {n}")
            for f in line.pop("nan", ()):
                line[f] = [math.nan] * int(line[f][0]) if f in LISTS else math.nan
            yield line


def columns(source: Source, fields: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Reads columns of numbers and strings; what was not measured is NaN."""
    with segment(source) as file:
        if tables.has_pyarrow() or tables.is_parquet(file):
            table = tables.read_table(file, fields)
            found = {f: tables.to_numpy(table[f]) for f in fields}
            return {f: v if f in (*INTEGERS, *STRINGS) else v.astype(float, copy=False) for f, v in found.items()}
        values = {f: [] if f in STRINGS else array("q" if f in INTEGERS else "d") for f in fields}
        shared: dict[str, str] = {}
        for row in rows(file):
            for f, column in values.items():
                value = row.get(f, math.nan)
                column.append(shared.setdefault(value, value) if f in STRINGS else value)
        return {f: np.array(v, dtype=object if f in STRINGS else None) for f, v in values.items()}


def pointers(source: Source) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Reads where the spectra are: steps (T,), names (T,), (T, 3) of chunk, offset in bytes, length."""
    with segment(source) as file:
        if tables.has_pyarrow() or tables.is_parquet(file):
            table = tables.read_table(file, ("step", "name", "spectrum"))
            table = table.filter(table["spectrum"].is_valid())
            where = table["spectrum"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if len(where) != 3 * len(table):
                raise tables.damaged(file, "a pointer that is no triple")
            return tables.to_numpy(table["step"]), tables.to_numpy(table["name"]), where.reshape(-1, 3)
        kept = [(row["step"], row["name"], row["spectrum"]) for row in rows(file) if "spectrum" in row]
    steps, names, where = zip(*kept, strict=True) if kept else ((), (), ())
    return np.array(steps, dtype=int), np.array(names, dtype=object), np.array(where, dtype=int).reshape(-1, 3)


def table(source: Source, shown: Mapping[str, str] | None = None) -> Any:
    """Reads a segment as a pyarrow Table of the schema that Parquet files have; `shown` replaces names."""
    with segment(source) as file:
        return tables.read_table(file, shown=shown)


def tidy(run_dir: Path):
    """Removes what a kill left beside the segments, before they are cut or written on: nobody else may write them."""
    live = run_dir / LIVE
    for path in run_dir.glob("records-*.jsonl"):
        if path.with_suffix(".parquet").exists():
            path.unlink()  # or it would come back when the Parquet file goes
        elif live.exists() and os.path.samestat(path.stat(), live.stat()):
            path.unlink()  # killed while it was closed
    for path in run_dir.glob("records-*.tmp"):
        path.unlink()


def trim(path: Path, step: int):
    """Cuts the records of later steps off a closed segment, which goes where nothing is left."""
    steps = columns(path, ("step",))["step"]
    if len(steps) and steps[-1] <= step:
        return
    if not len(steps) or steps[0] > step:
        path.unlink()
    elif path.suffix == ".parquet":
        with segment(path) as file:
            cut = tables.read_table(file).slice(0, int(np.searchsorted(steps, step, "right")))
        tables.replace(path, cut)
    else:
        os.truncate(path, next(start for line, start, _ in lines(path) if line["step"] > step))


def trim_all(run_dir: Path, step: int):
    """Cuts the records of later steps off a run directory that nobody writes; one that somebody writes is left."""
    try:
        live = JsonLines(run_dir / LIVE, step)
    except ValueError:
        return
    try:
        tidy(run_dir)
        for path in reversed(paths(run_dir)[:-1]):
            trim(path, step)
    finally:
        live.close()


def restless(run_dir: Path) -> ValueError:
    """The error that says that no moment was found at which all segments are there."""
    return ValueError(
        f"load: expected segments that can be opened, got run_dir={run_dir} where some come and go. Look for links "
        "that lead nowhere, or read it again."
    )
