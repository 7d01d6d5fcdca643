import numpy as np
import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.probe.planner import Budget, Cost, Plan, Planner


def simulate(fraction, full, topk, steps=400, step_seconds=1.0, beside=0.0, on_device=False):
    """Runs a simulated clock; returns the spent fraction and, per step, what was measured.

    A step takes `beside` times what its measurements take besides, of the host.
    """
    budget = Budget(fraction, full, topk)
    spent, history, cost = 0.0, [], 0.0
    for _ in range(steps):
        chosen_full, chosen_topk = budget.plan(step_seconds + cost)
        seconds = sum(full[i] for i in chosen_full), sum(topk[i] for i in chosen_topk)
        for kind, places, each in zip(("full", "leading"), (chosen_full, chosen_topk), seconds, strict=True):
            budget.update_cost(Cost(kind, places, each, each if on_device else 0.0))
        cost = sum(seconds) * (1 + beside)
        budget.charge(cost - on_device * sum(seconds))
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


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("leading", [0.002, 0.009, None])
def test_what_is_told_to_be_covered_is_measured(part, leading):
    """Also where leading values would cost a fifth: turns are full spectra."""
    needed = 20 * (leading or 0.01)
    budget = Budget(part * needed, [0.01] * 20, [leading] * 20)
    measured = 0
    for _ in range(400):
        chosen = budget.plan(1.0)
        measured += len(chosen.full) + len(chosen.leading)
        budget.charge(0.01 * len(chosen.full) + (leading or 0) * len(chosen.leading))
    assert abs(measured / (20 * 400) / budget.coverage - 1) < 0.05
    assert abs(budget.enough / needed - 1) < 1e-6


def test_the_cheaper_measurement_is_preferred():
    _, history = simulate(0.05, [0.001, 0.5], [0.002, 0.002])
    assert all(0 in full and 0 not in topk for full, topk in history)
    assert all(topk == [1] for _, topk in history)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("beside", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("part", [0.3, 0.9, 1.02, 1.2, 1.5])
def test_what_is_beside_the_measurements_is_paid_for_too(part, beside, on_device):
    """The budget is a part of what everything in full takes; records and audits take `beside` of the measurements."""
    everything = 10 * 0.01 * (1 + beside)
    budget = part * everything / (1 + part * everything)
    fraction, history = simulate(budget, [0.01] * 10, [None] * 10, beside=beside, on_device=on_device)
    assert fraction <= 1.01 * budget
    measured = sum(len(full) for full, _ in history[100:]) / (10 * len(history[100:]))
    assert measured >= 0.93 * min(part, 1)


def test_one_dear_audit_does_not_change_what_is_covered_by_much():
    """An audit takes 20 measurements' time after each 400."""
    budget = Budget(0.01, [0.02] * 10, [None] * 10)
    covered = []
    for step in range(2000):
        budget.plan(1.0)
        budget.update_cost(Cost("full", [step % 10], 0.02, 0.0))
        budget.charge(0.02 + 0.4 * (step % 400 == 399))
        covered.append(budget.coverage)
    assert 0.7 <= min(covered[400:]) / max(covered) and 1.0 <= budget.markup


def test_coverage():
    budget = Budget(0.01, [0.02] * 10, [None] * 10)
    for _ in range(50):
        budget.plan(1.0)
    assert abs(budget.coverage - 0.05) < 1e-9
    for _ in range(200):
        budget.update_cost(Cost("full", list(range(10)), 0.2, 0.0))
        budget.charge(0.25)
    assert abs(budget.coverage - 0.05 / 1.25) < 1e-6 and abs(budget.markup - 1.25) < 1e-6
    budget.charge(0.0)  # of the first step nothing is known
    assert abs(budget.markup - 1.25) < 1e-6


def test_costs_follow_measurements():
    budget = Budget(0.01, [1.0, 1.0], [None, None])
    for _ in range(100):
        budget.update_cost(Cost("full", [0], 3.0, 0.0))
    assert abs(budget.full[0] - 3.0) < 1e-3 and budget.full[1] == 1.0


def planner(method, **options):
    """A planner of three matrices, the second of them too small for 4 leading values; and of its measurements."""
    measured = []

    def measure(plan):
        measured.append(plan)
        return dict.fromkeys(plan.full, 0.3) | dict.fromkeys(plan.leading, 0.1)

    made = Planner(method, k=4, **options)
    made.follow([(12, 20), (11, 30), (40, 12)])
    made.calibrate(measure, compiles=False)
    return made, measured


@pytest.mark.parametrize(
    ("method", "plan"), [("full", ([0, 1, 2], [])), ("exact", ([0, 1, 2], [])), ("topk", ([1], [0, 2]))]
)
def test_methods_that_do_not_look_at_the_clock(method, plan):
    made, measured = planner(method, every=2)
    assert [made.plan(0.0, step) for step in range(1, 5)] == [None, plan, None, plan]
    assert measured == ([Plan([], [0, 2])] * 2 if method == "topk" else [])
    made.heed(lacking=[2], moved=[0])
    assert made.plan(0.0, 6) == (sorted({*plan[0], 2}), plan[1]) and made.plan(0.0, 8) == plan
    made.update_cost(Cost("full", [0], 1.0, 1.0))


def test_within_a_budget_the_first_step_measures_everything():
    made, measured = planner("auto", budget=0.5)
    assert measured == [Plan([], [0, 2])] * 2 + [Plan([0, 1, 2], [])]
    assert made.plan(100.0, 7) == ([0, 1, 2], [0, 2]), "how long a step takes is not known yet"
    assert made.plan(110.0, 8) == ([0, 1, 2], []), "five seconds pay for 0.9"
    made.charge(10.0)
    for step in range(9, 60):
        made.plan(110.0, step)
    made.heed(lacking=[1], moved=[])
    assert made.plan(110.0, 60) == ([1], []), "whatever the budget"


def test_other_matrices_are_planned_anew():
    made, _ = planner("auto", budget=0.5)
    made.plan(0.0, 1)
    made.heed(lacking=[2], moved=[])
    made.follow([(12, 20)])
    made.update_cost(Cost("full", [5], 1.0, 0.0))  # of a matrix that was added, and whose cost is not known yet
    made.calibrate(lambda plan: dict.fromkeys([*plan.full, *plan.leading], 0.1), compiles=False)
    assert made.plan(100.0, 2) == ([0], [])


def test_matrices_without_leading_values_are_not_asked_for_them_again():
    made = Planner("topk", k=4)
    made.follow([(12, 20), (40, 12)])
    made.calibrate(lambda _: {1: 0.1}, compiles=False)
    assert made.plan(0.0, 1) == ([0], [1])


def test_small_budgets_are_told_once(caplog):
    made, _ = planner("auto", budget=0.01)
    for step in range(1, 60):
        made.plan(10.0 * step, step)
    assert caplog.messages == [
        "sosd_fast: budget=0.01 covers 11 % of the matrices each step; they take turns. budget=0.05 would cover all."
    ]


def test_steps_at_which_nothing_is_measured_leave_nothing_behind():
    net = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with sosd_fast.track(net, budget=1e-12) as probe:
        for _ in range(30):
            net(torch.ones(8)).sum().backward()
            optimizer.step()
        assert len(probe._recorder._watcher._rates_at) <= 1
        assert probe.step_count == 30 and probe.latest()["weight"].step < 5
