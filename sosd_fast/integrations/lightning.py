"""The probe in the Lightning Trainer.

lightning.Trainer(..., callbacks=[LightningCallback(run_dir="runs/a")])
"""

from typing import Any

import torch.distributed as dist

from sosd_fast.integrations.common import METRICS, AttachedProbe, scalars

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise ImportError("LightningCallback: expected Lightning to be installed. Run `pip install lightning`.") from None


class LightningCallback(AttachedProbe, Callback):
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
