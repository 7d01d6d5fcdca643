"""The claims of the paper as statistics of finished runs, each with a verdict by a rule that is fixed here.

A claim gets the runs it needs, seed by seed. It *holds* where its rule is met at every seed, *holds weakly* where the
weaker rule is met by the medians over the seeds, and otherwise does not hold at this scale. SD variation is that of a
module kind: the median over its matrices at each step.
"""

import math

import numpy as np

from sosd_fast.runs.phases import threshold_step
from training.paper.claim import Claim
from training.paper.finished import BODY, Finished
from training.paper.theory_claims import t2, t2_over_seeds, t3, t3_over_seeds

Seeds = list[Finished]  # the same run at each seed


def c1(wsd: Seeds, llama: Seeds) -> Claim:
    """Cosines to the final state."""
    claim = Claim(
        "C1",
        "the spectrum's cosine to its final state saturates much earlier than the parameters'",
        "holds: twice as early or more, both to 0.99 and to the last tenth of its own way; weakly: to 0.99 alone",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        for what, part in (("to 0.99", None), ("to a tenth of the way left", 0.1)):
            values = []
            for run in seeds:
                times = []
                for cosine in (run.spectrum_cosine, run.parameter_cosine):
                    far = 1 - cosine  # (T, matrices)
                    level = np.full(far.shape[1], 0.01) if part is None else part * far[0]
                    found = [threshold_step(run.snapshots, f, at) for f, at in zip(far.T, level, strict=True)]
                    times.append(float(np.median([max(t, 1) for t in found])))
                values.append(times[1] / times[0])
            claim.rows.append((f"{model}, step of the parameters over step of the spectrum, {what}", values))
    return claim.judge(
        lambda *v: min(v) >= 2,
        lambda a, _b, c, _d: min(a, c) >= 2,
    )


def c1_angle(wsd: Seeds, llama: Seeds) -> Claim:
    """The same by angles, each over its own at the start."""
    claim = Claim(
        "C1b",
        "the same by the angle to the final state over that at the start, which no cosine near 1 at the start decides",
        "holds: half of the angle is left twice as early or more; weakly: earlier",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        values = []
        for run in seeds:
            times = []
            for cosine in (run.spectrum_cosine, run.parameter_cosine):
                angle = np.arccos(np.clip(cosine, -1, 1))  # (T, matrices)
                found = [threshold_step(run.snapshots, a, 0.5 * a[0]) for a in angle.T]
                times.append(float(np.median([max(t, 1) for t in found])))
            values.append(times[1] / times[0])
        claim.rows.append((f"{model}, step of the parameters over step of the spectrum, half of the angle", values))
    return claim.judge(lambda *v: min(v) >= 2, lambda *v: min(v) > 1)


def c2(wsd: Seeds, llama: Seeds) -> Claim:
    """The impulse and the floor."""
    claim = Claim(
        "C2",
        "SD variation shows an early impulse, then falls to a floor: the onset of stability",
        "holds: an onset in every module kind after a fall of 10 or more; weakly: in half of them, of 2 or more",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        found = [[k for k in run.phases.kinds.values() if k] for run in seeds]
        claim.rows.append(
            (
                f"{model}, part of the kinds with an onset",
                [len(f) / len(r.kinds) for f, r in zip(found, seeds, strict=True)],
            )
        )
        claim.rows.append(
            (
                f"{model}, fall to the floor, median of those",
                [float(np.median([k.fall for k in f])) if f else 1.0 for f in found],
            )
        )
    return claim.judge(
        lambda p, f, q, g: min(p, q) == 1 and min(f, g) >= 10,
        lambda p, f, q, g: min(p, q) >= 0.5 and min(f, g) >= 2,
    )


def c2_height(wsd: Seeds, llama: Seeds) -> Claim:
    """The same by the whole height of the impulse."""
    claim = Claim(
        "C2b",
        "the same by the impulse's height over the floor: the fall before an onset leaves out what the later slope, "
        "that of growing weights, would have made of the same time",
        "holds: in every module kind the largest SD variation is 10 times that of the later half or more, both divided "
        "by their learning rates (in GPT-2 the later half at the peak rate); weakly: 3 times",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        heights = []
        for run in seeds:
            last = run.decay_start if model == "GPT-2" else run.steps[-1]
            over = []
            for steps, values in run.kinds.values():
                smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, 5), axis=-1)  # no single value
                rates = run.lr[steps - 1]
                peak, later = int(smooth.argmax()), (steps > last / 2) & (steps <= last)
                over.append(smooth[peak] / rates[peak + 2] / np.median(values[later] / rates[later]))
            heights.append(float(min(over)))
        claim.rows.append((f"{model}, impulse over floor, least of the kinds", heights))
    return claim.judge(lambda a, b: min(a, b) >= 10, lambda a, b: min(a, b) >= 3)


def c3(wsd: Seeds, llama: Seeds) -> Claim:
    """Onset and loss boundary."""
    claim = Claim(
        "C3",
        "that onset coincides with the loss turning from fast to slow descent",
        "holds: the loss has a boundary on logarithmic axes and the onsets' median is within a factor of 2 of it; "
        "weakly: within 2 of the two-segment knot on linear axes, which any descent has",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        for axes, boundary in (("logarithmic", "loss"), ("linear", "loss_linear")):
            values = []
            for run in seeds:
                onsets = [k.step for k in run.phases.kinds.values() if k]
                at = getattr(run.phases, boundary)
                values.append(float(np.median(onsets)) / at.step if onsets and at else math.nan)
            claim.rows.append((f"{model}, onset over loss boundary, {axes} axes", values))
    return claim.judge(
        lambda a, _b, c, _d: all(0.5 <= v <= 2 for v in (a, c)),
        lambda _a, b, _c, d: all(0.5 <= v <= 2 for v in (b, d)),
    )


def c4(wsd: Seeds, llama: Seeds) -> Claim:
    """MLP against attention."""
    claim = Claim(
        "C4",
        "MLP matrices vary less than attention matrices; both enter stability together",
        "holds: attention's floor is above MLP's and their onsets are within a factor of 2; weakly: the first only",
    )
    for model, seeds in (("GPT-2", wsd), ("LLaMA", llama)):
        half = [(run.steps[-1] / 2, run.decay_start if model == "GPT-2" else run.steps[-1]) for run in seeds]
        floors = [r.variation(["attention"], *h) / r.variation(["mlp"], *h) for r, h in zip(seeds, half, strict=True)]
        onsets = [[run.phases.kinds[k] for k in BODY] for run in seeds]
        claim.rows.append((f"{model}, attention's SD variation over MLP's in the later half", floors))
        claim.rows.append(
            (f"{model}, attention's onset over MLP's", [a.step / m.step if a and m else math.nan for a, m in onsets])
        )
    return claim.judge(
        lambda a, b, c, d: min(a, c) > 1 and all(0.5 <= v <= 2 for v in (b, d)),
        lambda a, _b, c, _d: min(a, c) > 1,
    )


def c5(step: Seeds, wsd: Seeds) -> Claim:
    """Step decay."""
    claim = Claim(
        "C5",
        "step decay: SD variation drops sharply at each cut, with renewed loss descent",
        "holds: by 5 or more within a twentieth of the run at both cuts, and the loss is below that of the same run "
        "without the first cut, on the same batches; weakly: by 2 or more",
    )
    w = int(step[0].steps[-1] / 20)
    for cut in (0.5, 0.75):
        at = [cut * run.steps[-1] for run in step]
        drops = [r.variation(BODY, c - w, c) / r.variation(BODY, c, c + w) for r, c in zip(step, at, strict=True)]
        claim.rows.append((f"SD variation before over after the cut at {100 * cut:.0f} %", drops))
    gains = [
        b.mean_loss(c, c + 2 * w) - a.mean_loss(c, c + 2 * w)
        for a, b in zip(step, wsd, strict=True)
        for c in [0.5 * a.steps[-1]]
    ]
    claim.rows.append(("loss gained by the first cut, over a tenth of the run (nats)", gains))
    return claim.judge(lambda a, b, gain: min(a, b) >= 5 and gain > 0, lambda a, b, gain: min(a, b) >= 2 and gain > 0)


def c6(wsd: Seeds) -> Claim:
    """WSD."""
    claim = Claim(
        "C6",
        "WSD: SD variation oscillates about a constant, then falls with the learning rate; the loss improves again",
        "holds: within 1.5 from the first to the second half of the stable phase, falls in 9 of 10 tenths of the "
        "decay, loss ends below the stable phase's power law; weakly: within 3, 7 of 10",
    )
    ratio, falling, gain = [], [], []
    for run in wsd:
        end, last = run.decay_start, run.steps[-1]
        begin = max([k.step for k in run.phases.kinds.values() if k and k.step < 0.8 * end], default=end // 2)
        middle = (begin + end) / 2
        ratio.append(run.variation(BODY, begin, middle) / run.variation(BODY, middle, end))
        falling.append(_falling_tenths(run, end, last))
        stable = (run.steps > end / 2) & (run.steps <= end)
        if stable.sum() < 3:
            gain.append(math.nan)
            continue
        fit = np.polyfit(np.log(run.steps[stable]), np.log(run.loss[stable]), 1)
        w = max(last // 20, 1)
        expected = np.exp(np.polyval(fit, np.log(run.steps[-w:]))).mean()
        gain.append(float(expected - run.loss[-w:].mean()))
    claim.rows = [
        ("SD variation, first over second half of the stable phase", ratio),
        ("part of the decay's tenths in which it falls", falling),
        ("loss gained over the power law of the stable phase (nats)", gain),
    ]
    return claim.judge(
        lambda r, f, g: 1 / 1.5 <= r <= 1.5 and f >= 0.9 and g > 0,
        lambda r, f, g: 1 / 3 <= r <= 3 and f >= 0.7 and g > 0,
    )


def c7(llama: Seeds) -> Claim:
    """Cosine."""
    claim = Claim(
        "C7",
        "cosine: smooth, steady decrease of SD variation with the learning rate",
        "holds: falls in 9 of 10 tenths after the onsets, rank correlation with the rate 0.9 or more; weakly: 7, 0.7",
    )
    falling, correlation = [], []
    for run in llama:
        begin = max(
            [k.step for k in run.phases.kinds.values() if k and k.step < 0.7 * run.steps[-1]],
            default=run.steps[-1] // 3,
        )
        falling.append(_falling_tenths(run, begin, run.steps[-1]))
        steps, values = run.kinds["mlp"]
        correlation.append(_rank_correlation(values[steps > begin], run.lr[steps[steps > begin] - 1]))
    claim.rows = [
        ("part of the tenths in which it falls", falling),
        ("rank correlation with the learning rate", correlation),
    ]
    return claim.judge(lambda f, c: f >= 0.9 and c >= 0.9, lambda f, c: f >= 0.7 and c >= 0.7)


def c8(llama: Seeds, decayed: Seeds) -> Claim:
    """Weight decay."""
    claim = Claim(
        "C8",
        "weight decay keeps the norm smaller, SD variation higher, and the final loss lower",
        "holds: all three; weakly: norm and SD variation",
    )
    norms, variations, losses = [], [], []
    for plain, run in zip(llama, decayed, strict=True):
        last = run.steps[-1]
        norms.append(run.body_norm()[1][-1] / plain.body_norm()[1][-1])
        variations.append(run.variation(BODY, 0.9 * last, last) / plain.variation(BODY, 0.9 * last, last))
        losses.append(float(run.val[-1, 1] - plain.val[-1, 1]))
    claim.rows = [
        ("final norm with over without decay, body", norms),
        ("SD variation with over without decay, last tenth", variations),
        ("validation loss with minus without decay (nats)", losses),
    ]
    return claim.judge(lambda n, v, x: n < 1 and v > 1 and x < 0, lambda n, v, _x: n < 1 and v > 1)


def c9(wsd: Seeds, muon: Seeds) -> Claim:
    """Muon."""
    claim = Claim(
        "C9",
        "Muon: two phases; in the stable phase SD variation a tenth of Adam's, and a lower loss",
        "holds: an onset in attention or MLP, SD variation a fifth or less in the later half of the stable phase, "
        "lower loss; weakly: two thirds or less",
    )
    ratio, losses, onsets = [], [], []
    for adam, run in zip(wsd, muon, strict=True):
        span = run.decay_start / 2, run.decay_start
        ratio.append(adam.variation(BODY, *span) / run.variation(BODY, *span))
        losses.append(float(run.val[-1, 1] - adam.val[-1, 1]))
        onsets.append(float(sum(run.phases.kinds[k] is not None for k in BODY)))
    claim.rows = [
        ("Adam's SD variation over Muon's, body, stable phase", ratio),
        ("validation loss with Muon minus with Adam (nats)", losses),
        ("onsets seen, of attention and MLP", onsets),
    ]
    return claim.judge(lambda r, x, n: r >= 5 and x < 0 and n >= 1, lambda r, _x, n: r >= 1.5 and n >= 1)


def t1(*runs: Seeds, theory: list[dict] | None = None) -> Claim:
    """The bound, over everything that ran."""
    claim = Claim(
        "T1", "a step's SD variation is at most (1 + sqrt(r)) |dW|_F / |W|_*", "holds: at every record of every run"
    )
    per_seed = [[run.bound_ratio for run in seeds] for seeds in zip(*runs, strict=True)]
    claim.rows = [
        ("largest measured over bound", [max(worst for worst, _, _ in seed) for seed in per_seed]),
        ("violations", [float(sum(v for _, v, _ in seed)) for seed in per_seed]),
        ("records", [float(sum(n for *_, n in seed)) for seed in per_seed]),
    ]
    if theory:
        largest = [max(result["lemmas"].values()) for result in theory[: len(per_seed)]]
        claim.rows.append(("largest measured over bound of the lemmas, simplified model", largest))
    return claim.judge(
        lambda worst, violations, _n, lemmas=0.0: worst <= 1 and violations == 0 and lemmas <= 1 + 1e-9,
        lambda *_: False,
    )


CLAIMS = {  # claim -> the runs it is given, in order
    c1: ("gpt2-wsd", "llama-cosine"),
    c1_angle: ("gpt2-wsd", "llama-cosine"),
    c2: ("gpt2-wsd", "llama-cosine"),
    c2_height: ("gpt2-wsd", "llama-cosine"),
    c3: ("gpt2-wsd", "llama-cosine"),
    c4: ("gpt2-wsd", "llama-cosine"),
    c5: ("gpt2-step", "gpt2-wsd"),
    c6: ("gpt2-wsd",),
    c7: ("llama-cosine",),
    c8: ("llama-cosine", "llama-cosine-decay"),
    c9: ("gpt2-wsd", "gpt2-muon"),
}


def judge(runs: dict[str, Seeds], theory: list[dict] | None) -> list[Claim]:
    """Every claim whose runs are there."""
    found = [claim(*(runs[name] for name in needed)) for claim, needed in CLAIMS.items() if set(needed) <= set(runs)]
    if runs:
        found.append(t1(*runs.values(), theory=theory))
    return found + ([claim(theory) for claim in (t2, t2_over_seeds, t3, t3_over_seeds)] if theory else [])


def _falling_tenths(run: Finished, start: int, stop: int) -> float:
    edges = np.unique(np.linspace(start, stop, 11).round())
    medians = [run.variation(BODY, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return float(np.mean(np.diff(medians) < 0)) if len(medians) > 1 else math.nan


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
