"""Other people's tools against ours in one run: spectra, Newton-Schulz, and what following a training step costs.

On the CPU, on the shapes of a model's body, by the calls that a user of each tool would make. A tool that is not
installed has a row that says so: pip install weightwatcher trainscope gram-newton-schulz diffract-core, which needs
Python 3.12.
"""

import importlib
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sosd_fast
from bench.harness import finish, gates, interleaved, parser, quantiles, show, show_card, true_svdvals, upright
from bench.svd_overhead import Errors, Stopwatch
from sosd_fast.kernels import multiplies_bfloat16
from sosd_fast.kernels.newton_schulz import COEFFICIENTS, newton_schulz, newton_schulz_ref
from sosd_fast.matrices import find_matrices
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.testing import matrix, sd_distance
from training.data import batches, load_text
from training.model import PRESETS, Transformer
from training.optimizers import DEFAULT_LR, build_optimizers

BATCH = 4  # matrices of a shape in one call, as a probe has them
TRIPLES = COEFFICIENTS["muon"] * 5
SD_GATE = 1e-6  # on our singular distributions
NS_GATES = {"sosd_fast, bfloat16": 6e-2, "sosd_fast, float32": 2e-4}  # relative in the Frobenius norm, Gaussian
WARM_UP = 2  # training steps that are not counted


class Missing(Exception):
    """Why a contender does not run here."""


def load(module: str, needs: str = "") -> Any:
    """Imports a peer."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Missing(f"no module {error.name}{needs}") from None


# --- Contenders: each takes its input and returns what is timed


def weightwatcher_of(Ws: list[Tensor]) -> Callable:
    """WeightWatcher's spectra, one watcher a matrix, for each call describes the whole of a watcher's model."""
    watcher_of = load("weightwatcher").WeightWatcher
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    watchers = []
    for W in Ws:
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(W, requires_grad=False)
        watchers.append(watcher_of(model=layer))
    return lambda: [torch.tensor(watcher.get_ESD(layer=0)).flip(-1).clamp(min=0).sqrt() for watcher in watchers]


def diffract_of(Ws: list[Tensor]) -> Callable:
    """diffract-core's spectra, one session a call, in memory."""
    session_of = load("diffract", ", Python 3.12 or newer").Session
    weights = {f"layer{i}.weight": W.numpy() for i, W in enumerate(Ws)}

    def run():
        with session_of(profile="ram") as session:
            session.models.add(weights, model_id="model")
            session.compute.apply("weights_svals")
            found = session.results.export_metrics("weights_svals", export_format="dict").values()
        values = {each["metadata"]["name"]: each["fields"]["weights_svals"] for each in found}
        return [torch.tensor(values[name]).flip(-1) for name in weights]

    return run


def gram_values(W: Tensor) -> Tensor:
    """The singular values by float32 eigvalsh of the Gram matrix, descending."""
    return torch.linalg.eigvalsh(W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W).flip(-1).clamp(min=0).sqrt()


def muon_of(G: Tensor) -> Callable:
    """The function of torch.optim.Muon, which runs in bfloat16 and returns it."""
    iteration = load("torch.optim._muon")._zeropower_via_newtonschulz
    return lambda: iteration(G, TRIPLES[0], len(TRIPLES), 1e-7)


def gram_newton_schulz_of(G: Tensor) -> Callable:
    """gram-newton-schulz by torch, without its GPU kernels; it runs in float16."""
    make = load("gram_newton_schulz").GramNewtonSchulz
    iteration = make(ns_use_kernels=False, compile_kwargs=None, ns_coefficients=[list(each) for each in TRIPLES])
    return lambda: iteration(G)


def bfloat16_of(G: Tensor) -> Callable:
    """Ours as Muon takes it by default, on CPUs that have the products for it."""
    if not multiplies_bfloat16():
        raise Missing("no bfloat16 on this CPU")
    return lambda: newton_schulz(G, dtype=torch.bfloat16)


SPECTRA = {
    "sosd_fast": lambda Ws: lambda: spectra(Ws).S,
    "torch.linalg.svdvals": lambda Ws: lambda: [torch.linalg.svdvals(upright(W)) for W in Ws],
    "Gram + eigvalsh": lambda Ws: lambda: [gram_values(W) for W in Ws],
    "WeightWatcher": weightwatcher_of,
    "diffract-core": diffract_of,
}
NEWTON_SCHULZ = {
    "sosd_fast, bfloat16": bfloat16_of,
    "sosd_fast, float32": lambda G: lambda: newton_schulz(G),
    "torch.optim.Muon": muon_of,
    "gram-newton-schulz": gram_newton_schulz_of,
}


def compare(makers: dict[str, Callable], cases: dict[str, tuple], error: Callable, each: int, repeats: int) -> dict:
    """Times the contenders on cases (input, truth); name -> ms of one of `each` matrices by case, and largest error."""
    rows: dict[str, dict] = {name: {"ms": {}, "error": 0.0} for name in makers}
    for case, (given, truth) in cases.items():
        runs = {}
        for name, make in makers.items():
            try:
                runs[name] = make(given)
            except Missing as why:
                rows[name] = {"missing": str(why)}
        times = interleaved(runs, repeats, 1)
        for name, run in runs.items():
            rows[name]["ms"][case] = {key: ms / each for key, ms in times[name].items()}
            rows[name]["error"] = max(rows[name]["error"], error(run(), truth))
    return rows


# --- A training step


class Copy:
    """One of several models in training, from one seed on the same batches, and what follows it."""

    def __init__(self, name: str, args, folder: Path):
        torch.manual_seed(0)
        self.model = Transformer(PRESETS[args.model])
        self.optimizers = build_optimizers(self.model, "adamw", DEFAULT_LR["adamw"])
        text, context = load_text().train, PRESETS[args.model].context
        self.stream = batches(text, args.batch_size, context, torch.Generator().manual_seed(0))
        self.seconds, self.losses, self.spectra = [], [], 0
        self.clock, self.probe, self.scope = Stopwatch(), None, None
        if name == "trainscope":
            module = load("trainscope")
            config = module.TrainScopeConfig(run_dir=str(folder / name))
            self.scope = module.TrainScope(self.model, self.optimizers[0], config).attach()
        elif name != "off":
            method = "full" if "full" in name else "auto"
            kept = {"run_dir": folder / name, "on_record": self.count}
            self.probe = sosd_fast.track(self.model, self.optimizers, method=method, budget=args.budget, **kept)
            self.probe.clock = self.clock

    def count(self, record: sosd_fast.Record):
        """Counts the spectra that are recorded of steps."""
        self.spectra += record.step > 0 and record.spectrum is not None

    def step(self):
        """Trains one step."""
        tokens, targets = next(self.stream)
        self.clock.start()
        began = time.perf_counter()
        loss = self.model(tokens, targets)
        loss.backward()
        if self.scope is not None:
            self.scope.step(loss.item())  # before the optimizer's, as its page says
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.clock.stop()
        self.losses.append(loss.item())

    def close(self) -> float | None:
        """Ends what follows; returns the largest SD error of the last step's spectra, None where there are none."""
        if self.scope is not None:
            self.scope.detach()
        if self.probe is None:
            return None
        self.probe.flush()
        last = [r for r in self.probe.latest().values() if r.step == len(self.losses) and r.spectrum is not None]
        errors = Errors()
        errors.add(last, errors.truth(self.probe, len(self.losses))[0], {}, warm=True)
        self.probe.close()
        return errors.sd if last else None


def compare_steps(args) -> dict:
    """Trains the copies in turn; what each costs beyond the copy that nothing follows."""
    rows: dict[str, dict] = {}
    copies: dict[str, Copy] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("off", f"sosd_fast, budget {args.budget:.0%}", "sosd_fast, full", "trainscope"):
            rows[name] = {}
            try:
                copies[name] = Copy(name, args, Path(folder))
            except Missing as why:
                rows[name]["missing"] = str(why)
        order, turn = random.Random(0), list(copies)
        for _ in range(args.steps):
            order.shuffle(turn)
            for name in turn:
                copies[name].step()
        errors = {name: copy.close() for name, copy in copies.items()}
    off = copies["off"]
    alone = sum(off.seconds[WARM_UP:])
    for name, copy in copies.items():
        extra = [a - b for a, b in zip(copy.seconds[WARM_UP:], off.seconds[WARM_UP:], strict=True)]
        rows[name] |= {
            "step_ms": quantiles(copy.seconds[WARM_UP:])["ms"],
            "extra_ms": 1e3 * sum(extra) / len(extra),  # a budget is spent unevenly, so the mean counts
            "extra_median_ms": quantiles(extra)["ms"],
            "overhead_percent": 100 * sum(extra) / alone,
            "spectra_a_step": copy.spectra / args.steps,
            "error": errors[name],
            "same_losses": copy.losses == off.losses,
        }
    return rows


# --- Tables


def versions() -> dict[str, str | None]:
    """The versions of what is compared, None where it is not installed."""
    found: dict[str, str | None] = {"torch": torch.__version__, "sosd_fast": sosd_fast.__version__}
    for name in ("weightwatcher", "diffract-core", "gram-newton-schulz", "trainscope"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def show_rows(title: str, columns: list[str], rows: dict[str, dict], cells: Callable):
    """Prints one row a contender, with its version or why it does not run."""
    found, table = versions(), []
    for name, row in rows.items():
        version = found.get(name.split(",")[0].lower(), found["torch"])
        table.append([name, row["missing"], *[""] * len(columns)] if "missing" in row else [name, version, *cells(row)])
    show(title, ["", "version", *columns], table)


def main():
    """Gate, tables, JSON."""
    p = parser(__doc__.split("\n")[0], repeats=7)
    # fmt: off
    p.add_argument("--model", default="gpt2-nano", choices=PRESETS,
                   help="The model whose shapes are measured, a preset of training/model.py, %(default)s by default; "
                   "only a nano model is trained, too.")
    p.add_argument("--steps", type=int, default=100,
                   help="The number of training steps of each copy, at least 4, %(default)s by default.")
    p.add_argument("--batch-size", type=int, default=8,
                   help="The number of sequences in a step, %(default)s by default.")
    p.add_argument("--budget", type=float, default=0.01,
                   help="The fraction of the step time that our tracker may take, %(default)s by default.")
    # fmt: on
    args = p.parse_args()
    show_card()
    body = find_matrices(Transformer(PRESETS[args.model]), include=("h.*",))
    shapes = Counter(tuple(m.tensor().shape) for m in body)
    lists = {f"{m}x{n}": [matrix("gaussian", m, n, seed=i) for i in range(BATCH)] for m, n in shapes}
    cases = {name: (Ws, [true_svdvals(W) for W in Ws]) for name, Ws in lists.items()}
    values = compare(SPECTRA, cases, lambda found, truth: max(map(sd_distance, found, truth)), BATCH, args.repeats)
    gradients = {f"{m}x{n}": matrix("gaussian", m, n) for m, n in sorted({(min(s), max(s)) for s in shapes})}
    cases = {name: (G, newton_schulz_ref(G.double(), TRIPLES)) for name, G in gradients.items()}
    iterations = compare(NEWTON_SCHULZ, cases, lambda X, T: float((X.double() - T).norm() / T.norm()), 1, args.repeats)
    steps = compare_steps(args) if args.model.endswith("nano") else {}

    gate = {f"our SD error <= {SD_GATE:g}": values["sosd_fast"]["error"] <= SD_GATE}
    for name, limit in NS_GATES.items():
        gate[f"{name}: error <= {limit:g}"] = iterations[name].get("error", 0.0) <= limit
    ours = [row for name, row in steps.items() if name.startswith("sosd_fast")]
    gate["our trackers: losses bit-identical"] = all(row["same_losses"] for row in ours)
    gate[f"our trackers: SD error <= {SD_GATE:g}"] = all((row["error"] or 0.0) <= SD_GATE for row in ours)
    if not gates(gate):
        print("the gate is red: no times are printed")
        raise SystemExit(1)

    for row in values.values():
        if "ms" in row:
            row["body_ms"] = sum(row["ms"][f"{m}x{n}"]["ms"] * count for (m, n), count in shapes.items())
    body_ms = values["sosd_fast"]["body_ms"]

    def times(row: dict) -> list[str]:
        return [f"{each['ms']:.3g}" for each in row["ms"].values()]

    # fmt: off
    show_rows(
        f"all singular values, ms a matrix, {BATCH} Gaussian ones a call, float32; x: over the body's ms of sosd_fast",
        [*(f"{count} of {m}x{n}" for (m, n), count in shapes.items()), "body", "x", "SD error"], values,
        lambda row: [*times(row), f"{row['body_ms']:.1f}", f"{row['body_ms'] / body_ms:.2f}", f"{row['error']:.0e}"])
    show_rows("Newton-Schulz, 5 steps, ms a matrix, and the largest error relative to float64", [*gradients, "error"],
              iterations, lambda row: [*times(row), f"{row['error']:.0e}"])
    if steps:
        show_rows(
            f"a training step, {args.model}, AdamW, {args.steps} steps; extra: ms beyond the step of off",
            ["step ms", "extra, mean", "median", "over %", "spectra a step", "SD error", "same losses"], steps,
            lambda row: [f"{row['step_ms']:.1f}", f"{row['extra_ms']:.2f}", f"{row['extra_median_ms']:.2f}",
                         f"{row['overhead_percent']:.1f}", f"{row['spectra_a_step']:.1f}",
                         "" if row["error"] is None else f"{row['error']:.0e}", "yes" if row["same_losses"] else "no"])
    # fmt: on
    result = {"benchmark": "peers", "settings": vars(args), "versions": versions(), "gate": gate}
    finish(result | {"spectra": values, "newton_schulz": iterations, "steps": steps}, args.json)


if __name__ == "__main__":
    main()
