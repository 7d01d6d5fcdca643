"""Kernels: arrays in, arrays out; they know nothing of models, steps or files."""

import contextlib
import functools
import logging
import sys
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from sosd_fast.kernels.namesake import give_way
from sosd_fast.kernels.precision import full_precision  # noqa: F401

if __name__ == "kernels":  # imported where the repository's folder is on sys.path, by someone who means another package
    give_way()

log = logging.getLogger("sosd_fast")  # not warnings: made into errors, those would end a training run

try:
    from sosd_fast import _C  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # not built: every op then runs its torch path
    _C = None

triton = tl = None
# Its import takes half a second, so a torch without CUDA and ROCm leaves it out, unless someone has it already (the
# tests do).
if torch.version.cuda is not None or torch.version.hip is not None or "triton" in sys.modules:
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl  # noqa: F401

interpreted = False  # tests set it: CPU tensors then take the Triton kernels, in Triton's interpreter


class Backend(StrEnum):
    """What runs an operation."""

    CPP = "cpp"
    TRITON = "triton"
    TORCH = "torch"


_IN_CPP = {"svdvals", "topk_svdvals", "singular_distribution"}
_IN_TRITON = {
    "svdvals", "topk_svdvals", "syrk", "tridiagonal", "sturm", "eigh", "singular_distribution", "newton_schulz"
}  # fmt: skip
# Sides of matrices up to which the Triton kernels are the faster ones.
LARGEST = {"tridiagonal": 8192}


def backend_of(op: str, tensor: Tensor) -> Backend:
    """Tells what runs an operation on a tensor, and warns once of what is missing.

    Args:
        op: the name of a function of `sosd_fast` or `sosd_fast.kernels`.
        tensor: it is called with.
    """
    if op in LARGEST and tensor.shape[-1] > LARGEST[op]:
        return Backend.TORCH
    if tensor.is_cuda and op in _IN_TRITON:
        if triton is not None:
            return Backend.TRITON
        warn_missing("Triton")
    elif tensor.device.type == "cpu":
        if interpreted and op in _IN_TRITON:
            return Backend.TRITON
        if op in _IN_CPP:
            if _C is not None:
                return Backend.CPP
            warn_missing("extension")
    return Backend.TORCH


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What instructions this machine's CPU has, as Linux names them; none on other systems.

    torch.cpu.get_capabilities tells the same, but not before torch 2.10.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, Arm
                return frozenset(flags.split())
    return frozenset()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively, and torch has the library that does; others are slow at it."""
    return torch.backends.mkldnn.is_available() and not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


_MISSING = {
    "Triton": "sosd_fast: Triton is not installed, so CUDA tensors take slower torch operations. Install it with "
    "`pip install triton`; `python -m sosd_fast doctor` shows the paths.",
    "extension": f"sosd_fast._C is not built in {Path(__file__).parent.parent}, so CPU tensors take slower torch "
    "operations. Run `pip install -e .` in the project's folder, with a C++17 compiler; `python -m sosd_fast doctor` "
    "shows the paths.",
}


@functools.cache
def warn_missing(what: str):
    """Warns, once a process, that kernels are missing: "Triton" or "extension"."""
    log.warning(_MISSING[what])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def is_hopper(device: torch.device) -> bool:
    """Whether a device is an H100 or H200, whose compiler does with fewer registers than others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def stream_of(device: torch.device) -> tuple[torch.device, int] | None:
    """What to keep tables on a device under: the device and its current stream, on which they are copied and read.

    None while a graph is captured, which would go on to read a table after it was dropped.
    """
    if device.type != "cuda":
        return device, 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return device, torch.cuda.current_stream(device).cuda_stream


def precision_of_products() -> str:
    """How Triton multiplies float32 on this GPU: by three TF32 products, or by what ROCm has."""
    return "tf32x3" if torch.version.hip is None else "ieee"


def options_of(config: dict[str, int]) -> dict[str, int]:
    """A kernel's configuration with what this GPU's compiler knows: ROCm's sets no limit of registers."""
    return {k: v for k, v in config.items() if k != "maxnreg" or torch.version.hip is None}


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


def scale_of(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Powers of two to multiply matrices by, so that the reduction of their Gram matrices stays in a dtype's range.

    The reduction squares the entries of a Gram matrix: in float32, of a long matrix of entries near 2^29, to infinity.

    Args:
        largest: (B,), the largest |x| of each matrix.
        dtype: float32 or float64, of the Gram matrix.

    Returns:
        scale (B,) float64, 1 where all is well, and finite (B,), whether the matrix is: NaN or Inf also get 1.
    """
    finite = torch.isfinite(largest)
    power = power_of_two(torch.where(finite & (largest > 0), largest, 1.0).double())
    if dtype == torch.float32:  # which has to hold the factor
        power = power.clamp(2.0**-126, 2.0**126)
    tame = (power > 2.0**-16) & (power < 2.0**16)
    return torch.where(tame, 1.0, 1 / power), finite
