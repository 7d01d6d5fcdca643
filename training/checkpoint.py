"""Checkpoints: everything that a run needs to go on as if it had not stopped, whatever the number of processes.

RUN_DIR/checkpoints/step-000100/ holds weights and optimizer state in the format of torch.distributed.checkpoint (each
rank writes its shard; another number of ranks can read them) and, of each rank, its random states and its probe's
state. A checkpoint appears under its name when it is whole, and holds finite weights. One that is damaged is passed
over for the one before. What a checkpoint says is data: nothing in it is run, whoever wrote it.
"""

import contextlib
import dataclasses
import enum
import io
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from training.parallel import Parallel

KEEP = 2
FAILURES = (Exception, CheckpointException)  # the latter is no Exception


@contextlib.contextmanager
def _alone_is_fine():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def all_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch("step-[0-9]{1,18}", path.name)]
    return sorted(found, key=step_of)


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(all_of(run_dir)), None)


def save(
    run_dir: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], parallel: Parallel, probe=None
) -> Path:
    """Writes the checkpoint of a step and drops all but the newest KEEP up to it; every rank must call it.

    Raises:
        ValueError: weights that are not finite; nothing is written.
        OSError: it could not be written, as on a full disk; what there was of it is removed, older ones stay.
    """
    path = run_dir / "checkpoints" / f"step-{step:06d}"
    partial = path.with_name(f"partial-{step:06d}")
    if not _finite(model, parallel):
        raise ValueError(f"expected finite weights, got NaN or Inf in those of step {step}")
    error = None
    try:
        if parallel.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as failed:
        error = failed
    if not _failed_anywhere(error, parallel):
        error = _write(partial, model, optimizers, parallel, probe)
    if _failed_anywhere(error, parallel):
        if parallel.main:
            shutil.rmtree(partial, ignore_errors=True)
        parallel.barrier()
        raise OSError(_reason(error)) from error
    if parallel.main:
        shutil.rmtree(path, ignore_errors=True)  # a damaged one, or the run would have gone on from there
        partial.rename(path)
        found = all_of(run_dir)
        kept = [each for each in found if step_of(each) <= step][-KEEP:]
        for other in found:  # later ones are damaged, too
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
    parallel.barrier()
    return path


def _write(partial: Path, model, optimizers, parallel: Parallel, probe) -> BaseException | None:
    """Writes into a folder; returns what failed on this rank."""
    weights, states = get_state_dict(model, optimizers)
    try:
        with _alone_is_fine():
            dcp.save({"model": weights, "optimizers": states}, checkpoint_id=partial)
        own = {"ranks": parallel.ranks, "rng": torch.get_rng_state(), "probe": probe.state_dict() if probe else None}
        if parallel.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(parallel.device)
        with open(partial / f"rank-{parallel.rank:05d}.pt", "wb") as file:
            torch.save(own, file)
            file.flush()
            os.fsync(file.fileno())
    except FAILURES as error:
        return error
    return None


def restore(
    run_dir: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], parallel: Parallel, say=print
) -> tuple[int, dict | None]:
    """Reads the newest checkpoint that can be read into a model and its optimizers; every rank must call it.

    Args:
        run_dir: the run.
        model: built as it was.
        optimizers: of the model, built as they were.
        parallel: the ranks.
        say: told of each checkpoint that is passed over, on rank 0.

    Returns:
        Its step, 0 where there is none, and the state of this rank's probe, as `load` does.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    paths = parallel.agree(all_of(run_dir))
    for path in reversed(paths):
        error, state = None, None
        try:
            state = load(path, model, optimizers, parallel)
        except FAILURES as failed:
            error = failed
        if not _failed_anywhere(error, parallel):
            return step_of(path), state
        if parallel.main:
            say(f"run: cannot go on from {path} ({_reason(error)}); trying the checkpoint before it.")
    if paths:
        raise ValueError("none of its checkpoints can be read. Start anew, or bring back one that is whole")
    return 0, None


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], parallel: Parallel) -> dict | None:
    """Reads a checkpoint into a model and its optimizers, which must be built as they were.

    Returns:
        The state of this rank's probe, or None where there is none, or where it was saved by another number of ranks.

    Raises:
        ValueError: weights that are not finite.
        Exception: a damaged checkpoint, in many ways; or CheckpointException, which is none.
    """
    weights, states = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizers": states}
    _Reader(path).read_metadata()  # what is wrong with it is said in one line here, and in many by torch
    with _alone_is_fine():
        dcp.load(state, storage_reader=_Reader(path), planner=_Planner())
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state["optimizers"])
    if not _finite(model, parallel):
        raise ValueError("its weights are NaN or Inf")
    own = path / f"rank-{parallel.rank:05d}.pt"
    saved = torch.load(own, map_location="cpu", weights_only=True) if own.exists() else {"ranks": None}
    if saved["ranks"] != parallel.ranks:
        return None
    torch.set_rng_state(saved["rng"])
    if parallel.device.type == "cuda" and "cuda_rng" in saved:
        torch.cuda.set_rng_state(saved["cuda_rng"], parallel.device)
    return saved["probe"]


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.split("-")[1])


def _finite(model: nn.Module, parallel: Parallel) -> bool:
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    wrong = sum((~torch.isfinite(p.detach())).any().float() for p in local)
    return not float(parallel.sum(torch.as_tensor(wrong, device=parallel.device)))


def _failed_anywhere(error: BaseException | None, parallel: Parallel) -> bool:
    return bool(float(parallel.sum(torch.tensor(float(error is not None), device=parallel.device))))


def _reason(error: BaseException | None) -> str:
    """One line of what failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip().partition("\n")[0][:300] if error else "another rank failed"
    return re.sub(r"[^ -~]", "?", text) or type(error).__name__


_PLAIN = ("pathlib.PosixPath", "pathlib._local.PosixPath", "torch.Size", "torch.serialization._get_layout")


class _Unpickler(pickle.Unpickler):
    """Unpickles the index of torch.distributed.checkpoint: its own plain classes, and no function.

    `sosd_fast.checkpoints` reads the index, too, but makes stand-ins of what it names, and gives whole matrices.
    torch's loader takes nothing but `Metadata` itself, and brings each rank its part of the optimizer's state.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        elif f"{module}.{name}" in _PLAIN:
            return super().find_class(module, name)
        elif module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}, and nothing in a checkpoint is run")


class _Reader(dcp.FileSystemReader):
    """Reads the index as data, and no file outside the checkpoint."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("its index is none")
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path or getattr(
                stored, "transform_descriptors", None
            ):
                raise pickle.UnpicklingError(f"its index names a file {stored.relative_path!r}")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads what is no tensor as data, where torch's own unpickles whatever is there."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        data = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), data)
        data.seek(0)
        super().load_bytes(read_item, data)
