"""What a probe remembers of a matrix between its measurements."""

# Most of torch has no complete types; S and W are the field's names.
# pyright: reportUnknownMemberType=false, reportConstantRedefinition=false

import functools
import logging
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sosd_fast.distributed.layout import cost, shape_of
from sosd_fast.distributed.spectra import Shards
from sosd_fast.matrices import Matrix
from sosd_fast.probe.measurement import Kind, Measurement
from sosd_fast.spectra.products import State

_WORDS: dict[Kind, str] = {"full": "spectrum", "leading": "leading values"}
_STRICTER = {"auto": "gram64", "gram64": "exact64"}
_JUMP = 3.0  # times as far as it usually moves

log = logging.getLogger("sosd_fast")


class Leading(NamedTuple):
    """The last leading values of a matrix."""

    step: int
    S: NDArray[Any]  # (k,)
    rest: float  # Frobenius norm of what the other singular values make up


class Row:
    """A spectrum among those that were computed together, which cost less to handle as they are than one by one.

    Args:
        whole: (B, r) float64.
        at: the row of the spectrum.
    """

    def __init__(self, whole: Tensor, at: int):
        self.whole, self.at = whole, at

    @functools.cached_property
    def tensor(self) -> Tensor:
        """The spectrum, (r,)."""
        return self.whole[self.at]


class MatrixState:
    """A matrix and what is remembered of it.

    Results may reach the host some steps after their measurement was launched. So the memory has two parts. What the
    next measurement starts from stays where the matrix is, and is handed on when a measurement is launched
    (`hand_on_full`, `hand_on_leading`). What the host knows is written when the results are there (`update`).
    `lose` drops of both what a measurement that raised may have spoiled. `follow`, `set_reference`, `refer` and
    `measure_more_strictly` change what is measured, and `load_state_dict` takes up what was saved.
    """

    def __init__(self, matrix: Matrix, method: str = "auto", keep_weights: bool = False):
        self.matrix = matrix
        self.name = matrix.name
        self.shape = shape_of(matrix)
        self.cost = cost(self.shape)  # of a full spectrum, in operations
        self.place = 0  # among the matrices that the probe follows
        self.shards: Shards | None = None  # where ranks measure together
        self.form: tuple[Any, ...] | None = None  # of its parameter
        self.method = method  # auto or exact; each audit that fails makes it gram64, then exact64 (exact in float64)
        self.keep_weights = keep_weights
        self.lost: set[Kind] = set()  # of the measurements, those that raised the last time
        # Handed on when a measurement is launched
        self.last: Row | None = None  # last full spectrum
        self.S_step: int | None = None
        self.W: Tensor | None = None  # float32, the weights of that spectrum; with keep_weights
        self.subspace: State | None = None  # of `topk_svdvals`
        # Written when the results are on the host
        self.spectrum: NDArray[Any] | None = None  # last full spectrum, (r,) float64
        self.leading: Leading | None = None
        self.reference: Row | None = None  # where the matrix is; cosines are taken to it
        self.refers_to_first = False  # whether its first spectrum that has a distribution becomes its reference
        self.usual_move: float | None = None  # of its singular distribution in a step, smoothed
        self.warned: str | None = None  # what was last said to be wrong with it

    @property
    def mine(self) -> bool:
        """Whether this rank records the matrix."""
        return self.shards is None or self.shards.mine(self.place)

    @property
    def known(self) -> bool:
        """Whether the last full spectrum that reached the host has a distribution."""
        return self.spectrum is not None and math.isfinite(self.spectrum[0])

    def tensor(self) -> Tensor:
        """Returns the matrix, or what this rank contributes of it, where ranks measure together.

        Raises:
            ValueError: the matrix has another shape than when it was found, which `Parameter.data` allows, or its
                parameter was moved to the meta device.
        """
        if self.matrix.parameter.is_meta:
            raise ValueError(f"track: expected the values of {self.name}, got a parameter on the meta device.")
        if self.shards:
            return self.shards.local(self.place)
        W = self.matrix.tensor()
        if W.shape != self.shape:
            raise ValueError(
                f"track: expected {self.name} of shape {self.shape}, got shape={tuple(W.shape)}. "
                "Replace the parameter in its module, or call track again."
            )
        return W

    def follow(self, matrix: Matrix):
        """Takes the matrix from a parameter that may be another one or have changed its form."""
        self.matrix, form = matrix, form_of(matrix.parameter)
        if self.form not in (None, form):
            self.subspace = self.leading = self.W = None  # they fit the earlier form
        self.form = form

    def hand_on_full(self, W: Tensor, S: Row, step: int):
        """Keeps what the next full measurement starts from; called when one was launched, where the matrix is."""
        if self.keep_weights:
            kept = self.W
            if kept is None or (kept.is_inference() and not torch.is_inference_mode_enabled()):  # else it is written to
                kept = torch.empty(W.shape, dtype=torch.float32, device=W.device)
            self.W = kept.copy_(W)
        self.last, self.S_step = S, step

    def hand_on_leading(self, subspace: State | None):
        """Keeps what the next measurement of the leading values starts from; called when one was launched."""
        self.subspace = subspace

    def update(self, found: Measurement) -> bool:
        """Keeps the results of a measurement; called in the order of steps.

        Returns:
            Whether the singular distribution moved three times as far as it usually does.
        """
        if found.lost:
            return False
        sigma_max = found.sigma_max
        sound = math.isfinite(sigma_max)
        if (leading := found.leading) is not None:
            self.lost.discard("leading")
            self.leading = Leading(found.step, leading.S, leading.rest)
        if found.full is not None:
            self.lost.discard("full")
            self.spectrum = found.full.spectrum.copy()  # the record's may be changed by its owner
            if sound and self.reference is None:
                self.refer()
        if found.mine and (not sound or (sigma_max == 0 and found.step > 0)):  # zero at first is a usual start
            what = "is zero" if sigma_max == 0 else "holds NaN or Inf"
            self.warn_once(what, f"at step {found.step}, so it has no singular distribution")
        moved = found.moved
        if moved is None or not math.isfinite(moved):
            return False
        usual = self.usual_move
        self.usual_move = moved if usual is None else 0.9 * usual + 0.1 * moved
        return usual is not None and moved > _JUMP * usual

    def lacks_spectrum(self, found: Measurement) -> bool:
        """Whether leading values were measured, but no full spectrum is known to take the others from.

        To be asked before `update`.
        """
        if found.leading is None or found.lost or "full" in self.lost or self.known:
            return False
        return math.isfinite(found.leading.sigma_max)

    def set_reference(self, spectrum: Any):
        """Sets the spectrum that cosines are taken to, (r,), or None."""
        device = self.matrix.parameter.device
        known = None if spectrum is None else torch.as_tensor(spectrum, dtype=torch.float64, device=device)
        self.reference = None if known is None else Row(known[None], 0)

    def refer(self):
        """Makes the last full spectrum the reference, where there is to be one, is none, and that is not zero."""
        if self.refers_to_first and self.reference is None and self.known and self.spectrum is not None:
            if not self.spectrum[0]:
                return  # a cosine to zero is none: LoRA's B is zero at first
            self.reference = self.last

    def lose(self, kind: Kind, step: int, error: Exception):
        """Lets the next measurement of a kind start anew, for the one at a step raised an error."""
        self.lost.add(kind)
        if kind == "full":
            self.last = self.S_step = self.W = None
        else:
            self.subspace = self.leading = None
        self.warn_once(
            "cannot be measured",
            f"at step {step} (its {_WORDS[kind]}: {type(error).__name__}: {error}). Its records are NaN until it can",
        )

    def measure_more_strictly(self):
        """Computes in a higher precision from now on."""
        self.method = _STRICTER.get(self.method, self.method)

    def warn_once(self, what: str, more: str):
        """Logs what is wrong with the matrix, unless that was the last thing said of it."""
        if self.warned != what:
            self.warned = what
            log.warning("sosd_fast: %s %s %s.", self.name, what, more)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next measurement depends on, under the names that checkpoints have."""
        return {
            "method": self.method,
            "S": None if self.last is None else self.last.tensor,
            "spectrum": None if self.spectrum is None else torch.from_numpy(self.spectrum.copy()),
            "S_step": self.S_step,
            "reference": None if self.reference is None else self.reference.tensor,
            "W": None if self.W is None else self.W.clone(),
            "usual": self.usual_move,
            "warned": self.warned,
            "state": None if self.subspace is None else tuple(self.subspace),
            "leading": self._saved_leading(),
        }

    def load_state_dict(self, state: Mapping[str, Any]):
        """Takes up what `state_dict` returned."""
        device = self.matrix.parameter.device

        def there(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        self.method, self.S_step = state["method"], state["S_step"]
        self.usual_move, self.warned = state["usual"], state["warned"]
        self.W = there(state["W"])
        self.last, self.reference = (
            None if S is None else Row(S[None], 0) for S in (there(state[name]) for name in ("S", "reference"))
        )
        self.spectrum = None if state["spectrum"] is None else state["spectrum"].cpu().numpy()
        self.subspace = None if state["state"] is None else State(*(part.to(device) for part in state["state"]))
        self.leading = None
        if state["leading"] is not None:
            step, S, square = state["leading"]
            self.leading = Leading(step, np.array(S), math.sqrt(square))

    def _saved_leading(self) -> tuple[int, list[float], float] | None:
        if self.leading is None:
            return None
        step, S, rest = self.leading
        # Saved is the square, as by earlier versions. Its root is the norm again, bit for bit unless the square leaves
        # the range; rest ** 2 would raise where it does.
        return step, S.tolist(), rest * rest


# What of a parameter its measurement depends on besides its values.
form_of: Callable[[Tensor], tuple[Any, ...]] = operator.attrgetter("shape", "dtype", "device")
