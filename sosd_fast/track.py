"""track(): follows a model, so that its spectra are measured after each optimizer step."""

import logging
import os
import reprlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sosd_fast.distributed.share import RankAssignment, share
from sosd_fast.matrices import DEFAULT_SPLIT, find_matrices
from sosd_fast.probe.followed import Found
from sosd_fast.probe.probe import Probe, probes_of
from sosd_fast.probe.settings import Settings
from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record

METHODS = ("auto", "full", "topk", "exact")

log = logging.getLogger("sosd_fast")


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_fraction(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= 1


def _are_patterns(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Collection) and all(isinstance(p, str) for p in value))


def _is_split(value: object) -> bool:
    def is_parts(parts: object) -> bool:
        return _is_whole(parts) or (isinstance(parts, Sequence) and len(parts) > 0 and all(map(_is_whole, parts)))

    return isinstance(value, Mapping) and all(isinstance(p, str) and is_parts(n) for p, n in value.items())


def _is_spectrum(value: object) -> bool:
    try:
        return torch.as_tensor(value, dtype=torch.float64).ndim == 1
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_reference(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_spectrum(S) for name, S in value.items())
    return value is None or (isinstance(value, str) and value == "initial")


def _are_optimizers(value: object) -> bool:
    several = list[object](value) if isinstance(value, Collection) and not isinstance(value, str | Mapping) else [value]
    return all(isinstance(o, torch.optim.Optimizer) for o in several)


class _Check(NamedTuple):
    """What an argument of `track` must be."""

    fits: Callable[[Any], bool]
    expected: str
    remedy: str
    or_none: bool = False


_CHECKS = {
    "model": _Check(lambda v: isinstance(v, nn.Module), "an nn.Module", "Pass the model itself."),
    "optimizers": _Check(
        _are_optimizers,
        "torch optimizers",
        "None takes every one that fits; for loops without a torch optimizer pass [] and call Probe.step.",
        True,
    ),
    "method": _Check(
        lambda v: isinstance(v, str) and v in METHODS, f"one of {', '.join(METHODS)}", "Leave it out for 'auto'."
    ),
    "k": _Check(_is_whole, "a whole number of at least 1", "32 is the default."),
    "budget": _Check(_is_fraction, "a fraction of the step time, above 0 and at most 1", "0.01 is one percent."),
    "every": _Check(_is_whole, "a whole number of at least 1", "1 measures each step."),
    "include": _Check(_are_patterns, "shell patterns of parameter names", "('*',) takes all."),
    "exclude": _Check(_are_patterns, "shell patterns of parameter names", "() leaves out none."),
    "split": _Check(
        _is_split,
        "a mapping from shell patterns to whole numbers of parts, or the parts' sizes, of at least 1",
        "{'*qkv.weight': 3} cuts into three, {} cuts nothing.",
    ),
    "reference": _Check(
        _is_reference, "'initial', a mapping from names to spectra, or None", "A spectrum is (r,); use 'initial'."
    ),
    "run_dir": _Check(
        lambda v: isinstance(v, str | os.PathLike) and isinstance(os.fspath(v), str) and os.fspath(v) != "",
        "the path of a directory",
        "None keeps the records in memory.",
        True,
    ),
    "on_record": _Check(callable, "a function of a Record", "None calls nothing.", True),
    "on_event": _Check(callable, "a function of an Event", "None calls nothing.", True),
    "step": _Check(lambda v: _is_whole(v, 0), "a number of steps taken before now", "None continues.", True),
    "audit": _Check(lambda v: isinstance(v, bool), "True or False", "True is the default."),
    "theory_bound": _Check(lambda v: isinstance(v, bool), "True or False", "False is the default."),
}


def _check(arguments: dict[str, Any]):
    """Raises a ValueError for the first argument that is none of what it may be."""
    for name, check in _CHECKS.items():
        value = arguments[name]
        if not (value is None and check.or_none or check.fits(value)):
            shown = type(value).__name__ if name == "model" else reprlib.repr(value)
            raise ValueError(f"track: expected {check.expected}, got {name}={shown}. {check.remedy}")


def track(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    method: str = "auto",
    k: int = 32,
    budget: float = 0.01,
    every: int = 1,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split: Mapping[str, int | Sequence[int]] = DEFAULT_SPLIT,
    reference: str | Mapping[str, Tensor] | None = "initial",
    run_dir: str | os.PathLike | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
    step: int | None = None,
    audit: bool = True,
    theory_bound: bool = False,
) -> Probe:
    """Measures the singular values of a model's matrices after every optimizer step, until the model is gone.

    The probe never writes a weight, computes a parametrization nor draws a random number: training is bit for bit what
    it is without it. An error inside it is logged, stops the probe, and leaves the run alone. What fails alone ends
    alone: a matrix that cannot be measured has NaN records until it can; where `run_dir` cannot be written any more,
    records go on in memory; a process that is forked measures nothing until it calls `track` itself.

    CUDA tensors are measured on a stream of their own, which the next optimizer step waits for; records come when they
    are there, some steps later, and `flush` waits for them. Weights that something else changes meanwhile may be seen
    half changed, and steps inside a CUDA graph that you capture and replay yourself are not seen.

    A step is over when the outermost `step` of an optimizer returns, and the weights are measured as they are then.
    Optimizers that step in turn make one step. Where one of them steps every n-th time, the steps of the one that steps
    most often count, a Wasserstein GAN's critic's for instance, and each is measured before the next one begins. Other
    weights, a schedule-free optimizer's averages or a replayed graph's, are measured by `Probe.step` at the point where
    the model holds them, with `optimizers=[]`; docs/steps.md shows how.

    Several ranks share the work. Call it on each of them, with the model as DistributedDataParallel, `fully_shard` or
    `parallelize_module` made it: each measures and records its matrices, and writes them to run_dir/rank-00000 and so
    on, which `sosd_fast.load(run_dir)` merges. DTensors may be placed in any way on any meshes, beside plain parameters
    too; those that hold partial sums are left out. Plain ones that differ from rank to rank get the rank in their name.
    What the ranks hold parts of they measure in steps that all of them take together: what stops the probe of one of
    them stops the run at the ranks' time limit. Copies are known by the DistributedDataParallel or the like that keeps
    them equal, whatever is around it. Stages of a pipeline each track their own modules, all with one run_dir.

    Args:
        model: any nn.Module. Measured once right away, so that the first step has something to compare with.
        optimizers: the ones whose steps count; None takes every optimizer that holds one of the matrices, an
            empty list none: call `Probe.step`. What accelerate, Fabric or Lightning put around one will do as well.
        method: "full", all singular values every step; "topk", the k leading ones; "exact", all of them by
            `torch.linalg.svdvals`; "auto", the leading ones every step and full spectra as the budget allows, every
            step where it allows that.
        k: leading values to follow. Matrices with fewer than 3 k values are measured in full instead.
        budget: of the step time, for "auto".
        every: measure each so many steps.
        include: shell patterns of parameter names.
        exclude: shell patterns of parameter names.
        split: fused matrices; see `sosd_fast.matrices.find_matrices`.
        reference: spectra that the cosine is taken to: "initial", the first one of each matrix that is not zero; a
            mapping from names to spectra; or None.
        run_dir: where records are written; None keeps the last 10,000 in memory.
        on_record: called with each record. It may use the probe and train other tracked models. Where it raises, that
            is logged, and after ten failures in a row it is not called again.
        on_event: called, in the same way, with each `Event`: an onset of stability, a spike of SD variation, a matrix
            that has become NaN or zero, an audit beyond its bound.
        step: steps taken before now. None continues after the last step in `run_dir`, or starts at 0; a number cuts
            off what `run_dir` holds of later steps.
        audit: now and then recompute one matrix in float64 and compare, for a twentieth of what the full spectra cost;
            an error beyond its bound is a warning, and that matrix is measured in float64 from then on. CPU only.
        theory_bound: also record the bound on each SD variation that the size of the update gives. Keeps a float32
            copy of the weights.

    Returns:
        The `Probe`; keep it to read the records, or not.

    Raises:
        ValueError: a model without matrices or without any that can be measured, among them one that DeepSpeed's ZeRO
            stage 3 partitioned, or a bad argument; parts of matrices whose other parts lie on ranks that do not make
            the same call within 45 seconds.
    """
    if isinstance(optimizers, Iterator):
        optimizers = list(optimizers)  # to be gone through more than once
    _check(dict(locals()))
    if isinstance(reference, Mapping):
        names = [m.name for m in find_matrices(model, include, exclude, split)]
        if not set(reference) & set(names):
            raise ValueError(
                "track: expected spectra by the names of matrices, got "
                f"reference={{{', '.join(map(repr, reference))}}}"
                f". The matrices are {', '.join(names[:8])}."
            )
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = [optimizers]
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"track: expected weights, got model={type(model).__name__} on the meta device. Track it later."
        )
    partitioned = _partitioned(model)
    if partitioned and not any(p.ndim >= 2 and p.numel() for p in model.parameters()):
        raise ValueError(
            f"track: expected whole parameters, got model={type(model).__name__}, whose {partitioned[0]} "
            f"and others are {_ZERO_3}. Use stage 2, or measure the checkpoints: python -m sosd_fast analyze."
        )
    this = weakref.ref(model)
    said: dict[str, str] = {}

    known: RankAssignment | None = None

    def find() -> Found | None:
        nonlocal known
        model = this()
        if model is None:
            return None
        left_out: dict[str, str] = {}
        unreadable: dict[str, str] = {}
        matrices = find_matrices(model, include, exclude, split, left_out, unreadable)
        found = share(model, matrices, known)
        known = found if found.group is not None else None  # which keeps weights alive
        left_out.update(found.left_out)
        unreadable.update(found.left_out)
        for name in _partitioned(model):
            left_out[name] = unreadable[name] = f"is {_ZERO_3}"
        new = {name: why for name, why in unreadable.items() if name not in said}
        if new:
            said.update(new)
            log.warning(
                "sosd_fast: left out, for their values cannot be read as they are: %s. Pass exclude to leave them out "
                "silently.",
                ", ".join(f"{name} {why}" for name, why in new.items()),
            )
        return Found(found, left_out)

    settings = Settings(
        method=method,
        k=k,
        budget=budget,
        every=every,
        reference=reference,
        run_dir=run_dir,
        on_record=on_record,
        on_event=on_event,
        step=step,
        audit=audit,
        theory_bound=theory_bound,
    )
    probe = Probe(this, find, optimizers, settings)
    probes_of.setdefault(model, []).append(probe)  # lives as long as the model does
    return probe


_ZERO_3 = "partitioned by DeepSpeed's ZeRO stage 3"


def _partitioned(model: nn.Module) -> list[str]:
    """The names of parameters that hold no values, for DeepSpeed's ZeRO stage 3 gathers these while they are used."""
    return [
        name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", ())) > 1 and not p.numel()
    ]  # fmt: skip
