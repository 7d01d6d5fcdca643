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


class Launcher:
    """Launches kernels that share tensors; called on the device and stream that are current when it is made.

    Args:
        tensors: by the names of the kernels' arguments. A kernel takes those that it has names for.
    """

    def __init__(self, **tensors: Tensor):
        self._tensors = tensors
        self._stream = self._kind = None
        if _known:  # else there may be no driver
            self._look()

    def _look(self):
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        self._stream = driver.get_current_stream(device)
        self._kind = device, *((name, t.dtype, t.data_ptr() % 16 == 0) for name, t in self._tensors.items())

    def __call__(self, kernel: Any, grid: tuple[int, ...], **numbers: Any):
        """Launches a kernel.

        Args:
            kernel: by `triton.jit`; no argument of it is left to its default.
            grid: how many programs there are, up to three numbers.
            numbers: its arguments that are not tensors, and Triton's options.
        """
        tensors = self._tensors
        known = _known.get((id(kernel), grid, self._kind, *numbers.items()))
        if known is not None:
            run, names, _ = known
            run(*[tensors[name] if name in tensors else numbers[name] for name in names], stream=self._stream)
            return
        compiled = kernel[grid](**{name: t for name, t in tensors.items() if name in kernel.arg_names}, **numbers)
        if compiled is None or not hasattr(compiled, "__getitem__"):  # the interpreter, and a driver that only compiles
            return
        if self._kind is None:
            self._look()
        if len(_known) >= _MOST:
            _known.clear()
        names = [name for name in kernel.arg_names if name in tensors or name in numbers]
        _known[id(kernel), grid, self._kind, *numbers.items()] = compiled[(*grid, 1, 1)[:3]], names, kernel


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any):
    """Launches `kernel[grid](**arguments)` on the current device and stream, as a `Launcher` does."""
    tensors, numbers = {}, {}
    for name, value in arguments.items():
        (tensors if isinstance(value, Tensor) else numbers)[name] = value
    Launcher(**tensors)(kernel, grid, **numbers)
