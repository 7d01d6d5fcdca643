"""One HTML page about one or several runs, that opens without a network: figures, tables, settings."""

import io
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape as html_escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sosd_fast.checkpoints.analyze import parameter_alignment
from sosd_fast.checkpoints.files import find_checkpoints
from sosd_fast.matrices import kind
from sosd_fast.runs import plot
from sosd_fast.runs.curves import KINDS, logged, spectral_alignment, variation_by_kind
from sosd_fast.runs.phases import onsets as onsets_of
from sosd_fast.runs.records import Run, load
from sosd_fast.runs.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHORT = ' class="short"'  # of a cell that is not broken: others are wherever it must be, or the page would scroll
_MOVED = (
    "An onset is told while the run goes on, from the steps up to then, and not taken back. What came later moved it; "
    "figures and tables of this page look at the whole run."
)
_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    run_dirs: Sequence[str | os.PathLike],
    path: str | os.PathLike = "report.html",
    *,
    matrices: int = 48,
) -> Path:
    """Writes the report of one run, or of several overlaid.

    Saved weights in a run directory (checkpoint*, checkpoints/*, step*) give the alignment of the parameters.

    Args:
        run_dirs: run directories.
        path: of the page.
        matrices: whose spectra are drawn of each run at most, spread evenly over its kinds.

    Returns:
        The path.

    Raises:
        ValueError: no run directory.
        ImportError: without matplotlib.
    """
    if not run_dirs:
        raise ValueError("report: expected at least one run directory, got run_dirs=[]. Pass what track wrote.")
    for run_dir in run_dirs:
        if not isinstance(run_dir, str | os.PathLike):
            raise ValueError(
                f"report: expected paths of run directories, got a {type(run_dir).__name__}. Pass the folders."
            )
    runs = _labelled([load(run_dir) for run_dir in run_dirs])
    events = _events(runs)  # what is damaged is told before figures are drawn, which takes seconds
    sections = [_overview(runs), events, _alignment(runs), _kinds(runs), *_spectra(runs, matrices)]
    sections += [_cost(runs), _bounds(runs), _settings(runs)]
    page = string.Template(_TEMPLATE.read_text()).substitute(
        title=escape(" against ".join(runs)),
        subtitle=escape("; ".join(_summary(label, run) for label, run in runs.items())),
        version=metadata.version("sosd_fast"),
        sections="\n".join(filter(None, sections)),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def escape(text: str) -> str:
    """Text of a page: what is in it is shown, whatever it is."""
    return html_escape(plain(text))


def _labelled(runs: list[Run]) -> dict[str, Run]:
    labels = [run.run_dir.resolve().name for run in runs]
    twice = {label for label in labels if labels.count(label) > 1}
    return {
        str(run.run_dir) if label in twice else label: run for label, run in zip(labels, runs, strict=True)
    }  # fmt: skip


def _summary(label: str, run: Run) -> str:
    steps = run.columns("step")["step"]
    last = f"{steps[-1]} steps" if len(steps) else "no records"
    missing = f"; without those of ranks {', '.join(map(str, run.missing_ranks))}" if run.missing_ranks else ""
    return f"{label}: {len(run.names)} matrices, {last}, {len(steps):,} records{missing}"


def _overview(runs: dict[str, Run]) -> str:
    if len(runs) == 1:
        draw = partial(plot.plot_run, *runs.values())
    else:
        draw = partial(plot.plot_runs, runs)
    caption = "Median over the matrices of a kind; the band is their range. Dotted: onset of stability."
    drawn = _figure(draw, "overview", "loss and SD variation by step", caption)
    curves = {label: variation_by_kind(run) for label, run in runs.items()}
    kinds = [name for name in KINDS if any(name in of_run for of_run in curves.values())]
    rows = (row for label, run in runs.items() for row in _curve_rows(label, run, curves[label], kinds))
    return _section("Loss and SD variation", drawn + _numbers(["run", "step", "loss", *kinds], rows))


def _curve_rows(label: str, run: Run, curves: dict, kinds: Sequence[str]) -> Iterable[list]:
    losses = {int(step): loss for step, loss in logged(run, "loss").tolist()}
    for step in _some(sorted({*losses, *(step for steps, _ in curves.values() for step in steps.tolist())})):
        row = [label, int(step), f"{losses[step]:.4g}" if step in losses else "–"]
        for name in kinds:
            steps, spread = curves.get(name, (np.empty(0), np.empty((0, 3))))
            at = np.flatnonzero(steps == step)
            row.append(f"{spread[at[0], 1]:.2e}" if len(at) else "–")
        yield row


def _events(runs: dict[str, Run]) -> str:
    rows, moved = [], False
    for label, run in runs.items():
        onsets = onsets_of(run) if any(event.what == "onset" for event in run.events) else {}
        for event in run.events:
            text = str(event)
            if event.what == "onset" and (seen := onsets.get(event.names[0])) != event.at:
                text += "; the whole run shows " + ("none" if seen is None else f"it at step {seen}")
                moved = True
            rows.append([label, event.step, text])
    if not rows:
        return ""
    rows += [[label, "–", "none was found"] for label, run in runs.items() if not run.events]
    drawn = _table(["run", "step", "what the probe found"], rows)
    return _section("Events", drawn + _note(_MOVED) if moved else drawn)


def _alignment(runs: dict[str, Run]) -> str:
    parameters = {}
    for label, run in runs.items():
        files = find_checkpoints(run.run_dir)
        if len(files) > 1:
            parameters[label] = parameter_alignment(files)
    if not any(len(run.spectra(name)[0]) > 1 for run in runs.values() for name in run.names):
        return ""
    caption = "Solid: cosine of each spectrum to the last one of its matrix. "
    caption += "Dashed: cosine of the parameters to the last checkpoint." if parameters else (
        "The same of the parameters needs checkpoints, and none were found."
    )  # fmt: skip
    draw = partial(plot.plot_alignment, runs, parameters)
    rows = []
    for label, run in runs.items():
        steps, cosine = spectral_alignment(run)
        chosen = _some(range(len(steps)))
        rows += [[label, int(steps[i]), *(f"{value:.5f}" for value in cosine[i])] for i in chosen]
    drawn = _figure(draw, "alignment", "cosine by step", caption)
    header = ["run", "step", "cosine of the spectra, least", "median", "largest"]
    return _section("Alignment with the final state", drawn + _numbers(header, rows))


def _kinds(runs: dict[str, Run]) -> str:
    header = ["run", "module", "matrices", "SD variation, last", "at its peak", "peak at step", "onset of stability"]
    header += ["effective rank, first → last", "stable rank, first → last", "cosine to the start"]
    rows = []
    for label, run in runs.items():
        curves, onsets = variation_by_kind(run), onsets_of(run)
        ends = {f: _ends(run, f) for f in ("effective_rank", "stable_rank", "cosine")}
        for name in dict.fromkeys(map(kind, run.names)):
            row = [label, name, sum(kind(n) == name for n in run.names)]
            if name in curves:
                steps, variation = curves[name]
                peak = int(variation[:, 1].argmax())
                row += [f"{variation[-1, 1]:.2e}", f"{variation[peak, 1]:.2e}", int(steps[peak])]
                row.append("not seen" if onsets[name] is None else f"step {onsets[name]}")
            else:
                row += ["–"] * 4
            for f, digits in (("effective_rank", 1), ("stable_rank", 1), ("cosine", 4)):
                pairs = [ends[f][n] for n in run.names if kind(n) == name and n in ends[f]]
                first, last = np.median(pairs, axis=0) if pairs else (math.nan, math.nan)
                text = f"{last:.{digits}f}" if f == "cosine" else f"{first:.{digits}f} → {last:.{digits}f}"
                row.append(text if pairs else "–")
            rows.append(row)
    return _section("By module kind", _table(header, rows) + _note("Medians over the matrices of a kind."))


def _ends(run: Run, field: str) -> dict[str, tuple[float, float]]:
    """First and last value of a field that each matrix has."""
    table = run.columns("name", field)
    found: dict[str, tuple[float, float]] = {}
    measured = np.isfinite(table[field])
    for name, value in zip(table["name"][measured], table[field][measured].tolist(), strict=True):
        found[name] = (found[name][0] if name in found else value, value)
    return found


def _spectra(runs: dict[str, Run], limit: int) -> Iterable[str]:
    chosen, counts = {label: {} for label in runs}, {label: {} for label in runs}
    for label, run in runs.items():
        by_kind: dict[str, list[str]] = {}
        for name in run.names:
            if len(run.spectra(name)[0]) > 1:
                by_kind.setdefault(kind(name), []).append(name)
        share = max(1, limit // max(len(by_kind), 1))
        for name, members in by_kind.items():
            places = np.unique(np.linspace(0, len(members) - 1, share).round().astype(int))
            chosen[label][name], counts[label][name] = [members[i] for i in places], len(members)
    kinds = {name for of_run in chosen.values() for name in of_run}
    limits = {
        name: plot.color_limits([(run, chosen[label].get(name, [])) for label, run in runs.items()]) for name in kinds
    }
    for number, (label, run) in enumerate(runs.items()):
        parts = []
        for name, members in chosen[label].items():
            caption = (
                f"{len(members)} of {counts[label][name]} matrices. Red: a larger share of the sum than at first; "
                "blue: a smaller one." + " The colours are those of all runs." * (len(runs) > 1)
            )
            draw = partial(plot.plot_spectra, run, members, limits=limits[name])
            drawn = _figure(draw, f"spectra{number}-{name}", f"spectra of {name} matrices over time", caption)
            header = ["matrix", "steps", "largest value's share, first → last", "values that hold half of the sum"]
            drawn += _numbers(header, (_spectrum_row(run, member) for member in members))
            parts.append(f"<details open><summary>{escape(name)}</summary>{drawn}</details>")
        if parts:
            yield _section("Spectra over time" + (f": {label}" if len(runs) > 1 else ""), "\n".join(parts))


def _spectrum_row(run: Run, name: str) -> list:
    steps, S = run.spectra(name)
    usable = np.flatnonzero(np.isfinite(S).all(1) & (S.sum(1) > 0))
    if not len(usable):
        return [name, "–", "–", "–"]
    ends = usable[[0, -1]]
    shares = S[ends].astype(float) / S[ends].sum(1, keepdims=True, dtype=float)
    halves = (shares.cumsum(1) < 0.5).sum(1) + 1
    span = f"{steps[ends[0]]} to {steps[ends[1]]}"
    return [name, span, " → ".join(f"{v:.4f}" for v in shares[:, 0]), " → ".join(map(str, halves))]


def _cost(runs: dict[str, Run]) -> str:
    rows = []
    for label, run in runs.items():
        overhead, steps = logged(run, "overhead")[:, 1], logged(run, "step_ms")[:, 1]
        methods, counts = np.unique(run.columns("method")["method"].astype(str), return_counts=True)
        shares = ", ".join(f"{m} {100 * c / counts.sum():.3g} %" for m, c in zip(methods, counts, strict=True))
        rows.append(
            [
                label,
                f"{overhead[-1]:.2%}" if len(overhead) else "–",
                f"{np.median(steps):.1f} ms" if len(steps) else "–",
                shares,
            ]
        )
    header = ["run", "tracker's part of the time", "median step", "records by method"]
    return _section("Overhead", _table(header, rows))


def _bounds(runs: dict[str, Run]) -> str:
    rows = []
    for label, run in runs.items():
        t = run.columns("sd_variation", "sd_error", "theory_bound", "audit_error")
        known = np.isfinite(t["sd_variation"]) & np.isfinite(t["theory_bound"])
        broken = int((t["sd_variation"][known] > t["theory_bound"][known]).sum())
        errors = t["sd_error"][np.isfinite(t["sd_error"])]
        rows.append(
            [label, f"{np.median(errors):.1e}" if len(errors) else "–", f"{errors.max():.1e}" if len(errors) else "–",
             f"{broken} of {known.sum()}" if known.any() else "not measured", *_audited(t)]
        )  # fmt: skip
    header = ["run", "bound on the SD error, median", "largest", "SD variation above the theory's bound"]
    header += ["audits", "audited error over its bound, median", "largest"]
    note = "An audit recomputes a spectrum in float64 and compares: no error may exceed its bound."
    return _section("Errors and bounds", _table(header, rows) + _note(note))


def _audited(table: dict[str, np.ndarray]) -> list:
    audited = np.isfinite(table["audit_error"]) & (table["sd_error"] > 0)
    if not audited.any():
        return ["none", "–", "–"]
    ratio = table["audit_error"][audited] / table["sd_error"][audited]
    return [len(ratio), f"{np.median(ratio):.2g}", f"{ratio.max():.2g}"]


def _settings(runs: dict[str, Run]) -> str:
    settings = {}
    for label, run in runs.items():
        config = _config(run.run_dir / "config.json")
        settings[label] = {f"track: {k}": v for k, v in run.meta.get("settings", {}).items()} | config
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    rows = [[key, *(_plain(values.get(key, "–")) for values in settings.values())] for key in keys]
    rows.sort(key=lambda row: len(set(row[1:])) == 1 < len(runs))  # first what the runs differ in
    return _section("Settings", _table(["setting", *runs], rows)) if rows else ""


def _config(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {"config.json": config}
    except (OSError, ValueError, RecursionError):
        return {"config.json": "damaged: it holds no JSON"}


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def _note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _numbers(header: Sequence, rows: Iterable[Sequence]) -> str:
    """The numbers behind a figure, for those who open them."""
    rows = list(rows)
    return f"<details><summary>numbers</summary>{_table(header, rows)}</details>" if rows else ""


def _some(values: Sequence, most: int = 16) -> list:
    """The first, the last, and some between them, ever farther apart: figures of training are read like that."""
    places = np.unique(np.geomspace(1, len(values), most).round().astype(int)) - 1 if len(values) else ()
    return [values[i] for i in places]


def _table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A table; where it has many columns, a narrow screen shows each row as a list under the names of the columns."""
    names = [escape(str(name)) for name in header]
    head = "".join(f"<th>{name}</th>" for name in names)

    def line(cells) -> str:
        texts = [escape(str(cell)) for cell in cells]
        drawn = (f'<td{_SHORT * (len(t) <= 16)} data-of="{n}">{t}</td>' for n, t in zip(names, texts, strict=True))
        return f"<tr>{''.join(drawn)}</tr>"

    many = ' class="many"' if len(names) > 3 else ""
    body = "\n".join(map(line, rows))
    return f"<table{many}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(draw: Callable[..., "Figure"], name: str, label: str, caption: str) -> str:
    """Embeds a figure twice, for wide and for narrow screens: scaled down, its letters could not be read."""
    wide = _svg(draw(), name, label)
    narrow = _svg(draw(narrow=True), f"{name}-narrow", label)
    shown = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _svg(figure, name: str, label: str) -> str:
    """Makes SVG whose ink follows the reader's colours; its ids get a prefix of their own."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_color") and hasattr(artist, "get_text")):
        text.set_color(plot.INK)
    for axes in figure.axes:
        axes.patch.set_visible(False)
        axes.tick_params(which="both", color=plot.INK, labelcolor=plot.INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(plot.INK)
    figure.patch.set_visible(False)
    hints = _hints(figure)
    import matplotlib

    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(plot.INK, "var(--ink)")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for i, hint in enumerate(hints):
        text = text.replace(f'<g id="{name}-hint{i}">', f'<g id="{name}-hint{i}"><title>{escape(hint)}</title>', 1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _hints(figure) -> list[str]:
    """Marks the lines of a figure, and returns what a pointer that rests on each is told."""
    found = []
    for axes in figure.axes:
        for line in axes.lines:
            x, y = (np.asarray(values, dtype=float) for values in line.get_data())
            label = line.get_label()
            of = "" if label.startswith("_") else f"{label}: "
            if len(x) == 2 and x[0] == x[1]:
                hint = f"onset of stability at step {x[0]:.0f}"
            elif np.isfinite(y).any():
                top = int(np.nanargmax(y))
                hint = f"{of}{y[-1]:.4g} at step {x[-1]:.0f}; largest {y[top]:.4g} at step {x[top]:.0f}"
            else:
                continue
            line.set_gid(f"hint{len(found)}")
            found.append(hint)
    return found
