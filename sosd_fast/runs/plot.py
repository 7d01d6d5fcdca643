"""Figures from runs, as functions that return a matplotlib Figure; the caller saves it with `figure.savefig(path)`."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sosd_fast.runs.curves import logged, spectral_alignment, variation_by_kind
from sosd_fast.runs.phases import onsets
from sosd_fast.runs.records import Run
from sosd_fast.runs.text import label as as_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#222222"  # of text, axes and the loss; the report puts the reader's colour in its place
_COLORS = {"attention": "#4477aa", "mlp": "#ee6677", "embedding": "#228833", "head": "#aa3377", "other": "#777777"}
_RUN_COLORS = ("#4477aa", "#ee7733", "#009988", "#cc3377", "#999933", "#888888")
_NARROW = 3.7  # inches: 355 of the 358 pixels that a page leaves on a screen of 390
_POINTS = 1500  # drawn of a curve at most; a curve of more is drawn as its extremes and median over equal spans


def plot_run(run: Run, *, narrow: bool = False) -> "Figure":
    """Draws the loss, and below it the SD variation of each module kind with its onset of stability, over the steps.

    Args:
        run: with records of full spectra.
        narrow: draw it for the screen of a telephone, 3.7 inches wide.

    Returns:
        A matplotlib Figure.
    """
    figure, (top, bottom) = _figure("plot_run", *(_NARROW, 5.4) if narrow else (8, 6.5), 2, 1, sharex=True)
    _draw_loss(top, run, INK, {"loss": "training", "val_loss": "validation"})
    _say_no_loss(top)
    top.set_title(as_label(run.run_dir.name))
    found = onsets(run)
    for name, curve in variation_by_kind(run).items():
        _draw_variation(bottom, curve, _COLORS[name], name, found[name])
    bottom.set_ylabel("SD variation per step\n" + r"$\|SD_t - SD_{t-1}\|_2$ (median, range)")
    bottom.set_xlabel("training step")
    _finish(top, bottom, narrow=narrow)
    return figure


def plot_runs(runs: Mapping[str, Run], *, narrow: bool = False) -> "Figure":
    """Overlays several runs: the loss, and the SD variation of each module kind in a panel of its own.

    Args:
        runs: label -> run.
        narrow: draw it for the screen of a telephone, 3.7 inches wide, with its panels in one column.

    Returns:
        A matplotlib Figure. Dotted lines are onsets of stability.
    """
    curves = {label: variation_by_kind(run) for label, run in runs.items()}
    kinds = [name for name in _COLORS if any(name in c for c in curves.values())]
    count, columns = 1 + len(kinds), 1 if narrow else 2
    rows = -(-count // columns)
    size = (_NARROW, 2.4 * rows) if narrow else (9, 2.9 * rows)
    figure, axes = _figure("plot_runs", *size, rows, columns, sharex=True, squeeze=False)
    axes = axes.ravel()
    for (label, run), color in zip(runs.items(), _cycle(len(runs)), strict=True):
        validated = any(line.get("val_loss") is not None for line in run.log)
        _draw_loss(axes[0], run, color, {"loss": None if validated else label, "val_loss": label})
        found = onsets(run)
        for name, panel in zip(kinds, axes[1:], strict=False):
            if name in curves[label]:
                _draw_variation(panel, curves[label][name], color, label, found[name])
    _say_no_loss(axes[0])
    axes[0].set_title("loss, thick: validation")
    for name, panel in zip(kinds, axes[1:], strict=False):
        panel.set_title(name)
        panel.set_ylabel("SD variation per step")
    if count % columns:  # the last one takes the whole row
        axes[count].remove()
        axes[count - 1].set_subplotspec(axes[0].get_gridspec()[-1, :])
    for panel in axes[max(0, count - columns) : count]:
        panel.set_xlabel("training step")
        panel.tick_params(labelbottom=True)
    _finish(*axes[:count], narrow=narrow)
    return figure


def plot_spectra(
    run: Run,
    names: Sequence[str],
    *,
    change: bool = True,
    columns: int = 3,
    limits: tuple[float, float] | None = None,
    narrow: bool = False,
) -> "Figure":
    """Draws heat maps of spectra over time, one a matrix, all in one scale of colours.

    Each column of pixels is a singular distribution, the largest value at the top, ranks on a log scale. Between the
    spectra that a run kept, the last one stands.

    Args:
        run: with full spectra of the matrices.
        names: of the matrices.
        change: colour each value's share of the sum over what it was in the first spectrum, log2; else over the mean
            share, log10.
        columns: of panels.
        limits: of the scale of colours; by default what `color_limits` says of these matrices. Pass what it says of
            several runs where they are to be compared.
        narrow: draw it for the screen of a telephone, 3.7 inches wide, in one column.

    Returns:
        A matplotlib Figure.
    """
    columns = 1 if narrow else min(columns, len(names))
    rows = -(-len(names) // columns)
    width = _NARROW if narrow else 3.0 * columns + 0.8
    figure, axes = _figure("plot_spectra", width, 1.9 * rows + 0.4, rows, columns, squeeze=False)
    images = {name: image for name in names if (image := _image(run, name, change)) is not None}
    low, high = limits or _limits(images.values(), change)
    shown = None
    for name, panel in zip(names, axes.ravel(), strict=False):
        panel.set_title(as_label(name), fontsize=7)
        panel.tick_params(labelsize=7)
        if name in images:
            times, ranks, pixels = images[name]
            shown = panel.pcolormesh(
                times, ranks, pixels.T, cmap="RdBu_r" if change else "viridis", rasterized=True, vmin=low, vmax=high
            )
            panel.set_yscale("log")
            panel.set_ylim(ranks[-1], 1)
            panel.xaxis.get_major_locator().set_params(nbins=4)
    for panel in axes.ravel()[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel("rank (1: largest)", fontsize=8)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, shrink=min(1.0, 1.6 / rows), aspect=15)
        bar.set_label(r"$\log_2(SD_t / SD_0)$" if change else r"$\log_{10}(r\,SD_t)$", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def color_limits(matrices: Sequence[tuple[Run, Sequence[str]]], *, change: bool = True) -> tuple[float, float]:
    """Finds one scale of colours for the spectra of several runs, which `plot_spectra` can be given.

    Args:
        matrices: runs, and names of their matrices.
        change: as of `plot_spectra`.

    Returns:
        (lowest, highest) value that has a colour of its own; half a percent of the area lies beyond either.
    """
    images = (_image(run, name, change) for run, names in matrices for name in names)
    return _limits([image for image in images if image is not None], change)


def plot_alignment(
    runs: Mapping[str, Run],
    parameters: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None,
    *,
    narrow: bool = False,
) -> "Figure":
    """Draws how close the spectra are to their final state, and the parameters to theirs.

    Args:
        runs: label -> run with full spectra.
        parameters: label -> (steps, cosine of the parameters to their final state), from checkpoints; see
            `sosd_fast.checkpoints.analyze.parameter_alignment`.
        narrow: draw it for the screen of a telephone, 3.7 inches wide.

    Returns:
        A matplotlib Figure.
    """
    figure, axes = _figure("plot_alignment", *(_NARROW, 3.2) if narrow else (8, 3.4))
    for (label, run), color in zip(runs.items(), _cycle(len(runs)), strict=True):
        steps, cosine = spectral_alignment(run)
        if len(steps):
            steps, cosine = _reduced(steps, cosine)
            axes.plot(steps, cosine[:, 1], color=color, lw=1.5, label=as_label(f"{label}: spectra"))
            axes.fill_between(steps, cosine[:, 0], cosine[:, 2], color=color, alpha=0.15, lw=0)
        if parameters and label in parameters:
            axes.plot(
                *parameters[label],
                color=color,
                lw=1.5,
                ls="--",
                marker="o",
                ms=3,
                label=as_label(f"{label}: parameters"),
            )
    axes.set_ylabel("cosine to the final state\n(median, range)")
    axes.set_xlabel("training step")
    _finish(axes, narrow=narrow)
    return figure


def _figure(caller: str, width: float, height: float, *subplots, **options):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{caller}: expected matplotlib to be installed. Run `pip install matplotlib`.") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    return figure, figure.subplots(*subplots, **options)


def _image(run: Run, name: str, change: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Edges of pixels in steps and in ranks, and the pixels of a matrix; None where it has no spectrum."""
    steps, S = run.spectra(name)
    usable = [i for i in range(len(S)) if np.isfinite(S[i]).all() and S[i].sum() > 0]
    if not usable:
        return None
    steps, S = steps[usable], np.maximum(S[usable], 1e-12 * S[usable].max())
    S = S / S.sum(1, keepdims=True)
    image = np.log2(S / S[0]) if change else np.log10(S * S.shape[1])
    times = np.linspace(steps[0], max(steps[-1], steps[0] + 1), min(300, len(steps)) + 1)
    ranks = np.unique(np.geomspace(1, image.shape[1] + 1, 100).round().astype(int))
    return times, ranks, image[np.searchsorted(steps, times[:-1], "right") - 1][:, ranks[:-1] - 1]


def _limits(images: Collection[tuple[np.ndarray, np.ndarray, np.ndarray]], change: bool) -> tuple[float, float]:
    if not images:
        return (-0.01, 0.01) if change else (0.0, 0.01)
    # By area, or the many values of high rank would leave the first, which take half of a panel, beyond the scale.
    weights = [np.broadcast_to(np.diff(np.log(ranks)), pixels.shape).ravel() for _, ranks, pixels in images]
    values = np.concatenate([pixels.ravel() for *_, pixels in images])
    order = np.argsort(values)
    area = np.cumsum(np.concatenate(weights)[order])
    low, high = values[order[np.searchsorted(area / area[-1], [0.005, 0.995])]].tolist()
    return (-max(-low, high, 0.01), max(-low, high, 0.01)) if change else (low, high)


def _cycle(count: int) -> list[str]:
    return [_RUN_COLORS[i % len(_RUN_COLORS)] for i in range(count)]


def _reduced(steps: np.ndarray, curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws no more than can be seen: minimum, median and maximum (T, 3) over spans of steps."""
    if len(steps) <= _POINTS:
        return steps, curve
    spans = np.array_split(np.arange(len(steps)), _POINTS // 2)
    rows = [(curve[s, 0].min(), np.median(curve[s, 1]), curve[s, 2].max()) for s in spans]
    return np.array([steps[s[len(s) // 2]] for s in spans]), np.array(rows)


def _draw_loss(axes, run: Run, color: str, labels: Mapping[str, str | None]):
    for key, style in (("loss", {"lw": 0.8, "alpha": 0.6}), ("val_loss", {"lw": 2})):
        points = logged(run, key)
        if len(points):
            steps, curve = _reduced(points[:, 0], points[:, [1, 1, 1]])
            axes.plot(
                steps, curve[:, 1], label=None if labels[key] is None else as_label(labels[key]), color=color, **style
            )
    axes.set_ylabel("loss (nats per token)")


def _say_no_loss(axes):
    if not axes.lines:
        axes.text(0.5, 0.5, "log.jsonl has no loss", transform=axes.transAxes, ha="center", va="center")


def _draw_variation(axes, curve, color: str, label: str, onset: int | None):
    steps, variation = _reduced(*curve)
    axes.plot(steps, variation[:, 1], color=color, label=as_label(label), lw=1.5)
    axes.fill_between(steps, variation[:, 0], variation[:, 2], color=color, alpha=0.15, lw=0)
    if onset is not None:
        axes.axvline(onset, color=color, ls=":", lw=1.2)
    axes.set_yscale("log")


def _finish(*panels, narrow: bool):
    for axes in panels:
        if narrow:
            axes.tick_params(labelsize=8)
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                text.set_fontsize(8)
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
