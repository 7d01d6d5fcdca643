"""Kernels: arrays in, arrays out; they know nothing of models, steps or files."""

import contextlib
import functools
import logging

import torch

log = logging.getLogger("sosd_fast")  # not warnings: made into errors, those would end a training run

try:
    from sosd_fast import _C
except ImportError:  # not built: every op then runs its torch path
    _C = None


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
