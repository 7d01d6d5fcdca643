"""Records: append them to a run directory, read them back.

A run directory holds

    meta.json             format, version, the matrices and the probe's settings
    records.jsonl         one record a line, in the order of steps
    spectra-00000.f32     the full spectra, little-endian float32 end to end; a record points into it
    log.jsonl             one line a step from the training loop, where it writes one

Spectra are written before the lines that point to them, and a step's lines in one write, so that whatever ends the
process leaves at most one torn line or step at the end; opening the directory again cuts it off.
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What was measured of one matrix at one step; None where it was not measured, NaN where it does not exist."""

    step: int
    name: str
    shape: tuple[int, int]
    method: str  # topk, gram32, gram64, direct64 or exact
    interval: int | None = None  # steps since the measurement that sd_variation compares with
    sd_variation: float | None = None  # |SD_t - SD_s|_2
    # What of it lies in the k leading values. Where method is topk, their sum is not known: `_topk` and `_carried`, the
    # same with all values, take the others to be shaped as in the last full spectrum (1 to 3 % off with AdamW, up to
    # 70 % early in training with Muon; LOG.md); `_floor` holds whatever they are, as far as the leading values do.
    sd_variation_topk: float | None = None
    sd_variation_carried: float | None = None
    sd_variation_floor: float | None = None  # sd_variation is at least this
    cosine: float | None = None  # to the reference spectrum
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
    topk: tuple[float, ...] = ()  # leading singular values, descending
    residual: tuple[float, ...] | None = None  # of each leading value, where method is topk
    spectrum: np.ndarray | None = dataclasses.field(default=None, compare=False)  # all values, descending


_FLOATS = tuple(f.name for f in dataclasses.fields(Record) if f.type == float | None)


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Args:
        path: created where missing. A torn last line is cut off.
        step: cut off the lines whose "step" is greater.

    Raises:
        ValueError: a damaged line that is not the last, or a file that another process has open for writing.
    """

    def __init__(self, path: str | os.PathLike, step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"JsonLines: expected a file that nobody else writes, got path={self.path}. "
                "Close the other run, or choose another directory."
            ) from None
        end = 0
        for line, start, stop in _lines(self.path):
            if step is not None and line.get("step", 0) > step:
                end = start
                break
            end = stop
        self.truncate(end)

    def write(self, *objects: dict):
        """Appends objects in one write and hands them to the operating system."""
        self._file.write(b"".join(_encode(o) for o in objects))
        self._file.flush()

    def truncate(self, size: int):
        """Cuts the file off after `size` bytes."""
        self._file.truncate(size)

    def flush(self):
        """Forces what was written to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        """Closes the file; closing twice is fine."""
        self._file.close()


class RunWriter:
    """Appends records to a run directory, after what is already there.

    Args:
        run_dir: created where missing.
        meta: written to meta.json.
        step: records of later steps are cut off; None keeps all.

    Attributes:
        step: the last complete step that is kept, or None.
    """

    def __init__(self, run_dir: str | os.PathLike, meta: dict | None = None, step: int | None = None):
        self.run_dir = Path(run_dir)
        self._lines = JsonLines(self.run_dir / "records.jsonl", step)
        kept = list(_lines(self._lines.path))
        if kept and (last := kept[-1][0])["of"] > sum(line["step"] == last["step"] for line, *_ in kept):
            first = next(i for i, (line, *_) in enumerate(kept) if line["step"] == last["step"])
            self._lines.truncate(kept[first][1])
            del kept[first:]
        self.step = kept[-1][0]["step"] if kept else None
        pointers = [line["spectrum"] for line, *_ in kept if line.get("spectrum")]
        chunk, offset, length = pointers[-1] if pointers else (0, 0, 0)
        self._chunk, end = chunk, offset + 4 * length
        for path in sorted(self.run_dir.glob("spectra-*.f32")):
            if path != self._chunk_path() and path > self._chunk_path():
                path.unlink()
        self._spectra = open(self._chunk_path(), "ab")
        self._spectra.truncate(end)
        self._spectra.seek(end)  # truncating leaves the position, which pointers are taken from, behind the end
        meta = {"format": "sosd_fast", "version": FORMAT_VERSION} | (meta or {})
        temporary = self.run_dir / "meta.json.tmp"
        temporary.write_text(json.dumps(meta, indent=1))
        temporary.replace(self.run_dir / "meta.json")

    def append(self, records: Sequence[Record]):
        """Appends the records of one step."""
        lines = [_to_line(r, self._append_spectrum(r.spectrum)) | {"of": len(records)} for r in records]
        self._spectra.flush()
        self._lines.write(*lines)

    def first_spectra(self) -> dict[str, np.ndarray]:
        """Reads the first full spectrum of each matrix."""
        run = load(self.run_dir)
        return {name: run.spectra(name)[1][0] for name in run.names if len(run.spectra(name)[0])}

    def flush(self):
        """Forces what was appended to disk."""
        os.fsync(self._spectra.fileno())
        self._lines.flush()

    def close(self):
        """Closes the files; closing twice is fine."""
        self._spectra.close()
        self._lines.close()

    def _append_spectrum(self, spectrum: np.ndarray | None) -> list[int] | None:
        if spectrum is None:
            return None
        if self._spectra.tell() >= CHUNK_BYTES:
            self._spectra.close()
            self._chunk += 1
            self._spectra = open(self._chunk_path(), "wb")
        offset = self._spectra.tell()
        self._spectra.write(np.ascontiguousarray(spectrum, dtype="<f4").tobytes())
        return [self._chunk, offset, len(spectrum)]

    def _chunk_path(self) -> Path:
        return _chunk_path(self.run_dir, self._chunk)


@dataclasses.dataclass
class Run:
    """A run directory, read.

    Attributes:
        run_dir: where it was read from.
        meta: meta.json.
        records: in the order of steps, without their spectra; see `spectra`.
        log: what the training loop wrote to log.jsonl, one dict a step.
    """

    run_dir: Path
    meta: dict
    records: list[Record]
    log: list[dict]
    _pointers: dict[str, list[tuple[int, list[int]]]] = dataclasses.field(repr=False)

    @property
    def names(self) -> list[str]:
        """The matrices, in the model's order."""
        return list(dict.fromkeys(r.name for r in self.records))

    def spectra(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads the full spectra of one matrix.

        Returns:
            (steps (T,), S (T, r) float32, each row descending).
        """
        if name not in self.names:
            raise ValueError(f"Run.spectra: expected one of {len(self.names)} names, got name={name!r}. See Run.names.")
        pointers = self._pointers.get(name, [])
        rows = []
        for _, (chunk, offset, length) in pointers:
            path = _chunk_path(self.run_dir, chunk)
            rows.append(np.fromfile(path, dtype="<f4", count=length, offset=offset))
        return np.array([step for step, _ in pointers]), np.array(rows)

    def to_pandas(self):
        """Returns the records as a pandas DataFrame, one row a record."""
        try:
            import pandas
        except ImportError:
            raise ImportError("Run.to_pandas: expected pandas to be installed. Run `pip install pandas`.") from None
        fields = [f.name for f in dataclasses.fields(Record) if f.name != "spectrum"]
        return pandas.DataFrame([{f: getattr(r, f) for f in fields} for r in self.records], columns=fields)


def load(run_dir: str | os.PathLike) -> Run:
    """Reads a run directory, also one that is being written or was cut off; a torn last step is left out.

    Raises:
        ValueError: no run directory, one of a newer version, or a damaged one.
    """
    run_dir = Path(run_dir)
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
    lines = [line for line, *_ in _lines(run_dir / "records.jsonl")]
    if lines and sum(line["step"] == lines[-1]["step"] for line in lines) < lines[-1]["of"]:
        lines = [line for line in lines if line["step"] != lines[-1]["step"]]
    pointers: dict[str, list] = {}
    for line in lines:
        if line.get("spectrum"):
            pointers.setdefault(line["name"], []).append((line["step"], line["spectrum"]))
    log = [line for line, *_ in _lines(run_dir / "log.jsonl")] if (run_dir / "log.jsonl").exists() else []
    return Run(run_dir, meta, [_from_line(line) for line in lines], log, pointers)


def _chunk_path(run_dir: Path, chunk: int) -> Path:
    return run_dir / f"spectra-{chunk:05d}.f32"


def _encode(o: dict) -> bytes:
    return (json.dumps(o, separators=(",", ":")) + "\n").encode()


def _lines(path: Path) -> Iterable[tuple[dict, int, int]]:
    """Yields (object, first byte, byte after) of each whole line."""
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


def _to_line(record: Record, pointer: list[int] | None) -> dict:
    """JSON has no NaN: such values become null, and "nan" lists them."""
    line = {f: getattr(record, f) for f in Record.__dataclass_fields__ if f != "spectrum"}
    nan = [f for f in _FLOATS if line[f] is not None and not math.isfinite(line[f])]
    line = {f: v for f, v in line.items() if v is not None and f not in nan and not (f == "topk" and not v)}
    for f in ("topk", "residual"):
        if f in line and not all(map(math.isfinite, line[f])):
            nan.append(f)
            line[f] = [len(line[f])]
    return line | ({"nan": nan} if nan else {}) | ({"spectrum": pointer} if pointer else {})


def _from_line(line: dict) -> Record:
    values = {f: line[f] for f in Record.__dataclass_fields__ if f in line and f != "spectrum"}
    for f in line.get("nan", ()):
        values[f] = [math.nan] * int(values[f][0]) if f in ("topk", "residual") else math.nan
    for f in ("shape", "topk", "residual"):
        if f in values:
            values[f] = tuple(values[f])
    return Record(**values)
