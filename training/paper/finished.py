"""A finished run of the reproduction: its curves, and what was observed of its weights beside the probe."""

import math
from functools import cached_property
from pathlib import Path

import numpy as np

import sosd_fast
from sosd_fast.matrices import kind
from sosd_fast.runs.curves import variation_by_kind
from sosd_fast.runs.phases import Phases, run_phases
from sosd_fast.spectra.bounds import theory_bound

BODY = ("attention", "mlp")


class Finished:
    """A finished run: its curves, and what was observed of its weights beside the probe."""

    def __init__(self, run_dir: Path):
        self.run = sosd_fast.load(run_dir)
        log = self.run.log
        self.steps, self.loss, self.lr = (np.array([line[k] for line in log]) for k in ("step", "loss", "lr"))
        self.val = np.array([(line["step"], line["val_loss"]) for line in log if "val_loss" in line])  # (T, 2)
        observed = np.load(run_dir / "observed.npz")
        self.names: list[str] = observed["names"].tolist()
        self.updates = observed["updates"]  # (steps, matrices): |W_t - W_{t-1}|_F
        self.snapshots, self.parameter_cosine = (
            observed["steps"],
            observed["cosine"],
        )  # (T,), (T, matrices), to the last

    @cached_property
    def kinds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Steps and median SD variation of each kind."""
        return {name: (steps, spread[:, 1]) for name, (steps, spread) in variation_by_kind(self.run).items()}

    @cached_property
    def phases(self) -> Phases:
        """Onsets and loss boundary."""
        return run_phases(self.run)

    @cached_property
    def spectrum_cosine(self) -> np.ndarray:
        """(T, matrices): cosine of the spectrum at each snapshot to that at the last."""
        columns = []
        for name in self.names:
            steps, S = self.run.spectra(name)
            S = S[np.clip(np.searchsorted(steps, self.snapshots, side="right") - 1, 0, None)].astype(float)
            S /= np.linalg.norm(S, axis=1, keepdims=True)
            columns.append(S @ S[-1])
        return np.stack(columns, axis=-1)

    def variation(self, kinds, start: float, stop: float) -> float:
        """Median SD variation over kinds and over the steps after `start` up to `stop`."""
        curves = [values[(steps > start) & (steps <= stop)] for k in kinds for steps, values in [self.kinds[k]]]
        values = np.concatenate(curves)
        return float(np.median(values)) if len(values) else math.nan

    def mean_loss(self, start: float, stop: float) -> float:
        """Mean training loss over the steps after `start` up to `stop`."""
        values = self.loss[(self.steps > start) & (self.steps <= stop)]
        return float(values.mean()) if len(values) else math.nan

    @cached_property
    def decay_start(self) -> int:
        """The last step at the peak learning rate."""
        return int(self.steps[self.lr >= 0.999 * self.lr.max()].max())

    def body_norm(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the Frobenius norm of all attention and MLP matrices together."""
        squares: dict[int, float] = {}
        for r in self.run.records:
            if kind(r.name) in BODY and r.frobenius_norm is not None:
                squares[r.step] = squares.get(r.step, 0.0) + r.frobenius_norm**2
        return np.array(list(squares)), np.sqrt(list(squares.values()))

    @cached_property
    def bound_ratio(self) -> tuple[float, int, int]:
        """T1 over all records: largest measured over bound, how many are above by more than `sd_error`, how many."""
        column = {name: i for i, name in enumerate(self.names)}
        before: dict[str, tuple[float, float]] = {}  # sum and error of the last record
        worst, violations, count = 0.0, 0, 0
        for r in self.run.records:
            if r.nuclear_norm is None:
                continue
            previous = before.get(r.name)
            before[r.name] = (r.nuclear_norm, r.sd_error or 0.0)
            if previous and r.interval == 1 and r.sd_variation is not None:
                update = self.updates[r.step - 1, column[r.name]]
                bound = theory_bound(update, max(r.nuclear_norm, previous[0]), min(r.shape))
                error = previous[1] + (r.sd_error or 0.0)
                worst = max(worst, (r.sd_variation - error) / bound if bound > 0 else 0.0)
                violations += r.sd_variation > bound + error
                count += 1
        return worst, violations, count
