"""The run directories of several ranks as one: which ranks are missing, and whose matrix a name is."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT_VERSION = 2

log = logging.getLogger("sosd_fast")


class Part(NamedTuple):
    """A run directory that one process wrote."""

    path: Path
    meta: dict[str, Any]

    @property
    def matrices(self) -> list[str]:
        """The names of its matrices, as they were when it was opened."""
        return self.meta.get("matrices", [])


def read_meta(run_dir: Path) -> dict[str, Any]:
    """Reads meta.json.

    Raises:
        ValueError: a damaged one, or one of a newer version.
        OSError: there is none.
    """
    path = run_dir / "meta.json"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"load: expected a file, got {path}, which is none. Remove it.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not all(fits(meta[key]) for key, fits in _FITS.items() if key in meta):
        raise ValueError(
            f"load: expected JSON that says format, version and matrices, got a damaged {path}. Remove it, and track "
            "with this run_dir writes another; the records do not need it."
        )
    if meta.get("version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"load: expected format version {FORMAT_VERSION} or older, got version={meta['version']} in {run_dir}. "
            "Install a newer sosd_fast."
        )
    return meta


def _all(kind: type) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(type(v) is kind for v in values)


_FITS: dict[str, Callable[[Any], bool]] = {
    "version": lambda v: type(v) is int,
    "matrices": _all(str),
    "rank": lambda v: type(v) is int,
    "shared_by": _all(int),
    "settings": lambda v: isinstance(v, dict),
    "next_segment": lambda v: type(v) is int and v >= 0,
}


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
