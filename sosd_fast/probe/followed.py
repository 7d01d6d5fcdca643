"""The matrices of a model that a probe follows."""

import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sosd_fast.distributed.layout import shape_of
from sosd_fast.distributed.share import RankAssignment
from sosd_fast.distributed.spectra import Shards
from sosd_fast.matrices import Matrix
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.state import MatrixState, form_of

_LOOK_EVERY = 20  # steps

log = logging.getLogger("sosd_fast")


def some(names: Collection[str], most: int = 4) -> str:
    """Returns the first names, and how many there are where there are more."""
    first = ", ".join(itertools.islice(names, most))
    return first if len(names) <= most else f"{first}, ... ({len(names)})"


class Found(NamedTuple):
    """The matrices of a model as they are now."""

    share: RankAssignment  # what this rank measures of them
    left_out: Mapping[str, str] = {}  # parameters that are not measured, and why


class FollowedMatrices:
    """The matrices of a model that a probe follows, those that it has gained and lost included.

    Args:
        model: which the probe does not keep alive.
        find: returns the matrices as they are now, None where the model is gone.
        method: of `sosd_fast.track`.
        keep_weights: of every `MatrixState`.
    """

    def __init__(
        self,
        model: "weakref.ref[nn.Module]",
        find: Callable[[], Found | None],
        method: str = "auto",
        keep_weights: bool = False,
    ):
        self.model, self._find = model, find
        self._method, self._keep_weights = "exact" if method == "exact" else "auto", keep_weights
        self.states: list[MatrixState] = []
        self.shards: Shards | None = None
        self.left_out: Mapping[str, str] = {}
        self._refer_to_first = False
        self._in_model: frozenset[int] = frozenset()  # the parameters at the last search
        found = find()
        assert found is not None
        self.share = found.share
        self._in_model = self._parameters()
        self.take(found, step=None)
        self._first_entries = self._entries()

    def __len__(self) -> int:
        return len(self.states)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The (m, n) of each matrix."""
        return [t.shape for t in self.states]

    @property
    def on_gpu(self) -> bool:
        """Whether one of the matrices is on a CUDA device."""
        return any(t.matrix.parameter.is_cuda for t in self.states)

    def changed(self, step: int) -> bool:
        """Whether the data of a parameter were replaced by data of another form, or the model has other parameters.

        Its parameters are looked at every 20 steps, which takes 1.2 ms then where there are 600 modules; and not
        where ranks measure together, for `fully_shard` puts others in their place during a step.
        """
        if any(t.form != form_of(t.matrix.parameter) for t in self.states):
            return True
        return step % _LOOK_EVERY == 0 and self.shards is None and self._parameters() != self._in_model

    def moved(self) -> bool:
        """Whether weights differ from those first followed, by some of their entries; waits for a device."""
        now = self._entries()
        return any(
            old is not None and new is not None and old.shape == new.shape and not torch.equal(old, new)
            for old, new in zip(self._first_entries, now, strict=False)
        )

    def _entries(self) -> list[Tensor | None]:
        """The first row of some matrices; of tensors that are plain, for others may be computed or spread."""
        found: list[Tensor | None] = []
        for p in [p for p in (t.matrix.parameter for t in self.states) if type(p) in (nn.Parameter, Tensor)][:4]:
            try:
                found.append(p.detach()[0].clone())
            except (RuntimeError, IndexError):  # its memory may have been taken away
                found.append(None)
        return found

    def search(self, step: int) -> Found | None:
        """Returns the matrices of the model as they are now, to be given to `take`; None where they are the same."""
        self._in_model = self._parameters()
        try:
            found = self._find()
        except ValueError as error:  # no matrix is left, say; the probe follows those it has
            found = None
            log.warning("sosd_fast: the model changed at step %d, and its matrices stay as they were: %s", step, error)
        if found is None:
            for t in self.states:
                t.follow(t.matrix)  # the next search waits for another change
            return None
        followed = [(t.name, id(t.matrix.parameter), t.form) for t in self.states]
        now = [(m.name, id(m.parameter), form_of(m.parameter)) for m in found.share.matrices]
        return None if now == followed else found

    def take(self, found: Found, step: int | None) -> list[int]:
        """Follows the matrices found; those already followed keep what is remembered of them.

        Args:
            found: the matrices.
            step: at which the model changed; None at the beginning, when nothing is said of it.

        Returns:
            The places of the new ones.
        """
        share = found.share
        names = {m.name for m in share.matrices}
        # Still in the model and not found under another name: their data may have been taken away for a while.
        hidden = self._parameters() - {id(m.parameter) for m in share.matrices}
        alone = share.ranks == 1 and share.group is None  # ranks may exchange matrices
        missing = [t for t in self.states if t.name not in names] if alone else []
        unreadable = [t for t in missing if id(t.matrix.parameter) in hidden]
        known, names_before = {(t.name, t.shape): t for t in self.states}, {t.name for t in self.states}
        self.states = [known.get((m.name, shape_of(m))) or self._make(m) for m in share.matrices]
        other_form: list[str] = []
        for t, m in zip(self.states, share.matrices, strict=True):
            if (t.name in names_before) if t.form is None else (t.form[1] != m.parameter.dtype):
                other_form.append(t.name)
            t.follow(m)
        for t in unreadable:
            t.follow(t.matrix)
        self.states += unreadable
        shards = None
        if share.group is not None:
            boxes = [each.boxes[share.rank] for each in share.common]
            shards = Shards(share.matrices, boxes, share.spreads, share.group)
        for place, t in enumerate(self.states):
            t.shards, t.place = shards, place
        self.share, self.shards, self.left_out = share, shards, found.left_out
        followed = set(map(id, known.values()))
        new = [t.place for t in self.states if id(t) not in followed]
        if step is not None:
            if more := [self.states[place].name for place in new if self.states[place].name not in names_before]:
                log.info("sosd_fast: %d more matrices are measured from step %d on.", len(more), step)
            if other_form:
                log.warning(
                    "sosd_fast: %s got another shape or dtype after step %d; measured as they are now from there on.",
                    some(other_form),
                    step,
                )
            if gone := [t.name for t in missing if t not in unreadable]:
                log.warning("sosd_fast: %s are not measured after step %d any more.", ", ".join(gone), step)
        return new

    def check_measurable(self, measurements: list[Measurement]):
        """Raises a ValueError where none of the matrices of a process alone could be measured."""
        error = measurements[0].failure
        if error and self.share.ranks == 1 and all(found.lost for found in measurements):
            raise ValueError(
                f"track: expected at least one matrix that can be measured, got {measurements[0].name}, which raises "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Exclude such parameters, or track the model "
                "when they can be read."
            ) from error

    def refer(self, reference: str | Mapping[str, Any] | None):
        """Sets what cosines are taken to, after the first measurement; see `sosd_fast.track`.

        Raises:
            ValueError: a spectrum that does not fit its matrix.
        """
        self._refer_to_first = reference == "initial"
        for t in self.states:
            t.refers_to_first = self._refer_to_first
            if isinstance(reference, Mapping):
                spectrum = reference.get(t.name)
                if spectrum is None and reference and not t.mine:
                    spectrum = t.S  # another rank records this matrix; it is measured here with others of its shape
                if spectrum is not None and len(spectrum) != min(t.shape):
                    raise ValueError(
                        f"track: expected {min(t.shape)} singular values for {t.name}, got a reference with "
                        f"{len(spectrum)}. Pass spectra of this model."
                    )
                t.set_reference(spectrum)
            else:
                t.refer()

    def update(self, measurements: list[Measurement]) -> tuple[list[int], list[int]]:
        """Keeps the results of a step.

        Returns:
            The places of the matrices that must be measured in full, for only the leading ones of their singular
            values are known, and of those whose singular distributions moved unusually far.
        """
        lacking = [m.place for m in measurements if m.leading and self.states[m.place].lacks_spectrum(m)]
        return lacking, [m.place for m in measurements if self.states[m.place].update(m)]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Returns what the next measurements depend on, by the names of the matrices."""
        return {t.name: t.state_dict() for t in self.states}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], step: int, now: int):
        """Takes up what `state_dict` returned for the same matrices at a step, which must be the step now.

        Raises:
            ValueError: another step or other matrices.
        """
        if step != now or list(state) != [t.name for t in self.states]:
            raise ValueError(
                f"Probe.load_state_dict: expected the state of {len(self.states)} matrices at step {now}, got "
                f"{len(state)} at step={step}. Pass that step to track, and the same model."
            )
        for t in self.states:
            t.load_state_dict(state[t.name])

    def _parameters(self) -> frozenset[int]:
        model = self.model()
        return frozenset(map(id, model.parameters())) if model is not None else frozenset()

    def _make(self, matrix: Matrix) -> MatrixState:
        state = MatrixState(matrix, self._method, self._keep_weights)
        state.refers_to_first = self._refer_to_first
        return state
