"""Run directories, read: as they are when asked, also beside a process that writes them."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs import events, segments, tables
from sosd_fast.runs.lines import lines
from sosd_fast.runs.parts import Part, missing_ranks, read_meta, say_faults, told_apart
from sosd_fast.runs.schema import FLOATS, Record, from_line
from sosd_fast.runs.segments import Source

if TYPE_CHECKING:
    import pandas


class Run:
    """A run directory, read as it is when asked: nothing but `meta` is held in memory until then.

    Attributes:
        run_dir: where it was read from.
        meta: meta.json.
        missing_ranks: ranks that share the work on its matrices, and whose records it lacks.
    """

    def __init__(self, run_dir: Path, meta: dict[str, Any], parts: Sequence[Part] = ()):
        self.run_dir = run_dir
        self.meta = meta
        self._parts = list(parts) or [Part(run_dir, meta)]  # the run directories of the ranks
        self.missing_ranks = missing_ranks(self._parts)

    def __repr__(self):
        return f"Run({str(self.run_dir)!r})"

    @classmethod
    def merge(cls, runs: Sequence["Run"]) -> "Run":
        """Joins the runs of several ranks, each of which measured matrices of the same model, or models of its own.

        Where two measured the same matrix at the same step, the first one counts; so do its meta.json and log. Names
        that ranks gave to matrices of different models, as pipeline stages may, are told apart: weight[rank 0],
        weight[rank 2], after the first rank that has the model.
        """
        if not runs:
            raise ValueError("Run.merge: expected at least one run, got runs=[]. Pass what sosd_fast.load returned.")
        parts = [part for run in runs for part in run._parts]
        shown = told_apart(parts, [part.matrices for part in parts])
        matrices = list(
            dict.fromkeys(names.get(m, m) for p, names in zip(parts, shown, strict=True) for m in p.matrices)
        )
        return cls(runs[0].run_dir, runs[0].meta | ({"matrices": matrices} if matrices else {}), parts)

    @functools.cached_property
    def records(self) -> list[Record]:
        """All records in the order of steps, without their spectra: about 1 kB each in memory."""
        parts = [segments.consistent(part.path, _records) for part in self._parts]
        if len(parts) == 1:
            return parts[0]
        self._know({r.name for part in parts for r in part})
        found: dict[tuple[int, str], Record] = {}
        for part, shown in zip(parts, self._shown, strict=True):
            for r in part:
                r = dataclasses.replace(r, name=shown[r.name]) if r.name in shown else r
                found.setdefault((r.step, r.name), r)
        order = self._order()
        return sorted(found.values(), key=lambda r: (r.step, order.get(r.name, len(order))))

    @functools.cached_property
    def log(self) -> list[dict[str, Any]]:
        """What the training loop wrote to log.jsonl, one dict a step."""
        logs = [folder / "log.jsonl" for folder in (self.run_dir, *(part.path for part in self._parts))]
        path = next((path for path in logs if path.is_file()), None)
        return [line for line, *_ in lines(path)] if path else []

    @functools.cached_property
    def events(self) -> list[events.Event]:
        """What happened, as the probe found it: onsets of stability, spikes, NaN, zero, audits beyond their bounds."""
        return events.of_parts([part.path for part in self._parts], self._shown)

    @functools.cached_property
    def names(self) -> list[str]:
        """The matrices that were measured, in the model's order."""
        return list(self._shapes)

    def columns(self, *fields: str) -> dict[str, NDArray[Any]]:
        """Reads fields of all records as arrays, in the order of steps.

        Args:
            fields: "step", "name", "method", or the name of a number; numbers that were not measured are NaN.

        Returns:
            field -> (number of records,).
        """
        numbers = {"step", "name", "method", *FLOATS, "interval"}
        for f in fields:
            if f not in numbers:
                raise ValueError(f"Run.columns: expected one of {', '.join(sorted(numbers))}, got fields={f!r}.")
        wanted = tuple(dict.fromkeys((*fields, "step", "name")))

        def read(sources: list[Source]) -> list[dict[str, NDArray[Any]]]:
            return [segments.columns(source, wanted) for source in sources]

        parts = [segments.consistent(part.path, read) for part in self._parts]
        if len(parts) > 1:
            self._know({name for part in parts for p in part for name in set(p["name"])})
        for part, shown in zip(parts, self._shown, strict=True):
            for p in part if shown else ():
                p["name"] = np.array([shown.get(name, name) for name in p["name"]], dtype=object)
        table = {f: np.concatenate([p[f] for part in parts for p in part] or [np.empty(0)]) for f in wanted}
        if len(self._parts) > 1:
            order = self._order()
            code = table["step"] * (len(order) + 1) + np.array(
                [order.get(name, len(order)) for name in table["name"]], dtype=np.int64
            )
            first = np.unique(code, return_index=True)[1]
            table = {f: values[first] for f, values in table.items()}
        return {f: table[f] for f in fields}

    def spectra(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Reads the full spectra of one matrix that were kept; of one that changed its shape, those of the last shape.

        Returns:
            (steps (T,), S (T, r) float32, each row descending).
        """
        if name not in self.names:
            raise ValueError(f"Run.spectra: expected one of {len(self.names)} names, got name={name!r}. See Run.names.")
        kept: dict[int, tuple[Path, NDArray[Any]]] = {}
        for part, found in self._pointers:
            for step, where in found.get(name, ()):
                kept.setdefault(step, (part, where))
        length = kept[max(kept)][1][2] if kept else 0
        steps = sorted(step for step, (_, where) in kept.items() if where[2] == length)
        values = {
            part: _values(part, [kept[step][1] for step in steps if kept[step][0] == part])
            for part in {kept[step][0] for step in steps}
        }
        rows = [values[kept[step][0]][tuple(kept[step][1].tolist())] for step in steps]
        return np.array(steps, dtype=np.int64), np.array(rows)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the records as a pandas DataFrame: one row a record, all fields but lists of values."""
        try:
            import pandas
        except ImportError:
            raise ImportError("Run.to_pandas: expected pandas to be installed. Run `pip install pandas`.") from None
        table = self.columns("step", "name", "method", "interval", *FLOATS)
        self._know(set(table["name"]))
        frame = pandas.DataFrame(table)
        frame.insert(2, "shape", [self._shapes.get(name) for name in table["name"]])
        return frame

    def to_parquet(self, path: str | os.PathLike[str]):
        """Writes all records, with their leading values, to one Parquet file, a segment at a time."""

        def found() -> Iterator[Any]:
            for part, shown in zip(self._parts, self._shown, strict=True):
                with segments.snapshot(part.path) as sources:
                    yield from (segments.table(source, shown) for source in sources)

        for _ in range(segments.TRIES):
            with open(path, "wb") as target, contextlib.suppress(FileNotFoundError):  # a writer removed a segment
                return tables.write_parquet(target, found())
        raise segments.restless(self.run_dir)

    def _order(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def _know(self, names: set[str]):
        """Looks again for names and shapes, where a run that is being written has gained matrices."""
        shown = {name: new for each in self._shown for name, new in each.items()}
        if not names <= {*self.names, *shown}:
            for f in ("_own_shapes", "_shown", "_shapes", "names"):
                self.__dict__.pop(f, None)

    @functools.cached_property
    def _own_shapes(self) -> list[dict[str, tuple[int, int]]]:
        """Of each part, the shapes of its matrices by the names that it recorded them under."""
        return [segments.consistent(part.path, _shapes_of) for part in self._parts]

    @functools.cached_property
    def _shown(self) -> list[dict[str, str]]:
        """Of each part, the names that are told apart; a model may have gained matrices since a part was opened."""
        if len(self._parts) == 1:
            return [{}]
        return told_apart(
            self._parts, [{*part.matrices, *own} for part, own in zip(self._parts, self._own_shapes, strict=True)]
        )

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for own, shown in zip(self._own_shapes, self._shown, strict=True):
            for name, shape in ((shown.get(name, name), shape) for name, shape in own.items()):
                if found.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"load: expected one model, got {name} of shape {found[name]} and {shape}. "
                        "Merge the ranks of one run only."
                    )
        order = {name: i for i, name in enumerate(self.meta.get("matrices", ()))}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    @functools.cached_property
    def _pointers(self) -> list[tuple[Path, dict[str, list[tuple[int, NDArray[Any]]]]]]:
        result: list[tuple[Path, dict[str, list[tuple[int, NDArray[Any]]]]]] = []
        for part, shown in zip(self._parts, self._shown, strict=True):
            found: dict[str, list[tuple[int, NDArray[Any]]]] = {}
            for table in segments.consistent(part.path, lambda sources: [segments.pointers(each) for each in sources]):
                for step, name, where in zip(*table, strict=True):
                    found.setdefault(str(shown.get(name, name)), []).append((int(step), where))
            result.append((part.path, found))
        return result


def load(run_dir: str | os.PathLike[str]) -> Run:
    """Reads a run directory, also one that is being written or was cut off; a torn last step is left out.

    Args:
        run_dir: as given to `sosd_fast.track`; what several ranks wrote there is merged, and a warning names the ranks
            that are missing.

    Raises:
        ValueError: no run directory, one of a newer version, or a damaged one.
    """
    run_dir = Path(run_dir)
    folders = [path.parent for path in sorted(run_dir.glob("rank-*/meta.json"))]
    if not folders:
        return _load_part(run_dir)
    if (run_dir / "meta.json").exists():  # it began, or goes on, as a run of one process
        folders.append(run_dir)
    parts = [_load_part(folder) for folder in folders]
    run = Run.merge(parts)
    run.run_dir = run_dir
    recorded = {name for part in parts for name in part.meta.get("matrices", ())}
    say_faults(run_dir, run.missing_ranks, [name for name in run.meta.get("matrices", ()) if name not in recorded])
    return run


def _load_part(run_dir: Path) -> Run:
    try:
        meta = read_meta(run_dir)
    except OSError:
        raise ValueError(
            f"load: expected a run directory with a meta.json, got run_dir={run_dir}. "
            "Pass the run_dir that was given to sosd_fast.track."
        ) from None

    def look(sources: list[Source]):
        for source in sources[-1:]:
            for _ in lines(source) if not isinstance(source, Path) else ():
                pass  # a damaged line is told here, not in the middle of an evaluation

    segments.consistent(run_dir, look)
    return Run(run_dir, meta)


def _records(sources: list[Source]) -> list[Record]:
    return [from_line(row) for source in sources for row in segments.rows(source)]


def _shapes_of(sources: list[Source]) -> dict[str, tuple[int, int]]:
    own: dict[str, tuple[int, int]] = {}
    for source in sources:
        missing = set(segments.columns(source, ("name",))["name"]) - set(own)
        for row in segments.rows(source) if missing else ():
            own.setdefault(row["name"], (row["shape"][0], row["shape"][1]))
            missing.discard(row["name"])
            if not missing:
                break
    return own


def _values(run_dir: Path, wanted: list[NDArray[Any]]) -> dict[tuple[int, int, int], NDArray[Any]]:
    """Reads the spectra at (chunk, offset, length)."""
    found: dict[tuple[int, int, int], NDArray[Any]] = {}
    by_chunk: dict[int, list[tuple[int, int, int]]] = {}
    for chunk, offset, length in sorted(tuple(where.tolist()) for where in wanted):
        by_chunk.setdefault(chunk, []).append((chunk, offset, length))
    for chunk, each in by_chunk.items():
        path = chunk_path(run_dir, chunk)
        size = path.stat().st_size if path.is_file() else 0  # read, not mapped: a file that is cut off would end us
        if size < max(offset + 4 * length for _, offset, length in each) or min(each)[1] < 0:
            raise ValueError(
                f"Run.spectra: expected {path} to hold the spectra that records point to, got {size} bytes. It was "
                "cut off or removed; bring it back, or use the records, which are whole."
            )
        with open(path, "rb") as file:
            for where in each:
                file.seek(where[1])
                found[where] = np.frombuffer(file.read(4 * where[2]), dtype="<f4")
    return found


def chunk_path(run_dir: Path, chunk: int) -> Path:
    """The file of a chunk of spectra."""
    return run_dir / f"spectra-{chunk:05d}.f32"
