"""Reproduce the paper's figures and judge its claims: ``python -m training.paper.reproduce all --scale nano``."""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sosd_fast.matrices import find_matrices
from training import run
from training.flags import number
from training.machine import card, commit
from training.model import Transformer
from training.paper import figures, theory
from training.paper.claims import Claim, judge
from training.paper.finished import Finished
from training.paper.scales import SCALES, run_flags, subwords

SNAPSHOTS = 40  # of the weights, for their cosine to the final state


PAPER = {  # the presets of run.py behind each figure
    "fig1": ("small-adamw-wsd",),
    "fig2": ("small-adamw-wsd", "medium-adamw-wsd", "llama-0.5b-cosine", "llama-2b-cosine"),
    "fig3": ("small-adamw-wsd", "medium-adamw-wsd", "llama-0.5b-cosine", "llama-2b-cosine"),
    "fig4": ("small-adamw-step", "small-adamw-wsd", "llama-0.5b-cosine"),
    "fig5": ("llama-0.5b-cosine", "llama-0.5b-cosine-nodecay", "small-adamw-wsd", "small-muon-wsd"),
    "theory": (),
}


def parse_args(argv=None) -> argparse.Namespace:
    """Read the flags; what follows "--" goes to run.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0],
        epilog="Flags after -- go to every run: python -m training.paper.reproduce fig3 --out=runs/wide -- --width=512",
    )
    add, positive = parser.add_argument, number(int, 1)
    # fmt: off
    add("figures", nargs="*", default=["all"], metavar="figure",
        help=f"Draws these figures and judges their claims: {', '.join(PAPER)}, or all, which is the default.")
    add("--scale", choices=[*SCALES, "paper"], default="nano",
        help="The size of the runs; paper only prints the commands of the paper's own; %(default)s by default.")
    add("--seeds", type=positive, default=3,
        help="The number of runs of each kind, with seeds 0, 1, ...; %(default)s by default.")
    add("--steps", type=positive, help="The number of optimizer steps of each run; by default that of the scale.")
    add("--jobs", type=number(int, 0),
        help="The number of runs at a time, 0 for all in this process; by default one on each core, or one on a GPU.")
    add("--data",
        help="Token shards or text for run.py; by default Python's standard library, in the scale's tokens.")
    add("--out", help="The folder for runs and results; by default runs/reproduce-SCALE.")
    add("--publish", help="A folder that figures, table and settings are copied to; by default none.")
    # fmt: on
    args = parser.parse_args(own)
    args.run_flags = rest
    if any(flag.split("=")[0] in ("--steps", "--seed", "--run-dir") for flag in rest):
        parser.error(f"expected flags of the model, data or optimizer after --, got {' '.join(rest)}.")
    if unknown := set(args.figures) - {*PAPER, "all"}:
        parser.error(f"expected figures among {', '.join(PAPER)} or all, got {', '.join(sorted(unknown))}.")
    args.figures = list(PAPER) if "all" in args.figures else [f for f in PAPER if f in args.figures]
    args.out = Path(args.out or f"runs/reproduce-{args.scale}")
    return args


class Observer:
    """Follows a run's weights beside the probe: the size of every update, and snapshots for the cosine to the end.

    It finds the model by the first forward pass of a Transformer, and hooks torch's optimizers; run.py knows nothing
    of it.
    """

    def __init__(self, steps: int):
        early = np.geomspace(1, steps, SNAPSHOTS // 2)
        self._wanted = {0, *np.linspace(0, steps, SNAPSHOTS // 2).round().astype(int), *early.round().astype(int)}
        self._matrices, self._previous, self._counts = [], {}, {}
        self._updates = np.full((steps, 0), np.nan)
        self._snapshots: dict[int, list[torch.Tensor]] = {}
        self._steps = steps

    def __enter__(self):
        self._handles = [
            register_module_forward_pre_hook(self._find),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _find(self, module, args):  # noqa: ARG002
        if isinstance(module, Transformer):
            self._handles[0].remove()
            self._matrices = find_matrices(module)
            self._previous = {m.name: m.tensor().clone() for m in self._matrices}
            self._updates = np.full((self._steps, len(self._matrices)), np.nan)
            self._snapshot(0)

    def _after(self, optimizer, args, kwargs):  # noqa: ARG002
        step = self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, m in enumerate(self._matrices):
            if id(m.parameter) in held:
                difference = m.tensor() - self._previous[m.name]  # exact where weights are close (Sterbenz)
                self._updates[step - 1, i] = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
                self._previous[m.name].copy_(m.tensor())
        if step == min(self._counts.values()) and step in self._wanted and not np.isnan(self._updates[step - 1]).any():
            self._snapshot(step)

    def _snapshot(self, step: int):
        self._snapshots[step] = [m.tensor().to("cpu", torch.float16, copy=True) for m in self._matrices]

    def save(self, path: Path):
        """Writes names, updates (steps, matrices), and the cosines of the snapshots to the last one."""
        steps = sorted(self._snapshots)

        def cosines(matrices):
            last = self._snapshots[steps[-1]]
            pairs = ((a.double().flatten(), b.double().flatten()) for a, b in zip(matrices, last, strict=True))
            return [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]

        cosine = np.array([cosines(self._snapshots[step]) for step in steps])
        names = [m.name for m in self._matrices]
        np.savez(path, names=names, updates=self._updates, steps=steps, cosine=cosine)


def train(run_dir: Path, flags: list[str], steps: int) -> float:
    """Trains one run and keeps it; returns the seconds it took."""
    began = time.monotonic()
    shutil.rmtree(run_dir, ignore_errors=True)
    torch.set_num_threads(1)  # the same sums in the same order whatever the number of cores
    with Observer(steps) as observer, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = run.main([*flags, f"--run-dir={run_dir}"])
    if status:
        raise RuntimeError(f"reproduce: expected {run_dir} to end well, got exit status {status} of run.py.")
    observer.save(run_dir / "observed.npz")
    mark = {"flags": portable(flags, run_dir.parent), "commit": commit()}
    (run_dir / "finished.json").write_text(json.dumps(mark))  # last, so that what is there is whole
    return time.monotonic() - began


def portable(flags: list[str], out: Path) -> list[str]:
    """The flags with what lies in the results' folder named from there, so that the folder may move."""
    return [flag.replace(f"{out}{os.sep}", "") for flag in flags]


def is_finished(run_dir: Path, flags: list[str]) -> bool:
    """Whether this folder holds exactly this run, to its end."""
    mark = run_dir / "finished.json"
    kept = json.loads(mark.read_text()) if mark.exists() else None
    # a list was written before commits were kept
    return isinstance(kept, dict) and kept["flags"] == portable(flags, run_dir.parent)


def train_all(todo: dict[Path, list[str]], steps: int, jobs: int, console: Console) -> list[str]:
    """Trains the runs that are not there yet, `jobs` at a time; returns what went wrong."""
    failures, began = [], time.monotonic()
    missing = {path: flags for path, flags in todo.items() if not is_finished(path, flags)}
    console.print(f"{len(todo)} runs of {steps} steps: {len(todo) - len(missing)} are there, {len(missing)} to do")
    if jobs == 0:
        for path, flags in missing.items():
            train(path, flags, steps)
        return []
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited; read when a process starts
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
        Progress(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("steps", total=max(1, steps * len(missing)))
        for path in missing:
            shutil.rmtree(path, ignore_errors=True)
        futures = {pool.submit(train, path, flags, steps): path for path, flags in missing.items()}
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=2, return_when="FIRST_COMPLETED")
                done = sum(_lines(path / "log.jsonl") for path in missing)
                progress.update(bar, completed=done)
                for future in finished:
                    if error := future.exception():
                        failures.append(f"{futures[future].name}: {error}")
                    spent = time.monotonic() - began
                    left = spent * (steps * len(missing) / max(done, 1) - 1)
                    console.print(
                        f"{futures[future].name}: {'failed' if error else f'{future.result():.0f} s'}; "
                        f"{spent / 60:.1f} min so far, about {left / 60:.1f} left"
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def theory_results(out: Path, seeds: int, steps: int, levels: int) -> list[dict]:
    """Results of the simplified model at each seed, with its figure; reused where they are there."""
    argv = [f"--steps={steps}", f"--seeds={seeds}", f"--levels={levels}", f"--out={out}"]
    kept = out / "theory.json"
    if not (kept.exists() and json.loads(kept.read_text()).get("argv") == argv):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            theory.main(argv)
        kept.write_text(json.dumps(json.loads(kept.read_text()) | {"argv": argv}, indent=1) + "\n")
    return json.loads(kept.read_text())["seeds"]


def table(claims: list[Claim]) -> str:
    """The claims in Markdown: statistic, median and range over the seeds, verdict."""

    def number(value):
        return "–" if value is None or np.isnan(value) else f"{value:.3g}"

    lines = ["| claim | statistic | median (range over seeds) | verdict |", "|---|---|---|---|"]
    for claim in claims:
        for i, (name, values) in enumerate(claim.rows):
            value = f"{number(np.median(values))} ({number(min(values))} to {number(max(values))})"
            lines.append(f"| {claim.id if i == 0 else ''} | {name} | {value} | {claim.verdict if i == 0 else ''} |")
    lines += ["", *(f"- **{claim.id}** {claim.claim}. Rule: {claim.rule}." for claim in claims)]
    return "\n".join(lines) + "\n"


def settings(args: argparse.Namespace, steps: int, todo: dict[Path, list[str]]) -> dict:
    """What the results were made with: machine, versions, commit, flags."""
    marks = [json.loads((path / "finished.json").read_text()) for path in todo]
    return {
        "scale": args.scale,
        "seeds": list(range(args.seeds)),
        "steps": steps,
        "cores": os.cpu_count(),
        **card(),
        "commits of the runs": sorted({str(mark["commit"]) for mark in marks}),
        "flags": {path.name: " ".join(portable(flags, args.out)) for path, flags in todo.items()},
    }


def paper_commands(names: list[str], data: str | None) -> list[str]:
    """The commands of the paper's runs, one a line; the largest want several machines."""
    presets = dict.fromkeys(preset for name in names for preset in PAPER[name])
    data = data or "SHARDS"
    start = "torchrun --nproc-per-node=8 training/run.py"
    return [f"{start} --preset={p} --parallel=hsdp --data={data} --run-dir=runs/{p}" for p in presets]


def main(argv=None) -> int:
    """Train or reuse the runs, draw the figures, judge the claims."""
    args = parse_args(argv)
    console = Console()
    if args.scale == "paper":
        print("\n".join(paper_commands(args.figures, args.data)))
        return 0
    scale = SCALES[args.scale]
    steps = args.steps or scale.steps
    jobs = args.jobs
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() and "--device=cpu" not in scale.flags else os.cpu_count() or 1

    # The runs
    if scale.vocab and not args.data:
        try:
            args.data = str(subwords(args.out / f"bpe{scale.vocab}", scale.vocab))
        except ImportError as error:
            print(f"reproduce: {error}", file=sys.stderr)
            return 2
    names = list(dict.fromkeys(name for figure in args.figures for name in figures.RUNS.get(figure, ())))
    common = [
        "--tracker=full",  # every matrix every step, whatever the machine's speed
        "--quiet",
        f"--steps={steps}",
        f"--warmup={max(1, round(scale.warmup * steps / scale.steps))}",
        f"--eval-every={min(scale.eval_every, steps)}",
        f"--eval-sequences={scale.eval_sequences}",
        *scale.flags,
        *([f"--data={args.data}"] if args.data else []),
        *args.run_flags,
    ]
    flags = run_flags(scale, steps)
    todo = {
        args.out / f"{name}-s{seed}": [*flags[name], *common, f"--seed={seed}"]
        for seed in range(args.seeds)
        for name in names
    }
    try:
        failures = train_all(todo, steps, jobs, console)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    if failures:
        print("reproduce: expected every run to end well, got\n" + "\n".join(failures), file=sys.stderr)
        return 1

    # Theory, figures, verdicts
    results = None
    if "theory" in args.figures:
        results = theory_results(args.out, max(args.seeds, scale.theory_seeds), scale.theory_steps, scale.theory_levels)
    finished = {name: [Finished(args.out / f"{name}-s{seed}") for seed in range(args.seeds)] for name in names}
    for figure in (f for f in args.figures if f in figures.RUNS):
        drawn, curves = figures.draw(figure, finished)
        figures.save(drawn, args.out / f"{figure}.png")
        with open(args.out / f"{figure}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("panel", "curve", "seed", "step", "value"), *curves])
    claims = judge(finished, results)
    text = table(claims)
    (args.out / "table.md").write_text(text)
    (args.out / "settings.json").write_text(json.dumps(settings(args, steps, todo), indent=1) + "\n")
    if args.publish:
        Path(args.publish).mkdir(parents=True, exist_ok=True)
        for path in (*args.out.glob("*.png"), args.out / "table.md", args.out / "settings.json"):
            shutil.copy(path, args.publish)
    print(text)
    print(f"figures and numbers: {args.out}")
    return int(any(claim.id == "T1" and claim.verdict != "holds" for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
