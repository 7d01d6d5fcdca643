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
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosd_fast.runs import segments, tables
from sosd_fast.runs.lines import AppendOnly, JsonLines, complete_end, last_line, replace_text, sync_folder
from sosd_fast.runs.parts import FORMAT_VERSION, read_meta
from sosd_fast.runs.reader import Run, chunk_path, load
from sosd_fast.runs.schema import Line, Record, to_line

__all__ = ["JsonLines", "Record", "Run", "RunWriter", "load"]

CHUNK_BYTES = 64 * 2**20  # of spectra
SEGMENT_BYTES = 32 * 2**20  # of records: about 60,000 lines, which pyarrow turns into Parquet in about half a second
SPARSEST = 100  # steps between the spectra of a matrix that are kept

log = logging.getLogger("sosd_fast")


class RunWriter:
    """Appends records to a run directory, after what is already there.

    Args:
        run_dir: created where missing.
        meta: written to meta.json.
        step: records of later steps are cut off; None keeps all.

    Attributes:
        step: the last complete step that is kept, or None.

    Raises:
        ValueError: a run directory of a later format, a damaged one, or one that somebody else writes.
    """

    def __init__(self, run_dir: str | os.PathLike[str], meta: dict[str, Any] | None = None, step: int | None = None):
        self.run_dir = Path(run_dir)
        there = read_meta(self.run_dir) if os.path.lexists(self.run_dir / "meta.json") else {}  # before it is changed
        self._lines = JsonLines(self.run_dir / segments.LIVE, step)
        try:
            self._open(meta or {}, there, step)
        except BaseException:
            self._lines.close()
            raise

    def _open(self, meta: dict[str, Any], there: dict[str, Any], step: int | None):
        live = self.run_dir / segments.LIVE
        segments.tidy(self.run_dir)
        closed = segments.paths(self.run_dir)[:-1]
        # Of the next segment: a number is given once, also where the segment that had it is cut off.
        self._number = max([there.get("next_segment", 0), *(segments.number(path) + 1 for path in closed)])
        ours = {"format": "sosd_fast", "version": FORMAT_VERSION, "next_segment": self._number}
        replace_text(self.run_dir / "meta.json", json.dumps(ours | meta, indent=1))
        if step is not None:  # the newest first: a kill in between leaves no gap
            for path in reversed(closed):
                segments.trim(path, step)
        self._lines.truncate(complete_end(live))
        self.step: int | None = None
        last = last_line(live) or {}
        self._appended = last.get("step", -1), last.get("of", 0)  # the step written last, and how many lines of it
        self._kept: dict[tuple[str, str], int] = {}  # (what, matrix) -> the step at which it was last kept
        self._chunk, end = self._look_back()
        for path in self.run_dir.glob("spectra-*.f32"):
            if path.name > self._chunk_path().name:
                path.unlink()
        there_are = self._chunk_path().stat().st_size if self._chunk_path().exists() else 0
        if there_are < end:  # values are lost, as by a power failure: what is written now must not take their place
            log.warning(
                "sosd_fast: %s has %d bytes, and records point to %d; the spectra that are lost cannot be read.",
                self._chunk_path(), there_are, end,
            )  # fmt: skip
            self._chunk, end = self._chunk + 1, 0
        self._spectra = AppendOnly(self._chunk_path())
        self._spectra.truncate(end)
        sync_folder(self.run_dir)
        sync_folder(self.run_dir.parent)

    @staticmethod
    def trim(run_dir: Path, step: int):
        """Cuts the records of later steps off a run directory, unless somebody writes it."""
        segments.trim_all(run_dir, step)

    def append(self, records: Sequence[Record]):
        """Appends records of one step; spectra and leading values by the rule that this module states."""
        lines: list[Line] = []
        if not records:
            return
        already = self._appended[1] if self._appended[0] == records[0].step else 0
        if not already and not self._lines.inherited and self._lines.size >= SEGMENT_BYTES:
            self._close_segment()  # not within a step, which may come in parts
        for r in records:
            pointer = self._append_spectrum(r.spectrum) if r.spectrum is not None and self._due("spectrum", r) else None
            if r.topk and not self._due("topk", r):
                r = dataclasses.replace(r, topk=(), residual=None)
            lines.append(to_line(r, pointer) | {"of": already + len(records)})
        self._lines.write(*lines)
        self._appended = records[0].step, already + len(records)

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
        closed = self.run_dir / f"records-{self._number:05d}.jsonl"
        self._number += 1
        self._spectra.flush()  # before lines that point to them
        self._lines.start_over(closed)
        with contextlib.suppress(Exception):  # no pyarrow, a full disk: JSON lines are read as well, only more slowly
            tables.to_parquet(closed)

    def _append_spectrum(self, spectrum: NDArray[Any]) -> list[int]:
        if self._spectra.size >= CHUNK_BYTES:
            self._spectra.flush()
            self._spectra.close()
            self._chunk += 1
            self._spectra = AppendOnly(self._chunk_path(), "wb")
        offset = self._spectra.size
        self._spectra.append(np.ascontiguousarray(spectrum, dtype="<f4").tobytes())
        return [self._chunk, offset, len(spectrum)]

    def _chunk_path(self) -> Path:
        return chunk_path(self.run_dir, self._chunk)
