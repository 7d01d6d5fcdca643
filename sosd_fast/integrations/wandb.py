"""Metrics of every matrix in Weights & Biases.

writer = WandbWriter(wandb.init(...))
sosd_fast.track(model, on_record=writer, on_event=writer.on_event)
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record

UNSAVED_STEPS = 100  # without a row of the loop's, before a message says so; some loops log each 50 steps

log = logging.getLogger("sosd_fast")


class WandbWriter:
    """An `on_record` function that writes to Weights & Biases, against a metric of its own, spectra/step.

    W&B drops a row whose step lies behind the one it has reached, so the writer never moves W&B's step: it adds to the
    row that is open, and `run.log` of the training loop closes it, with or without `step=`. Where the loop logs at
    every step, so are the spectra; where it logs more rarely, each row has the spectra of the last step before it.

    Args:
        run: what wandb.init returned; None takes the run that is active when the first record comes. Of several
            processes those without one write nothing, except the first, which must have one.
        metrics: fields of `Record`.
        own_rows: give each step a row, for loops that log nothing themselves, or that never pass `step=`: the rows move
            W&B's step on.
    """

    def __init__(self, run: Any = None, metrics: Sequence[str] = METRICS, *, own_rows: bool = False):
        self._run: Any = run
        self._metrics, self._own_rows = metrics, own_rows
        self._step: int | None = None
        self._at, self._unsaved = None, 0  # W&B's step, and steps since it moved

    def __call__(self, record: Record):
        """Writes one record."""
        if self._step is None:
            if not self._find_run():
                return
            self._run.define_metric("spectra/step", hidden=True)
            self._run.define_metric("spectra/*", step_metric="spectra/step")
        elif self._step != record.step:
            self._next_step()
        self._step = record.step
        self._run.log({"spectra/step": record.step} | scalars(record, self._metrics), commit=False)

    def on_event(self, event: Event):
        """Sends an alert, which W&B passes on by mail or Slack as its user has set."""
        if self._find_run():
            level = "INFO" if event.what == "onset" else "WARN"
            self._run.alert(title=event.title, text=str(event), level=level, wait_duration=0)

    def _find_run(self) -> bool:
        """Whether there is a run to write to; of several processes only the first must have one."""
        if self._run is None:
            import wandb

            self._run = wandb.run
        if self._run is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return False
        if self._run is None:
            raise ValueError(
                "WandbWriter: expected an active W&B run, got run=None. Call wandb.init first, or pass its result."
            )
        return True

    def _next_step(self):
        if self._own_rows:
            self._run.log({}, commit=True)
            return
        self._unsaved = self._unsaved + 1 if self._at == self._run.step else 0
        self._at = self._run.step
        if self._unsaved == UNSAVED_STEPS:
            log.warning(
                "sosd_fast: W&B's row stayed open for %d steps, and keeps the spectra of the last step only. Call "
                "run.log in the loop, or pass own_rows=True to WandbWriter where the loop logs nothing.",
                UNSAVED_STEPS,
            )
