"""A live view of a run in the terminal, read from its run directory while another process writes it."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sosd_fast.matrices import kind
from sosd_fast.runs import segments
from sosd_fast.runs.curves import logged, variation_by_kind
from sosd_fast.runs.records import Run, load

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
_EVENTS = 8  # shown, the newest
_SEGMENTS = 2  # of records that are read at most: some 60,000 to 120,000 records, however long the run is
_REST = 4  # times as long as reading took, between two looks


class _Recent:
    """The newest records of a run, in the form that curves are made of."""

    def __init__(self, run: Run):
        fields = ("step", "name", "sd_variation", "sd_variation_carried")

        def read(sources: list[segments.Source]) -> list[dict[str, Any]]:
            return [segments.columns(source, fields) for source in sources[-_SEGMENTS:]]

        tables = [t for part in run._parts for t in segments.consistent(part.path, read)]
        self._table: dict[str, Any] = {f: np.concatenate([t[f] for t in tables] or [np.empty(0)]) for f in fields}
        order = np.argsort(self._table["step"], kind="stable")  # of several ranks
        self._table = {f: values[order] for f, values in self._table.items()}
        v, carried = self._table["sd_variation"], self._table.pop("sd_variation_carried")
        self.estimated = not np.isfinite(v).any()
        if self.estimated:  # nothing but leading values is measured
            self._table["sd_variation"] = carried
        self.names = list(dict.fromkeys(self._table["name"].tolist()))

    def columns(self, *fields: str) -> dict[str, Any]:
        return {f: self._table[f] for f in fields}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Draws values as blocks on a logarithmic scale; of several that share a block the largest, so that spikes stay.

    Args:
        values: in order; those that are not finite or not positive leave a gap.
        width: in characters, at most.
    """
    parts = np.array_split(np.asarray(values, dtype=float), min(width, len(values))) if len(values) else []
    tops = [max((v for v in part.tolist() if 0 < v < math.inf), default=math.nan) for part in parts]
    logs = [math.log(top) for top in tops]  # the logarithm of NaN is NaN
    known = [v for v in logs if not math.isnan(v)]
    if not known:
        return " " * len(logs)
    low, high = min(known), max(known)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(v) else _BLOCKS[round((v - low) * scale)] for v in logs)


def snapshot(run_dir: str | Path, width: int = 80) -> "RenderableType":
    """Returns what there is to see of a run now, for rich to print.

    Args:
        run_dir: as given to `sosd_fast.track`.
        width: of the terminal, in characters.

    Raises:
        ValueError: no run directory.
        ImportError: without rich.
    """
    console = _rich()
    from rich.table import Table
    from rich.text import Text

    run = load(run_dir)
    recent = _Recent(run)
    curves = variation_by_kind(recent)  # pyright: ignore[reportArgumentType]
    steps = recent.columns("step")["step"]
    losses, overhead = (logged(run, field)[:, 1].tolist() for field in ("loss", "overhead"))
    head = [f"step {steps[-1]}" if len(steps) else "no records yet", f"{len(recent.names)} matrices"]
    if losses:
        head.append(f"loss {losses[-1]:.4g}")
    if overhead:
        head.append(f"overhead {overhead[-1]:.2%}")
    onsets = {event.names[0]: event for event in run.events if event.what == "onset"}
    spikes = [event for event in run.events if event.what == "spike"]
    room = max(8, width - 52)
    table = Table("", "", "now", "peak", "onset", "spikes", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    table.columns[1].no_wrap = True
    if losses:
        table.add_row("loss", sparkline(losses, room), f"{losses[-1]:.4g}", f"{max(losses):.4g}", "", "")
    for name, (_, spread) in curves.items():
        median = spread[:, 1]
        count = sum(any(kind(matrix) == name for matrix in event.names) for event in spikes)
        onset = f"step {onsets[name].at}" if name in onsets else "–"
        numbers = f"{median[-1]:.1e}", f"{median.max():.1e}", onset, str(count or "–")
        table.add_row(name, sparkline(spread[:, 2].tolist(), room), *numbers)
    lines: list[Any] = [Text(f"{run.run_dir}", style="bold"), Text(", ".join(head)), Text(), table, Text()]
    if len(steps):
        what = "SD variation per step, largest of each kind" + (", estimated from leading values" * recent.estimated)
        lines.append(Text(f"{what}; log scale, steps {steps[0]} to {steps[-1]}; now and peak: medians", style="dim"))
    lines.append(Text("events" if run.events else "no events yet", style="bold" if run.events else "dim"))
    bad = {"nan", "zero", "audit"}
    lines += [Text(f"  {e}", style="red" if e.what in bad else "") for e in run.events[-_EVENTS:]]
    if len(run.events) > _EVENTS:
        lines.append(Text(f"  {len(run.events) - _EVENTS} earlier ones: sosd_fast.load(run).events", style="dim"))
    return console.Group(*lines)


def watch(run_dir: str | Path, every: float = 1.0, console: "Console | None" = None):
    """Shows a run in the terminal until ctrl-C, anew every few seconds; without a terminal, prints it once.

    Args:
        run_dir: as given to `sosd_fast.track`; another process may be writing it.
        every: seconds between two looks, at least; a look that takes long is followed by four times as much rest.
        console: of rich; that of stdout by default.

    Raises:
        ValueError: no run directory.
        ImportError: without rich.
    """
    console = console or _rich().Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
        console.print(snapshot(run_dir, console.width))
        return
    from rich.live import Live

    view = snapshot(run_dir, console.width)
    try:
        with Live(view, console=console, screen=True, auto_refresh=False) as live:
            while True:
                began = time.monotonic()
                try:
                    view = snapshot(run_dir, console.width)
                    live.update(view, refresh=True)
                except (OSError, ValueError) as error:  # a segment was being moved; or the directory is gone
                    live.update(_rich().Group(view, f"cannot be read just now: {error}"), refresh=True)
                time.sleep(max(every, _REST * (time.monotonic() - began)))
    except KeyboardInterrupt:
        console.print(view)  # the last look stays on the screen


def _rich():
    try:
        import rich.console
    except ImportError:
        raise ImportError("watch: expected rich to be installed. Run `pip install rich`.") from None
    return rich.console
