"""What is said of training steps whose end could not be known, or was known too late."""

import logging

LATE = (
    "an optimizer that had not stepped before stepped first in the batch of step {next}, which others told when they "
    "stepped on the same gradients. The records of step {step} hold its change of step {next}; later ones are right."
)
EARLY = (
    "an optimizer stepped in the batch of step {step} when that was measured already, for no step of it was expected. "
    "The records of step {step} lack its change; later ones are right."
)
UNKNOWN = (
    "an optimizer stepped for the first time at step {step}, on gradients of its own. Whether its steps end training "
    "steps, as a generator's after its critic's, begin them, or are some themselves, cannot be seen: records of its "
    "matrices may be one step late, and the count may be one off. Where that matters, pass optimizers=[] and call "
    "Probe.step at the end of each batch."
)
TWO_LOSSES = (
    "optimizers that had shared a backward pass stepped by turns, each on gradients of its own, and each of these "
    "steps was counted. From step {step} on one of each makes a training step, as a critic's and its generator's do. "
    "If each of them is one, pass optimizers=[] and call Probe.step after it."
)
TWICE = (
    "Probe.step was called at step {next} though optimizers' steps are counted as well, so training steps may count "
    "twice. Leave it out, or pass optimizers=[] to count nothing else."
)

log = logging.getLogger("sosd_fast")


class Doubts:
    """What was said; iterates over it."""

    def __init__(self):
        self._said: dict[str, str] = {}

    def __iter__(self):
        return iter(self._said.values())

    def say(self, doubt: str, step: int):
        """Logs a doubt, once: one of the texts of this module.

        Args:
            doubt: the text.
            step: the last one that is over.
        """
        if doubt not in self._said:
            self._said[doubt] = doubt.format(step=step, next=step + 1)
            log.warning("sosd_fast: %s", self._said[doubt])
