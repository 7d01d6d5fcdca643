"""Audits: now and then a spectrum is compared with an SVD in float64."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportConstantRedefinition=false

import logging
import math
import random
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.recorder import KEPT_RECORDS
from sosd_fast.probe.state import MatrixState
from sosd_fast.spectra.precision import Method

log = logging.getLogger("sosd_fast")


class Audit(NamedTuple):
    """A spectrum compared with `torch.linalg.svdvals` in float64."""

    step: int
    name: str
    error: float  # |SD - SD_true|_2
    bound: float  # what the record said of it


class Auditor:
    """Audits one matrix at a time, in random order, for a twentieth of what the full spectra cost.

    Costs are counted in operations, not in seconds, so that a run's audits do not depend on the machine's mood.

    Attributes:
        audits: the last 10,000.
    """

    SHARE = 0.05
    DEARER = 20.0  # an SVD in float64 against our spectra: 15 at 768 x 768, 18 at 256 x 256

    def __init__(self):
        self.audits: deque[Audit] = deque(maxlen=KEPT_RECORDS)
        self._earned = 0.0
        self._queue: list[int] = []
        self._cycles = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next choice depends on."""
        return {"earned": self._earned, "queue": list(self._queue), "cycles": self._cycles}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Takes up what `state_dict` returned."""
        self._earned, self._queue, self._cycles = state["earned"], list(state["queue"]), state["cycles"]

    def choose(self, measured: list[int], states: list[MatrixState]) -> int | None:
        """Returns which of the matrices just measured in full to audit, or None for now."""
        self._earned += self.SHARE * sum(states[i].cost for i in measured)
        if not self._queue:
            self._queue = list(range(len(states)))
            random.Random(self._cycles).shuffle(self._queue)
            self._cycles += 1
        allowed = set(measured)
        i = next((i for i in self._queue if i in allowed), None)
        if i is None or self._earned < self.DEARER * states[i].cost:
            return None
        self._earned -= self.DEARER * states[i].cost
        self._queue.remove(i)
        return i

    def audit(self, measurements: list[Measurement], states: list[MatrixState]):
        """Audits one of the matrices just measured, when it is time, and notes the error in its measurement.

        Only matrices on the host are audited, in the step in which they were measured. An error beyond the bound is
        logged, and the matrix is measured more strictly from then on.
        """
        found = {
            m.place: m
            for m in measurements
            if m.full is not None and m.failure is None and states[m.place].matrix.parameter.device.type == "cpu"
        }
        i = self.choose(list(found), states)
        if i is None:
            return
        state, m = states[i], found[i]
        try:
            result = audit(state, m)
        except Exception as error:
            if state.shards is not None:
                raise
            state.warn_once("cannot be audited", f"at step {m.step} ({type(error).__name__}: {error})")
            return
        if result is None:
            return
        m.audit_error = result.error
        self.audits.append(result)
        if result.error > result.bound:
            state.measure_more_strictly()
            log.warning(
                "sosd_fast: audit of %s at step %d: |SD - SD_true| = %.1e is beyond its bound %.1e. "
                "It is measured in float64 from now on.",
                result.name,
                result.step,
                result.error,
                result.bound,
            )


def audit(state: MatrixState, found: Measurement) -> Audit | None:
    """Compares a spectrum just measured with an SVD in float64; None for a matrix without a distribution."""
    assert found.full is not None
    if state.shards:
        S = state.shards.spectra([state.place], Method.BIDIAG64).S[0]
    else:
        W = state.tensor().double()
        if not W.isfinite().all():  # LAPACK raises
            return None
        S = torch.linalg.svdvals(W if W.shape[0] >= W.shape[1] else W.mT)
    bound = found.full.sd_error
    if not (S.isfinite().all() and S[0] > 0 and math.isfinite(bound)):
        return None
    spectrum = torch.from_numpy(found.full.spectrum)
    difference = spectrum / spectrum.sum() - S / S.sum()
    error = float(torch.linalg.vector_norm(difference))
    return Audit(found.step, found.name, error, bound)
