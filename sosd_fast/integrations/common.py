"""What the integrations share: the names of metrics, and a probe that lives as long as a Trainer's training.

Metrics are called spectra/<module>/<metric>, after the matrix and the field of its `Record`.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from sosd_fast.distributed.layout import copies
from sosd_fast.runs.records import JsonLines, Record
from sosd_fast.track import Probe, track

log = logging.getLogger("sosd_fast")

METRICS = ("sd_variation", "sd_variation_topk", "cosine", "sigma_max", "stable_rank", "effective_rank")


def scalars(record: Record, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns {"spectra/<module>/<metric>": value} of what was measured."""
    found = {f"spectra/{record.name}/{metric}": getattr(record, metric) for metric in metrics}
    return {key: value for key, value in found.items() if value is not None}


class AttachedProbe:
    """A probe from the beginning of training to its end, and the run directory's log; a callback's base class.

    Args:
        run_dir: where records are written.
        track_options: of `sosd_fast.track`.

    Attributes:
        probe: the `Probe`, from the beginning of training.
    """

    def __init__(self, *, run_dir: str | os.PathLike | None = None, **track_options):
        super().__init__()
        self.run_dir, self._track_options = run_dir, track_options
        self.probe: Probe | None = None
        self._log: JsonLines | None = None
        self._copied: nn.Module | None = None

    def attach(
        self, model: nn.Module, step: int, ranks: int, main: bool, on_record: Callable[[Record], None] | None = None
    ) -> Probe:
        """Begins to follow a model that `ranks` processes train; on each of them, one of which is the main one."""
        given = self._track_options.get("on_record")

        def each(record):
            for function in (given, on_record):
                if function is not None:
                    function(record)

        self.detach()
        group = dist.group.WORLD if ranks > 1 else None
        if group is not None:  # counts where the parameters are not sharded
            self._copied = copied = getattr(model, "_orig_mod", model)
            copies[copied] = group
        options: dict[str, Any] = self._track_options | {"on_record": each if given or on_record else None}
        self.probe = track(model, run_dir=self.run_dir, step=step, **options)
        if self.run_dir is not None and main:
            self._log = JsonLines(Path(self.run_dir) / "log.jsonl", step)
        return self.probe

    def write(self, step: int, **values):
        """Adds a line to log.jsonl, of the values that are numbers."""
        kept = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        if self._log is not None and self.probe is not None and kept:
            try:
                self._log.write({"step": step} | kept | {"overhead": self.probe.overhead})
            except OSError as error:
                log.error(
                    "sosd_fast: %s cannot be written at step %d (%s) and ends there.", self._log.path, step, error
                )
                self._log.close()
                self._log = None

    def detach(self):
        """Closes the probe and the log; closing twice is fine."""
        if self.probe is not None:
            self.probe.close()
        if self._log is not None:
            self._log.close()
        if self._copied is not None:
            copies.pop(self._copied, None)
        self._log = self._copied = None
