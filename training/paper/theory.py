"""The simplified transformer of the theory, measured: ``python -m training.paper.theory``.

One layer, one head, X (L, d) given, labels one-hot over C classes, full-batch gradient descent from a small start:

    Q, K, V = X W_Q, X W_K, X W_V;   A = softmax(Q K^T / sqrt(d));   H = A V;   loss = mean cross-entropy of H W_O

W_O is fixed. Half of the positions share one label, so that uniform attention, which a small start gives, leaves
V a gradient: with balanced labels it leaves none, and nothing moves for thousands of steps
(LOG.md#simplified-transformer).

Along the run it checks the lemmas behind the bound on the SD variation, records what the theorems assume, times the
thresholds T_V and T_QK after which the variation stays below each of a grid of levels, and relates the decrease of the
loss in a step to the variation.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sosd_fast.runs.phases import onset, threshold_step
from sosd_fast.spectra.bounds import theory_bound

MATRICES = ("Q", "K", "V")
LABELS = ("common", "balanced")
POWERS = np.arange(0, 3.01, 0.05)  # tried for the bound of phase II
IMPULSE_END = 0.1  # phase II begins where every matrix's variation stays below this part of its peak


def parse_args(argv=None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    # fmt: off
    add("--width", type=int, default=32, help="The width d in features, %(default)s by default.")
    add("--positions", type=int, default=16, help="The number L of positions, %(default)s by default.")
    add("--classes", type=int, default=8, help="The number C of classes, %(default)s by default.")
    add("--lr", type=float, default=0.02,
        help="The learning rate of gradient descent, which is constant, %(default)s by default.")
    add("--init", type=float, default=0.01,
        help="The scale of the weights at the start, a factor of N(0, 1/d), %(default)s by default.")
    add("--steps", type=int, default=12000, help="The number of steps of gradient descent, %(default)s by default.")
    add("--seeds", type=int, default=3, help="The number of runs, with seeds 0, 1, ...; %(default)s by default.")
    add("--levels", type=int, default=12, help="The number of thresholds in the grid, %(default)s by default.")
    add("--labels", choices=LABELS, default="common",
        help="Half of the positions have one label with common, all labels are as frequent with balanced; %(default)s "
        "by default.")
    add("--out", default="runs/theory", help="The folder for theory.png and theory.json, %(default)s by default.")
    # fmt: on
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seeds < 1:
        parser.error(f"expected at least one step and one seed, got --steps={args.steps} --seeds={args.seeds}.")
    return args


class Problem(NamedTuple):
    """X (L, d), one-hot labels Y (L, C) and W_O (d, C), all float64."""

    X: Tensor
    Y: Tensor
    W_O: Tensor


class Trace(NamedTuple):
    """What was measured; row t - 1 of each array belongs to update t, from W_{t-1} to W_t."""

    steps: np.ndarray  # (T,) 1, 2, ...
    loss: np.ndarray  # (T + 1,) before the first update, and after each
    variation: np.ndarray  # (T, 3) of W_Q, W_K, W_V
    bound: np.ndarray  # (T, 3) of T1
    lemmas: dict[str, np.ndarray]  # (T, 3) measured over bound, at most 1
    norm: np.ndarray  # (T + 1, 3) Frobenius norms
    condition: np.ndarray  # (T + 1, 3) largest over smallest singular value
    grad_H: np.ndarray  # (T,) norm of the loss's gradient with respect to H, before the update
    grad_norm: np.ndarray  # (T, 3)
    attention_margin: np.ndarray  # (T,) largest minus second largest entry, least over the positions
    logit_margin: np.ndarray  # (T,)


def make_problem(
    seed: int, positions: int, width: int, classes: int, labels: str = "common"
) -> tuple[Problem, torch.Generator]:
    """Gaussian X and W_O; label 0 at half of the positions, any other at the rest; "balanced": all as often."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(positions, width, generator=g, dtype=torch.float64)
    order = torch.randperm(positions, generator=g)
    of_position = torch.zeros(positions, dtype=torch.long)
    if labels == "balanced":
        of_position[order] = torch.arange(positions) % classes
    else:
        others = order[: positions - positions // 2]
        of_position[others] = torch.randint(1, classes, (len(others),), generator=g)
    W_O = torch.randn(width, classes, generator=g, dtype=torch.float64) / width**0.5
    return Problem(X, torch.nn.functional.one_hot(of_position, classes).double(), W_O), g


def forward(problem: Problem, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, attention A (L, L) and logits (L, C) of W = (W_Q, W_K, W_V), (3, d, d)."""
    Q, K, V = problem.X @ W
    A = torch.softmax(Q @ K.T / Q.shape[1] ** 0.5, dim=-1)
    logits = A @ V @ problem.W_O
    return -(problem.Y * torch.log_softmax(logits, dim=-1)).sum(-1).mean(), A, logits


def gradients(problem: Problem, W: Tensor, A: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's gradients with respect to W (3, d, d) and H (L, d), by hand.

    dH = (softmax(H W_O) - Y) W_O^T / L;  dV = A^T dH;  dA = dH V^T;  dS = A * (dA - rowsum(dA * A)) / sqrt(d);
    dQ = dS K;  dK = dS^T Q;  dW = X^T d(X W).
    """
    X, Y, W_O = problem
    Q, K, V = X @ W
    dH = (torch.softmax(logits, dim=-1) - Y) @ W_O.T / len(X)
    dA = dH @ V.T
    dS = A * (dA - (dA * A).sum(-1, keepdim=True)) / X.shape[1] ** 0.5
    return X.T @ torch.stack([dS @ K, dS.T @ Q, A.T @ dH]), dH


def simulate(seed: int, width=32, positions=16, classes=8, lr=0.02, init=0.01, steps=12000, labels="common") -> Trace:
    """Gradient descent from a small start, everything measured at each step, in float64 and on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and faster at this size
    try:
        problem, g = make_problem(seed, positions, width, classes, labels)
        W = init * torch.randn(3, width, width, generator=g, dtype=torch.float64) / width**0.5
        S = torch.linalg.svdvals(W)
        first, rows = (S, forward(problem, W)[0]), []
        for _ in range(steps):
            _, A, logits = forward(problem, W)
            G, dH = gradients(problem, W, A, logits)
            W_next = W - lr * G
            S_next = torch.linalg.svdvals(W_next)
            loss, _, _ = forward(problem, W_next)
            update = torch.linalg.matrix_norm(W_next - W)
            rows.append((S_next, update, _margin(A), _margin(logits), dH.norm(), torch.linalg.matrix_norm(G), loss))
            W, S = W_next, S_next
    finally:
        torch.set_num_threads(threads)
    S, update, attention_margin, logit_margin, grad_H, grad_norm, loss = map(torch.stack, zip(*rows, strict=True))
    S = torch.cat([first[0][None], S])  # (T + 1, 3, d)
    sums = S.sum(-1)
    variation = (S[1:] / sums[1:, :, None] - S[:-1] / sums[:-1, :, None]).norm(dim=-1)
    moved, largest = (S[1:] - S[:-1]).norm(dim=-1), torch.maximum(sums[1:], sums[:-1])
    bound = theory_bound(update, largest, width)
    lemmas = {
        "normalisation is Lipschitz": variation / theory_bound(moved, largest, width),
        "singular values are 1-Lipschitz": moved / update,
        "|SD' - SD| <= (1 + sqrt(r)) |W' - W|_F / |W|_*": variation / bound,
    }
    return Trace(
        steps=np.arange(1, steps + 1),
        loss=torch.cat([first[1][None], loss]).numpy(),
        variation=variation.numpy(),
        bound=bound.numpy(),
        lemmas={name: ratio.numpy() for name, ratio in lemmas.items()},
        norm=S.norm(dim=-1).numpy(),
        condition=(S[..., 0] / S[..., -1]).numpy(),
        grad_H=grad_H.numpy(),
        grad_norm=grad_norm.numpy(),
        attention_margin=attention_margin.numpy(),
        logit_margin=logit_margin.numpy(),
    )


def _margin(x: Tensor) -> Tensor:
    """Least over the rows: largest minus second largest entry."""
    largest = x.topk(2, dim=-1).values
    return (largest[:, 0] - largest[:, 1]).min()


def thresholds(trace: Trace, values: np.ndarray, count: int = 12) -> dict[str, np.ndarray]:
    """Steps after which V, and both Q and K, stay below each level of a grid common to both, from their peaks down.

    Levels whose threshold is not within the run, with a tenth of it to spare, are left out: there the end of the run
    would decide.
    """
    V, QK = values[:, 2], values[:, :2].max(axis=1)
    top = 0.5 * min(V.max(), QK.max())
    bottom = max(c[int(0.9 * len(c)) :].max() for c in (V, QK))
    if bottom >= top:
        return {"level": np.empty(0), "V": np.empty(0), "QK": np.empty(0)}
    levels = np.geomspace(top, bottom, count)
    times = {name: np.array([threshold_step(trace.steps, c, e) for e in levels]) for name, c in (("V", V), ("QK", QK))}
    return {"level": levels, **times}


def power_law(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The exponent of y ~ x^p by least squares on logarithms, its standard error, and the correlation."""
    x, y = np.log(x), np.log(y)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"exponent": math.nan, "error": math.nan, "correlation": math.nan}
    slope = np.polyfit(x, y, 1)[0]
    correlation = float(np.corrcoef(x, y)[0, 1])
    error = abs(slope) * math.sqrt(max(1 / correlation**2 - 1, 0) / (len(x) - 2))
    return {"exponent": float(slope), "error": float(error), "correlation": correlation}


def analyse(trace: Trace, lr: float, levels: int = 12) -> dict:
    """The numbers behind T1 to T3, as plain Python values."""
    drops = -np.diff(trace.loss)
    worst = trace.variation.max(axis=1)
    ends = [threshold_step(trace.steps, v, IMPULSE_END * v.max()) for v in trace.variation.T]
    boundary = None if None in ends else max(ends)
    result = {
        "lemmas": {name: float(ratio.max()) for name, ratio in trace.lemmas.items()},
        "onsets": {m: onset(trace.steps, v) for m, v in zip(MATRICES, trace.variation.T, strict=True)},
        "impulse_ends": dict(zip(MATRICES, ends, strict=True)),
        "phase_II_from": boundary,
        "loss": [float(trace.loss[0]), float(trace.loss[-1])],
    }
    for name, values in (("thresholds", trace.variation), ("thresholds_of_bound", trace.bound)):
        times = thresholds(trace, values, levels)
        fits = {f"exponent_{m}": power_law(1 / times["level"], times[m]) for m in ("V", "QK")}
        result[name] = {k: v.tolist() for k, v in times.items()} | fits
    # The assumptions, over the whole run and before the loss has done nine tenths of its way
    window = int(np.argmax(trace.loss <= trace.loss[0] - 0.9 * (trace.loss[0] - trace.loss.min())))
    grows = np.diff(trace.norm, axis=0) > 0
    early = slice(max(window // 20, 1), max(window, 3))
    result["assumptions"] = {
        "window": window,
        "norms increase, part of the steps": dict(zip(MATRICES, grows.mean(axis=0).tolist(), strict=True)),
        "norms increase, part of the window": dict(zip(MATRICES, grows[:window].mean(axis=0).tolist(), strict=True)),
        "condition number, first and largest": {
            m: [float(c[0]), float(c.max())] for m, c in zip(MATRICES, trace.condition.T, strict=True)
        },
        "gradient of H, least over first, in the window": float(trace.grad_H[:window].min() / trace.grad_H[0]),
        "gradient of H, least over first, in the run": float(trace.grad_H.min() / trace.grad_H[0]),
        "gradients, largest": dict(zip(MATRICES, trace.grad_norm.max(axis=0).tolist(), strict=True)),
        "growth of the norm of V in the window, power of t": power_law(trace.steps[early], trace.norm[1:, 2][early])[
            "exponent"
        ],
    }
    one, two = slice(0, boundary), slice(boundary, None)
    if boundary is not None and boundary < len(drops):
        result["assumptions"]["positive margins, part of phase II"] = {
            "attention": float((trace.attention_margin[two] > 0).mean()),
            "logits": float((trace.logit_margin[two] > 0).mean()),
        }
        result["phase_I"] = {
            "falling steps": float((drops[one] > 0).mean()),
            "least decrease per step over lr": float(drops[one].min() / lr),
            "median decrease per step over lr": float(np.median(drops[one]) / lr),
        }
        x, y = worst[two], drops[two]
        half = len(x) // 2
        fit = power_law(x[y > 0], y[y > 0])
        p = fit["exponent"]

        def bound(power):
            """The constant that bounds the first half, and the part of the second that it bounds."""
            constant = (y[:half] / x[:half] ** power).max()
            return float(constant), float((y[half:] <= constant * x[half:] ** power).mean())

        constant, within = bound(p)
        result["phase_II"] = fit | {
            "falling steps": float((y > 0).mean()),
            "constant": constant,
            "within it, later half": within,
            "largest exponent of a bound": max((float(q) for q in POWERS if bound(q)[1] >= 0.99), default=-math.inf),
        }
    return result


def draw(trace: Trace, result: dict):
    """Draws loss, variation and bound, norms, thresholds and decrements of one run; returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    colors = {"Q": "#4477aa", "K": "#66ccee", "V": "#ee6677", "QK": "#4477aa"}
    figure = Figure(figsize=(12, 7), layout="constrained", dpi=100)
    axes = figure.subplots(2, 3)
    (a, b, c), (d, e, f) = axes
    drops, worst, boundary = -np.diff(trace.loss), trace.variation.max(axis=1), result["phase_II_from"]
    a.plot(trace.steps, trace.loss[1:], color="#222222")
    a.set(xscale="log", ylabel="loss (nats)", title="loss")
    for i, m in enumerate(MATRICES):
        b.plot(trace.steps, trace.variation[:, i], color=colors[m], label=m)
        b.plot(trace.steps, trace.bound[:, i], color=colors[m], ls=":", lw=1)
        c.plot(trace.steps, trace.norm[1:, i], color=colors[m], label=m)
    b.set(xscale="log", yscale="log", ylabel="SD variation per step", title="SD variation and its bound (dotted)")
    c.set(xscale="log", yscale="log", ylabel="Frobenius norm", title="norms")
    for axis in (a, b, c):
        axis.set_xlabel("step")
        if boundary:
            axis.axvline(boundary, color="#999999", lw=1, ls="--")
    for name, marker, label in (("thresholds", "o", ""), ("thresholds_of_bound", "x", " of the bound")):
        for m in ("V", "QK"):
            times = result[name]
            p = times[f"exponent_{m}"]["exponent"]
            d.plot(1 / np.array(times["level"]), times[m], marker, color=colors[m], ms=4, label=f"{m}{label}: {p:.2f}")
    d.set(xlabel="1 / ε", ylabel="threshold step", title="stays below ε from here on")
    if any(result[name]["level"] for name in ("thresholds", "thresholds_of_bound")):
        d.set(xscale="log", yscale="log")
    for part, color, label in ((slice(0, boundary), "#ccbb44", "phase I"), (slice(boundary, None), "#aa3377", "II")):
        x, y = worst[part], drops[part]
        e.plot(x[y > 0], y[y > 0], ".", ms=1.5, color=color, label=label)
    e.set(xscale="log", yscale="log", xlabel="largest SD variation", ylabel="decrease of the loss per step")
    e.set_title("decrease against variation")
    f.plot(trace.steps, trace.grad_H / trace.grad_H[0], color="#222222", label="gradient of H, over its first")
    f.plot(trace.steps, trace.attention_margin, color="#228833", label="attention margin")
    f.plot(trace.steps, trace.logit_margin, color="#aa3377", label="logit margin")
    f.set(xscale="log", yscale="log", ylim=(1e-4, None), xlabel="step", title="what the theorems assume")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not a:
            axis.legend(frameon=False, fontsize=8)
    return figure


def main(argv=None) -> int:
    """Run the seeds, print the numbers, write figure and JSON."""
    args = parse_args(argv)
    settings = {k: getattr(args, k) for k in ("width", "positions", "classes", "lr", "init", "steps", "labels")}
    results = []
    for seed in range(args.seeds):
        trace = simulate(seed, **settings)
        results.append(analyse(trace, args.lr, args.levels))
        if seed == 0:
            figure = draw(trace, results[0])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "theory.png")
    (out / "theory.json").write_text(json.dumps({"settings": settings, "seeds": results}, indent=1) + "\n")
    table = Table("statistic", *(f"seed {seed}" for seed in range(args.seeds)))
    for name, values in zip(*_flat(results), strict=True):
        table.add_row(name, *values)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"figure: {out / 'theory.png'}")
    return int(any(max(result["lemmas"].values()) > 1 + 1e-9 for result in results))


def _flat(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Names and values of the numbers in nested results, long lists left out."""

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, part in value.items():
                yield from walk(f"{prefix}{'.' if prefix else ''}{key}", part)
        elif not (isinstance(value, list) and len(value) > 2):
            parts = value if isinstance(value, list | tuple) else [value]
            yield prefix, ", ".join("-" if v is None else f"{v:.4g}" for v in parts)

    flat = [dict(walk("", result)) for result in results]
    names = list(dict.fromkeys(name for one in flat for name in one))
    return names, [[one.get(name, "-") for one in flat] for name in names]


if __name__ == "__main__":
    sys.exit(main())
