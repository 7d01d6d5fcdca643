"""Segments as pyarrow tables and Parquet files, where pyarrow is installed."""

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs.lines import complete_end, sync_folder
from sosd_fast.runs.schema import LISTS, STRINGS, Line, Record


def has_pyarrow() -> bool:
    """Whether pyarrow can be imported."""
    try:
        return importlib.util.find_spec("pyarrow") is not None
    except ValueError:  # hidden on purpose
        return False


def is_parquet(file: BinaryIO) -> bool:
    """Whether an open segment is a Parquet file, by its name."""
    return file.name.endswith(".parquet")


def read_table(file: BinaryIO, fields: Sequence[str] | None = None, shown: Mapping[str, str] | None = None) -> Any:
    """Reads a segment as a pyarrow Table of the schema that Parquet files have; a missing column is null.

    Args:
        file: JSON lines or Parquet.
        fields: columns; None reads all.
        shown: names of matrices to replace.
    """
    if shown:
        table = read_table(file, fields)
        at = table.schema.get_field_index("name")
        names = [shown.get(name, name) for name in table["name"].to_pylist()]
        return table.set_column(at, "name", [names])
    schema = _schema()
    if fields is not None:
        import pyarrow

        schema = pyarrow.schema([schema.field(f) for f in fields])
    import pyarrow

    try:
        table = _of_parquet(file, schema) if is_parquet(file) else _of_lines(file, schema)
        table.validate(full=True)  # names may be no UTF-8, which would be told when they are made strings
        if any(table[f].null_count for f in ("step", "name") if f in schema.names):
            raise damaged(file, "a record without a step or a name")
        return table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise damaged(file, str(error).partition("\n")[0]) from None


def parquet_rows(file: BinaryIO) -> Iterator[Line]:
    """Yields the records of a Parquet file as dicts of what was measured."""
    parquet = _parquet(file.name)
    import pyarrow

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                yield {k: v for k, v in row.items() if v is not None}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(file, str(error).partition("\n")[0]) from None


def damaged(file: BinaryIO, why: str) -> ValueError:
    """The error that says which segment is damaged."""
    return ValueError(
        f"load: expected records, got a damaged file {file.name} ({why}). Move it away to read the other segments."
    )


def to_parquet(path: Path) -> Path:
    """Replaces a closed segment of JSON lines by a Parquet file, in one rename; needs pyarrow."""
    target = path.with_suffix(".parquet")
    with open(path, "rb") as file:
        replace(target, read_table(file))
    path.unlink()
    return target


def replace(target: Path, table: Any):
    """Writes a Parquet file whole or not at all, and forces it to disk."""
    temporary = target.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write_parquet(file, [table])
            file.flush()
            os.fsync(file.fileno())  # before the lines that it replaces go
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_parquet(target: BinaryIO, tables: Iterable[Any]):
    """Writes tables of the records' schema to one Parquet file, one at a time."""
    parquet = _parquet(target.name)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": list(STRINGS)}
    options["use_byte_stream_split"] = [f.name for f in _schema() if str(f.type) == "double"]
    with parquet.ParquetWriter(target, _schema(), **options) as writer:
        for table in tables:
            writer.write_table(table.cast(_schema()))


def to_numpy(column: Any) -> NDArray[Any]:
    """Makes an array of a column: strings as objects, of which equal ones are one; null is NaN, or an empty string."""
    import pyarrow

    if pyarrow.types.is_string(column.type):
        column = column.dictionary_encode()
    if pyarrow.types.is_dictionary(column.type):
        column = column.unify_dictionaries().combine_chunks()
        words = np.array([*column.dictionary.to_pylist(), ""], dtype=object)
        return words[column.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
    return column.to_numpy()


def _of_parquet(file: BinaryIO, schema: Any) -> Any:
    parquet = _parquet(file.name)
    import pyarrow

    found = parquet.ParquetFile(file, read_dictionary=list(STRINGS))
    there = [f for f in schema.names if f in found.schema_arrow.names]
    table = found.read(there)
    missing = [f for f in schema.names if f not in there]
    if unknown := [f for f in ("step", "name") if f in missing]:
        raise damaged(file, f"without a column {unknown[0]}")
    for f in missing:  # a field that Record has gained since
        table = table.append_column(schema.field(f), pyarrow.nulls(len(table), schema.field(f).type))
    return table.select(schema.names)


def _of_lines(file: BinaryIO, schema: Any) -> Any:
    import pyarrow
    import pyarrow.compute
    import pyarrow.json

    end = complete_end(file)
    if not end:
        return schema.empty_table()
    nan = pyarrow.field("nan", pyarrow.list_(pyarrow.string()))
    file.seek(0)
    table = pyarrow.json.read_json(
        pyarrow.BufferReader(file.read(end)),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema.append(nan), unexpected_field_behavior="ignore"),
    ).combine_chunks()
    marked = table["nan"].is_valid()
    compute: Any = pyarrow.compute  # its functions are made when it is imported
    if compute.any(marked).as_py():
        marks = [set(m or ()) for m in table["nan"].to_pylist()]
        for i, f in enumerate(schema.names):
            mask = [f in m for m in marks]
            if f in LISTS and any(mask):
                old = zip(table[f].to_pylist(), mask, strict=True)
                new = pyarrow.array([[math.nan] * int(v[0]) if m else v for v, m in old], schema.field(f).type)
                table = table.set_column(i, f, new)
            elif any(mask):
                new = compute.replace_with_mask(table[f].combine_chunks(), pyarrow.array(mask), math.nan)
                table = table.set_column(i, f, new)
    return table.select(schema.names)


def _schema():
    import pyarrow as pa

    types = {"step": pa.int64(), "interval": pa.int64(), "name": pa.string(), "method": pa.string()}
    types |= {"shape": pa.list_(pa.int64()), "spectrum": pa.list_(pa.int64())}
    types |= {"topk": pa.list_(pa.float64()), "residual": pa.list_(pa.float64())}
    return pa.schema([(f, types.get(f, pa.float64())) for f in Record.__dataclass_fields__])


def _parquet(path: str | Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"load: expected pyarrow to be installed, got path={path}. Run `pip install pyarrow`."
        ) from None
    return pyarrow.parquet
