"""Checkpoints: everything that a run needs to go on as if it had not stopped, whatever the number of processes.

RUN_DIR/checkpoints/step-000100/ holds weights and optimizer state in the format of torch.distributed.checkpoint (each
rank writes its shard; another number of ranks can read them) and, of each rank, its random states and its probe's
state. A checkpoint appears under its name when it is whole.
"""

import contextlib
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from training.parallel import Parallel

KEEP = 2


@contextlib.contextmanager
def _alone_is_fine():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted((run_dir / "checkpoints").glob("step-*"), key=step_of)
    return found[-1] if found else None


def save(
    run_dir: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], parallel: Parallel, probe=None
) -> Path:
    """Writes the checkpoint of a step and drops all but the newest KEEP; every rank must call it."""
    path = run_dir / "checkpoints" / f"step-{step:06d}"
    if path.exists():  # it holds the same: a run is a function of its step
        return path
    partial = path.with_name(f"partial-{step:06d}")
    if parallel.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    weights, states = get_state_dict(model, optimizers)
    with _alone_is_fine():
        dcp.save({"model": weights, "optimizers": states}, checkpoint_id=partial)
    own = {"ranks": parallel.ranks, "rng": torch.get_rng_state(), "probe": probe.state_dict() if probe else None}
    if parallel.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(parallel.device)
    torch.save(own, partial / f"rank-{parallel.rank:05d}.pt")
    parallel.barrier()
    if parallel.main:
        partial.rename(path)
        for old in sorted(path.parent.glob("step-*"), key=step_of)[:-KEEP]:
            shutil.rmtree(old)
    parallel.barrier()
    return path


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], parallel: Parallel) -> dict | None:
    """Reads a checkpoint into a model and its optimizers, which must be built as they were.

    Returns:
        The state of this rank's probe, or None where there is none, or where it was saved by another number of ranks.
    """
    weights, states = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizers": states}
    with _alone_is_fine():
        dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state["optimizers"])
    own = path / f"rank-{parallel.rank:05d}.pt"
    saved = torch.load(own, map_location="cpu") if own.exists() else {"ranks": None}
    if saved["ranks"] != parallel.ranks:
        return None
    torch.set_rng_state(saved["rng"])
    if parallel.device.type == "cuda" and "cuda_rng" in saved:
        torch.cuda.set_rng_state(saved["cuda_rng"], parallel.device)
    return saved["probe"]


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.split("-")[1])
