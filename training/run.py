"""Train a language model on text with the spectral probe on: ``python training/run.py --tracker=fast``."""

import sys
from pathlib import Path

if not __package__:  # run as a file, it would find the modules of training/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import time
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import sosd_fast
from sosd_fast.runs.curves import variation_by_kind
from sosd_fast.runs.phases import onsets
from sosd_fast.runs.plot import plot_run
from sosd_fast.runs.records import JsonLines, RunWriter
from training import checkpoint
from training.data import fixed_batches, load_data, passes
from training.flags import METHODS, parse_args
from training.model import PRESETS, Transformer, flops_per_token, resized
from training.optimizers import build_optimizers
from training.parallel import setup
from training.schedule import SCHEDULES

# Dense bfloat16 FLOP/s by the data sheets; the first name found in the device's decides.
PEAK_FLOPS = {"B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "A100": 3.12e14, "L40S": 3.62e14, "4090": 1.65e14}


def closing_table(run) -> Table:
    """SD variation of each kind of matrix: the last one, that at its peak, and the onset of stability, if any."""
    table = Table("module", "SD variation, last", "at step", "at its peak", "at step", "onset of stability")
    found = onsets(run)
    for name, (steps, spread) in variation_by_kind(run).items():
        variation = spread[:, 1]  # the median over the matrices of that kind
        peak = int(variation.argmax())
        seen = "not seen" if found[name] is None else f"step {found[name]}"
        table.add_row(name, f"{variation[-1]:.2e}", f"{steps[-1]}", f"{variation[peak]:.2e}", f"{steps[peak]}", seen)
    return table


def describe(args: argparse.Namespace, config, source: str) -> str:
    """One line: the model, its parameters, and what it will be trained on."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(config).parameters())
    tokens = args.batch_size * config.context
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return (
        f"{args.model}: {size} parameters, {source}, {args.steps} steps of {args.batch_size} x {config.context} = "
        f"{tokens:,} tokens ({args.steps * tokens / 1e9:.3g} B in all, {flops_per_token(config) * tokens / 1e12:.3g} "
        f"TFLOP a step), {args.optimizer}, {args.schedule}, tracker {args.tracker}"
    )


@contextlib.contextmanager
def stop_signals():
    """Yields a list that SIGTERM and Ctrl-C are put on, so that the step ends first; a later Ctrl-C ends at once."""
    received, since = [], math.inf

    def stop(number, _frame):
        nonlocal since
        if number == signal.SIGINT and time.monotonic() > since + 1:  # a terminal and torchrun send it twice at once
            raise KeyboardInterrupt
        received.append(number)
        since = min(since, time.monotonic())

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv=None) -> int:
    """Train as the flags say; returns the exit status: 0, 1 after a non-finite loss, 128 + n after signal n."""
    args = parse_args(argv)
    config = resized(PRESETS[args.model], args.layers, args.width)
    config = replace(config, context=args.context or config.context)
    if args.dry_run:
        if int(os.environ.get("RANK", "0")) == 0:
            print(describe(args, config, args.data or "no data yet"))
        return 0

    # Processes and data, then the run directory: a wrong --data leaves no folder behind
    try:
        parallel = setup(args.parallel, args.device, args.replicas, args.timeout, args.tp_size)
        args.run_dir = parallel.agree(args.run_dir)
        run_dir = Path(args.run_dir)
        if args.resume and checkpoint.latest(run_dir) is None and not args.checkpoint_every:
            raise ValueError("there is no checkpoint to go on from. Start anew, with --checkpoint-every")
        tokens = load_data(args.data, config.vocab)
        config = replace(config, vocab=max(config.vocab, -(-tokens.vocab // 64) * 64))
        shares, own_share = parallel.data_ranks, parallel.data_rank
        passes(tokens.train, args.batch_size, config.context, args.seed, 0, own_share, shares)  # for its checks
        validation = fixed_batches(tokens.val, args.micro_batch_size * shares, config.context, args.eval_sequences)
        run_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"run: cannot start with --data={args.data}, --run-dir={args.run_dir}: {error}", file=sys.stderr)
        return 2
    console, device = Console(quiet=args.quiet or not parallel.main), parallel.device
    if parallel.main and not args.resume:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        (run_dir / "config.json").write_text(json.dumps({**vars(args), "versions": versions}, indent=2) + "\n")

    def say(text: str):
        if parallel.main:
            print(text, file=sys.stderr)

    # Model, optimizers, probe
    torch.manual_seed(args.seed)  # every rank draws the whole model, so that it is the same however it is spread
    model = Transformer(config).to(device)
    if args.compile:
        model.compile()
    spread = parallel.wrap(model, args.dtype)
    optimizers = build_optimizers(
        model, args.optimizer, args.lr, args.weight_decay, args.adam_lr, decay_all=args.decay_all
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    done, probe_state = 0, None
    if args.resume:
        try:
            done, probe_state = checkpoint.restore(run_dir, spread, optimizers, parallel, say)
        except ValueError as error:
            print(f"run: cannot go on with --resume={args.resume}: {error}.", file=sys.stderr)
            parallel.close()
            return 2
    train = passes(tokens.train, args.batch_size, config.context, args.seed, done, own_share, shares)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading replaces them
    probe = None
    if args.tracker != "off":
        settings = {"method": METHODS[args.tracker], "budget": args.tracker_budget, "k": args.tracker_k}
        probe = sosd_fast.track(spread, **settings, run_dir=run_dir, step=done if args.resume else None)
        if probe_state:
            probe.load_state_dict(probe_state)
    elif parallel.main:
        RunWriter(run_dir).close()  # no records, but a run directory whose log sosd_fast.load can read
    source = f"{len(tokens.train) / 1e6:.1f} + {len(tokens.val) / 1e6:.1f} M tokens ({tokens.source})"
    console.print(describe(args, config, source) + (f", from step {done}" if done else ""))

    @torch.no_grad()
    def validation_loss() -> float:
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for x, y in validation:
            own = -(-len(x) // shares)
            rows = slice(own_share * own, (own_share + 1) * own)
            count = len(x[rows])
            rows = rows if count else slice(0, 1)  # a rank without a sequence must still join the others' forward
            with autocast:
                loss = spread(x[rows].to(device), y[rows].to(device))
            total += torch.stack((loss.double() * count, torch.tensor(count, device=device)))
        value, count = parallel.sum(total).tolist()
        return value / count

    def fetch():
        """The next batch, and what is wrong with it; other ranks wait for this one, which then takes zeros."""
        try:
            return next(train), None
        except (OSError, ValueError) as error:  # a shard that has changed since it was opened
            zeros = torch.zeros(args.batch_size // shares, config.context, dtype=torch.int64)
            return (zeros, zeros), str(error)

    saved = done

    def save(step: int):
        nonlocal saved
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == saved:
            return
        try:
            checkpoint.save(run_dir, step, spread, optimizers, parallel, probe)
            saved = step
        except (OSError, ValueError) as error:
            kept = f"that of step {saved} is kept" if saved else "there is none before it"
            say(f"run: no checkpoint was written at step {step}: {error}; {kept}.")

    def write(*lines: dict):
        """Logs lines, or forces what was logged to disk where there are none."""
        nonlocal log
        try:
            if log:
                log.write(*lines) if lines else log.flush()
        except OSError as error:
            log.close()
            log = None
            say(f"run: {run_dir / 'log.jsonl'} cannot be written from step {step} on: {error}; training goes on.")

    # The loop
    log = JsonLines(run_dir / "log.jsonl", done if args.resume else None) if parallel.main else None
    multiplier = SCHEDULES[args.schedule]
    micro_batches = args.batch_size // (shares * args.micro_batch_size)
    step_tokens = args.batch_size * config.context
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    train_time, loss, val_loss, status, step = 0.0, math.nan, math.nan, 0, done
    progress = Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  val {task.fields[val]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tok/s  tracker {task.fields[overhead]:.1%}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )
    bar = progress.add_task("", total=args.steps, loss=loss, val=val_loss, rate=0.0, overhead=0.0)
    try:
        with progress, stop_signals() as stops:
            for step in range(done + 1, args.steps + 1):
                start = time.perf_counter()
                for group in groups:
                    group["lr"] = group["initial_lr"] * multiplier(step - 1, args.steps, args.warmup)
                windows, fault = fetch()
                batch = [part.to(device).split(args.micro_batch_size) for part in windows]  # (B, T) each
                totals = torch.zeros(3, device=device)  # loss, whether a rank was told to stop, or has no data
                for i, (x, y) in enumerate(zip(*batch, strict=True), 1):
                    with parallel.accumulating(spread, last=i == micro_batches):
                        with autocast:
                            loss_tensor = spread(x, y) / micro_batches
                        loss_tensor.backward()
                    totals[0] += loss_tensor.detach()
                norm = parallel.clip(model, args.clip) if args.clip else None
                totals[1], totals[2] = len(stops), fault is not None
                loss, stopped, unread = parallel.sum(totals).tolist()
                loss /= parallel.ranks
                if unread:
                    if fault:
                        print(f"run: no data at step {step}: {fault}", file=sys.stderr)
                    status = 2
                    save(step - 1)
                    break
                if not math.isfinite(loss):  # before the update, so that the weights stay as they were
                    status = 1
                    save(step - 1)
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
                    "lr": groups[0]["lr"],
                    "tokens": step * step_tokens,
                    "step_ms": 1e3 * step_time,
                    "tokens_per_s": step_tokens / step_time,
                    "overhead": overhead,
                }
                if norm is not None:
                    line["grad_norm"] = float(norm)
                if peak:
                    line["mfu"] = flops_per_token(config) * step_tokens / step_time / (peak * parallel.ranks)
                if step % args.eval_every == 0 or step == args.steps:
                    line["val_loss"] = val_loss = validation_loss()
                write(line)
                due = args.checkpoint_every and (step % args.checkpoint_every == 0 or step == args.steps)
                if "val_loss" in line or due or stopped:  # what a kill can cost is bounded by one cadence
                    write()
                    if probe:
                        probe.flush()
                    if due or stopped:
                        save(step)
                if "val_loss" in line and not console.is_terminal:  # where no bar can move
                    console.print(f"step {step}: loss {loss:.3f}, validation {val_loss:.3f}, tracker {overhead:.1%}")
                rate = (step - done) * step_tokens / train_time
                progress.update(bar, completed=step, loss=loss, val=val_loss, rate=rate, overhead=overhead)
                if stopped:
                    status = 128 + (stops[0] if stops else signal.SIGTERM)
                    break
    except KeyboardInterrupt:
        status = 130
    finally:
        if probe:
            probe.close()
        if log:
            log.close()
    parallel.barrier()
    parallel.close()
    if not parallel.main:
        return status

    # What came of it
    run = sosd_fast.load(run_dir)
    if status == 1:
        print(
            f"run: expected a finite loss, got loss={loss} at step {step}. Lower --lr (now {args.lr:g}) or lengthen "
            f"--warmup; the records{' and the weights' * (saved == step - 1 > 0)} up to there are in {run_dir}.",
            file=sys.stderr,
        )
    elif status:
        console.print(f"interrupted after step {len(run.log)} of {args.steps}; go on with --resume={run_dir}")
    if probe:
        console.print(closing_table(run))
    if run.log:
        rate = (step - done) * step_tokens / max(train_time, 1e-9)
        mfu = f", {run.log[-1]['mfu']:.1%} of the peak FLOP/s" if peak else ""
        console.print(
            f"loss {run.log[-1]['loss']:.3f}, validation {val_loss:.3f}; {rate:,.0f} tokens/s{mfu}; "
            f"tracker overhead {run.log[-1]['overhead']:.2%} of the step"
        )
        try:
            plot_run(run).savefig(run_dir / "run.png", dpi=150)
            print(f"figure: {run_dir / 'run.png'}")
        except OSError as error:
            print(f"run: no figure could be written: {error}.", file=sys.stderr)
    print(f"run directory: {run_dir}")
    if probe:
        for event in run.events:
            print(f"event: {event}")
        python = Path(sys.executable)
        python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
        print(f"one page about it: {python} -m sosd_fast report {run_dir}")
        print(f"a live view, also while it trains: {python} -m sosd_fast watch {run_dir}")
    return status


if __name__ == "__main__":
    sys.exit(main())
