"""What the integrations share: the names of metrics, and a probe that lives as long as a Trainer's training.

Metrics are called spectra/<matrix>/<metric>, after the matrix and the field of its `Record`.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from sosd_fast.distributed.share import copies
from sosd_fast.runs.records import JsonLines, Record
from sosd_fast.track import Probe, track

log = logging.getLogger("sosd_fast")

METRICS = ("sd_variation", "sd_variation_topk", "cosine", "sigma_max", "stable_rank", "effective_rank")


def scalars(record: Record, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns {"spectra/<matrix>/<metric>": value} of what was measured.

    MLflow takes letters, digits and _-. :/ in a name, so the part of a matrix follows a point: attn.weight[q] is
    attn.weight.q here, and experts[0,1] is experts.0.1.
    """
    name = re.sub(r"[^\w/.\- :]", "_", re.sub(r"[\[,]", ".", record.name).replace("]", ""), flags=re.ASCII)
    found = {f"spectra/{name}/{metric}": getattr(record, metric) for metric in metrics}
    return {key: value for key, value in found.items() if value is not None}


def of_all_processes(values: Mapping[int, Mapping[str, float]], ranks: int) -> dict[int, dict[str, float]]:
    """Joins {step: {metric: value}} of all processes, which must make this call together; on each of them."""
    heard = [values]
    if ranks > 1:
        heard *= ranks
        dist.all_gather_object(heard, values)
    steps = sorted({step for each in heard for step in each})
    return {step: {key: value for each in heard for key, value in each.get(step, {}).items()} for step in steps}


class AttachedProbe:
    """A probe from the beginning of a training to its end, and the run directory's log; a callback's base class.

    It counts the steps that the framework counts, also those of optimizers that torch knows nothing of. A training that
    begins at step 0 after another one of the same callback is a run of its own, in run_dir/fit-2, run_dir/fit-3, ...
    One that goes on from a later step goes on in the directory of the one before.

    Args:
        run_dir: where records are written.
        track_options: of `sosd_fast.track`. With `optimizers` the steps of these count, instead of the framework's.

    Attributes:
        probe: the `Probe`, from the beginning of training; None where the model cannot be followed.
    """

    def __init__(self, *, run_dir: str | os.PathLike | None = None, **track_options):
        super().__init__()
        self.run_dir, self._track_options = run_dir, track_options
        self.probe: Probe | None = None
        self._log: JsonLines | None = None
        self._copied: nn.Module | None = None
        self._runs = 1
        self._told = 0  # the framework's step
        self._hold = True

    @property
    def directory(self) -> Path | None:
        """Where the records of the present training, or else the last one, are written."""
        if self.run_dir is None:
            return None
        return Path(self.run_dir) if self._runs == 1 else Path(self.run_dir) / f"fit-{self._runs}"

    def attach(
        self,
        model: nn.Module,
        step: int,
        ranks: int,
        main: bool,
        on_record: Callable[[Record], None] | None = None,
        told: int | None = None,
    ):
        """Begins to follow a model.

        Args:
            model: the model.
            step: steps taken before now.
            ranks: how many processes train it; each of them must make this call.
            main: whether this is the process that writes the log.
            on_record: called with each record, after the user's.
            told: the framework's own count, which `advance` is given; `step` by default.
        """
        given = self._track_options.get("on_record")

        def each(record):
            for function in (given, on_record):
                if function is not None:
                    function(record)

        self.detach()
        if step == 0 and self.probe is not None and self.probe.step_count > 0:
            self._runs += 1
            if self.run_dir is not None:
                log.warning(
                    "sosd_fast: another training begins with this callback; it is recorded in %s.", self.directory
                )
        self.probe, self._told, self._hold = None, step if told is None else told, True
        group = dist.group.WORLD if ranks > 1 else None
        if group is not None:  # counts where the parameters are not sharded
            self._copied = copied = getattr(model, "_orig_mod", model)
            copies[copied] = group
        options: dict[str, Any] = {"optimizers": []} | self._track_options
        options["on_record"] = each if given or on_record else None
        try:
            self.probe = track(model, run_dir=self.directory, step=step, **options)
            if self.directory is not None and main:
                self._log = JsonLines(self.directory / "log.jsonl", step)
        except Exception as error:  # nothing may end a training
            without = "the spectra" if self.probe is None else "log.jsonl"
            log.error(
                "sosd_fast: training goes on without %s. %s", without, error, exc_info=not isinstance(error, ValueError)
            )

    def advance(self, told: int, optimizers: Iterable[Any]) -> bool:
        """Measures a training step, where the framework's own count says that one is over.

        Args:
            told: the framework's count.
            optimizers: the framework's.

        Returns:
            Whether one is over.
        """
        if told == self._told:
            return False
        self._told = told
        if self.probe is not None and "optimizers" not in self._track_options:
            self._hold = self._hold and not self._seen(self.probe, optimizers)
            self.probe.step(hold=self._hold)
        return True

    @staticmethod
    def _seen(probe: Probe, optimizers: Iterable[Any]) -> bool:
        """Whether steps of torch.optim change the weights, which let measurements on a GPU read them before.

        The state that an optimizer keeps of a weight shows that it has stepped. One that updates weights in the
        backward pass, or copies of them, has none, nor has plain SGD: the next forward pass waits then.
        """
        changed: set[int] = set()
        for optimizer in optimizers:
            state = getattr(getattr(optimizer, "optimizer", optimizer), "state", None)
            changed |= set(map(id, state)) if isinstance(state, Mapping) else set()
        return all(id(m.parameter) in changed for m in probe.matrices if m.parameter.requires_grad)

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
