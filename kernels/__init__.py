"""Kernels: arrays in, arrays out; they know nothing of models, steps or files."""

import functools
import warnings

try:
    from sosd_fast import _C
except ImportError:  # not built: every op then runs its torch path
    _C = None


@functools.cache
def warn_no_extension():
    """Warns, once a process, that the C++ kernels are missing."""
    warnings.warn(
        "sosd_fast._C is not built, so CPU tensors take the slower torch path. "
        "Install a C++17 compiler and run `pip install -e .` again; `python -m sosd_fast doctor` shows the paths.",
        stacklevel=3,
    )
