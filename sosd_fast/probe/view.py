"""What a probe tells those who ask it."""

from collections import deque
from html import escape

from sosd_fast.matrices import Matrix
from sosd_fast.probe.account import Account
from sosd_fast.probe.audit import Audit, Auditor
from sosd_fast.probe.followed import some
from sosd_fast.probe.lifetime import OutlivesModel
from sosd_fast.probe.planner import Planner
from sosd_fast.probe.recorder import Recorder
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record

_COLUMNS = ("sd_variation", "sd_variation_topk", "cosine", "sigma_max", "stable_rank", "effective_rank")


class View(OutlivesModel):
    """What can be read of a probe; `Probe` makes the parts that are named here."""

    _planner: Planner
    _auditor: Auditor | None
    _account: Account
    _recorder: Recorder

    def latest(self) -> dict[str, Record]:
        """Returns the last record of each matrix, by name."""
        return dict(self._recorder.latest)

    @property
    def events(self) -> list[Event]:
        """The onsets, spikes, NaN, zeros and audits beyond their bounds that this probe found, the last 10,000."""
        return list(self._recorder.events)

    @property
    def audits(self) -> deque[Audit]:
        """The comparisons with float64, the last 10,000."""
        return self._auditor.audits if self._auditor else deque()

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices that this rank measures."""
        return self._matrices.matrices

    @property
    def seconds(self) -> float:
        """The seconds spent in the probe since the first step, on the host and on GPUs."""
        return self._account.seconds

    @property
    def overhead(self) -> float:
        """The fraction of the time since the first step that was spent in the probe, on the host and on GPUs."""
        return self._account.overhead

    def __reduce__(self):
        """A copy is None, so that a model that keeps its probe can be copied and saved."""
        return type(None), ()

    def __repr__(self) -> str:
        return f"Probe({len(self._matrices)} matrices, step {self.step_count}{'' if self.alive else ', closed'})"

    def __str__(self) -> str:
        closed = "" if self.alive else ", closed"
        model = self._matrices.model()
        of = "a model that is gone" if model is None else type(model).__name__
        follows = f"{len(self._matrices)} matrices of {of}"
        if self._matrices.share.ranks > 1:
            follows += f", the share of rank {self._matrices.share.rank} of {self._matrices.share.ranks}"
        lines = [f"Probe of {follows}{closed}"]
        reasons: dict[str, list[str]] = {}
        for name, why in self._matrices.left_out.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            shown = some(names).removesuffix(f" ({len(names)})")
            lines.append(f"left out: {len(names)} ({shown}), each {why}")
        if lost := [t.name for t in self._matrices.states if t.lost]:
            lines.append(f"cannot be measured at present: {some(lost)}")
        seen, remedy = self._planner.seen, " (where no optimizer of torch trains, call Probe.step after each)"
        lines.append(f"steps seen: {seen}{f', the last is step {self.step_count}' if seen else remedy}")
        if seen and not self._steps.pending and self._matrices.moves():
            lines[-1] += "; the weights have changed since"
        lines += [f"doubtful: {doubt}" for doubt in self._steps.doubts]
        if (shares := self._planner.shares) is None:
            lines.append("measured: the weights as they were when the model was tracked")
        else:
            full, leading = (100 * share for share in shares)
            lines.append(f"measured each step: {full:.3g} % of the matrices in full, {leading:.3g} % by leading values")
        lines.append(f"overhead: {100 * self.overhead:.2g} % of the time")
        if latest := self._recorder.latest:
            oldest = min(latest.values(), key=lambda r: r.step)
            lines.append(f"oldest record: {oldest.name}, of step {oldest.step} ({self.step_count - oldest.step} ago)")
        lines += [f"last event: {event}" for event in self.events[-1:]]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: the lines of `print`, then a table of the last record of each matrix."""
        header = ("matrix", "shape", "step", "method", *_COLUMNS)
        rows = [
            (r.name, "×".join(map(str, r.shape)), r.step, r.method, *(_number(getattr(r, f)) for f in _COLUMNS))
            for r in self.latest().values()
        ]
        table = "".join(
            "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
            for tag, part in (("th", [header]), ("td", rows))
            for row in part
        )
        return f"<pre>{escape(str(self))}</pre><table>{table}</table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
