"""The claims about the simplified model, judged by what `theory.analyse` returns for each seed."""

import math

import numpy as np

from training.paper.claim import Claim

GROWTH = "growth of the norm of V in the window, power of t"


def t2(theory: list[dict]) -> Claim:
    """Threshold times of the simplified model."""
    claim = Claim(
        "T2",
        "the bound is met for good after T_V of order 1/ε; T_QK grows slower in 1/ε",
        "holds: exponent of V at most 1, that of QK below it by more than two standard errors; weakly: the first only",
    )
    fits = [[result["thresholds"][f"exponent_{m}"] for m in ("V", "QK")] for result in theory]
    claim.rows = [
        ("exponent of T_V in 1/ε", [v["exponent"] for v, _ in fits]),
        ("exponent of T_QK", [q["exponent"] for _, q in fits]),
        ("standard error of their difference", [math.hypot(v["error"], q["error"]) for v, q in fits]),
        ("growth of W_V, power of t (assumed: 1)", [r["assumptions"][GROWTH] for r in theory]),
    ]
    return claim.judge(lambda v, q, e, _g: v <= 1 and q + 2 * e < v, lambda v, _q, _e, _g: v <= 1)


def t2_over_seeds(theory: list[dict]) -> Claim:
    """The same, with the standard error that seeds give."""
    claim = Claim(
        "T2b",
        "the same with standard errors over the seeds: levels of one run are not independent",
        "holds: mean exponent of V at most 1 and above that of QK in the same runs by more than two standard errors "
        "of the mean; weakly: the first only",
    )
    fits = [[result["thresholds"][f"exponent_{m}"]["exponent"] for m in ("V", "QK")] for result in theory]
    v, q = np.array(fits, dtype=float).T
    claim.rows = [
        ("mean exponent of T_V in 1/ε", [float(v.mean())]),
        ("mean of T_V's less T_QK's", [float((v - q).mean())]),
        ("its standard error", [_standard_error(v - q)]),
        ("seeds", [float(len(v))]),
    ]
    return claim.judge(lambda v, d, e, _n: v <= 1 and d > 2 * e, lambda v, _d, _e, _n: v <= 1)


def t3(theory: list[dict]) -> Claim:
    """Loss decrements of the simplified model."""
    claim = Claim(
        "T3",
        "phase I lowers the loss by a constant times η or more, phase II by a polynomial in SD variation or less",
        "holds: every step of phase I lowers it, and in phase II a power law with correlation 0.9 or more, with the "
        "constant that bounds the first half, bounds 99 % of the second; weakly: correlation 0.7, 90 %",
    )
    one, two = ([result.get(part, {}) for result in theory] for part in ("phase_I", "phase_II"))
    claim.rows = [
        ("phase I, least decrease per step over η", [p.get("least decrease per step over lr", math.nan) for p in one]),
        ("phase II, exponent", [p.get("exponent", math.nan) for p in two]),
        ("phase II, correlation of the logarithms", [p.get("correlation", math.nan) for p in two]),
        ("phase II, later half within the bound", [p.get("within it, later half", math.nan) for p in two]),
    ]
    return claim.judge(
        lambda least, p, c, w: least > 0 and p > 0 and c >= 0.9 and w >= 0.99,
        lambda least, p, c, w: least > 0 and p > 0 and c >= 0.7 and w >= 0.9,
    )


def t3_over_seeds(theory: list[dict]) -> Claim:
    """The same, by the powers that bound a run, and the standard error that seeds give."""
    claim = Claim(
        "T3b",
        "the same by the largest power that bounds phase II: a fit through its middle is not a bound",
        "holds: every step of phase I lowers the loss at every seed, and the largest power of SD variation whose "
        "constant in the first half of phase II bounds 99 % of the second is above 0 by more than two standard errors "
        "of the mean; weakly: the second only",
    )
    one, two = ([result.get(part, {}) for result in theory] for part in ("phase_I", "phase_II"))
    least = [p.get("least decrease per step over lr", math.nan) for p in one]
    powers = np.array([p.get("largest exponent of a bound", math.nan) for p in two])
    claim.rows = [
        ("phase I, least decrease per step over η, all seeds", [float(np.min(least))]),
        ("phase II, largest exponent of a bound, mean", [float(powers.mean())]),
        ("its standard error", [_standard_error(powers)]),
        ("seeds", [float(len(powers))]),
    ]
    return claim.judge(lambda a, p, e, _n: a > 0 and p > 2 * e, lambda _a, p, e, _n: p > 2 * e)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
