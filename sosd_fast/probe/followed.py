"""The matrices of a model that a probe follows."""

import dataclasses
import functools
import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sosd_fast.distributed.layout import shape_of
from sosd_fast.distributed.share import RankAssignment
from sosd_fast.distributed.spectra import Shards
from sosd_fast.matrices import Matrix
from sosd_fast.probe.holders import Holders
from sosd_fast.probe.measurement import Measurement
from sosd_fast.probe.optimizers import version_of
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
        self._released: dict[int, weakref.ref[Tensor]] = {}  # by what stands in for them
        self._noted: list[tuple[Tensor, Tensor | None, int]] = []  # parameters, some entries, their version
        found = find()
        assert found is not None
        self.share = found.share
        self._in_model = self._parameters()
        self.take(found, step=None)
        self.note_weights()

    def __len__(self) -> int:
        return len(self.states)

    @property
    def matrices(self) -> list[Matrix]:
        """Those followed, with the parameters that something keeps; those that are gone are on the meta device."""
        return [self._with_other(t.matrix, self._kept) for t in self.states]

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

        Whether the followed ones are where they were is looked at every step, which takes 27 us where there are 600
        modules; whether there are more every 20 steps, which takes 0.9 ms then. Neither is looked at where ranks
        measure together, for `fully_shard` puts others in their place during a step.
        """
        if any(map(operator.ne, self._forms, map(form_of, self._looked_at))):  # in C, 0.25 us each
            return True
        if self.shards is not None:
            return False
        return not self._holders.same() or (step % _LOOK_EVERY == 0 and self._parameters() != self._in_model)

    def note_weights(self):
        """Notes some entries of some matrices, for `moves`; of tensors that are plain, for others may be computed."""
        chosen: list[Tensor] = []
        for states in (self.states, self.states[::-1]):
            plain = (p for p in (t.matrix.parameter for t in states) if type(p) in (nn.Parameter, Tensor))
            first = next(plain, None)
            if first is not None:
                chosen.append(first if first.requires_grad else next((p for p in plain if p.requires_grad), first))
        self._noted = [(p, _some_entries(p, copied=True), version_of(p)) for p in chosen]

    def moves(self) -> float:
        """How often weights were changed since they were noted; infinite where they were, but do not count it."""
        most = 0.0
        for p, old, version in self._noted:
            now = _some_entries(p)
            if old is not None and now is not None and (old.shape, old.dtype) == (now.shape, now.dtype):
                if not torch.equal(old.nan_to_num(), now.nan_to_num()):  # waits for a device
                    most = max(most, version_of(p) - version or float("inf"))
        return most

    def search(self, step: int) -> Found | None:
        """Returns the matrices of the model as they are now, to be given to `take`; None where they are the same."""
        self._in_model = self._parameters()
        self._holders = self._held()
        try:
            found = self._find()
            kept = [t.matrix for t in self.states if not t.matrix.parameter.is_meta]  # where the model is gone
        except ValueError as error:  # no matrix is left, say
            log.warning("sosd_fast: the model changed at step %d, and nothing new is measured: %s", step, error)
            found, kept = None, [t.matrix for t in self.states if id(t.matrix.parameter) in self._in_model]
        if found is None and len(kept) < len(self.states) and self.share.ranks == 1 and self.shards is None:
            found = Found(self.share._replace(matrices=kept, parameters=[m.parameter for m in kept]), self.left_out)
        if found is None:
            for t in self.states:
                t.follow(t.matrix)  # the next search waits for another change
            self._note_forms()
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
        self._note_forms()
        self.share, self.shards, self.left_out = share, shards, found.left_out
        self._holders = self._held()
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

    @property
    def released(self) -> bool:
        """Whether the parameters were let go of."""
        return bool(self._released)

    def release(self):
        """Lets go of parameters until `regain`, of copies when they are gone; not of rows that ranks hold together."""
        if self._released or self.shards is not None:
            return
        followed = {id(p): p for p in (*self.share.parameters, *(t.matrix.parameter for t in self.states))}
        stand_ins = {key: torch.empty(p.shape, dtype=p.dtype, device="meta") for key, p in followed.items()}
        of_each: dict[int, list[MatrixState]] = {key: [] for key in followed}
        for t in self.states:
            of_each[id(t.matrix.parameter)].append(t)
        self._released = {
            id(stand_ins[key]): weakref.ref(p, functools.partial(_drop_weights, of_each[key]))
            for key, p in followed.items()
        }
        self._exchange(lambda p: stand_ins[id(p)])
        self._noted, self._holders = [], Holders(None, ())

    def regain(self) -> bool:
        """Takes up the parameters again that something has kept; returns whether there are any."""
        self._exchange(self._kept)
        self._released = {}
        self.note_weights()
        return any(not p.is_meta for p in self.share.parameters)

    def _kept(self, parameter: Tensor) -> Tensor:
        """The parameter for which another one stands in, where something keeps it."""
        released = self._released.get(id(parameter))
        kept = None if released is None else released()
        return parameter if kept is None else kept

    @staticmethod
    def _with_other(matrix: Matrix, other: Callable[[Tensor], Tensor]) -> Matrix:
        return dataclasses.replace(matrix, parameter=other(matrix.parameter))

    def _exchange(self, other: Callable[[Tensor], Tensor]):
        """Puts other parameters in the place of those followed."""
        matrices = [self._with_other(m, other) for m in self.share.matrices]
        self.share = self.share._replace(matrices=matrices, parameters=[other(p) for p in self.share.parameters])
        for t in self.states:
            t.matrix = self._with_other(t.matrix, other)
        self._note_forms()

    def _note_forms(self):
        """Notes what `changed` compares."""
        self._looked_at, self._forms = [t.matrix.parameter for t in self.states], [t.form for t in self.states]

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
                    # Another rank records this matrix; it is measured here with others of its shape.
                    spectrum = None if t.last is None else t.last.tensor
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

    def _held(self) -> Holders:
        return Holders(self.model(), {id(t.matrix.parameter) for t in self.states} if self.shards is None else ())

    def _make(self, matrix: Matrix) -> MatrixState:
        state = MatrixState(matrix, self._method, self._keep_weights)
        state.refers_to_first = self._refer_to_first
        return state


def _drop_weights(states: Iterable[MatrixState], gone: object):  # noqa: ARG001
    for t in states:
        t.W = None


def _some_entries(parameter: Tensor, copied: bool = False) -> Tensor | None:
    """Some entries of a parameter, spread over it where it is contiguous; None where it cannot be read."""
    try:
        if parameter.is_meta:
            return None
        W = parameter.detach()
        count = min(64, W.numel())
        entries = W.as_strided((count,), (W.numel() // count,)) if W.is_contiguous() else W[0]
        return entries.clone() if copied else entries
    except (RuntimeError, IndexError, ZeroDivisionError):  # its memory may have been taken away
        return None
