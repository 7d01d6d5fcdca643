import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sosd_fast.runs.phases import threshold_step
from sosd_fast.spectra.bounds import theory_bound
from training.paper import theory

SHORT = {"width": 12, "positions": 8, "classes": 4, "lr": 0.1, "steps": 1500}


@pytest.fixture(scope="module")
def trace():
    return theory.simulate(0, **SHORT)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    positions=st.integers(2, 9),
    width=st.integers(2, 9),
    classes=st.integers(2, 9),
    scale=st.floats(1e-3, 5),
)
def test_hand_derived_gradients_are_autograds(seed, positions, width, classes, scale):
    problem, g = theory.make_problem(seed, positions, width, classes)
    W = (scale * torch.randn(3, width, width, generator=g, dtype=torch.float64)).requires_grad_()
    Q, K, V = problem.X @ W
    H = torch.softmax(Q @ K.T / width**0.5, dim=-1) @ V
    loss = torch.nn.functional.cross_entropy(H @ problem.W_O, problem.Y.argmax(-1))
    expected_W, expected_H = torch.autograd.grad(loss, [W, H])
    with torch.no_grad():
        by_hand, A, logits = theory.forward(problem, W)
        G, dH = theory.gradients(problem, W, A, logits)
    assert by_hand.item() == pytest.approx(loss.item(), rel=1e-10, abs=1e-10)
    for mine, autograds in ((G, expected_W), (dH, expected_H)):
        assert float((mine - autograds).abs().max()) <= 1e-10 * (1 + float(autograds.abs().max()))


_matrix = {"r": st.integers(1, 10), "rest": st.integers(0, 6), "seed": st.integers(0, 2**32 - 1)}


def _pair(r, rest, seed, size, rank):
    """A matrix and an update of it, of low rank or of full, in any direction."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(r, r + rest, generator=g, dtype=torch.float64)
    k = min(rank, r)
    D = torch.randn(r, k, generator=g, dtype=torch.float64) @ torch.randn(k, r + rest, generator=g, dtype=torch.float64)
    return W, W + size * D


@settings(deadline=None, max_examples=100)
@given(**_matrix, size=st.floats(1e-6, 10), rank=st.integers(1, 10))
def test_singular_values_are_1_lipschitz(r, rest, seed, size, rank):
    W, moved = _pair(r, rest, seed, size, rank)
    distance = (torch.linalg.svdvals(moved) - torch.linalg.svdvals(W)).norm()
    assert distance <= (moved - W).norm() * (1 + 1e-12) + 1e-13


@settings(deadline=None, max_examples=200)
@given(
    a=st.lists(st.floats(0, 1e3), min_size=1, max_size=20),
    b=st.lists(st.floats(0, 1e3), min_size=20, max_size=20),
)
def test_normalisation_is_lipschitz(a, b):
    a, b = np.array(a), np.array(b[: len(a)])
    if min(a.sum(), b.sum()) < 1e-6:
        return
    variation = np.linalg.norm(a / a.sum() - b / b.sum())
    assert variation <= theory_bound(np.linalg.norm(a - b), max(a.sum(), b.sum()), len(a)) * (1 + 1e-9) + 1e-14


def test_lemmas_hold_at_every_step_of_a_run(trace):
    assert len(trace.lemmas) == 3
    for name, ratio in trace.lemmas.items():
        assert ratio.shape == (1500, 3) and ratio.max() <= 1 + 1e-9, name
        assert ratio.max() > 1e-3, name  # the bounds are of the size of what they bound
    assert (trace.variation <= trace.bound).all()


def test_a_run_descends_from_its_start(trace):
    assert trace.loss[-1] < 0.5 * trace.loss[0]
    assert (np.diff(trace.norm[:, 2]) > 0).mean() > 0.9
    np.testing.assert_allclose(trace.norm[0], 0.01 * 12**0.5, rtol=0.3)
    again = theory.simulate(0, **SHORT)
    assert all(np.array_equal(x, y) for x, y in zip(trace[1:3], again[1:3], strict=True))


def test_gradients_come_to_rest_with_the_loss(trace):
    step = -np.diff(trace.loss) / 0.1
    np.testing.assert_allclose(step[-50:], (trace.grad_norm[-50:] ** 2).sum(axis=1), rtol=0.1)  # dL = -lr |G|^2


def test_threshold_times_and_their_exponent():
    steps = np.arange(1, 4001)
    assert threshold_step(steps, 1 / steps, 0.01) == 100
    assert threshold_step(steps, np.where(steps == 50, 1, 0), 0.5) == 51
    assert threshold_step(steps, steps, 0.5) is None and threshold_step(steps, np.zeros(4000), 0) == 1
    V, QK = 1 / steps, 1 / steps**2.0
    trace = theory.Trace(steps, *[None] * 10)
    times = theory.thresholds(trace, np.stack([QK, QK / 2, V], axis=-1))
    fits = {m: theory.power_law(1 / times["level"], times[m]) for m in ("V", "QK")}
    assert fits["V"]["exponent"] == pytest.approx(1, abs=0.02) and fits["QK"]["exponent"] == pytest.approx(0.5, abs=0.1)
    assert len(theory.thresholds(trace, np.ones((4000, 3)))["level"]) == 0


def test_power_law_finds_its_exponent():
    x = np.geomspace(1, 100, 50)
    fit = theory.power_law(x, 3 * x**1.5 * np.exp(0.01 * np.sin(np.arange(50.0))))
    assert fit["exponent"] == pytest.approx(1.5, abs=0.01) and 0 < fit["error"] < 0.01 and fit["correlation"] > 0.99
    assert np.isnan(theory.power_law(x[:2], x[:2])["exponent"])


def test_the_script(tmp_path, capsys, monkeypatch):
    argv = ["--width=8", "--positions=6", "--classes=4", "--lr=0.1", "--steps=600", "--seeds=2", f"--out={tmp_path}"]
    assert theory.main(argv) == 0
    assert (tmp_path / "theory.png").read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "theory.json").read_text()
    found = json.loads(first)
    assert len(found["seeds"]) == 2 and max(found["seeds"][0]["lemmas"].values()) <= 1
    assert "exponent_V" in capsys.readouterr().out
    monkeypatch.setattr(theory, "draw", lambda *_: Figure())  # drawn again, the page takes seconds
    theory.main(argv)
    assert (tmp_path / "theory.json").read_text() == first
