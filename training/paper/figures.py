"""The paper's figures from finished runs: the first seed bold, the others thin beside it."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from sosd_fast.matrices import kind
from training.paper.finished import BODY, Finished

RUNS = {  # the runs behind each figure
    "fig1": ("gpt2-wsd",),
    "fig2": ("gpt2-wsd", "llama-cosine"),
    "fig3": ("gpt2-wsd", "llama-cosine"),
    "fig4": ("gpt2-step", "gpt2-wsd", "llama-cosine"),
    "fig5": ("llama-cosine", "llama-cosine-decay", "gpt2-wsd", "gpt2-muon"),
}
COLORS = {"attention": "#4477aa", "mlp": "#ee6677", "embedding": "#228833", "head": "#aa3377"}
TITLES = {
    "gpt2-wsd": "GPT-2, AdamW, WSD",
    "gpt2-step": "GPT-2, AdamW, step decay",
    "gpt2-muon": "GPT-2, Muon, WSD",
    "llama-cosine": "LLaMA, AdamW, cosine",
    "llama-cosine-decay": "LLaMA, AdamW, cosine, weight decay",
}


def draw(name: str, runs: dict[str, list[Finished]]) -> tuple[Figure, list[tuple]]:
    """Draws one figure; returns it and the rows (panel, curve, seed, step, value) behind it."""
    page = _Page()
    {"fig1": _fig1, "fig2": _fig2, "fig3": _fig3, "fig4": _fig4, "fig5": _fig5}[name](page, runs)
    for panel in page.figure.axes:
        panel.grid(alpha=0.2)
        panel.spines[["top"]].set_visible(False)
        if panel.get_legend_handles_labels()[0] and panel.get_legend() is None:
            panel.legend(frameon=False, fontsize=8)
    return page.figure, page.rows


def save(figure: Figure, path: Path):
    """Writes a PNG in 128 colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


class _Page:
    """A figure that remembers what is plotted on it."""

    def __init__(self):
        self.figure, self.rows = Figure(layout="constrained", dpi=100), []

    def panels(self, rows: int, columns: int, width=4.2, height=2.8, **kwargs):
        self.figure.set_size_inches(width * columns, height * rows)
        return self.figure.subplots(rows, columns, squeeze=False, **kwargs)

    def curve(self, panel, label: str, runs: list[Finished], values, color: str, **style):
        """Plots (steps, values) = values(run) of each seed."""
        for seed, run in enumerate(runs):
            x, y = values(run)
            first = {"lw": 1.6, "label": label} if seed == 0 else {"lw": 0.6, "alpha": 0.5}
            panel.plot(x, y, color=color, **(style | first))
            where = panel.get_title() or panel.get_ylabel()
            self.rows += [(where, label, seed, int(s), f"{v:.6g}") for s, v in zip(x, y, strict=True)]

    def variation(self, panel, runs: list[Finished], kinds, marks: bool = True):
        panel.set(yscale="log", xlabel="training step", ylabel="SD variation per step")
        for k in kinds:
            if k in runs[0].kinds:
                self.curve(panel, k, runs, lambda run, k=k: run.kinds[k], COLORS[k])
                if marks and (found := runs[0].phases.kinds[k]):
                    panel.axvline(found.step, color=COLORS[k], ls=":", lw=1)

    def loss(self, panel, runs: list[Finished], label="validation loss", color="#222222"):
        panel.set(xlabel="training step", ylabel="loss (nats per token)")
        if label == "validation loss":  # alone in its panel
            panel.plot(runs[0].steps, runs[0].loss, color="#bbbbbb", lw=0.8, label="training loss")
        self.curve(panel, label, runs, lambda run: run.val.T, color)


def _fig1(page: _Page, runs):
    seeds = runs["gpt2-wsd"]
    left, right = page.panels(1, 2, width=5, height=3.6)[0]
    left.set_title("cosine to the final state, median over matrices", fontsize=10)
    _cosines(page, left, seeds)
    kink = seeds[0].phases.loss
    what = "loss boundary" if kink else "knot on linear axes"
    right.set_title(f"loss, SD variation; dotted: onsets, dashed: {what}", fontsize=10)
    page.loss(right, seeds)
    if boundary := kink or seeds[0].phases.loss_linear:
        right.axvline(boundary.step, color="#222222", ls="--", lw=1)
    other = right.twinx()
    page.variation(other, seeds, COLORS)
    handles, labels = (a + b for a, b in zip(*(p.get_legend_handles_labels() for p in (right, other)), strict=True))
    other.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="upper right")
    right.legend().set_visible(False)
    right.set_ylim(None, right.get_ylim()[1] * 1.3)  # room for the legend
    other.set_ylim(None, other.get_ylim()[1] * 4)


def _cosines(page, panel, seeds, only=None):
    for label, attribute, color in (
        ("spectrum", "spectrum_cosine", "#aa3377"),
        ("parameters", "parameter_cosine", "#4477aa"),
    ):

        def values(run, attribute=attribute):
            columns = [i for i, name in enumerate(run.names) if only is None or kind(name) == only]
            return run.snapshots, np.median(getattr(run, attribute)[:, columns], axis=1)

        page.curve(panel, label, seeds, values, color)
    panel.set_xlabel("training step")
    panel.set_ylim(None, 1.02)


def _fig2(page: _Page, runs):
    kinds = ("attention", "mlp", "embedding")
    grid = page.panels(2, 3, sharex="row")
    for row, name in zip(grid, ("gpt2-wsd", "llama-cosine"), strict=True):
        for panel, k in zip(row, kinds, strict=True):
            panel.set_title(f"{TITLES[name]}: {k}", fontsize=9)
            _cosines(page, panel, runs[name], only=k)
        row[0].set_ylabel("cosine to the final state")


def _fig3(page: _Page, runs):
    grid = page.panels(2, 2, width=5, sharex="col")
    for (top, bottom), name in zip(grid.T, ("gpt2-wsd", "llama-cosine"), strict=True):
        top.set_title(TITLES[name])
        bottom.set_title(f"{TITLES[name]}: SD variation, dotted: onsets", fontsize=9)
        page.loss(top, runs[name])
        page.variation(bottom, runs[name], COLORS)


def _fig4(page: _Page, runs):
    grid = page.panels(2, 3, sharex="col")
    for (top, bottom), name in zip(grid.T, ("gpt2-step", "gpt2-wsd", "llama-cosine"), strict=True):
        top.set_title(TITLES[name])
        schedule = TITLES[name].split(", ")[-1]
        bottom.set_title(f"{schedule}: SD variation, dashed: learning rate", fontsize=9)
        page.loss(top, runs[name])
        page.variation(bottom, runs[name], BODY, marks=False)
        rate = bottom.twinx()
        run = runs[name][0]
        rate.plot(run.steps, run.lr, color="#999999", ls="--", lw=1)
        rate.set(ylim=(0, None), ylabel="learning rate")
        rate.ticklabel_format(axis="y", scilimits=(0, 0))


def _fig5(page: _Page, runs):
    grid = page.panels(2, 3)
    a, b, c = grid[0]
    a.set(title="weight decay: norm of the body", ylabel="Frobenius norm")
    b.set(title="weight decay: SD variation, body", ylabel="SD variation per step")
    c.set_title("weight decay: loss")
    for name, label, color in (("llama-cosine", "no decay", "#4477aa"), ("llama-cosine-decay", "decay", "#ee6677")):
        page.curve(a, label, runs[name], Finished.body_norm, color)
        page.curve(b, label, runs[name], _body, color)
        page.loss(c, runs[name], label, color)
    pairs = (("gpt2-wsd", "AdamW", "#4477aa"), ("gpt2-muon", "Muon", "#ee6677"))
    for panel, k in zip(grid[1][:2], BODY, strict=True):
        panel.set(title=f"Muon and AdamW: SD variation, {k}", ylabel="SD variation per step")
        for name, label, color in pairs:
            page.curve(panel, label, runs[name], lambda run, k=k: run.kinds[k], color)
    grid[1][2].set_title("Muon and AdamW: loss")
    for name, label, color in pairs:
        page.loss(grid[1][2], runs[name], label, color)
    for panel in (b, *grid[1][:2]):
        panel.set_yscale("log")
    for panel in grid.flat:
        panel.set_xlabel("training step")


def _body(run: Finished):
    """Mean over attention and MLP of the logarithm of their SD variation."""
    (steps, attention), (_, mlp) = (run.kinds[k] for k in BODY)
    return steps, np.sqrt(attention * mlp)
