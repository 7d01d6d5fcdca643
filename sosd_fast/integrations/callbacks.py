"""The probe in the tools people train with: Hugging Face Trainer, Lightning, TensorBoard, Weights & Biases.

    Trainer(..., callbacks=[HuggingFaceCallback(run_dir="runs/a")])
    lightning.Trainer(..., callbacks=[LightningCallback(run_dir="runs/a")])
    sosd_fast.track(model, on_record=TensorBoardWriter(SummaryWriter("runs/a")))
    sosd_fast.track(model, on_record=WandbWriter(wandb.init(...)))

Metrics are called spectra/<module>/<metric>, after the matrix and the field of its `Record`. The two callbacks are made
of their library's base class when they are first asked for; nothing is imported before.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from sosd_fast.distributed.sharded import copies
from sosd_fast.runs.records import JsonLines, Record
from sosd_fast.track import Probe, track

log = logging.getLogger("sosd_fast")

METRICS = ("sd_variation", "sd_variation_topk", "cosine", "sigma_max", "stable_rank", "effective_rank")


def scalars(record: Record, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns {"spectra/<module>/<metric>": value} of what was measured."""
    found = {f"spectra/{record.name}/{metric}": getattr(record, metric) for metric in metrics}
    return {key: value for key, value in found.items() if value is not None}


class TensorBoardWriter:
    """An `on_record` function that writes to TensorBoard.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        metrics: fields of `Record`.
    """

    def __init__(self, writer, metrics: Sequence[str] = METRICS):
        self._writer, self._metrics = writer, metrics

    def __call__(self, record: Record):
        """Writes one record."""
        for key, value in scalars(record, self._metrics).items():
            self._writer.add_scalar(key, value, record.step)


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


class _Attached:
    """What the callbacks share: a probe from the beginning of training to its end, and the run directory's log."""

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
        if self.probe is not None:
            self.probe.close()
        if self._log is not None:
            self._log.close()
        if self._copied is not None:
            copies.pop(self._copied, None)
        self._log = self._copied = None


@functools.cache
def _hugging_face() -> type:
    try:
        from transformers.trainer_callback import TrainerCallback
    except ImportError:
        raise ImportError(
            "HuggingFaceCallback: expected transformers to be installed. Run `pip install transformers[torch]`."
        ) from None

    class HuggingFaceCallback(_Attached, TrainerCallback):
        """Follows a transformers.Trainer; of several processes each measures its share, as `sosd_fast.track` says.

        Losses that the Trainer logs go to the run directory's log.jsonl, for the figures.

        Args:
            run_dir: where records are written; the Trainer's output_dir will do. A resumed training goes on in it.
            track_options: of `sosd_fast.track`.

        Attributes:
            probe: the `Probe`, from the beginning of training.
        """

        def on_train_begin(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
            if model is not None:
                self.attach(model, state.global_step, args.world_size, state.is_world_process_zero)

        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
            found = logs or {}
            lr = found.get("learning_rate")
            self.write(state.global_step, loss=found.get("loss"), lr=lr, val_loss=found.get("eval_loss"))

        def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
            if self.probe is not None:
                self.probe.flush()

        def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
            self.detach()

    return HuggingFaceCallback


@functools.cache
def _lightning() -> type:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        raise ImportError(
            "LightningCallback: expected Lightning to be installed. Run `pip install lightning`."
        ) from None

    class LightningCallback(_Attached, Callback):
        """Follows a lightning.Trainer; of several processes each measures its share, as `sosd_fast.track` says.

        Its loggers get spectra/<module>/<metric> of all processes at each step that is a multiple of log_every_n_steps;
        the run directory's log.jsonl gets the loss that training_step returns, and the metric val_loss.

        Args:
            run_dir: where records are written. A resumed training goes on in it.
            metrics: fields of `Record` that go to the loggers.
            track_options: of `sosd_fast.track`.

        Attributes:
            probe: the `Probe`, from the beginning of training.
        """

        def __init__(self, *, run_dir=None, metrics=METRICS, **track_options):
            super().__init__(run_dir=run_dir, **track_options)
            self._metrics, self._step, self._told, self._heard = metrics, None, 0, {}

        def on_train_start(self, trainer, pl_module):
            def hear(record):
                if self._logs(trainer, record.step):
                    self._heard.setdefault(record.step, {}).update(scalars(record, self._metrics))

            step = trainer.global_step if self._step is None else self._step
            self._told = trainer.global_step
            self._step = self.attach(pl_module, step, trainer.world_size, trainer.is_global_zero, hear).step_count

        def on_train_batch_end(self, trainer: Any, pl_module, outputs: Any, batch, batch_idx):  # noqa: ARG002
            if self.probe is None or (trainer.global_step == self._told and self.probe.step_count == self._step):
                return  # gradients are being accumulated
            if self._step != self.probe.step_count and self._logs(trainer, self.probe.step_count):
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                loss = None if loss is None else float(loss) * trainer.accumulate_grad_batches
                rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
                self.write(self.probe.step_count, loss=loss, lr=rate)
            self._step, before, self._told = self.probe.step_count, self._told, trainer.global_step
            every = trainer.log_every_n_steps
            # All processes must come here together, also where the probe of one has stopped: the Trainer's steps count.
            if trainer.world_size == 1 or (every and self._told // every > before // every):
                self._tell(trainer)

        def on_train_end(self, trainer, pl_module):  # noqa: ARG002
            if self.probe is not None:
                self.probe.flush()  # measurements on a GPU may be late
                self._tell(trainer)

        def _logs(self, trainer, step: int) -> bool:
            return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0

        def _tell(self, trainer):
            """Gives the loggers what there is of the steps that they log, of all processes."""
            heard, self._heard = [self._heard], {}
            if trainer.world_size > 1 and trainer.loggers:
                heard *= trainer.world_size
                dist.all_gather_object(heard, heard[0])
            for step in sorted({step for each in heard for step in each}) if trainer.is_global_zero else ():
                values = {key: value for each in heard for key, value in each.get(step, {}).items()}
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

        def on_validation_end(self, trainer, pl_module):  # noqa: ARG002
            if self.probe is not None and "val_loss" in trainer.callback_metrics:
                self.write(self.probe.step_count, val_loss=float(trainer.callback_metrics["val_loss"]))

        def on_fit_end(self, trainer, pl_module):  # noqa: ARG002
            self.detach()

        def on_exception(self, trainer, pl_module, exception):  # noqa: ARG002
            self.detach()

        def state_dict(self):
            return {"step": self._step}

        def load_state_dict(self, state_dict):
            self._step = state_dict["step"]

    return LightningCallback


def __getattr__(name: str):
    made = {"HuggingFaceCallback": _hugging_face, "LightningCallback": _lightning}
    if name not in made:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    callback = made[name]()
    callback.__qualname__ = name  # so that pickle finds it here
    globals()[name] = callback
    return callback
