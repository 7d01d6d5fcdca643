"""The files that hold a run's records: written and cut as JSON lines, kept as Parquet where pyarrow is installed.

`records.jsonl` is being written; `records-NNNNN.jsonl` or `.parquet` are closed, oldest first. Where a kill left both
forms of a segment, the Parquet one is whole and counts.
"""

import errno
import fcntl
import json
import math
import mmap
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs.schema import Line, Record

LIVE = "records.jsonl"
_INTEGERS = ("step",)
_STRINGS = ("name", "method")
_LISTS = ("shape", "topk", "residual", "spectrum")  # the last one points to the values: chunk, offset, length


class AppendOnly:
    """A file that only grows, without a buffer: nothing is pending when it is closed, collected or forked.

    A forked process closes its copy, which would keep the file's lock after the end of the process that opened it, and
    what is written there goes nowhere.

    Args:
        path: created where missing.
        mode: "ab" to go on behind what is there, "wb" to start over.
    """

    def __init__(self, path: Path, mode: str = "ab"):
        self.file = open(path, mode, buffering=0)
        self._pid = os.getpid()
        _open_files.add(self)

    @property
    def inherited(self) -> bool:
        """Whether another process opened the file."""
        return self._pid != os.getpid()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, data: bytes):
        """Hands all of `data` to the operating system, or raises OSError and leaves the file as it was."""
        if self.inherited:
            return
        start, rest = self.size, memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except BaseException:
            self.file.truncate(start)
            raise
        if not os.fstat(self.file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "the file was removed while it was being written", self.file.name)

    def truncate(self, size: int):
        """Cuts the file off after `size` bytes."""
        self.file.truncate(size)

    def flush(self):
        """Forces what was written to disk."""
        if not self.inherited:
            os.fsync(self.file.fileno())

    def close(self):
        """Closes the file; closing twice is fine."""
        self.file.close()


_open_files: "weakref.WeakSet[AppendOnly]" = weakref.WeakSet()


def _close_inherited():
    for file in list(_open_files):
        file.close()


os.register_at_fork(after_in_child=_close_inherited)


class JsonLines:
    """An append-only file of JSON objects, one a line; see `AppendOnly` for what a forked process does with it.

    Args:
        path: created where missing. A torn last line is cut off.
        step: cut off the lines whose "step" is greater.

    Raises:
        ValueError: a damaged line that is not the last, or a file that another process has open for writing.
    """

    def __init__(self, path: str | os.PathLike[str], step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = AppendOnly(self.path)
        try:
            fcntl.flock(self._file.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"JsonLines: expected a file that nobody else writes, got path={self.path}. "
                "Close the other run, or choose another directory."
            ) from None
        end = 0
        for line, start, stop in lines(self.path):
            if step is not None and line.get("step", 0) > step:
                end = start
                break
            end = stop
        self.truncate(end)

    def write(self, *objects: dict[str, Any]):
        """Appends objects in one write and hands them to the operating system."""
        self._file.append(b"".join(_encode(o) for o in objects))

    def truncate(self, size: int):
        """Cuts the file off after `size` bytes."""
        self._file.truncate(size)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.size

    def start_over(self, closed: Path):
        """Moves what was written to `closed`, and goes on in an empty file of the old name."""
        fresh = JsonLines(self.path.with_suffix(".next"))  # locked before it takes the name
        self.path.rename(closed)
        fresh.path.rename(self.path)
        self._file.close()
        self._file = fresh._file

    def flush(self):
        """Forces what was written to disk."""
        self._file.flush()

    def close(self):
        """Closes the file; closing twice is fine."""
        self._file.close()


def paths(run_dir: Path) -> list[Path]:
    """Lists the segments, oldest first, the one that is being written last."""
    closed = {p.stem: p for p in sorted(run_dir.glob("records-*")) if p.suffix in (".jsonl", ".parquet")}
    live = run_dir / LIVE
    return [*closed.values(), *([live] if live.exists() else [])]


def lines(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yields (object, first byte, byte after) of each whole line of a file of JSON lines."""
    start = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return  # torn, by definition the last
            try:
                parsed = json.loads(raw)
            except ValueError:
                raise ValueError(
                    f"load: expected JSON, got a damaged line {number} in {path}. Cut the file off before that line."
                ) from None
            yield parsed, start, start + len(raw)
            start += len(raw)


def complete_end(path: Path) -> int:
    """Returns the byte after the last complete step of a file of JSON lines, each with its step's count in "of"."""
    if not path.stat().st_size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = start = data.rfind(b"\n") + 1
        found, step, of = 0, None, 0
        while start:
            before = data.rfind(b"\n", 0, start - 1) + 1
            line = json.loads(data[before:start])
            if step is None:
                step, of = line["step"], line["of"]
            if line["step"] != step:
                break
            found, start = found + 1, before
        return end if found >= of else start


def rows(path: Path) -> Iterator[Line]:
    """Yields the records of a segment as dicts of what was measured, without a torn step."""
    if path.suffix == ".parquet":
        parquet = _pyarrow(path)
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    yield {k: v for k, v in row.items() if v is not None}
        return
    end = complete_end(path)
    for line, _, stop in lines(path):
        if stop > end:
            return
        for f in line.pop("nan", ()):
            line[f] = [math.nan] * int(line[f][0]) if f in _LISTS else math.nan
        yield line


def columns(path: Path, fields: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Reads columns of numbers and strings; what was not measured is NaN."""
    if _has_pyarrow() or path.suffix == ".parquet":
        table = read_table(path, fields)
        found = {f: _to_numpy(table[f]) for f in fields}
        return {f: v if f in (*_INTEGERS, *_STRINGS) else v.astype(float, copy=False) for f, v in found.items()}
    found = {f: [] if f in _STRINGS else array("q" if f in _INTEGERS else "d") for f in fields}
    shared: dict[str, str] = {}
    for row in rows(path):
        for f, values in found.items():
            value = row.get(f, math.nan)
            values.append(shared.setdefault(value, value) if f in _STRINGS else value)
    return {f: np.array(values, dtype=object if f in _STRINGS else None) for f, values in found.items()}


def pointers(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Reads where the spectra are: steps (T,), names (T,), (T, 3) of chunk, offset in bytes, length."""
    if _has_pyarrow() or path.suffix == ".parquet":
        table = read_table(path, ("step", "name", "spectrum"))
        table = table.filter(table["spectrum"].is_valid())
        where = table["spectrum"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, 3)
        return _to_numpy(table["step"]), _to_numpy(table["name"]), where
    kept = [(row["step"], row["name"], row["spectrum"]) for row in rows(path) if "spectrum" in row]
    steps, names, where = zip(*kept, strict=True) if kept else ((), (), ())
    return np.array(steps, dtype=int), np.array(names, dtype=object), np.array(where, dtype=int).reshape(-1, 3)


def read_table(path: Path, fields: Sequence[str] | None = None, shown: Mapping[str, str] | None = None) -> Any:
    """Reads a segment as a pyarrow Table of the schema that Parquet files have; `shown` replaces names."""
    if shown:
        table = read_table(path, fields)
        at = table.schema.get_field_index("name")
        names = [shown.get(name, name) for name in table["name"].to_pylist()]
        return table.set_column(at, "name", [names])
    parquet = _pyarrow(path)
    import pyarrow
    import pyarrow.compute
    import pyarrow.json

    schema = _schema()
    if fields is not None:
        schema = pyarrow.schema([schema.field(f) for f in fields])
    if path.suffix == ".parquet":
        return parquet.ParquetFile(path, read_dictionary=list(_STRINGS)).read(schema.names)
    end = complete_end(path)
    if not end:
        return schema.empty_table()
    nan = pyarrow.field("nan", pyarrow.list_(pyarrow.string()))
    with open(path, "rb") as file:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(file.read(end)),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema.append(nan), unexpected_field_behavior="ignore"
            ),
        ).combine_chunks()
    marked = table["nan"].is_valid()
    compute: Any = pyarrow.compute  # its functions are made when it is imported
    if compute.any(marked).as_py():
        marks = [set(m or ()) for m in table["nan"].to_pylist()]
        for i, f in enumerate(schema.names):
            mask = [f in m for m in marks]
            if f in _LISTS and any(mask):
                old = zip(table[f].to_pylist(), mask, strict=True)
                new = pyarrow.array([[math.nan] * int(v[0]) if m else v for v, m in old], schema.field(f).type)
                table = table.set_column(i, f, new)
            elif any(mask):
                new = compute.replace_with_mask(table[f].combine_chunks(), pyarrow.array(mask), math.nan)
                table = table.set_column(i, f, new)
    return table.select(schema.names)


def to_parquet(path: Path) -> Path:
    """Replaces a closed segment of JSON lines by a Parquet file, in one rename; needs pyarrow."""
    target = path.with_suffix(".parquet")
    _replace(target, read_table(path))
    path.unlink()
    return target


def trim(path: Path, step: int):
    """Cuts the records of later steps off a closed segment, which goes where nothing is left."""
    steps = columns(path, ("step",))["step"]
    if len(steps) and steps[-1] <= step:
        return
    if not len(steps) or steps[0] > step:
        path.unlink()
    elif path.suffix == ".parquet":
        _replace(path, read_table(path).slice(0, int(np.searchsorted(steps, step, "right"))))
    else:
        os.truncate(path, next(start for line, start, _ in lines(path) if line["step"] > step))


def trim_all(run_dir: Path, step: int):
    """Cuts the records of later steps off a run directory that nobody writes; one that somebody writes is left."""
    try:
        live = JsonLines(run_dir / LIVE, step)
    except ValueError:
        return
    try:
        for path in reversed(paths(run_dir)[:-1]):
            trim(path, step)
    finally:
        live.close()


def write_parquet(target: Path, tables: Iterator[Any]):
    """Writes tables of the records' schema to one Parquet file, one at a time."""
    parquet = _pyarrow(target)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": list(_STRINGS)}
    options["use_byte_stream_split"] = [f.name for f in _schema() if str(f.type) == "double"]
    with parquet.ParquetWriter(target, _schema(), **options) as writer:
        for table in tables:
            writer.write_table(table.cast(_schema()))


def _replace(target: Path, table: Any):
    temporary = target.with_suffix(".tmp")
    try:
        write_parquet(temporary, iter([table]))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # before the lines that it replaces go
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _schema():
    import pyarrow as pa

    types = {"step": pa.int64(), "interval": pa.int64(), "name": pa.string(), "method": pa.string()}
    types |= {"shape": pa.list_(pa.int64()), "spectrum": pa.list_(pa.int64())}
    types |= {"topk": pa.list_(pa.float64()), "residual": pa.list_(pa.float64())}
    return pa.schema([(f, types.get(f, pa.float64())) for f in Record.__dataclass_fields__])


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow

    if pyarrow.types.is_string(column.type):
        column = column.dictionary_encode()
    if pyarrow.types.is_dictionary(column.type):
        column = column.unify_dictionaries().combine_chunks()
        words = np.array(column.dictionary.to_pylist(), dtype=object)
        return words[column.indices.to_numpy(zero_copy_only=False)] if len(words) else words
    return column.to_numpy()


def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def _pyarrow(path: Path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"load: expected pyarrow to be installed, got path={path}. Run `pip install pyarrow`."
        ) from None
    return pyarrow.parquet


def _encode(o: dict[str, Any]) -> bytes:
    return (json.dumps(o, separators=(",", ":")) + "\n").encode()
