"""The run directories of several ranks as one: which ranks are missing, and whose matrix a name is."""

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("sosd_fast")


class Part(NamedTuple):
    """A run directory that one process wrote."""

    path: Path
    meta: dict[str, Any]

    @property
    def matrices(self) -> list[str]:
        """The names of its matrices, as they were when it was opened."""
        return self.meta.get("matrices", [])


def missing_ranks(parts: Iterable[Part]) -> list[int]:
    """The ranks that share the work on the matrices of some parts, and of which there is none."""
    sharing = {tuple(part.meta.get("shared_by", ())) for part in parts}
    return sorted({rank for ranks in sharing for rank in ranks} - {part.meta.get("rank") for part in parts})


def told_apart(parts: Sequence[Part], names: Sequence[Collection[str]]) -> list[dict[str, str]]:
    """Finds names that stand for matrices of different models, and tells them apart by a model's first rank.

    Ranks share one model where they share the work on its matrices, at one time or another; where others share other
    work, a pipeline's next stage for instance, their "0.weight" is another matrix. A part that does not say with whom
    it shared the work is taken to be of any model: release 0.1.0 wrote none else.

    Args:
        parts: the parts.
        names: of the matrices of each.

    Returns:
        For each part {name: name[rank first]} of those that need it.
    """
    first = _first_ranks(parts)
    models: dict[str, set[int]] = {}
    for model, own in zip(first, names, strict=True):
        for name in own:
            models.setdefault(name, set()).update([] if model is None else [model])
    return [
        {name: f"{name}[rank {model}]" for name in own if model is not None and len(models[name]) > 1}
        for model, own in zip(first, names, strict=True)
    ]


def say_faults(run_dir: Path, missing: Sequence[int], apart: Sequence[str]):
    """Logs which ranks are missing in a run directory, and which names are told apart."""
    if missing:
        log.warning(
            "sosd_fast: the records of rank%s %s are missing in %s; they share the work on its matrices. Call track on "
            "every rank, or bring together what ranks wrote to disks of their own.",
            "s" * (len(missing) > 1), ", ".join(map(str, missing)), run_dir,
        )  # fmt: skip
    if apart:
        log.warning(
            "sosd_fast: ranks in %s gave the same names to matrices of models of their own, which are told apart: %s. "
            "Give the parts of a model names that differ; or, where ranks hold copies of one, track the "
            "DistributedDataParallel that keeps them equal.",
            run_dir, ", ".join(apart[:4]) + (f", ... ({len(apart)})" if len(apart) > 4 else ""),
        )  # fmt: skip


def _first_ranks(parts: Sequence[Part]) -> list[int | None]:
    """The first rank of the model of each part; None where a part names no ranks."""
    sharing = [tuple(part.meta.get("shared_by", ())) for part in parts]
    models: list[set[int]] = []
    for ranks in dict.fromkeys(sharing):
        joined = [model for model in models if not model.isdisjoint(ranks)]
        models = [model for model in models if model.isdisjoint(ranks)] + [set(ranks).union(*joined)]
    return [next((min(model) for model in models if ranks and ranks[0] in model), None) for ranks in sharing]
