"""The probe in the Lightning Trainer.

lightning.Trainer(..., callbacks=[LightningCallback(run_dir="runs/a")])
"""

import os
from collections.abc import Sequence
from typing import Any

from sosd_fast.integrations.common import METRICS, AttachedProbe, of_all_processes, scalars

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise ImportError("LightningCallback: expected Lightning to be installed. Run `pip install lightning`.") from None


class LightningCallback(AttachedProbe, Callback):
    """Follows a lightning.Trainer; of several processes each measures its share, as `sosd_fast.track` says.

    A batch in which trainer.global_step advances is a step, however many optimizers step in it. The Trainer's loggers
    get spectra/<matrix>/<metric> of all processes at each step that is a multiple of log_every_n_steps; the run
    directory's log.jsonl gets the loss that training_step returns, and the metric val_loss.

    Args:
        run_dir: where records are written. A resumed training goes on in it; another one that begins at step 0 with the
            same callback is recorded in run_dir/fit-2.
        metrics: fields of `Record` that go to the loggers.
        track_options: of `sosd_fast.track`.

    Attributes:
        probe: the `Probe`, from the beginning of training; None where the model cannot be followed.
    """

    def __init__(
        self, *, run_dir: str | os.PathLike | None = None, metrics: Sequence[str] = METRICS, **track_options: Any
    ):
        super().__init__(run_dir=run_dir, **track_options)
        self._metrics, self._heard = metrics, {}
        self._step = 0  # the probe's, when the Trainer's was the one told
        self._loaded: int | None = None

    def on_train_start(self, trainer, pl_module):
        def hear(record):
            if self._logs(trainer, record.step):
                self._heard.setdefault(record.step, {}).update(scalars(record, self._metrics))

        now = trainer.global_step
        step = self._loaded if self._loaded is not None else self._step if now == self._told else now
        self._loaded, self._heard = None, {}
        self.attach(pl_module, step, trainer.world_size, trainer.is_global_zero, hear, told=now)
        self._step = step

    def on_train_batch_end(self, trainer: Any, pl_module, outputs: Any, batch, batch_idx):  # noqa: ARG002
        before = self._told
        if not self.advance(trainer.global_step, trainer.optimizers):
            return  # gradients are being accumulated
        if self.probe is not None and self._step != self.probe.step_count:
            self._step = self.probe.step_count
            if self._logs(trainer, self._step):
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                loss = None if loss is None else float(loss) * trainer.accumulate_grad_batches
                rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
                self.write(self._step, loss=loss, lr=rate)
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
        heard, self._heard = self._heard, {}
        if not trainer.loggers:
            return
        for step, values in of_all_processes(heard, trainer.world_size).items():
            for logger in trainer.loggers if trainer.is_global_zero else ():
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
        self._loaded = state_dict["step"]
