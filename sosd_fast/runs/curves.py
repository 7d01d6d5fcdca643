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


def rates_by_kind(run: Run) -> dict[str, np.ndarray]:
    """Collects the learning rate of each module kind at the steps of its `variation_by_kind`.

    It is the median of its matrices' at that step; where none is recorded, what the run's log says; NaN where that says
    nothing, or 1 at all steps where nothing is known of any.

    Returns:
        kind -> (T,).
    """
    table = run.columns("step", "name", "sd_variation", "lr")
    kinds = {name: kind(name) for name in run.names}
    of = np.array([kinds[name] for name in table["name"]], dtype=object)
    found = {}
    for name in dict.fromkeys(of.tolist()):
        mine = (of == name) & np.isfinite(table["sd_variation"])
        steps, start = np.unique(table["step"][mine], return_index=True)
        rates = [known_median(each) for each in np.split(table["lr"][mine], start[1:])] if len(steps) else []
        found[name] = filled_rates(run, steps, np.array(rates))
    return found


def known_median(values: np.ndarray) -> float:
    """The median of what is not NaN; NaN where all is."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else np.nan


def filled_rates(run: Run, steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Puts what the log says in the place of NaN, or 1 where nothing is known at all."""
    logged_rates = learning_rates(run, steps)
    if logged_rates is not None:
        rates = np.where(np.isnan(rates), logged_rates, rates)
    return np.ones(len(steps)) if np.isnan(rates).all() else rates


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
