"""Launches of Triton kernels in a fraction of the time that Triton takes to find the compiled code again.

Before each launch Triton asks of every argument how it may be specialised, 20 to 40 us for a dozen of them, which is
longer than the smaller kernels run. A launch that is like one before, in all numbers, dtypes and alignments, takes the
code that Triton returned for that one.
"""

from typing import Any

from torch import Tensor

from sosd_fast.kernels import triton

_MOST = 4096  # launches that are remembered; bands of 8192 rows take 1280
_known: dict[tuple, tuple[Any, list[str], Any]] = {}  # the kernel lives on, so that its id stays its own


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any):
    """Launches `kernel[grid](**arguments)` on the current device and stream.

    Args:
        kernel: by `triton.jit`; no argument of it is left to its default.
        grid: how many programs there are, up to three numbers.
        arguments: tensors, numbers and Triton's options.
    """
    of_device = triton.runtime.driver.active.get_current_device() if _known else None
    key = (
        id(kernel), grid, of_device, *arguments,
        *[(v.dtype, v.data_ptr() % 16 == 0) if isinstance(v, Tensor) else v for v in arguments.values()],
    )  # fmt: skip
    known = _known.get(key)
    if known is not None:
        run, names, _ = known
        run(*[arguments[name] for name in names])
        return
    compiled = kernel[grid](**arguments)
    if compiled is None or not hasattr(compiled, "__getitem__"):  # the interpreter, and a driver that only compiles
        return
    if len(_known) >= _MOST:
        _known.clear()
    key = (*key[:2], triton.runtime.driver.active.get_current_device(), *key[3:])
    _known[key] = compiled[(*grid, 1, 1)[:3]], [name for name in kernel.arg_names if name in arguments], kernel
