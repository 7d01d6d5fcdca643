"""The probe in the Hugging Face Trainer.

Trainer(..., callbacks=[HuggingFaceCallback(run_dir="runs/a")])
"""

from sosd_fast.integrations.common import AttachedProbe

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError:
    raise ImportError(
        "HuggingFaceCallback: expected transformers to be installed. Run `pip install transformers[torch]`."
    ) from None


class HuggingFaceCallback(AttachedProbe, TrainerCallback):
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
