import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sosd_fast
from sosd_fast.runs.phases import OnsetDetector, loss_boundary, onset, onset_of_stability, run_phases
from sosd_fast.runs.records import JsonLines, Record, RunWriter
from sosd_fast.spectra.bounds import theory_bound

STEPS = np.arange(1, 401)
SCHEDULES = {
    "constant": lambda t: np.ones(len(t)),
    "step": lambda t: np.where(t < 200, 1, np.where(t < 300, 0.1, 0.01)) * np.minimum(1, t / 20),
    "wsd": lambda t: np.minimum(1, t / 20) * np.minimum(1, (401 - t) / 115),
    "cosine": lambda t: np.minimum(1, t / 20) * (0.1 + 0.45 * (1 + np.cos(np.pi * t / 400))),
}


def impulse(steps=STEPS, at=60, height=4.6, before=15):
    """Log of a curve that falls along a power law from `before` to `at`, and is straight on both sides."""
    return -height * np.clip(np.log(steps / before) / np.log(at / before), 0, 1) - 4


def ar1(rng, correlation, size):
    noise = rng.standard_t(4, size)
    for i in range(1, size):
        noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
    return noise


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("deviation", [0, 0.1, 0.3])
def test_the_end_of_an_impulse_is_found_under_every_schedule(schedule, deviation):
    lr = 1e-3 * SCHEDULES[schedule](STEPS)
    found = []
    for seed in range(7):
        y = impulse() + deviation * np.random.default_rng(seed).standard_t(3, len(STEPS))
        found.append(onset(STEPS, lr * np.exp(y), lr))
    assert None not in found
    assert np.median([k.step for k in found]) == pytest.approx(60, rel=0.1)
    assert np.median([k.fall for k in found]) == pytest.approx(np.exp(4.6), rel=0.3)
    assert all(k.low <= k.step <= k.high and k.slope_before < -1 and abs(k.slope_after) < 0.5 for k in found)


def test_the_schedule_alone_is_no_onset():
    for schedule in SCHEDULES.values():
        lr = schedule(STEPS)
        noise = np.exp(0.1 * np.random.default_rng(1).standard_normal(len(STEPS)))
        assert onset_of_stability(STEPS, 1e-3 * lr * noise, lr) is None
    cut = np.where(STEPS < 200, 1, 0.1)
    assert onset_of_stability(STEPS, 1e-3 * cut) == pytest.approx(200, rel=0.2)  # without the rates, a cut is a fall


@pytest.mark.parametrize("correlation", [0, 0.5, 0.7])
@pytest.mark.parametrize("slope", [0, -0.4, -1])
def test_noise_about_a_straight_line_has_no_onset(correlation, slope):
    rng = np.random.default_rng(0)
    y = [slope * np.log(STEPS) + 0.3 * ar1(rng, correlation, len(STEPS)) for _ in range(24)]
    assert sum(onset(STEPS, np.exp(curve)) is not None for curve in y) <= 2  # 5 % expected at most


@settings(deadline=None, max_examples=25)
@given(
    at=st.integers(20, 250),
    height=st.floats(2, 8),
    steepness=st.floats(1.5, 4),
    scale=st.floats(1e-9, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_clear_impulse_is_found_wherever_it_ends(at, height, steepness, scale, seed):
    noise = np.random.default_rng(seed).standard_normal(len(STEPS))
    curve = np.exp(impulse(at=at, height=height, before=at / np.exp(height / steepness)) + 0.05 * noise)
    found = onset(STEPS, curve)
    assert found.step == pytest.approx(at, rel=0.15)
    scaled = onset(STEPS, scale * curve)
    assert (scaled.step, scaled.low, scaled.high) == (found.step, found.low, found.high)


def test_a_floor_that_does_not_follow_the_learning_rate_is_one():
    lr = SCHEDULES["cosine"](STEPS)
    v = np.exp(impulse(height=2) + 0.1 * np.random.default_rng(0).standard_normal(len(STEPS)))
    assert onset_of_stability(STEPS, v, lr) == pytest.approx(60, rel=0.1)


def test_outliers_do_not_decide():
    curve = np.exp(impulse() + 0.05 * np.random.default_rng(0).standard_normal(len(STEPS)))
    clean = onset_of_stability(STEPS, curve)
    spoiled = curve.copy()
    spoiled[::17] *= 1e3
    assert onset_of_stability(STEPS, spoiled) == pytest.approx(clean, rel=0.1)


def test_a_return_puts_it_off():
    y = impulse()
    y[150:230] += 4
    assert onset_of_stability(STEPS, np.exp(y)) == pytest.approx(230, rel=0.2)


def test_a_run_that_is_too_short_has_none():
    y = impulse()
    for end in (0, 3, 8, 30, 55, 62):
        assert onset_of_stability(STEPS[:end], np.exp(y[:end])) is None
    assert onset_of_stability(STEPS[:100], np.exp(y[:100])) == pytest.approx(60, rel=0.1)
    assert onset_of_stability(STEPS, np.full(400, 1e-3)) is None  # stable from the start: nothing fell


def test_an_onset_in_the_first_steps():
    y = impulse(at=6, before=1)
    assert onset_of_stability(STEPS, np.exp(y)) == pytest.approx(6, abs=1)


@pytest.mark.parametrize("axes", ["log", "linear"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_the_residuals_of_a_fit_are_those_of_least_squares(axes, noise):
    rng, detector = np.random.default_rng(0), OnsetDetector()
    for t in range(1, 1000):
        detector.update(t, math.exp(-min(math.log(t), 4.0) + noise * rng.normal()))
    fit = detector.fit(axes)
    assert fit is not None
    hinges = fit._sqrt_w[:, None] * np.maximum(fit.x[:, None] - fit.grid, 0)
    lines = fit._sqrt_w[:, None] * np.stack([np.ones_like(fit.x), fit.x], axis=-1)
    y = fit._sqrt_w * fit.y
    places = len(fit.grid)
    for knots in ([], [places // 2], [8, places // 3, places - 9]):

        def least(more, knots=knots):
            A = np.concatenate([lines, hinges[:, knots + more]], axis=1)
            return np.sum((y - A @ np.linalg.lstsq(A, y, rcond=None)[0]) ** 2)

        scale = least([]) + 1e-12 * np.sum(y**2)
        assert abs(fit.rss(knots) - least([])) <= 1e-9 * scale
        found = fit.rss_with_one_more(knots)
        allowed = [i for i in range(4, places - 4) if all(abs(i - k) >= 4 for k in knots)]
        assert np.flatnonzero(np.isfinite(found)).tolist() == allowed
        assert max(abs(found[i] - least([i])) for i in allowed) <= 1e-9 * scale


def test_what_was_not_measured_is_passed_over():
    sparse = [v if i % 2 else [None, math.nan, 0.0][i % 3] for i, v in enumerate(np.exp(impulse()))]
    assert onset_of_stability(STEPS, sparse) == pytest.approx(60, rel=0.1)
    lr = np.where(STEPS % 3, 1.0, 0.0)
    assert onset_of_stability(STEPS, lr * np.exp(impulse()), lr) == pytest.approx(60, rel=0.1)


def test_the_onset_does_not_move_when_the_run_gets_longer():
    steps = np.arange(1, 5001)
    curve = np.exp(impulse(steps) + 0.1 * np.random.default_rng(3).standard_normal(5000))
    found = [onset_of_stability(steps[:end], curve[:end]) for end in (200, 400, 1000, 5000)]
    assert found == pytest.approx([60] * 4, rel=0.1)


def test_online_is_offline_and_its_memory_is_bounded():
    steps = np.arange(1, 20_001)
    curve = np.exp(impulse(steps, at=3000, before=300) + 0.1 * np.random.default_rng(0).standard_normal(len(steps)))
    detector = OnsetDetector()
    for step, value in zip(steps, curve, strict=True):
        detector.update(step, value)
        if step in (500, 2000, 20_000):
            assert detector.onset() == onset(steps[:step], curve[:step])
    assert detector.onset().step == pytest.approx(3000, rel=0.1)
    assert len(detector.bins) < 8 * math.log2(20_000) and len(detector._open) <= 130
    with pytest.raises(ValueError, match="Sort the steps"):
        detector.update(20_000, 1e-3)


def two_power_laws(steps, at, early, late):
    return 10 * np.exp(early * np.log(np.minimum(steps, at)) + late * np.log(np.maximum(steps / at, 1)))


def test_the_loss_boundary_of_two_power_laws():
    """But where noise makes one more knot, as in 1 of 400 draws of 2 % noise."""
    missed = []
    for seed in range(40):
        at = 20 + seed * 131 // 40
        noise = 1 + 0.02 * np.random.default_rng(seed).standard_normal(len(STEPS))
        found = loss_boundary(STEPS, two_power_laws(STEPS, at, -0.4, -0.1) * noise)
        slopes = np.array([found.slope_before + 0.4, found.slope_after + 0.1])
        if abs(found.step / at - 1) > 0.25 or (np.abs(slopes) > 0.06).any():
            missed.append((at, seed, found))
    assert not missed


def test_the_loss_boundary_knows_warm_up_from_descent_and_decay_from_boundary():
    loss = two_power_laws(np.maximum(STEPS / 10, 1), 4, -0.6, -0.1)  # stands still to step 10, turns at 40
    lr = SCHEDULES["wsd"](STEPS)
    loss *= np.where(STEPS > 285, (STEPS / 285.0) ** -0.8, 1)
    assert loss_boundary(STEPS, loss, lr).step == pytest.approx(40, rel=0.15)


def test_one_power_law_has_no_boundary_but_a_knot_on_linear_axes_that_moves():
    rng, found, linear = np.random.default_rng(0), 0, []
    steps = np.arange(1, 2001)
    for _ in range(20):
        loss = 5 * steps**-0.22 * np.exp(0.05 * rng.standard_normal(2000))
        found += loss_boundary(steps, loss) is not None
        linear.append([loss_boundary(steps[:n], loss[:n], axes="linear").step for n in (300, 2000)])
    assert found <= 1
    short, long = np.median(linear, axis=0)
    assert long > 2 * short
    assert loss_boundary([], []) is None and loss_boundary(STEPS[:9], STEPS[:9]) is None
    with pytest.raises(ValueError, match="axes='polar'"):
        loss_boundary(steps, steps, axes="polar")


def test_the_phases_of_a_run(tmp_path):
    writer, log = RunWriter(tmp_path), JsonLines(tmp_path / "log.jsonl")
    shape = {"sd": impulse(at=80), "loss": two_power_laws(STEPS, 40, -0.4, -0.1)}
    for step in STEPS.tolist():
        values = {"h.0.mlp.w": np.exp(shape["sd"][step - 1]), "h.0.attn.q": 1e-3, "h.1.attn.q": None}
        writer.append([Record(step, name, (4, 4), "gram32", sd_variation=v) for name, v in values.items()])
        log.write({"step": step, "lr": 1.0, "loss": float(shape["loss"][step - 1])})
    writer.close()
    log.close()
    phases = run_phases(sosd_fast.load(tmp_path))
    assert set(phases.kinds) == {"mlp", "attention"} and set(phases.matrices) == set(values)
    assert phases.kinds["mlp"] == phases.matrices["h.0.mlp.w"] and phases.kinds["attention"] is None
    assert phases.loss.step == pytest.approx(40, rel=0.1) and phases.loss_linear.step < phases.loss.step


@settings(deadline=None, max_examples=100)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    size=st.floats(1e-6, 10),
    decay=st.floats(0, 3),
    aligned=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_theory_bound_holds_for_any_two_matrices(m, n, size, decay, aligned, seed):
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    W = (U * torch.arange(1, r + 1) ** -decay) @ Vh
    D = U[:, -1:] @ Vh[-1:] if aligned else torch.randn(m, n, generator=generator, dtype=torch.float64)
    S, T = (torch.linalg.svdvals(A) for A in (W, W + size * D))
    variation = (S / S.sum() - T / T.sum()).norm()
    bound = theory_bound(size * D.norm(), torch.maximum(S.sum(), T.sum()), r)
    assert variation <= bound * (1 + 1e-12) + 1e-14
    assert theory_bound(size * D.norm(), S.sum(), r) >= bound


def test_theory_bound_is_within_its_factor_of_what_can_happen():
    # All of the change in the least value of many equal ones: |dSD| = x sqrt(1 - 1/r) / r to first order.
    r, x = 64, 1e-3
    S = torch.ones(r, dtype=torch.float64)
    T = S.clone()
    T[-1] -= x
    variation = (S / S.sum() - T / T.sum()).norm()
    assert variation > theory_bound(x, S.sum(), r) / (1.1 * (1 + math.sqrt(r)))
