"""Train a small language model on text with the spectral probe on: ``python training/run.py --tracker=fast``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import math
import platform
import time

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import sosd_fast
from sosd_fast.phases import onset_of_stability
from sosd_fast.plot import plot_run, variation_by_kind
from sosd_fast.records import JsonLines, RunWriter
from training.data import batches, fixed_batches, load_text
from training.model import PRESETS, Transformer
from training.schedule import SCHEDULES

METHODS = {"fast": "auto", "full": "full", "topk": "topk", "exact": "exact"}
# Validation loss of gpt2-nano after 150 steps of 8 x 256 bytes, wsd, warm-up 20:
# adamw 5e-4 2.08, 1e-3 1.99, 2e-3 2.09, 4e-3 2.46, 8e-3 2.71; muon 0.02 2.00, 0.04 2.00.
DEFAULT_LR = {"adamw": 1e-3, "muon": 0.02}


def parse_args(argv=None) -> argparse.Namespace:
    """Read the flags; a wrong value ends with a message that names the choices."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    positive, fraction = _number(int, 1), _number(float, 0)
    # The probe
    parser.add_argument("--tracker", choices=[*METHODS, "off"], default="fast", help="how spectra are measured")
    parser.add_argument("--tracker-budget", type=fraction, default=0.03, help="part of the step time it may take")
    parser.add_argument("--tracker-k", type=positive, default=32, help="leading singular values kept of each matrix")
    # Model
    parser.add_argument("--model", choices=list(PRESETS), default="gpt2-nano", help="preset of training/model.py")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is by autocast")
    # Optimization
    parser.add_argument("--optimizer", choices=list(DEFAULT_LR), default="adamw", help="muon: for the body's matrices")
    parser.add_argument("--lr", type=fraction, help=f"peak learning rate of the body; None means {DEFAULT_LR}")
    parser.add_argument("--adam-lr", type=fraction, help="with muon, that of embedding, head and gains; None: adamw's")
    parser.add_argument("--weight-decay", type=fraction, default=0.0, help="on the body's matrices only")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="wsd", help="learning rate over the steps")
    parser.add_argument("--warmup", type=_number(int, 0), default=20, help="steps of linear warm-up")
    parser.add_argument("--steps", type=positive, default=350, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences in a step")
    # Data and results
    parser.add_argument("--data", help="a text file or folder of text; None is Python's standard library, as bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    parser.add_argument("--eval-every", type=positive, default=25, help="steps between validations")
    parser.add_argument("--eval-sequences", type=positive, default=32, help="sequences of a validation")
    parser.add_argument("--run-dir", help="new folder for the results; None is runs/MODEL-OPTIMIZER-SCHEDULE-sSEED")
    parser.add_argument("--quiet", action="store_true", help="no progress and no tables")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: expected a usable device, got {args.device!r} ({error}). Try --device=cpu.")
    given = None if args.run_dir is None else Path(args.run_dir)
    if given is not None and given.exists() and not (given.is_dir() and not any(given.iterdir())):
        parser.error(f"argument --run-dir: expected a new or empty folder, got {args.run_dir!r}. Choose another.")
    args.lr = DEFAULT_LR[args.optimizer] if args.lr is None else args.lr
    args.adam_lr = DEFAULT_LR["adamw"] if args.adam_lr is None else args.adam_lr
    args.run_dir = args.run_dir or _fresh(f"runs/{args.model}-{args.optimizer}-{args.schedule}-s{args.seed}")
    return args


def _number(convert, least):
    def read(text):
        value = convert(text)
        if not (value >= least and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text}")
        return value

    read.__name__ = convert.__name__  # what argparse names in "invalid int value"
    return read


def _fresh(run_dir: str) -> str:
    number, candidate = 1, Path(run_dir)
    while candidate.exists():
        number += 1
        candidate = Path(f"{run_dir}-{number}")
    return str(candidate)


def build_optimizers(
    model: torch.nn.Module, optimizer: str, lr: float, weight_decay: float = 0.0, adam_lr: float | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for every parameter, or Muon for the body's matrices (those in ``h``) and AdamW for the rest.

    Args:
        model: a Transformer.
        optimizer: "adamw" or "muon".
        lr: peak learning rate of the body, kept as each group's "initial_lr" for the schedule.
        weight_decay: on the body's matrices; embedding, head and gains have none.
        adam_lr: with "muon", the learning rate of embedding, head and gains; None is AdamW's default.

    Returns:
        The optimizers, the body's first.
    """
    named = list(model.named_parameters())
    body = [p for name, p in named if name.startswith("h.") and p.ndim == 2]
    rest = [p for name, p in named if not (name.startswith("h.") and p.ndim == 2)]
    device = named[0][1].device.type
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": device in ("cpu", "cuda")}
    if optimizer == "muon":
        adam_lr = DEFAULT_LR["adamw"] if adam_lr is None else adam_lr
        optimizers = [
            sosd_fast.Muon(body, lr=lr, weight_decay=weight_decay, momentum=0.95),
            torch.optim.AdamW(rest, lr=adam_lr, **adam),
        ]
    elif optimizer == "adamw":
        groups = [{"params": body, "weight_decay": weight_decay}, {"params": rest}]
        optimizers = [torch.optim.AdamW(groups, lr=lr, **adam)]
    else:
        raise ValueError(
            f"build_optimizers: expected one of {list(DEFAULT_LR)}, got optimizer={optimizer!r}. Choose one."
        )
    for group in (group for each in optimizers for group in each.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def closing_table(run) -> Table:
    """SD variation of each kind of matrix: now, at its peak, and the onset of stability where there is one."""
    table = Table("module", "SD variation now", "at its peak", "peak step", "onset of stability")
    # A falling learning rate brings the variation down by itself, so the onset is looked for before it falls.
    rates = {line["step"]: line["lr"] for line in run.log}
    falls = max((step for step, lr in rates.items() if lr > 0.999 * max(rates.values())), default=0)
    for name, (steps, spread) in variation_by_kind(run).items():
        variation = spread[:, 1]  # the median over the matrices of that kind
        peak = int(variation.argmax())
        onset = onset_of_stability(steps[steps <= falls], variation[steps <= falls])
        seen = "not seen" if onset is None else f"step {onset}"
        table.add_row(name, f"{variation[-1]:.2e}", f"{variation[peak]:.2e}", f"{steps[peak]}", seen)
    return table


def main(argv=None) -> int:
    """Train as the flags say; returns the exit status: 0, 1 after a non-finite loss, 130 after Ctrl-C."""
    args = parse_args(argv)
    console = Console(quiet=args.quiet)
    device = torch.device(args.device)

    # Data, then the run directory: a wrong --data leaves no folder behind
    run_dir = Path(args.run_dir)
    config = PRESETS[args.model]
    try:
        tokens = load_text(args.data)
        train = batches(tokens.train, args.batch_size, config.context, torch.Generator().manual_seed(args.seed))
        validation = fixed_batches(tokens.val, args.batch_size, config.context, args.eval_sequences)
        run_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"run: cannot start with --data={args.data}, --run-dir={run_dir}: {error}", file=sys.stderr)
        return 2
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    (run_dir / "config.json").write_text(json.dumps({**vars(args), "versions": versions}, indent=2) + "\n")

    # Model, optimizers, probe
    torch.manual_seed(args.seed)
    model = Transformer(config).to(device)
    if args.compile:
        model.compile()
    optimizers = build_optimizers(model, args.optimizer, args.lr, args.weight_decay, args.adam_lr)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    probe = None
    if args.tracker != "off":
        method = METHODS[args.tracker]
        probe = sosd_fast.track(model, method=method, budget=args.tracker_budget, k=args.tracker_k, run_dir=run_dir)
    else:
        RunWriter(run_dir).close()  # no records, but a run directory whose log sosd_fast.load can read
    console.print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{len(tokens.train) / 1e6:.1f} + {len(tokens.val) / 1e6:.1f} MB of text ({tokens.source}), {args.steps} steps "
        f"of {args.batch_size} x {config.context} tokens, tracker {args.tracker}"
    )

    @torch.no_grad()
    def validation_loss() -> float:
        with autocast:
            losses = [model(x.to(device), y.to(device)) for x, y in validation]
        sizes = torch.tensor([len(x) for x, _ in validation])
        return float((torch.stack(losses).cpu() * sizes).sum() / sizes.sum())

    # The loop
    log = JsonLines(run_dir / "log.jsonl")
    multiplier = SCHEDULES[args.schedule]
    train_time, loss, val_loss, status = 0.0, math.nan, math.nan, 0
    progress = Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  val {task.fields[val]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tok/s  tracker {task.fields[overhead]:.1%}"),
        TimeRemainingColumn(),
        console=console,
        disable=args.quiet,
    )
    bar = progress.add_task("", total=args.steps, loss=loss, val=val_loss, rate=0.0, overhead=0.0)
    try:
        with progress:
            for step in range(1, args.steps + 1):
                start = time.perf_counter()
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = group["initial_lr"] * multiplier(step - 1, args.steps, args.warmup)
                x, y = (part.to(device) for part in next(train))  # (B, T)
                with autocast:
                    loss_tensor = model(x, y)
                loss_tensor.backward()
                loss = loss_tensor.item()
                if not math.isfinite(loss):  # before the update, so that the weights stay as they were
                    status = 1
                    break
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step_time = time.perf_counter() - start
                train_time += step_time
                overhead = probe.overhead if probe else 0.0
                line = {
                    "step": step,
                    "loss": loss,
                    "lr": optimizers[0].param_groups[0]["lr"],
                    "tokens": step * y.numel(),
                    "step_ms": 1e3 * step_time,
                    "tokens_per_s": y.numel() / step_time,
                    "overhead": overhead,
                }
                if step % args.eval_every == 0 or step == args.steps:
                    line["val_loss"] = val_loss = validation_loss()
                log.write(line)
                if "val_loss" in line:  # what a kill can cost is bounded by one cadence
                    log.flush()
                    if probe:
                        probe.flush()
                    if not console.is_terminal:  # where no bar can move
                        console.print(
                            f"step {step}: loss {loss:.3f}, validation {val_loss:.3f}, tracker {overhead:.1%}"
                        )
                rate = step * y.numel() / train_time
                progress.update(bar, completed=step, loss=loss, val=val_loss, rate=rate, overhead=overhead)
    except KeyboardInterrupt:
        status = 130
    finally:
        if probe:
            probe.close()
        log.close()

    # What came of it
    run = sosd_fast.load(run_dir)
    if status == 1:
        print(
            f"run: expected a finite loss, got loss={loss} at step {step}. Lower --lr (now {args.lr:g}) or lengthen "
            f"--warmup; the records up to there are in {run_dir}.",
            file=sys.stderr,
        )
    elif status == 130:
        console.print(f"interrupted after step {len(run.log)} of {args.steps}")
    if probe:
        console.print(closing_table(run))
    if run.log:
        rate = run.log[-1]["tokens"] / sum(1e-3 * line["step_ms"] for line in run.log)
        console.print(
            f"loss {run.log[-1]['loss']:.3f}, validation {val_loss:.3f}; {rate:,.0f} tokens/s; "
            f"tracker overhead {run.log[-1]['overhead']:.2%} of the step"
        )
        plot_run(run).savefig(run_dir / "run.png", dpi=150)
        print(f"figure: {run_dir / 'run.png'}")
    print(f"run directory: {run_dir}")
    return status


if __name__ == "__main__":
    sys.exit(main())
