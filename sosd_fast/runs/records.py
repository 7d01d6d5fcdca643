"""Records: append them to a run directory, read them back.

A run directory (format version 2) holds

    meta.json             format, version, the matrices and the probe's settings; of several processes, also "rank", the
                          one that wrote this folder, and "shared_by", the ranks that share the work on its matrices
    records.jsonl         the records being written: one a line, in the order of steps
    events.jsonl          onsets, spikes, NaN: see `sosd_fast.runs.events`
    records-00000.*       older ones, moved there every 32 MB; as Parquet where pyarrow is installed, else as they were
    spectra-00000.f32     full spectra, little-endian float32 end to end, 64 MB a file; a record points into it
    log.jsonl             one line a step from the training loop, where it writes one

Numbers are kept of every record. Leading values and full spectra are thinned, each per matrix: they are kept where at
least step / 1000 steps, at most 100, have passed since the last ones kept: every step up to step 1,999, then ever more
rarely, and from step 100,000 on at each hundredth.

Spectra are written before the lines that point to them, and a step's lines in one write, so that whatever ends the
process leaves at most one torn line or step at the end; opening the directory again cuts it off. Version 1 had a single
records.jsonl and kept everything; it is read, and goes on as version 2 when appended to.

Of several processes each has such a directory of its own, rank-00000 and so on, in the one that all of them were given.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs import events, segments
from sosd_fast.runs.parts import Part, missing_ranks, say_faults, told_apart
from sosd_fast.runs.schema import FLOATS, Line, Record, from_line, to_line
from sosd_fast.runs.segments import AppendOnly, JsonLines

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 2
CHUNK_BYTES = 64 * 2**20  # of spectra
SEGMENT_BYTES = 32 * 2**20  # of records: about 60,000 lines, which pyarrow turns into Parquet in about half a second
SPARSEST = 100  # steps between the spectra of a matrix that are kept


class RunWriter:
    """Appends records to a run directory, after what is already there.

    Args:
        run_dir: created where missing.
        meta: written to meta.json.
        step: records of later steps are cut off; None keeps all.

    Attributes:
        step: the last complete step that is kept, or None.
    """

    def __init__(self, run_dir: str | os.PathLike[str], meta: dict[str, Any] | None = None, step: int | None = None):
        self.run_dir = Path(run_dir)
        self._lines = JsonLines(self.run_dir / segments.LIVE, step)
        try:
            self._open(meta, step)
        except BaseException:
            self._lines.close()
            raise

    def _open(self, meta: dict[str, Any] | None, step: int | None):
        live = self.run_dir / segments.LIVE
        if step is not None:  # the newest first: a kill in between leaves no gap
            for path in reversed(segments.paths(self.run_dir)[:-1]):
                segments.trim(path, step)
        self._lines.truncate(segments.complete_end(live))
        self.step: int | None = None
        self._appended = -1, 0  # the step written last, and how many records of it
        self._kept: dict[tuple[str, str], int] = {}  # (what, matrix) -> the step at which it was last kept
        self._chunk, end = self._look_back()
        for path in self.run_dir.glob("spectra-*.f32"):
            if path.name > self._chunk_path().name:
                path.unlink()
        self._spectra = AppendOnly(self._chunk_path())
        self._spectra.truncate(end)
        temporary = self.run_dir / "meta.json.tmp"
        temporary.write_text(json.dumps({"format": "sosd_fast", "version": FORMAT_VERSION, **(meta or {})}, indent=1))
        temporary.replace(self.run_dir / "meta.json")

    @staticmethod
    def trim(run_dir: Path, step: int):
        """Cuts the records of later steps off a run directory, unless somebody writes it."""
        segments.trim_all(run_dir, step)

    def append(self, records: Sequence[Record]):
        """Appends records of one step; spectra and leading values by the rule that this module states."""
        lines: list[Line] = []
        already = self._appended[1] if records and self._appended[0] == records[0].step else 0
        for r in records:
            pointer = self._append_spectrum(r.spectrum) if r.spectrum is not None and self._due("spectrum", r) else None
            if r.topk and not self._due("topk", r):
                r = dataclasses.replace(r, topk=(), residual=None)
            lines.append(to_line(r, pointer) | {"of": already + len(records)})
        self._lines.write(*lines)
        if records:
            self._appended = records[0].step, already + len(records)
        if self._lines.size >= SEGMENT_BYTES:
            self._close_segment()

    def first_spectra(self) -> dict[str, NDArray[Any]]:
        """Reads the first full spectrum of each matrix that had one that is neither zero nor holds NaN or Inf."""
        run = load(self.run_dir)
        spectra = {name: run.spectra(name)[1] for name in run.names}
        finite = {name: S[np.isfinite(S).all(axis=1) & (S[:, 0] > 0)] for name, S in spectra.items() if len(S)}
        return {name: S[0] for name, S in finite.items() if len(S)}

    def flush(self):
        """Forces what was appended to disk."""
        self._spectra.flush()
        self._lines.flush()

    def close(self):
        """Closes the files; closing twice is fine."""
        self._spectra.close()
        self._lines.close()

    def _due(self, what: str, record: Record) -> bool:
        last = self._kept.get((what, record.name))
        due = last is None or record.step - last >= min(record.step // 1000, SPARSEST)
        if due:
            self._kept[what, record.name] = record.step
        return due

    def _look_back(self) -> tuple[int, int]:
        """Finds the last step, what was kept lately, and (chunk, byte) at which the spectra that are kept end."""
        end = None
        for path in reversed(segments.paths(self.run_dir)):
            first = last = pointer = None
            for row in segments.rows(path):
                first, last = (row["step"] if first is None else first), row["step"]
                pointer = row.get("spectrum", pointer)
                for what in ("topk", "spectrum"):
                    if what in row:
                        self._kept[what, row["name"]] = max(last, self._kept.get((what, row["name"]), 0))
            self.step = last if self.step is None else self.step
            end = end or pointer
            if end and first is not None and self.step is not None and first <= self.step - SPARSEST:
                break
        chunk, offset, length = end or (0, 0, 0)
        return chunk, offset + 4 * length

    def _close_segment(self):
        number = sum(path.name != segments.LIVE for path in segments.paths(self.run_dir))
        closed = self.run_dir / f"records-{number:05d}.jsonl"
        self._lines.start_over(closed)
        with contextlib.suppress(Exception):  # no pyarrow, a full disk: JSON lines are read as well, only more slowly
            segments.to_parquet(closed)

    def _append_spectrum(self, spectrum: NDArray[Any]) -> list[int]:
        if self._spectra.size >= CHUNK_BYTES:
            self._spectra.close()
            self._chunk += 1
            self._spectra = AppendOnly(self._chunk_path(), "wb")
        offset = self._spectra.size
        self._spectra.append(np.ascontiguousarray(spectrum, dtype="<f4").tobytes())
        return [self._chunk, offset, len(spectrum)]

    def _chunk_path(self) -> Path:
        return _chunk_path(self.run_dir, self._chunk)


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
        matrices = list(dict.fromkeys(of.get(m, m) for p, of in zip(parts, shown, strict=True) for m in p.matrices))
        return cls(runs[0].run_dir, runs[0].meta | ({"matrices": matrices} if matrices else {}), parts)

    @functools.cached_property
    def records(self) -> list[Record]:
        """All records in the order of steps, without their spectra: about 1 kB each in memory."""
        if len(self._parts) == 1:
            return [from_line(row) for row in _rows(self._parts[0].path)]
        found: dict[tuple[int, str], Record] = {}
        for part, shown in zip(self._parts, self._shown, strict=True):
            for row in _rows(part.path):
                name: str = row["name"]
                row["name"] = shown.get(name, name)
                found.setdefault((row["step"], shown.get(name, name)), from_line(row))
        order = {name: i for i, name in enumerate(self.names)}
        return sorted(found.values(), key=lambda r: (r.step, order[r.name]))

    @functools.cached_property
    def log(self) -> list[dict[str, Any]]:
        """What the training loop wrote to log.jsonl, one dict a step."""
        logs = [folder / "log.jsonl" for folder in (self.run_dir, *(part.path for part in self._parts))]
        path = next((path for path in logs if path.exists()), None)
        return [line for line, *_ in segments.lines(path)] if path else []

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
        parts: list[dict[str, NDArray[Any]]] = []
        for part, shown in zip(self._parts, self._shown, strict=True):
            parts += [segments.columns(path, wanted) for path in segments.paths(part.path)]
            for p in parts[-len(segments.paths(part.path)) :] if shown else ():
                p["name"] = np.array([shown.get(name, name) for name in p["name"]], dtype=object)
        table = {f: np.concatenate([p[f] for p in parts] or [np.empty(0)]) for f in wanted}
        if len(self._parts) > 1:
            order = {name: i for i, name in enumerate(self.names)}
            code = table["step"] * len(order) + np.array([order[name] for name in table["name"]], dtype=np.int64)
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
        rows: list[NDArray[Any]] = []
        chunks: dict[tuple[Path, int], NDArray[Any]] = {}
        for step in steps:
            part, (chunk, offset, length) = kept[step]
            if (part, chunk) not in chunks:
                chunks[part, chunk] = np.memmap(_chunk_path(part, chunk), dtype="<f4", mode="r")
            rows.append(chunks[part, chunk][offset // 4 : offset // 4 + length])
        return np.array(steps, dtype=np.int64), np.array(rows)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the records as a pandas DataFrame: one row a record, all fields but lists of values."""
        try:
            import pandas
        except ImportError:
            raise ImportError("Run.to_pandas: expected pandas to be installed. Run `pip install pandas`.") from None
        table = self.columns("step", "name", "method", "interval", *FLOATS)
        frame = pandas.DataFrame(table)
        frame.insert(2, "shape", [self._shapes[name] for name in table["name"]])
        return frame

    def to_parquet(self, path: str | os.PathLike[str]):
        """Writes all records, with their leading values, to one Parquet file, a segment at a time."""
        pairs = zip(self._parts, self._shown, strict=True)
        files = ((file, shown) for part, shown in pairs for file in segments.paths(part.path))
        segments.write_parquet(Path(path), (segments.read_table(file, shown=shown) for file, shown in files))

    @functools.cached_property
    def _own_shapes(self) -> list[dict[str, tuple[int, int]]]:
        """Of each part, the shapes of its matrices by the names that it recorded them under."""
        found: list[dict[str, tuple[int, int]]] = []
        for part in self._parts:
            found.append(own := {})
            for path in segments.paths(part.path):
                missing = set(segments.columns(path, ("name",))["name"]) - set(own)
                for row in segments.rows(path) if missing else ():
                    own.setdefault(row["name"], (row["shape"][0], row["shape"][1]))
                    missing.discard(row["name"])
                    if not missing:
                        break
        return found

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
            for path in segments.paths(part.path):
                for step, name, where in zip(*segments.pointers(path), strict=True):
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
        meta = json.loads((run_dir / "meta.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(
            f"load: expected a run directory with a meta.json, got run_dir={run_dir}. "
            "Pass the run_dir that was given to sosd_fast.track."
        ) from None
    if meta.get("version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"load: expected format version {FORMAT_VERSION} or older, got version={meta['version']} in {run_dir}. "
            "Install a newer sosd_fast."
        )
    if (run_dir / segments.LIVE).exists():
        for _ in segments.lines(run_dir / segments.LIVE):
            pass  # a damaged line is told here, not in the middle of an evaluation
    return Run(run_dir, meta)


def _rows(run_dir: Path) -> Iterator[Line]:
    return (row for path in segments.paths(run_dir) for row in segments.rows(path))


def _chunk_path(run_dir: Path, chunk: int) -> Path:
    return run_dir / f"spectra-{chunk:05d}.f32"
