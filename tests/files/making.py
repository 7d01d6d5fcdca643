"""What the functions that make files share: a table of them, and how they write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor


class Made(NamedTuple):
    """A file, and what analyze makes of it.

    Attributes:
        path: of the file or folder.
        matrices: name -> values; empty where it is refused.
        says: a pattern of the refusal, or of a note on what is left out.
        steps: of its checkpoints.
        needs: a package without which it is refused.
    """

    path: Path
    matrices: dict[str, Tensor]
    says: str = ""
    steps: tuple[int, ...] = (0,)
    needs: str = ""


FILES: dict[str, Callable[[Path], Made]] = {}


def file(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
    FILES[make.__name__] = make
    return make


def made(path: Path, value, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".safetensors":
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in value.items()}, path, **options)
    elif path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path, **options)
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
