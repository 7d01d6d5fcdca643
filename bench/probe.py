"""What the probe promises, kept over many steps: its budget, its bounds, its memory.

budget   nano GPT-2 at several budgets: measured overhead over budget, at most 1.3 after the first 50 steps
bounds   500 steps with AdamW and with Muon: every audited error over its bound, and SD variation against float64
soak     20,000 steps of a small model: memory, hooks and threads at the end against an early step
"""

import gc
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch.optim import optimizer as torch_optimizer

import sosd_fast
from bench.harness import finish, gates, parser, resident_mb, show, show_card, true_svdvals
from bench.svd_overhead import Stopwatch
from training.data import batches, load_text
from training.model import PRESETS, Transformer
from training.optimizers import DEFAULT_LR, build_optimizers

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.2)
BUDGET_GATE = 1.3
VARIATION_GATE = 0.02  # relative


def train(steps, optimizer, probes, each=lambda *_: None):
    """Trains a nano GPT-2 under several probes, made by `probes` from the model; returns seconds of training and them.

    The probes are stepped by hand in turn, each on a clock that runs while the model trains or it measures.
    """
    torch.manual_seed(0)
    model = Transformer(PRESETS["gpt2-nano"])
    optimizers = build_optimizers(model, optimizer, DEFAULT_LR[optimizer])
    stream = batches(load_text().train, 8, PRESETS["gpt2-nano"].context, torch.Generator().manual_seed(0))
    made = {name: make(model) for name, make in probes.items()}
    clocks = {name: Stopwatch() for name in made}
    for name, probe in made.items():
        probe.clock = clocks[name]
    training = 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        tokens, targets = next(stream)
        model(tokens, targets).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        took = time.perf_counter() - began
        training += took
        for name, probe in made.items():
            clocks[name].total += took
            clocks[name].start()
            probe.step()
            clocks[name].stop()
            each(step, name, probe)
    return training, made


def budget(args):
    """Measured overhead of each budget, as a fraction of the time, over that budget."""
    steps, skip = args.steps or 200, 50
    own, at_skip = {}, {}

    def note(step, name, probe):
        if step == min(skip, steps // 2):
            at_skip[name] = probe.seconds, probe.clock()
        own[name] = probe.seconds, probe.clock()

    def maker(fraction):
        return lambda model: sosd_fast.track(model, optimizers=[], budget=fraction)

    train(steps, "adamw", {str(b): maker(b) for b in BUDGETS}, note)
    rows, measured = [], {}
    for b in BUDGETS:
        (spent, now), (before, then) = own[str(b)], at_skip[str(b)]
        measured[str(b)] = (spent - before) / (now - then)
        rows.append([f"{100 * b:g} %", f"{100 * measured[str(b)]:.2f} %", f"{measured[str(b)] / b:.2f}"])
    show(f"budget, {steps} steps, AdamW", ["budget", "measured", "measured / budget"], rows)
    # more than every matrix in full every step is not to be had, so a large budget may be left unspent
    return all(measured[str(b)] <= BUDGET_GATE * b for b in BUDGETS), measured


def bounds(args):
    """Errors over bounds of audited spectra, and the error of SD variation where two steps in a row are checked."""
    steps = args.steps or 500
    rows, results = [], {}
    for optimizer in ("adamw", "muon"):
        truth, variations = {}, []

        def check(step, name, probe, truth=truth, variations=variations):
            if name != "fast" or step <= 20 or step % 20 < 18:
                return
            for m in probe.matrices:
                S = true_svdvals(m.tensor())
                before, truth[m.name] = truth.get(m.name), (step, S / S.sum())
                r = probe.latest()[m.name]
                if before and before[0] == step - 1 and r.step == step and r.sd_variation is not None:
                    variations.append(abs(r.sd_variation / float((truth[m.name][1] - before[1]).norm()) - 1))

        probes = {
            "fast": lambda model: sosd_fast.track(model, optimizers=[], budget=args.budget),
            "full": lambda model: sosd_fast.track(model, optimizers=[], method="full"),  # more audits
        }
        training, made = train(steps, optimizer, probes, check)
        probe, audits = made["fast"], [*made["fast"].audits, *made["full"].audits]
        worst = [a.error / a.bound for a in audits]
        results[optimizer] = {
            "audits": len(worst),
            "error_over_bound_median": statistics.median(worst),
            "error_over_bound_max": max(worst),
            "sd_error_max": max(a.error for a in audits),
            "variation_checks": len(variations),
            "variation_error_max": max(variations),
            "overhead": probe.seconds / (training + probe.seconds),
        }
        r = results[optimizer]
        rows.append([
            optimizer, r["audits"], f"{r['error_over_bound_median']:.2f}", f"{r['error_over_bound_max']:.2f}",
            f"{r['sd_error_max']:.1e}", r["variation_checks"], f"{r['variation_error_max']:.1e}",
            f"{100 * r['overhead']:.1f} %",
        ])  # fmt: skip
    columns = ["optimizer", "audits", "median", "max", "SD err", "checks", "variation err", "overhead"]
    show(f"error over bound of audited spectra, {steps} steps, budget {100 * args.budget:g} %", columns, rows)
    holds = all(r["error_over_bound_max"] <= 1 and r["variation_error_max"] <= VARIATION_GATE for r in results.values())
    return holds, results


def soak(args):
    """Memory, hooks and threads over many steps of a small model, with a run directory."""
    steps = args.steps or 20_000
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(48, 48) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hooks = len(torch_optimizer._global_optimizer_post_hooks) + len(torch_optimizer._global_optimizer_pre_hooks)
    samples = {}
    with tempfile.TemporaryDirectory() as folder:
        with sosd_fast.track(model, k=8, budget=0.2, run_dir=folder) as probe:
            for step in range(1, steps + 1):
                model(torch.randn(16, 48)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % (steps // 20) == 0:
                    gc.collect()
                    samples[step] = resident_mb()
        left = len(torch_optimizer._global_optimizer_post_hooks) + len(torch_optimizer._global_optimizer_pre_hooks)
        run = sosd_fast.load(folder)
        last, size = run.records[-1].step, sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        del probe
    early, late = samples[steps // 20 * 5], samples[max(samples)]
    result = {
        "steps": steps,
        "resident_mb": {str(k): v for k, v in samples.items()},
        "growth": late / early - 1,
        "hooks_left": left - hooks,
        "threads": threading.active_count(),
        "last_step_read": last,
        "run_dir_mb": size / 2**20,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    rows = [
        [
            f"{early:.1f}",
            f"{late:.1f}",
            f"{100 * result['growth']:.1f} %",
            result["hooks_left"],
            last,
            f"{size / 2**20:.0f}",
        ]
    ]
    show(
        f"{steps} steps", ["MB at a quarter", "MB at the end", "growth", "hooks left", "last step", "run dir MB"], rows
    )
    return abs(result["growth"]) <= 0.05 and left == hooks and last > steps - 20, result  # matrices take turns


def main():
    """Each part asked for, its gate, one JSON line."""
    parts = {"budget": budget, "bounds": bounds, "soak": soak}
    p = parser(__doc__.split("\n")[0])
    p.add_argument("parts", nargs="*", choices=[*parts, []], default=[], help="Runs these parts only; by default all.")
    p.add_argument(
        "--steps",
        type=int,
        help="The number of steps of each part; by default 200 for budget, 500 for bounds, 20,000 for soak.",
    )
    p.add_argument(
        "--budget",
        type=float,
        default=0.03,
        help="The fraction of the step time that the probe of the part bounds may take, %(default)s by default.",
    )
    args = p.parse_args()
    show_card()
    results, gate = {}, {}
    for name in args.parts or parts:
        gate[name], results[name] = parts[name](args)
        gates({name: gate[name]})
    finish({"benchmark": "probe", "settings": vars(args), "gate": gate, "rows": results}, args.json)
    if not all(gate.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
