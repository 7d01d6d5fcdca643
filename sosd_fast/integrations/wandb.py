"""Metrics of every matrix in Weights & Biases.

sosd_fast.track(model, on_record=WandbWriter(wandb.init(...)))
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.runs.records import Record


class WandbWriter:
    """An `on_record` function that writes to Weights & Biases, against a step of its own, spectra/step.

    A step's values go into one row, which the next step, or the end of the W&B run, completes.

    Args:
        run: what wandb.init returned; None takes the run that is active when the first record comes. Of several
            processes those without one write nothing, except the first, which must have one.
        metrics: fields of `Record`.
    """

    def __init__(self, run: Any = None, metrics: Sequence[str] = METRICS):
        self._run: Any = run
        self._metrics, self._step = metrics, None

    def __call__(self, record: Record):
        """Writes one record."""
        if self._step is None:
            if self._run is None:
                import wandb

                self._run = wandb.run
            if self._run is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
                return
            if self._run is None:
                raise ValueError(
                    "WandbWriter: expected an active W&B run, got run=None. Call wandb.init first, or pass its result."
                )
            self._run.define_metric("spectra/step", hidden=True)
            self._run.define_metric("spectra/*", step_metric="spectra/step")
        elif self._step != record.step:
            self._run.log({}, commit=True)
        self._step = record.step
        self._run.log({"spectra/step": record.step} | scalars(record, self._metrics), commit=False)
