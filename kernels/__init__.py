"""Kernels: arrays in, arrays out; they know nothing of models, steps or files."""

import contextlib
import functools
import logging
import sys

import torch
from torch import Tensor

from sosd_fast.kernels.precision import full_precision  # noqa: F401

log = logging.getLogger("sosd_fast")  # not warnings: made into errors, those would end a training run

try:
    from sosd_fast import _C  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # not built: every op then runs its torch path
    _C = None

triton = tl = None
# Its import takes half a second, so a torch without CUDA leaves it out, unless someone has it already (the tests do).
if torch.version.cuda is not None or "triton" in sys.modules:
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl  # noqa: F401

interpreted = False  # tests set it: CPU tensors then take the Triton kernels, in Triton's interpreter


def on_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor; warns once where a CUDA tensor has to do without them."""
    if tensor.device.type == "cpu":
        return interpreted
    if tensor.is_cuda and triton is None:
        warn_no_triton()
    return tensor.is_cuda and triton is not None


@functools.cache
def warn_no_triton():
    """Warns, once a process, that the GPU kernels are missing."""
    log.warning(
        "sosd_fast: Triton is not installed, so CUDA tensors take slower torch operations. "
        "Install it with `pip install triton`; `python -m sosd_fast doctor` shows the paths.",
    )


@functools.cache
def warn_no_extension():
    """Warns, once a process, that the C++ kernels are missing."""
    log.warning(
        "sosd_fast._C is not built, so CPU tensors take the slower torch path. "
        "Install a C++17 compiler and run `pip install -e .` again; `python -m sosd_fast doctor` shows the paths.",
    )


def largest_entry(X: Tensor) -> Tensor:
    """The largest |x| of each matrix, (..., 1, 1); NaN where the matrix holds NaN."""
    if X.is_cuda:
        return torch.linalg.vector_norm(X, torch.inf, dim=(-2, -1), keepdim=True)
    # On the CPU 8 matrices of 768 x 768 take 0.8 ms this way, against 6.6 ms by vector_norm.
    return torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below each |x|, float32 or float64, kept to 2^-100 to 2^126 or 2^-900 to 2^1022.

    Within those limits its inverse is normal, and a subnormal x divided by the lowest has a normal square. NaN and Inf
    give the upper limit. The bits of the exponent are taken as they are: torch.ldexp multiplies by pow(2, e), of which
    no document says that it is exact.
    """
    if x.dtype == torch.float32:
        return (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-100, 2.0**126)
    return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp(2.0**-900, 2.0**1022)
