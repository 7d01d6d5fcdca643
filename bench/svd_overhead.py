"""What tracking costs, and how well it measures: the training step without a tracker and with each kind.

Five copies of one model train in turn in one process, from one seed on the same batches, so that the steps differ in
nothing but the tracker; their losses must agree bit for bit. With --model gpt2-small only the trackers run, on that
model's matrices at their seeded initial values, each moved a little at every step.
"""

import argparse
import random
import time

import torch

import sosd_fast
from bench.harness import bar, finish, gates, parser, quantiles, show, show_card, true_svdvals
from sosd_fast.testing import sd_distance
from training.data import batches, load_text
from training.flags import METHODS
from training.model import PRESETS, Transformer
from training.optimizers import DEFAULT_LR, build_optimizers

ERROR_GATE = 1e-6  # on the singular distribution of a full measurement
TOPK_GATE = {"adamw": 1e-3, "muon": 5e-3}  # on the leading values, relative, after step 20
STARTS = 3  # steps of trackers alone that are not timed: there spectra begin in float64, and memory is taken
HEAD_GATE = 0.05  # relative, on the SD variation of the leading values over the exact sum of all


class Stopwatch:
    """The clock of one copy, which stands still while the others have their turn; budgets are shares of it."""

    def __init__(self):
        self.total, self.began = 0.0, None

    def __call__(self):
        return self.total + (0.0 if self.began is None else time.perf_counter() - self.began)

    def start(self):
        self.began = time.perf_counter()

    def stop(self):
        self.total, self.began = self(), None


class Errors:
    """Compares records with a float64 SVD of the same weights."""

    def __init__(self):
        self.sd, self.bound_ratio, self.topk, self.variation = 0.0, 0.0, 0.0, 0.0
        self.head = 0.0  # of the SD variation of the leading values, each divided by the exact sum
        self._before, self._leading = {}, {}

    def truth(self, probe, step):
        """SVDs of all matrices now, and those of the step before where there are some."""
        now = {}
        for m in probe.matrices:
            W = m.tensor()
            if W.is_cuda:  # by the Gram matrix, whose small values are good to 1e-8 of the largest
                W = W.double()
                G = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
                now[m.name] = torch.linalg.eigvalsh(G).flip(-1).clamp(min=0).sqrt().cpu()
            else:
                now[m.name] = true_svdvals(W)
        before = self._before.get(step - 1, {})
        self._before = {step: now}
        return now, before

    def add(self, records, now, before, warm):
        """Takes the worst over the records of one step."""
        for r in records:
            S = now[r.name]
            p = S / S.sum()
            if r.spectrum is not None:
                error = sd_distance(torch.as_tensor(r.spectrum), S)
                self.sd = max(self.sd, error)
                self.bound_ratio = max(self.bound_ratio, error / r.sd_error)
            leading = torch.tensor(r.topk, dtype=torch.float64)
            if r.spectrum is None and warm:
                self.topk = max(self.topk, float((leading / S[: len(leading)] - 1).abs().max()))
            if warm and r.name in before:
                q = before[r.name] / before[r.name].sum()
                if r.method == "topk" and self._leading[r.name][0] == r.step - 1:
                    k = len(r.topk)
                    measured = leading / S.sum() - self._leading[r.name][1] / before[r.name].sum()
                    self.head = max(self.head, abs(float(measured.norm() / (p - q)[:k].norm()) - 1))
                for measured, k in ((r.sd_variation, len(p)), (r.sd_variation_topk, len(r.topk))):
                    if measured is not None:
                        true = float((p - q)[:k].norm())
                        self.variation = max(self.variation, abs(measured - true) / true)
            if r.method == "topk":
                self._leading[r.name] = r.step, leading


def train(args):
    """Trains the copies in turn.

    Returns:
        Seconds per step and in the tracker, the share of the matrices that each step measured in full, errors, and
        whether losses agree.
    """
    names = ["off", *METHODS]
    text = load_text()
    models, optimizers, probes, streams = {}, {}, {}, {}
    clocks = {name: Stopwatch() for name in names}
    for name in names:
        torch.manual_seed(0)
        models[name] = Transformer(PRESETS[args.model])
        optimizers[name] = build_optimizers(models[name], args.optimizer, DEFAULT_LR[args.optimizer])
        streams[name] = batches(
            text.train, args.batch_size, PRESETS[args.model].context, torch.Generator().manual_seed(0)
        )
        if name != "off":  # stepped by hand, so that the tracker's part can be timed from outside
            probes[name] = sosd_fast.track(models[name], optimizers=[], method=METHODS[name], budget=args.budget)
            probes[name].clock = clocks[name]
    seconds = {name: [] for name in names}
    own, shares = {name: [] for name in METHODS}, {name: [] for name in METHODS}
    errors = {name: Errors() for name in METHODS}
    losses = {name: [] for name in names}
    order = random.Random(0)
    for step in range(1, args.steps + 1):
        order.shuffle(names)
        for name in names:
            tokens, targets = next(streams[name])
            clocks[name].start()
            began = time.perf_counter()
            loss = models[name](tokens, targets)
            loss.backward()
            for optimizer in optimizers[name]:
                optimizer.step()
                optimizer.zero_grad()
            trained = time.perf_counter()
            if name != "off":
                probes[name].step()
            ended = time.perf_counter()
            clocks[name].stop()
            losses[name].append(loss.item())
            if step > 2:
                seconds[name].append(ended - began)
                if name != "off":
                    own[name].append(ended - trained)
                    latest = probes[name].latest().values()
                    shares[name].append(sum(r.step == step and r.spectrum is not None for r in latest) / len(latest))
        if step % args.check_every in (0, args.check_every - 1) or step >= args.steps - 1:
            truth = {name: errors[name].truth(probes[name], step) for name in METHODS}
            for name, (now, before) in truth.items():
                latest = [r for r in probes[name].latest().values() if r.step == step]  # others are of earlier steps
                errors[name].add(latest, now, before, warm=step > 20)
    agree = all(values == losses["off"] for values in losses.values())
    return seconds, own, shares, errors, agree


def track_only(args):
    """The trackers alone on a model's matrices, each moved by a small random step before every measurement."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    model = Transformer(PRESETS[args.model]).to("cuda" if cuda else "cpu")
    probes = {
        name: sosd_fast.track(model, optimizers=[], method=method, include=("h.*",), budget=args.budget)
        for name, method in METHODS.items()
        # The budget of "fast" is a share of a training step, which there is none of; on a GPU "exact" takes minutes.
        if name != "fast" and not (cuda and name == "exact")
    }
    own = {name: [] for name in probes}
    errors = {name: Errors() for name in probes}
    for step in range(args.steps):
        with torch.no_grad():
            for p in model.h.parameters():
                p.add_(torch.randn_like(p), alpha=1e-4)
        for name, probe in probes.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            probe.step()
            if cuda:
                torch.cuda.synchronize()
            if step >= STARTS or args.steps <= STARTS:
                own[name].append(time.perf_counter() - began)
    now, _ = errors["full"].truth(probes["full"], args.steps)
    for name, probe in probes.items():
        probe.flush()
        errors[name].add(probe.latest().values(), now, {}, warm=True)
    return own, errors


def tracker_flags(p: argparse.ArgumentParser, model: str, budget: float):
    """Adds the flags of every benchmark that trains a model under trackers, with its defaults."""
    # fmt: off
    p.add_argument("--model", default=model, choices=PRESETS,
                   help="The model, a preset of training/model.py, %(default)s by default.")
    p.add_argument("--optimizer", default="adamw", choices=list(DEFAULT_LR),
                   help="The optimizer of the training, %(default)s by default.")
    p.add_argument("--budget", type=float, default=budget,
                   help="The fraction of the step time that the tracker fast may take, %(default)s by default.")
    # fmt: on


def main():
    """Gate, table, JSON."""
    p = parser(__doc__.split("\n")[0])
    tracker_flags(p, "gpt2-nano", 0.03)
    add = p.add_argument
    # fmt: off
    add("--steps", type=int,
        help="The number of training steps; by default 40 for a nano model, for others 12 on a GPU and else 3.")
    add("--batch-size", type=int, default=8, help="The number of sequences in a step, %(default)s by default.")
    add("--check-every", type=int, default=10,
        help="The number of steps between two comparisons with float64, %(default)s by default.")
    # fmt: on
    args = p.parse_args()
    trains = args.model.endswith("nano")
    args.steps = args.steps or (40 if trains else 12 if torch.cuda.is_available() else 3)
    show_card()

    if trains:
        seconds, own, shares, errors, agree = train(args)
        tokens = args.batch_size * PRESETS[args.model].context
        print(f"{args.model}, {args.optimizer}, {args.steps} steps of {tokens} tokens")
    else:
        own, errors = track_only(args)
        seconds, shares, agree = None, {}, True
        print(f"{args.model}: the trackers alone, {args.steps} steps")

    gate = {
        "losses bit-identical": agree,
        f"SD error <= {ERROR_GATE:g} and within its bound": all(
            e.sd <= ERROR_GATE and e.bound_ratio <= 1 for name, e in errors.items() if name != "exact"
        ),
    }
    if trains and args.steps > 20:
        gate[f"leading values within {TOPK_GATE[args.optimizer]:g} after step 20"] = (
            errors["topk"].topk <= TOPK_GATE[args.optimizer]
        )
        gate[f"their part of SD variation within {HEAD_GATE:g}, given the sum"] = errors["topk"].head <= HEAD_GATE
    green = gates(gate)

    result = {"benchmark": "svd_overhead", "settings": vars(args), "gate": gate, "rows": {}}
    rows = []
    tracker_ms = {name: quantiles(times or [0.0]) for name, times in own.items()}
    for name in ["off", *own] if trains else own:
        row = {}
        if seconds:
            row["step_ms"] = quantiles(seconds[name] or [0.0])["ms"]
        if name != "off":
            mean = 1e3 * sum(own[name]) / max(len(own[name]), 1)  # fast spends unevenly, so the mean counts
            row |= {"tracker_ms": mean, "low_ms": tracker_ms[name]["low"], "high_ms": tracker_ms[name]["high"]}
            if seconds and seconds["off"]:
                row["overhead_percent"] = 100 * mean / quantiles(seconds["off"])["ms"]
            if shares.get(name):
                row["measured_in_full"] = sum(shares[name]) / len(shares[name])
            exact = sum(own.get("exact", ())) / max(len(own.get("exact", ())), 1)
            row["times_cheaper_than_exact"] = 1e3 * exact / mean if mean and exact else None
            e = errors[name]
            row |= {
                "sd_error": e.sd,
                "error_over_bound": e.bound_ratio,
                "topk_error": e.topk,
                "topk_variation_error_given_sum": e.head,
                "variation_error": e.variation,
            }
        result["rows"][name] = row
        rows.append(
            [
                name,
                f"{row['step_ms']:.1f}" if "step_ms" in row else "",
                f"{row['tracker_ms']:.2f}" if name != "off" else "",
                f"{row['overhead_percent']:.1f}" if "overhead_percent" in row else "",
                f"{100 * row['measured_in_full']:.0f}" if "measured_in_full" in row else "",
                f"{row['times_cheaper_than_exact']:.1f}" if row.get("times_cheaper_than_exact") else "",
                *(f"{row[k]:.1e}" if row.get(k) else "" for k in ("sd_error", "topk_error", "variation_error")),
            ]
        )
    if not green:
        print("the gate is red: no times are printed")
        raise SystemExit(1)
    if torch.cuda.is_available() and not trains:
        bar("all values of the body's matrices, tracker and host included, ms", tracker_ms["full"]["ms"], 10)
    columns = ["tracker", "step ms", "tracker ms", "over %", "in full %", "x exact", "SD err", "top-k err", "var err"]
    show("largest errors against a float64 SVD; those of leading values and SD variation relative", columns, rows)
    finish(result, args.json)


if __name__ == "__main__":
    main()
