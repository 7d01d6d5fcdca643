import numpy as np

from sosd_fast.probe.planner import Budget


def simulate(fraction, full, topk, steps=400, step_seconds=1.0):
    """Runs a simulated clock; returns the spent fraction and, per step, what was measured."""
    budget = Budget(fraction, full, topk)
    spent, history, cost = 0.0, [], 0.0
    for _ in range(steps):
        chosen_full, chosen_topk = budget.plan(step_seconds + cost)
        cost = sum(full[i] for i in chosen_full) + sum(topk[i] for i in chosen_topk)
        budget.spent(cost)
        spent += cost
        history.append((chosen_full, chosen_topk))
    return spent / (steps * step_seconds + spent), history


def test_everything_every_step_where_the_budget_allows():
    fraction, history = simulate(0.5, [0.01] * 10, [0.005] * 10)
    assert all(full == list(range(10)) and not topk for full, topk in history)


def test_leading_values_every_step_and_full_spectra_in_pairs():
    fraction, history = simulate(0.05, [0.02] * 10, [0.002] * 10)
    assert all(topk == list(range(10)) for _, topk in history)
    assert 0.04 <= fraction <= 0.05 * 1.05
    for i in range(10):
        at = np.array([step for step, (full, _) in enumerate(history) if i in full])
        assert len(at) > 20, "each matrix has its turn"
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        assert all(len(run) >= 2 for run in runs[:-1]), "in pairs of consecutive steps"


def test_matrices_take_turns_where_even_the_leading_values_do_not_fit():
    fraction, history = simulate(0.01, [0.02] * 10, [0.01] * 10)
    assert fraction <= 0.01 * 1.05
    counts = [sum(i in full for full, _ in history) for i in range(10)]
    assert min(counts) > 0 and max(counts) - min(counts) <= 4
    assert not any(topk for _, topk in history)


def test_the_cheaper_measurement_is_preferred():
    _, history = simulate(0.05, [0.001, 0.5], [0.002, 0.002])
    assert all(0 in full and 0 not in topk for full, topk in history)
    assert all(topk == [1] for _, topk in history)


def test_coverage():
    budget = Budget(0.01, [0.02] * 10, [None] * 10)
    for _ in range(50):
        budget.plan(1.0)
    assert abs(budget.coverage - 0.05) < 1e-9


def test_costs_follow_measurements():
    budget = Budget(0.01, [1.0, 1.0], [None, None])
    for _ in range(100):
        budget.learn("full", [0], 3.0)
    assert abs(budget.full[0] - 3.0) < 1e-3 and budget.full[1] == 1.0
