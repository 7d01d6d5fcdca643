"""What a probe is told once, when it is made."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sosd_fast.runs.events import Event
from sosd_fast.runs.records import Record

Spectrum = Tensor | Sequence[float] | Any  # Any: an array of NumPy


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `sosd_fast.track` of the same names, where each is explained."""

    method: str = "auto"
    k: int = 32
    budget: float = 0.01
    every: int = 1
    reference: str | Mapping[str, Spectrum] | None = "initial"
    run_dir: str | os.PathLike[str] | None = None
    on_record: Callable[[Record], None] | None = None
    on_event: Callable[[Event], None] | None = None
    step: int | None = None
    audit: bool = True
    theory_bound: bool = False
