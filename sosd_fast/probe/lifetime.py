"""How long a probe holds weights: while the model lives, then during its actions, where something else keeps them."""

import logging
import weakref

from torch import nn

from sosd_fast.probe.followed import FollowedMatrices
from sosd_fast.probe.guard import Guarded
from sosd_fast.probe.steps import StepDetector

log = logging.getLogger("sosd_fast")


class OutlivesModel(Guarded):
    """A guarded object that may outlive the model whose weights it reads; `Probe` makes the parts that are named here.

    A part of the model that something else keeps is followed on, as the module inside of a wrapper that is gone.
    """

    step_count: int
    _matrices: FollowedMatrices
    _steps: StepDetector

    def rest_after(self, model: nn.Module | None):
        """Lets go of the weights when the model is gone."""
        if model is not None:
            weakref.finalize(model, _rest, weakref.ref(self)).atexit = False

    def _takes_up(self) -> bool:
        if not self._matrices.released:
            return True
        if there := self._matrices.regain():
            self._steps.hold(self._matrices.share.parameters)
        else:
            log.info("sosd_fast: the tracked model and its weights are gone after step %d.", self.step_count)
            self._finalizer()
        return there

    def _lays_down(self):
        if self._matrices.model() is None and not self._steps.pending:
            self._matrices.release()
            self._steps.hold(self._matrices.share.parameters)


def _rest(this: "weakref.ref[OutlivesModel]"):
    if (guarded := this()) is not None:
        guarded.rest()
