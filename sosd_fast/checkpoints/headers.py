"""What a file of weights says of its tensors, and how it is asked."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sosd_fast.runs.text import plain


class Header(NamedTuple):
    """What a file says of one of its tensors before the tensor is read."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a name, where torch has no such type
    bytes: int

    @property
    def is_float(self) -> bool:
        """Whether its values are floating-point numbers of two or more bytes, which are read as they are."""
        return isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point and self.dtype.itemsize > 1

    @property
    def is_eight_bit_float(self) -> bool:
        """Whether its values are floating-point numbers of a byte, which may have a scale."""
        return isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point and self.dtype.itemsize == 1

    @property
    def is_matrix(self) -> bool:
        """Whether it has two or more dimensions, none of them empty."""
        return len(self.shape) > 1 and math.prod(self.shape) > 0


def shown(text: object) -> str:
    """A name from a file for a message: of one line, without control characters, of a bounded length."""
    return plain(str(text)[:200])


class WeightFile(Protocol):
    """A file of weights, or a folder that is read as one.

    Attributes:
        in_order: whether the tensors come in the model's order, as a state_dict's do.
        left_out: key -> what it is, of tensors that cannot be read.
    """

    in_order: bool
    left_out: dict[str, str]

    def __init__(self, file: Path): ...

    def headers(self) -> Iterator[Header]:
        """Yields the header of each tensor."""
        ...

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Reads tensors, which are mapped only as long as they live."""
        ...
