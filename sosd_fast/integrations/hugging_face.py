"""The probe in the Hugging Face Trainer.

Trainer(..., callbacks=[HuggingFaceCallback(run_dir="runs/a")])
"""

import copy
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from sosd_fast.integrations.common import METRICS, AttachedProbe, of_all_processes, scalars

try:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_callback import CallbackHandler, TrainerCallback
except ImportError:
    raise ImportError(
        "HuggingFaceCallback: expected transformers to be installed. Run `pip install transformers[torch]`."
    ) from None

log = logging.getLogger("sosd_fast")


class HuggingFaceCallback(AttachedProbe, TrainerCallback):
    """Follows a transformers.Trainer; of several processes each measures its share, as `sosd_fast.track` says.

    A step is one of the Trainer's global steps. Losses that the Trainer logs go to the run directory's log.jsonl, for
    the figures; where it logs to (report_to), it logs spectra/<matrix>/<metric> of all processes at the same steps.

    Args:
        run_dir: where records are written; the Trainer's output_dir will do. A resumed training goes on in it; another
            one that begins at step 0 with the same callback is recorded in run_dir/fit-2.
        metrics: fields of `Record` that go to where the Trainer logs.
        track_options: of `sosd_fast.track`.

    Attributes:
        probe: the `Probe`, from the beginning of training; None where the model cannot be followed.
    """

    def __init__(
        self, *, run_dir: str | os.PathLike | None = None, metrics: Sequence[str] = METRICS, **track_options: Any
    ):
        super().__init__(run_dir=run_dir, **track_options)
        self._metrics, self._heard, self._loggers = metrics, {}, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
        def hear(record):
            if record.step not in self._heard:
                self._heard = {record.step: {}}  # the newest step
            self._heard[record.step].update(scalars(record, self._metrics))

        self._heard, self._loggers = {}, _loggers()
        if model is not None:
            self.attach(model, state.global_step, args.world_size, state.is_world_process_zero, hear)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.advance(state.global_step, [optimizer])
        if control.should_log:
            self._tell(args, state, control, **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_log:
            self._tell(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        found = logs or {}
        lr = found.get("learning_rate")
        self.write(state.global_step, loss=found.get("loss"), lr=lr, val_loss=found.get("eval_loss"))

    def on_save(self, args, state, control, **kwargs):  # noqa: ARG002
        if self.probe is not None:
            self.probe.flush()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002
        self.detach()

    def _tell(self, args, state, control, **kwargs):
        """Gives the Trainer's loggers what was measured last, of all processes, which come here together."""
        if not self._loggers:
            return
        heard, self._heard = self._heard, {}
        for step, values in of_all_processes(heard, args.world_size).items():
            then = copy.copy(state)
            then.global_step = step
            for logger in list(self._loggers):
                try:
                    logger.on_log(args, then, control, logs=dict(values), **kwargs)
                except Exception:  # nothing may end a training
                    self._loggers.remove(logger)
                    log.exception("sosd_fast: %s failed, and gets no more spectra.", type(logger).__name__)


def _loggers() -> list[TrainerCallback]:
    """The Trainer's callbacks that report_to stands for.

    A callback is given neither the Trainer nor its CallbackHandler, which calls it: so that is looked for among the
    callers.
    """
    kinds, frame = tuple(INTEGRATION_TO_CALLBACK.values()), sys._getframe(1)
    while frame is not None:
        handler: Any = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return [callback for callback in handler.callbacks if isinstance(callback, kinds)]
        frame = frame.f_back
    return []
