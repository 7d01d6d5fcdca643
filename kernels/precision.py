"""Float32 products in float32, whatever torch's settings allow to be taken in TF32 or bfloat16."""

import contextlib
import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch >= 2.9 has a precision for each backend and operation, which inherits ("none") from that of the backend, and
# that one from the generic one. Before there was one setting for all float32 products.
_BY_BACKEND = hasattr(torch._C, "_set_fp32_precision_setter")
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot"}


@contextlib.contextmanager
def full_precision(device_type: str):
    """Turns off autograd, autocast, and TF32 or bfloat16 products: those err by 1e-6 and more in a spectrum.

    On the CPU only the thread that enters it is affected. On other devices float32 products have no such way: where
    torch's setting allows less than float32, it is "ieee" for all threads while at least one is inside, and as it was
    when the last one has left. A thread that trains meanwhile, other than the one that measures, then has float32
    products too. Torch does not tell whether a setting is inherited; where that cannot be seen from the values, the one
    above it, of the backend or of all, is "ieee" for a few microseconds.
    """
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        if device_type != "cpu":
            with _PINS["cuda" if device_type == "cuda" else "mkldnn"].held():
                yield
        elif _is_full("mkldnn"):
            yield
        else:
            with _InFloat64():
                yield


def _is_full(backend: str) -> bool:
    if _BY_BACKEND:
        return torch._C._get_fp32_precision_getter(backend, "matmul") in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


class _InFloat64(TorchDispatchMode):
    """Takes float32 products in float64, in one thread: no setting reaches those."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if name.rstrip("_") not in _PRODUCTS or any(t.dtype != torch.float32 for t in tensors):
            return func(*args, **kwargs)
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        wide = [t.double() if isinstance(t, Tensor) else t for t in args]
        found = getattr(torch, name.rstrip("_"))(*wide, **kwargs).float()
        return found if out is None else out.resize_(found.shape).copy_(found)


class _Pin:
    """Keeps the precision of a backend's float32 products at "ieee" while it is held by any thread."""

    def __init__(self, backend: str):
        self._backend = backend
        self._lock = threading.Lock()
        self._holders = 0
        self._before: str | None = None  # to be put back; None where nothing was changed

    @contextlib.contextmanager
    def held(self):
        """Counts the thread in and out."""
        with self._lock:
            if not self._holders and not _is_full(self._backend):
                self._before = self._own()
                self._set("ieee" if _BY_BACKEND else "highest")
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders and self._before is not None:
                    if _is_full(self._backend):  # else someone has set it meanwhile, who is to have it
                        self._set(self._before)
                    self._before = None

    def _set(self, precision: str):
        if _BY_BACKEND:
            torch._C._set_fp32_precision_setter(self._backend, "matmul", precision)
        else:
            torch.set_float32_matmul_precision(precision)

    def _own(self) -> str:
        """The setting itself: "none" where the precision is inherited, which the getter does not tell."""
        if not _BY_BACKEND:
            return torch.get_float32_matmul_precision()
        get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
        precision = get(self._backend, "matmul")
        if get(self._backend, "all") != precision:
            return precision
        for parent in (("generic", "all"), (self._backend, "all")):
            if get(*parent) != precision:
                continue
            try:
                put(*parent, "ieee")
                inherited, backend_inherits = (get(self._backend, op) != precision for op in ("matmul", "all"))
            finally:
                put(*parent, precision)
            if inherited:
                return "none"
            if backend_inherits:  # so its own setting is "none", which must not be overwritten
                break
        return precision


_PINS = {backend: _Pin(backend) for backend in ("cuda", "mkldnn")}
