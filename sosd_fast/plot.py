"""Figures from a Run, as functions that return a matplotlib Figure."""

import numpy as np

from sosd_fast.matrices import kind
from sosd_fast.records import Run

_COLORS = {"attention": "#4477aa", "mlp": "#ee6677", "embedding": "#228833", "head": "#aa3377", "other": "#777777"}


def variation_by_kind(run: Run, hold: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collects the SD variation of each module kind.

    Args:
        run: with records of full spectra.
        hold: steps for which a matrix's last value stands, where a budget made matrices take turns. Without it the
            median would jump with the choice of matrices.

    Returns:
        kind -> (steps (T,), variation (T, 3)): minimum, median and maximum over the matrices of that kind.
    """
    measured: dict[str, dict[int, dict[str, float]]] = {}
    for r in run.records:
        if r.sd_variation is not None and np.isfinite(r.sd_variation):
            measured.setdefault(kind(r.name), {}).setdefault(r.step, {})[r.name] = r.sd_variation
    curves = {}
    for name in sorted(measured, key=list(_COLORS).index):
        last: dict[str, tuple[int, float]] = {}
        rows = []
        for step, values in measured[name].items():
            last |= {matrix: (step, value) for matrix, value in values.items()}
            standing = [value for since, value in last.values() if step - since <= hold]
            rows.append((min(standing), np.median(standing), max(standing)))
        curves[name] = np.array(list(measured[name])), np.array(rows)
    return curves


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
