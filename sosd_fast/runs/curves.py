"""Curves over the steps of a run, reduced to what is looked at: by module kind, or over all matrices."""

import numpy as np

from sosd_fast.matrices import kind
from sosd_fast.runs.records import Run

KINDS = ("attention", "mlp", "embedding", "head", "other")  # in the order of figures and tables


def variation_by_kind(run: Run, hold: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collects the SD variation of each module kind.

    Args:
        run: with records of full spectra.
        hold: steps for which a matrix's last value stands, where a budget made matrices take turns. Without it the
            median would jump with the choice of matrices.

    Returns:
        kind -> (steps (T,), variation (T, 3)): minimum, median and maximum over the matrices of that kind.
    """
    table = run.columns("step", "name", "sd_variation")
    kinds = {name: kind(name) for name in run.names}
    measured: dict[str, dict[int, dict[str, float]]] = {}
    for i in np.flatnonzero(np.isfinite(table["sd_variation"])):
        name = table["name"][i]
        of_step = measured.setdefault(kinds[name], {}).setdefault(int(table["step"][i]), {})
        of_step[name] = float(table["sd_variation"][i])
    curves = {}
    for name in sorted(measured, key=KINDS.index):
        last: dict[str, tuple[int, float]] = {}
        rows = []
        for step, values in measured[name].items():
            last |= {matrix: (step, value) for matrix, value in values.items()}
            standing = [value for since, value in last.values() if step - since <= hold]
            rows.append((min(standing), np.median(standing), max(standing)))
        curves[name] = np.array(list(measured[name])), np.array(rows)
    return curves


def spectral_alignment(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Takes the cosine of each kept spectrum to the last one of its matrix.

    Returns:
        (steps (T,), cosine (T, 3)): minimum, median and maximum over the matrices that have a spectrum at that step.
    """
    found: dict[int, list[float]] = {}
    for name in run.names:
        steps, S = run.spectra(name)
        if len(S):
            S = S / np.maximum(np.linalg.norm(S.astype(float), axis=1, keepdims=True), 1e-300)
            for step, cosine in zip(steps.tolist(), S @ S[-1], strict=True):
                found.setdefault(step, []).append(float(cosine))
    rows = [(min(found[s]), float(np.median(found[s])), max(found[s])) for s in sorted(found)]
    return np.array(sorted(found)), np.array(rows).reshape(-1, 3)


def learning_rates(run: Run, steps: np.ndarray) -> np.ndarray | None:
    """Reads the learning rate at each step from a run's log: that of the first line at the step or after it.

    Returns:
        (T,), or None where the log has none.
    """
    rates = logged(run, "lr")
    if not len(rates):
        return None
    return rates[np.searchsorted(rates[:, 0], steps).clip(0, len(rates) - 1), 1]


def logged(run: Run, field: str) -> np.ndarray:
    """Reads the numbers that a run's log has under a name, (T, 2) of step and value; what is no number is left out."""
    points = [(line.get("step"), line.get(field)) for line in run.log]
    return np.array([p for p in points if all(_is_number(v) for v in p)], dtype=float).reshape(-1, 2)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
