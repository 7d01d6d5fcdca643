"""What tracking costs a whole training step: one model, trained by turns without a tracker and with each kind.

The model of training/ in bfloat16, gradients accumulated to --tokens a step. The trackers follow one model and are
switched on and off by turns of a few steps, so that a drifting machine hits all alike and memory holds one model.
Overhead is told twice: by the difference of step times, and by the tracker's own account, `Probe.seconds`.
"""

import statistics
import time

import torch

import sosd_fast
from bench.harness import bar, finish, gates, parser, show, show_card, true_svdvals
from bench.svd_overhead import Errors, Stopwatch, tracker_flags
from training.data import batches, load_text
from training.flags import METHODS
from training.model import PRESETS, Transformer
from training.optimizers import DEFAULT_LR, build_optimizers

BARS = {"full": 1.5, "fast": 0.5}  # percent of the step, on a GPU
ERROR_GATE = 1e-6  # on the singular distribution
# Steps of a tracker before its account is read: spectra begin in float64, the next ones are timed alone, and what a
# budget has paid for them must be earned back.
WARM = {"full": 4, "fast": 24}


class Loop:
    """A training loop whose trackers can be switched."""

    def __init__(self, args):
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = PRESETS[args.model]
        self.model = Transformer(config).to(self.device)
        if args.compile:
            self.model.compile()
        self.optimizers = build_optimizers(self.model, args.optimizer, DEFAULT_LR[args.optimizer])
        sequences = args.tokens // config.context
        draw = batches(load_text().train, sequences, config.context, torch.Generator().manual_seed(0))
        parts = (part.to(self.device).split(args.micro_batch) for part in next(draw))
        self.micro = list(zip(*parts, strict=True))  # the same ones at each step
        self.tokens = sequences * config.context
        self.probes: dict[str, sosd_fast.Probe] = {}
        self.clocks: dict[str, Stopwatch] = {}

    def add(self, name: str, budget: float):
        """Tracks the model, at rest until `steps` names the tracker."""
        self.clocks[name] = Stopwatch()
        probe = sosd_fast.track(self.model, optimizers=[], method=METHODS[name], budget=budget, audit=False)
        probe.clock = self.clocks[name]
        self.probes[name] = probe

    def steps(self, name: str, count: int, forbid: bool = False) -> float:
        """Takes steps under one tracker; returns seconds a step. `forbid` makes a wait inside the tracker an error."""
        probe = self.probes.get(name)
        self.synchronize()
        if probe:
            self.clocks[name].start()
        began = time.perf_counter()
        for _ in range(count):
            for tokens, targets in self.micro:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    loss = self.model(tokens, targets) / len(self.micro)
                loss.backward()
            if probe:  # what the hooks do before an optimizer's step
                with forbidding(forbid):
                    probe.before_step(self.optimizers[0])
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if probe:
                with forbidding(forbid):
                    probe.step(hold=False)
        self.synchronize()
        seconds = time.perf_counter() - began
        if probe:
            self.clocks[name].stop()
        return seconds / count

    def account(self, name: str) -> tuple[float, float]:
        """Seconds that a tracker says it took, and seconds of its clock, so far."""
        self.probes[name].records()  # waits for what is under way, which then counts to the steps that began it
        return self.probes[name].seconds, self.clocks[name]()

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class forbidding:  # noqa: N801
    """Makes what waits for the device an error, as far as torch notices; the probe then stops, and is found dead."""

    def __init__(self, on: bool):
        self.on = on and torch.cuda.is_available()

    def __enter__(self):
        if self.on:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        if self.on:
            torch.cuda.set_sync_debug_mode("default")


def warm(name: str) -> int:
    """How many steps a tracker takes before its account is read."""
    return WARM.get(name, WARM["full"])


def measured(probe: sosd_fast.Probe, after: int) -> dict:
    """The shares of the matrices that a step measured in full, and by leading values only, after some steps."""
    records = [r for r in probe.records() if r.step > after]
    count, full = (probe.step_count - after) * len(probe.matrices), sum(r.spectrum is not None for r in records)
    return {"in_full": full / count, "leading": (len(records) - full) / count}


def measure(args) -> tuple[dict, dict, dict]:
    """Returns seconds a step by name and turn, the gate, and of each tracker its own account and what it measured."""
    loop = Loop(args)
    began = time.perf_counter()
    loop.steps("off", 2)  # compiles
    took = time.perf_counter() - began
    print(f"{loop.tokens} tokens a step, {len(loop.micro)} micro-batches; the first two steps took {took:.0f} s")
    accounts = {}
    for name in args.trackers:
        loop.add(name, args.budget)
        loop.steps(name, warm(name))
        accounts[name] = loop.account(name)
    names = ["off", *args.trackers]
    seconds = {name: [] for name in names}
    for turn in range(args.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            loop.steps(name, 1)  # what it is switched on in
            seconds[name].append(loop.steps(name, args.steps))
        print(f"turn {turn + 1}: " + ", ".join(f"{n} {1e3 * s[-1]:.1f} ms" for n, s in seconds.items()), flush=True)
    own = {}
    for name, (taken, passed) in accounts.items():
        taken_now, passed_now = loop.account(name)
        own[name] = measured(loop.probes[name], warm(name))
        own[name]["own_percent"] = 100 * (taken_now - taken) / (passed_now - passed)
    gate = {}
    if loop.device.type == "cuda":
        for name in args.trackers:
            loop.steps(name, 2, forbid=True)
        gate["no synchronisation in the tracker's step"] = all(p.alive for p in loop.probes.values())
    before = [p.detach().clone() for p in loop.model.parameters()]
    for probe in loop.probes.values():
        probe.step()
    gate["weights untouched"] = all(map(torch.equal, before, loop.model.parameters()))
    if "full" in loop.probes:
        probe = loop.probes["full"]
        probe.flush()
        matrices = {m.name: m.tensor() for m in probe.matrices}
        seen = {W.shape: (name, W) for name, W in matrices.items() if max(W.shape) <= 4096}  # one of each shape
        worst, errors = 0.0, Errors()
        for name, W in seen.values():
            S = true_svdvals(W)
            record = probe.latest()[name]
            if record.spectrum is not None:
                errors.add([record], {name: S}, {}, warm=False)
                worst = max(worst, errors.sd)
        gate[f"SD error <= {ERROR_GATE:g} and within its bound ({worst:.0e})"] = (
            0 < worst <= ERROR_GATE and errors.bound_ratio <= 1
        )
    gate["no tracker has failed"] = all(p.alive for p in loop.probes.values())
    if loop.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return seconds, gate, own


def main():
    """Gate, table, JSON."""
    p = parser(__doc__.split("\n")[0])
    tracker_flags(p, "gpt2-small", 0.005)
    add = p.add_argument
    # fmt: off
    add("--tokens", type=int, default=524288,
        help="The number of tokens in a step, accumulated, %(default)s by default.")
    add("--micro-batch", type=int, default=32,
        help="The number of sequences computed at a time, %(default)s by default.")
    add("--compile", action="store_true", help="Compiles the model with torch.compile; off by default.")
    add("--trackers", nargs="+", default=["full", "fast", "topk"], choices=list(METHODS),
        help="The kinds of trackers, by default full, fast and topk.")
    add("--turns", type=int, default=4, help="The number of turns of each tracker, %(default)s by default.")
    add("--steps", type=int, default=3,
        help="The number of timed steps in a turn, after one that is not timed, %(default)s by default.")
    # fmt: on
    args = p.parse_args()
    show_card()
    seconds, gate, own = measure(args)
    if not gates(gate):
        print("the gate is red: no times are printed")
        raise SystemExit(1)
    rows, results = [], {}
    for name, times in seconds.items():
        # turn by turn, against the untracked steps of the same turn
        over = [100 * (t / off - 1) for t, off in zip(times, seconds["off"], strict=True)]
        results[name] = {"step_ms": 1e3 * statistics.median(times)}
        if name != "off":
            results[name] |= {"over_percent": statistics.median(over), "turns_percent": over} | own[name]
        row = results[name]
        cells = [f"{row['step_ms']:.1f}"]
        if name != "off":
            cells += [f"{row['over_percent']:.2f}", f"{min(over):.2f}..{max(over):.2f}", f"{row['own_percent']:.2f}"]
            cells += [f"{100 * row['in_full']:.0f}", f"{100 * row['leading']:.0f}"]
        rows.append([name, *cells, *[""] * (6 - len(cells))])
    columns = ["tracker", "step ms", "over %, by step times", "turns", "over %, own account", "in full %", "leading %"]
    show(f"{args.model}, {args.tokens} tokens a step", columns, rows)
    if torch.cuda.is_available():
        for name, most in BARS.items():
            if name in results and not results[name]["in_full"] + results[name]["leading"]:
                print(f"{name} measured nothing in these steps, so its bars are not reached")
            elif name in results:
                for kind in ("over_percent", "own_percent"):
                    bar(f"{name}, {kind.replace('_', ' ')}", results[name][kind], most)
    finish({"benchmark": "end_to_end", "settings": vars(args), "gate": gate, "rows": results}, args.json)


if __name__ == "__main__":
    main()
