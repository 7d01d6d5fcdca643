"""Draws the two pictures of README.md, docs/loss.png and docs/cost.png: python docs/pictures.py."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from sosd_fast.runs.curves import variation_by_kind  # noqa: E402
from sosd_fast.runs.phases import onsets  # noqa: E402
from sosd_fast.runs.records import load  # noqa: E402

KIND = "mlp"
COLORS = {"AdamW": "#4477aa", "Muon": "#ee7733"}
RESULTS = DOCS.parent / "bench" / "results" / "amd-epyc"


def curves(run_dir: Path) -> dict:
    """Takes from a run what is drawn of it: the loss, and of the MLP's matrices the least, median and largest."""
    run = load(run_dir)
    steps, variation = variation_by_kind(run)[KIND]
    peak = max(line["lr"] for line in run.log)
    return {
        "loss": [(line["step"], round(line["loss"], 3)) for line in run.log],
        "validation loss": [(line["step"], round(line["val_loss"], 3)) for line in run.log if "val_loss" in line],
        "SD variation": [(int(t), *(float(f"{v:.3g}") for v in row)) for t, row in zip(steps, variation, strict=True)],
        "onset": onsets(run)[KIND],
        "last step at the peak rate": max(line["step"] for line in run.log if line["lr"] == peak),
    }


def draw_loss(runs: dict[str, dict]) -> Figure:
    """Draws the loss above the SD variation of the MLP's matrices, a colour for each optimizer."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained", dpi=120)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for label, run in runs.items():
        color = COLORS[label]
        top.plot(*np.transpose(run["loss"]), color=color, lw=0.7, alpha=0.6)
        top.plot(*np.transpose(run["validation loss"]), color=color, lw=2, label=label)
        step, low, median, high = np.transpose(run["SD variation"])
        bottom.plot(step, median, color=color, lw=1.6, label=label)
        bottom.fill_between(step, low, high, color=color, alpha=0.15, lw=0)
        if run["onset"] is not None:
            bottom.axvline(run["onset"], color=color, ls=":", lw=1.4)
        decay = run["last step at the peak rate"], step[-1]
    bottom.axvspan(*decay, color="#888888", alpha=0.12, lw=0, label="learning rate falls to 0")
    bottom.plot([], [], color="#666666", ls=":", label="onset of stability")
    top.set_ylabel("loss (nats per token)")
    bottom.set(xlabel="training step", ylabel="SD variation per step", yscale="log")
    return _finished(figure)


def costs() -> dict[str, float]:
    """Reads what each way of measuring costs, in percent of a training step with AdamW."""
    budget = json.loads((RESULTS / "probe_budget.json").read_text())["rows"]["budget"]
    rows = json.loads((RESULTS / "svd_overhead.json").read_text())["rows"]
    return {
        "torch.linalg.svdvals,\nevery step": rows["exact"]["overhead_percent"],
        "all values, every step\n(method=\"full\")": rows["full"]["overhead_percent"],
        "32 leading values, every step\n(method=\"topk\")": rows["topk"]["overhead_percent"],
        "as the budget allows\n(the default, budget=0.01)": 100 * budget["0.01"],
    }  # fmt: skip


def draw_costs(found: dict[str, float]) -> Figure:
    """Draws a bar for each way of measuring."""
    figure = Figure(figsize=(7.6, 2.6), layout="constrained", dpi=120)
    panel = figure.subplots()
    bars = panel.barh(list(found), list(found.values()), color=["#999999", *[COLORS["AdamW"]] * (len(found) - 1)])
    panel.bar_label(bars, fmt=lambda value: f" {value:.2g} %", fontsize=9)
    panel.set(xlabel="time, in % of a training step", xlim=(0, 1.12 * max(found.values())))
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    for panel in figure.axes:
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize=8, loc="best" if panel is figure.axes[0] else "lower center")
    return figure


def _save(figure: Figure, path: Path):
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size
    print(path)


def main(argv=None):
    """Draws both; with --runs from new runs, whose curves are kept in docs/pictures.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    # fmt: off
    parser.add_argument("--runs", nargs=2, metavar=("ADAMW", "MUON"),
                        help="Takes the curves from these run directories; by default from docs/pictures.json.")
    # fmt: on
    args = parser.parse_args(argv)
    kept = DOCS / "pictures.json"
    if args.runs:
        runs = {label: curves(Path(run_dir)) for label, run_dir in zip(COLORS, args.runs, strict=True)}
        lines = ",\n".join(f" {json.dumps(label)}: {json.dumps(run)}" for label, run in runs.items())
        kept.write_text(f"{{\n{lines}\n}}\n")
    _save(draw_loss(json.loads(kept.read_text())), DOCS / "loss.png")
    _save(draw_costs(costs()), DOCS / "cost.png")


if __name__ == "__main__":
    main()
