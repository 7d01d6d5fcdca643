"""Events of a run: what a person wants to be told of while it trains. They are kept in events.jsonl of a run directory.

The file is written a line at a time, each handed to the operating system at once, and before the records of the same
step: where a kill comes in between, opening the directory again cuts the event off, and it is found anew. Lines without
"what" are the detector's own: smoothed pieces of the curves, from which a resumed run goes on looking for onsets.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sosd_fast.runs.lines import AppendOnly, JsonLines, damaged, lines

FILE = "events.jsonl"
QUIET = 10  # steps after which the SD variation that rises once more is another spike

What = Literal["onset", "spike", "nan", "zero", "audit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in training: an onset of stability, a spike, NaN, zero, an audit beyond its bound."""

    step: int  # at which it was found
    what: What
    names: tuple[str, ...]  # the matrices, of a spike the worst first; of an onset the kind of matrices
    at: int  # the step at which it happened: an onset is seen only when the variation has stayed low for a while
    value: float | None = None  # times the variation before; factor by which it had fallen; error that an audit found
    limit: float | None = None  # the bound on that error

    @property
    def title(self) -> str:
        """What happened, in a few words."""
        return {
            "onset": "Onset of stability",
            "spike": "Spike of SD variation",
            "nan": "NaN or Inf in a matrix",
            "zero": "Matrix is zero",
            "audit": "Audit beyond its bound",
        }[self.what]

    def __str__(self) -> str:
        first, more = self.names[0], len(self.names) - 1
        others = f" and {more} more" if more else ""
        value, limit = self.value or math.nan, self.limit or math.nan
        return {
            "onset": f"onset of stability of {first} at step {self.at}: SD variation over learning rate had fallen to "
            f"1/{value:.3g} (seen at step {self.step})",
            "spike": f"spike of SD variation at step {self.at}: {first} {value:.1f} times its largest one just before"
            f"{others}",
            "nan": f"NaN or Inf in {first}{others} at step {self.at}",
            "zero": f"{first}{others} became zero at step {self.at}",
            "audit": f"audit of {first} at step {self.at}: |SD - SD_true| = {value:.1e} is beyond its bound "
            f"{limit:.1e}",
        }[self.what]


def to_line(event: Event) -> dict[str, Any]:
    """Makes an object of JSON of an event."""
    line = dataclasses.asdict(event)
    return {key: value for key, value in line.items() if value is not None}


def read(run_dir: Path) -> tuple[list[Event], list[dict[str, Any]]]:
    """Reads the events of one process, and the detector's own lines; none where there is no file.

    Raises:
        ValueError: a damaged line that is not the last.
    """
    path = run_dir / FILE
    found: list[Event] = []
    own: list[dict[str, Any]] = []
    for number, (line, *_) in enumerate(lines(path) if path.exists() else (), 1):
        if "what" not in line:
            own.append(line)
        elif _checked(line):
            known: dict[str, Any] = {f.name: line[f.name] for f in dataclasses.fields(Event) if f.name in line}
            known["names"] = tuple(known["names"])
            found.append(Event(**known))
        else:
            raise damaged(path, f"line {number}")
    return found, own


def _checked(line: dict[str, Any]) -> bool:
    """Whether a line has what an event must have, each of its type."""
    names = line.get("names")
    return (
        line["what"] in get_args(What)
        and all(type(line.get(f)) is int for f in ("step", "at"))
        and all(type(line[f]) in (int, float) for f in ("value", "limit") if f in line)
        and type(names) is list
        and bool(names)  # pyright: ignore[reportUnknownArgumentType]
        and all(type(name) is str for name in names)  # pyright: ignore[reportUnknownVariableType]
    )


def append(run_dir: Path, objects: Sequence[dict[str, Any]]):
    """Appends lines in one write, and hands them to the operating system. They are rare, so no file is kept open."""
    try:
        file = AppendOnly(run_dir / FILE)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "the run directory was removed", error.filename) from None
    try:
        file.append("".join(json.dumps(each, separators=(",", ":")) + "\n" for each in objects).encode())
    finally:
        file.close()


def trim(run_dir: Path, step: int):
    """Cuts off what was found after a step, and a torn line; nothing where there is no file."""
    if (run_dir / FILE).exists():
        JsonLines(run_dir / FILE, step).close()


def flush(run_dir: Path):
    """Forces what was appended to disk."""
    with contextlib.suppress(FileNotFoundError):
        file = os.open(run_dir / FILE, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def of_parts(folders: Sequence[Path], shown: Sequence[Mapping[str, str]]) -> list[Event]:
    """Reads the events of one process, or of several ranks as those of one run.

    Each rank looks at its own share of the matrices. An onset counts where the first of them saw it, and spikes within
    `QUIET` steps of one another are one; so are matrices that several ranks saw become NaN at the same step.

    Args:
        folders: a run directory of each.
        shown: of each, the names that are shown in the place of others.
    """
    if len(folders) == 1:
        return read(folders[0])[0]
    found: list[Event] = []
    for folder, names in zip(folders, shown, strict=True):
        for event in read(folder)[0]:
            found.append(dataclasses.replace(event, names=tuple(names.get(name, name) for name in event.names)))
    found.sort(key=lambda e: (e.step, -(e.value or 0)))
    kept: list[Event] = []
    for event in found:
        i = next((i for i in reversed(range(len(kept))) if _same(kept[i], event)), None)
        if i is None:
            kept.append(event)
        else:
            kept[i] = dataclasses.replace(kept[i], names=tuple(dict.fromkeys((*kept[i].names, *event.names))))
    return kept


def _same(a: Event, b: Event) -> bool:
    if a.what != b.what:
        return False
    if a.what == "onset":
        return a.names == b.names
    if a.what == "spike":
        return b.at - a.at <= QUIET
    return a.what != "audit" and a.at == b.at
