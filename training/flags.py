"""The flags of run.py, their checks, and what several scripts' flags share."""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from training.model import PRESETS, resized
from training.optimizers import DEFAULT_LR
from training.parallel import KINDS, mesh_sizes
from training.presets import RUNS
from training.schedule import SCHEDULES

METHODS = {"fast": "auto", "full": "full", "topk": "topk", "exact": "exact"}  # --tracker, and what sosd_fast calls it


def parse_args(argv=None) -> argparse.Namespace:
    """Read the flags; a wrong value ends with a message that names the choices."""
    parser = argparse.ArgumentParser(
        description="Train a language model on text with the spectral probe on.", allow_abbrev=False
    )
    add, positive, fraction = parser.add_argument, number(int, 1), number(float, 0)
    switch = argparse.BooleanOptionalAction
    # fmt: off
    add("--preset", choices=list(RUNS), metavar="NAME",
        help="Sets the other flags to those of one run of the paper, or of its small copy; by default to none. There "
        f"are {', '.join(RUNS)}.")
    add("--resume", metavar="RUN_DIR",
        help="Continues the run in this folder from its last checkpoint, with its flags; by default a new run starts.")
    # The probe
    add("--tracker", choices=[*METHODS, "off"], default="fast",
        help="How spectra are measured: fast keeps within the budget, full takes all singular values at every step, "
        "topk the leading ones, exact all by torch.linalg.svdvals in the dtype of the weights, off nothing; "
        "%(default)s by default.")
    add("--tracker-budget", type=number(float, 1e-6, 1), default=0.03,
        help="The fraction of the step time that the fast tracker may take, %(default)s by default.")
    add("--tracker-k", type=positive, default=32,
        help="The number of leading singular values kept of each matrix, %(default)s by default.")
    # Model
    add("--model", choices=list(PRESETS), default="gpt2-nano",
        help="The size and kind of the model, a preset of training/model.py, %(default)s by default.")
    add("--layers", type=positive, help="The number of blocks; by default that of the model.")
    add("--width", type=positive,
        help="The width of the residual stream in features; heads keep theirs; by default that of the model.")
    add("--context", type=positive, help="The length of a sequence in tokens; by default that of the model.")
    add("--compile", action=switch, help="Compiles the model with torch.compile; off by default.")
    add("--device", default="auto",
        help="The device: cpu, cuda, cuda:1, ... or auto, the GPU where there is one; %(default)s by default.")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="The dtype of products; weights are float32 in either case; %(default)s by default.")
    add("--parallel", choices=KINDS, default="none",
        help="How the model is spread over the processes that torchrun started, %(default)s by default.")
    add("--replicas", type=positive,
        help="The number of copies of the model with hsdp in --parallel; by default one on each machine.")
    add("--tp-size", type=positive,
        help="The number of processes that share every matrix product with tp in --parallel; by default all of them "
        "with tp alone, else 2.")
    add("--timeout", type=fraction, default=600.0,
        help="The seconds after which a rank gives up waiting for another, %(default)s by default.")
    # Optimization
    add("--optimizer", choices=list(DEFAULT_LR), default="adamw",
        help="The optimizer of the matrices in the blocks; AdamW takes the rest; %(default)s by default.")
    add("--lr", type=fraction,
        help="The peak learning rate of the matrices in the blocks; by default "
        f"{' and '.join(f'{lr:g} with {name}' for name, lr in DEFAULT_LR.items())}.")
    add("--adam-lr", type=fraction,
        help="With --optimizer=muon, the peak learning rate of embedding, head and gains; by default "
        f"{DEFAULT_LR['adamw']:g}.")
    add("--weight-decay", type=fraction, default=0.0,
        help="The decay of the matrices in the blocks, times the learning rate at each step; %(default)s by default.")
    add("--decay-all", action=switch, help="Decays embedding and head, too; off by default.")
    add("--clip", type=fraction, help="The largest norm of the gradient; by default nothing is clipped.")
    add("--schedule", choices=list(SCHEDULES), default="wsd",
        help="The course of the learning rate over the steps, %(default)s by default.")
    add("--warmup", type=number(int, 0), default=20,
        help="The number of steps over which the learning rate rises linearly, %(default)s by default.")
    add("--steps", type=positive, default=350, help="The number of optimizer steps, %(default)s by default.")
    add("--batch-size", type=positive, default=8,
        help="The number of sequences in a step, over all ranks, %(default)s by default.")
    add("--batch-tokens", type=positive,
        help="The number of tokens in a step, a multiple of the context, instead of --batch-size; not set by default.")
    add("--micro-batch-size", type=positive,
        help="The number of sequences that a rank computes at a time; by default all of its share.")
    # Data and results
    add("--data",
        help="Token shards that `python -m training.prepare` wrote, or a file or folder of text; by default the source "
        "of Python's standard library.")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="The seed of the weights and of the batches, %(default)s by default.")
    add("--eval-every", type=positive, default=25,
        help="The number of steps between two validations, %(default)s by default.")
    add("--eval-sequences", type=positive, default=32,
        help="The number of sequences of a validation, %(default)s by default.")
    add("--checkpoint-every", type=positive,
        help="The number of steps between two checkpoints; by default one is written only when the run is stopped.")
    add("--run-dir",
        help="A new or empty folder for the results; by default runs/MODEL-OPTIMIZER-SCHEDULE-sSEED, numbered where "
        "that exists.")
    add("--quiet", action="store_true", help="Prints neither progress nor tables; off by default.")
    add("--dry-run", action="store_true", help="Says what would run, and ends without a device; off by default.")
    # fmt: on
    # Not given above: Python 3.11 and 3.12 append the default to the help of a switch, behind its sentence.
    parser.set_defaults(compile=False, decay_all=False)

    base, _ = parser.parse_known_args(argv)
    if base.resume:
        try:
            file = Path(base.resume) / "config.json"
            saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            if not isinstance(saved, dict):
                raise ValueError("there is none" if saved is None else "it holds no flags")
        except (OSError, ValueError, RecursionError) as error:
            parser.error(f"argument --resume: expected a folder with a config.json, got {base.resume!r} ({error}).")
        parser.set_defaults(**_checked(parser, saved))
    elif base.preset:
        parser.set_defaults(**RUNS[base.preset])
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not torch.device(args.device).type == "cuda":
            torch.empty(0, device=args.device)
        elif (torch.device(args.device).index or 0) >= torch.cuda.device_count():  # a tensor would take up GPU 0
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: expected a usable device, got {args.device!r} ({error}). Try --device=cpu.")
    try:
        config = resized(PRESETS[args.model], args.layers, args.width)
    except ValueError as error:
        parser.error(f"argument --width: {error}")
    if args.batch_tokens:
        context = args.context or PRESETS[args.model].context
        if args.batch_tokens % context:
            parser.error(f"argument --batch-tokens: expected a multiple of {context}, got {args.batch_tokens}.")
        args.batch_size = args.batch_tokens // context
    shares, of = 1, "ranks"  # of a batch
    if args.parallel != "none" and "RANK" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
        try:
            tp = mesh_sizes(args.parallel, ranks, args.replicas, args.tp_size).get("tp", 1)
        except ValueError as error:
            parser.error(f"argument --parallel={args.parallel}: {error}")
        for what, count in {"heads": config.n_head, "features between two products": config.ff_width}.items():
            if count % tp:
                parser.error(
                    f"argument --tp-size: expected a number that divides the {count} {what} of --model={args.model}, "
                    f"got {tp}. Choose a divisor of {count}, or change --width."
                )
        shares, of = ranks // tp, f"groups of {tp} ranks" if tp > 1 else "ranks"
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, max(1, args.batch_size // shares))
    if args.batch_size % (shares * args.micro_batch_size):
        parser.error(
            f"argument --batch-size: expected a multiple of {shares} {of} x --micro-batch-size="
            f"{args.micro_batch_size}, got {args.batch_size}."
        )
    given = None if args.run_dir is None else Path(args.run_dir)
    if args.resume:
        args.run_dir = args.resume
    elif given is not None and int(os.environ.get("RANK", "0")) == 0:
        if given.exists() and not (given.is_dir() and not any(given.iterdir())):
            parser.error(f"argument --run-dir: expected a new or empty folder, got {args.run_dir!r}. Choose another.")
    args.lr = DEFAULT_LR[args.optimizer] if args.lr is None else args.lr
    args.adam_lr = DEFAULT_LR["adamw"] if args.adam_lr is None else args.adam_lr
    args.run_dir = args.run_dir or _fresh(f"runs/{args.model}-{args.optimizer}-{args.schedule}-s{args.seed}")
    return args


def _checked(parser: argparse.ArgumentParser, saved: dict) -> dict:
    """What a config.json says of flags, as if it had been given on the command line; anything else is left out."""
    found = {}
    for action in parser._actions:
        value = saved.get(action.dest)
        if value is None or action.dest in ("resume", "help"):
            if action.dest in saved and action.dest != "resume":
                found[action.dest] = None
            continue
        try:
            if action.nargs == 0:
                found[action.dest] = value if isinstance(value, bool) else int("no boolean")
            else:
                found[action.dest] = parser._get_value(action, str(value))
                parser._check_value(action, found[action.dest])
        except (argparse.ArgumentError, ValueError):
            shown = repr(value)[:80]
            parser.error(f"argument {action.option_strings[0]}: config.json says {shown}, which is no value of it.")
    return found


def number(convert, least, most=math.inf):
    """The type of a flag: a finite number from `least` to `most`."""

    def read(text):
        value = convert(text)
        if not (least <= value <= most and math.isfinite(value)):
            upper = f" and at most {most}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}{upper}, got {text}")
        return value

    read.__name__ = convert.__name__  # what argparse names in "invalid int value"
    return read


def _fresh(run_dir: str) -> str:
    number, candidate = 1, Path(run_dir)
    while candidate.exists():
        number += 1
        candidate = Path(f"{run_dir}-{number}")
    return str(candidate)
