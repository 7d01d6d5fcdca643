"""Figures from a Run, as functions that return a matplotlib Figure."""

import numpy as np

from sosd_fast.matrices import kind
from sosd_fast.records import Run

_COLORS = {"attention": "#4477aa", "mlp": "#ee6677", "embedding": "#228833", "head": "#aa3377", "other": "#777777"}


def variation_by_kind(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collects the SD variation of each module kind.

    Returns:
        kind -> (steps (T,), variation (T, 3)): minimum, median and maximum over the matrices of that kind that were
        measured in full at that step.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for r in run.records:
        if r.sd_variation is not None and np.isfinite(r.sd_variation):
            values.setdefault(kind(r.name), {}).setdefault(r.step, []).append(r.sd_variation)
    return {
        k: (np.array(list(v)), np.array([(min(x), np.median(x), max(x)) for x in v.values()]))
        for k, v in sorted(values.items(), key=lambda item: list(_COLORS).index(item[0]))
    }


def plot_run(run: Run):
    """Draws the loss, and below it the SD variation of each module kind, over the steps.

    Returns:
        A matplotlib Figure; the caller saves it with `figure.savefig(path)`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot_run: expected matplotlib to be installed. Run `pip install sosd_fast[plots]`."
        ) from None
    figure = Figure(figsize=(8, 6.5), layout="constrained", dpi=130)
    top, bottom = figure.subplots(2, 1, sharex=True)

    for key, label, style in (("loss", "training", {"lw": 0.8, "alpha": 0.6}), ("val_loss", "validation", {"lw": 2})):
        points = [(line["step"], line[key]) for line in run.log if line.get(key) is not None]
        if points:
            top.plot(*zip(*points, strict=True), label=label, color="#222222", **style)
    top.set_ylabel("loss (nats per token)")
    top.set_title(run.run_dir.name)

    for name, (steps, variation) in variation_by_kind(run).items():
        bottom.plot(steps, variation[:, 1], color=_COLORS[name], label=name, lw=1.5)
        bottom.fill_between(steps, variation[:, 0], variation[:, 2], color=_COLORS[name], alpha=0.15, lw=0)
    bottom.set_ylabel("SD variation per step\n" + r"$\|SD_t - SD_{t-1}\|_2$ (median, range)")
    bottom.set_xlabel("training step")
    if bottom.lines:
        bottom.set_yscale("log")
    for axes in (top, bottom):
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    return figure
