"""Kernels: arrays in, arrays out; they know nothing of models, steps or files."""

import contextlib
import functools
import logging
import sys

import torch
from torch import Tensor

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


@contextlib.contextmanager
def full_precision(device_type: str):
    """Turns off autograd, autocast, and TF32 or bfloat16 products: those err by 1e-6 and more in a spectrum."""
    backends = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b.matmul, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    legacy = None if backends else torch.get_float32_matmul_precision()  # torch < 2.9
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            if legacy:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
            if legacy:
                torch.set_float32_matmul_precision(legacy)
