"""Metrics of every matrix in TensorBoard.

writer = TensorBoardWriter(SummaryWriter("runs/a"))
sosd_fast.track(model, on_record=writer, on_event=writer.on_event)
"""

from collections.abc import Sequence
from typing import Any

from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record


class TensorBoardWriter:
    """An `on_record` function that writes to TensorBoard.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        metrics: fields of `Record`.
    """

    def __init__(self, writer: Any, metrics: Sequence[str] = METRICS):
        self._writer, self._metrics = writer, metrics

    def __call__(self, record: Record):
        """Writes one record."""
        for key, value in scalars(record, self._metrics).items():
            self._writer.add_scalar(key, value, record.step)

    def on_event(self, event: Event):
        """Writes an event to the tab Text."""
        self._writer.add_text("spectra/events", str(event), event.step)
