"""A GPU that is not there: tensors in this machine's memory that say they are on one, and a driver that only compiles.

Host code then runs as it would beside a GPU: it finds the device, makes streams and events, and launches kernels with
the arguments, and so for the key, that Triton's JIT would compile them for. `launches` records those keys. Nothing is
launched: `installed` lets each operation return what its reference in plain torch does in float64, so that results are
right and no time means anything.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # looks at all of torch as it is imported, which must not happen while the stub is in its place
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

DEVICE = torch.device("cuda", 0)
NAME = "a stub"
MULTIPROCESSORS = 132  # of an H100 or H200
_Disabled = torch._C.DisableTorchFunctionSubclass


class Tensor_(Tensor):  # noqa: N801
    """A tensor that says it is on the stub."""

    is_cuda = True
    device = property(lambda _: DEVICE)  # pyright: ignore

    def get_device(self):
        return DEVICE.index

    def __format__(self, how):
        return format(self.as_subclass(Tensor), how)

    def record_stream(self, stream):
        assert isinstance(stream, Stream)


def put(t: Any, kind: type[Tensor] = Tensor_) -> Any:
    """Tensors, or those in a sequence, as on the stub; those that are on it as plain ones, with `Tensor`."""
    if isinstance(t, Tensor):
        return t if isinstance(t, Tensor_) == (kind is Tensor_) else t.as_subclass(kind)
    if isinstance(t, (tuple, list)):
        items = [put(each, kind) for each in t]
        return type(t)(*items) if hasattr(t, "_fields") else type(t)(items)  # pyright: ignore
    return t


def _flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _device_of(value) -> str | None:
    """The type of device that an argument names."""
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, str):
        with contextlib.suppress(RuntimeError):
            return torch.device(value).type
    return None


class _Mode(TorchFunctionMode):
    """Follows what is on the stub through torch's functions, and refuses operands on two devices, as torch does."""

    MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.type}
    ANY_DEVICE = MOVES | {Tensor.__getitem__, Tensor.__setitem__, torch._foreach_copy_, torch.allclose, torch.equal}

    WAITS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, Tensor.numpy, torch.nonzero, torch.equal,
             Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}  # fmt: skip
    forbidden = False  # by torch.cuda.set_sync_debug_mode("error")

    def __init__(self, storage: str):
        super().__init__()
        self.storage = storage

    def _waits(self, func, args, kwargs, named) -> bool:
        """Whether the host would wait for the device, of whose tensors there is one among the arguments."""
        to_host = (func is Tensor.to and "cpu" in named) or (func is Tensor.copy_ and not isinstance(args[0], Tensor_))
        return func in self.WAITS or (to_host and not kwargs.get("non_blocking") and not any(a is True for a in args))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if getattr(func, "__module__", "") == "torch.linalg" or func in (torch.linalg.svdvals, torch.linalg.svd):
            kwargs.pop("driver", None)  # of cuSOLVER
        operands = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
        here = any(isinstance(t, Tensor_) for t in operands)
        if func is Tensor.pin_memory:
            return args[0]
        named = [*filter(None, map(_device_of, (*args, *kwargs.values())))]
        if _Mode.forbidden and here and self._waits(func, args, kwargs, named):
            raise RuntimeError("called a synchronizing CUDA operation")
        if func is Tensor.cpu:
            with _Disabled():
                return args[0].as_subclass(Tensor).clone() if here else func(*args, **kwargs)
        if func is Tensor.cuda:
            return put(args[0].as_subclass(Tensor).clone())
        if func is Tensor.to:
            named += [t.device.type for t in args[1:] if isinstance(t, Tensor)]
        if named:
            args = tuple(self.storage if _device_of(a) == "cuda" else a for a in args)
            kwargs = {k: self.storage if _device_of(v) == "cuda" else v for k, v in kwargs.items()}
        elif here and func not in self.ANY_DEVICE and not getattr(func, "__name__", "").startswith("_"):
            elsewhere = [t for t in operands if not isinstance(t, Tensor_) and t.ndim]
            if elsewhere:
                raise RuntimeError(
                    f"{func}: expected all tensors on one device, got {DEVICE} and {elsewhere[0].device}"
                )
        with _Disabled():
            if self.storage == "meta":  # whose operations are written in Python, and ask for the device
                args, kwargs = put(args, Tensor), {k: put(v, Tensor) for k, v in kwargs.items()}
            found = func(*args, **kwargs)
        wanted = named[0] == "cuda" if named else here
        if any(found is t for t in operands):  # in place, or nothing to do
            if func is Tensor.to and isinstance(found, Tensor_) != wanted:
                return put(found.clone()) if wanted else found.as_subclass(Tensor).clone()
            return found
        if wanted:
            return put(found)
        return found.as_subclass(Tensor) if isinstance(found, Tensor_) else found


class Stream:
    """A stream that has always done everything."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)

    def wait_event(self, event):
        assert isinstance(event, Event)

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True


class Event:
    """An event that was recorded a millisecond after the last one."""

    def __init__(self, enable_timing: bool = False, **_):
        self.timed, self.recorded = enable_timing, False

    def record(self, stream=None):
        assert stream is None or isinstance(stream, Stream)
        self.recorded = True

    def wait(self, stream=None):
        assert stream is None or isinstance(stream, Stream)

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        assert self.timed and other.timed and self.recorded and other.recorded
        return 1.0


def _sync_debug_mode(mode):
    assert mode in ("default", "warn", "error")
    _Mode.forbidden = mode == "error"
    if mode != "default":  # as torch 2.11 and 2.13 do
        text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        warnings.warn(text, UserWarning, stacklevel=2)


def _nothing(*_, **__):
    return None


def _as_it_is(model=None, **_):
    return model if model else lambda model: model


def _generator(device="cpu", make=torch.Generator):
    assert torch.device(device).type in ("cpu", "cuda")
    return make("cpu")


def _no_context(*_, **__):
    return contextlib.nullcontext()


_STREAM = Stream()
CUDA = {  # what is asked of torch.cuda
    "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1, "init": _nothing,
    "current_device": lambda: 0, "set_device": _nothing, "get_device_name": lambda *_: NAME,
    "is_bf16_supported": lambda *_, **__: True,
    "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=9, minor=0),
    "device": _no_context, "device_of": _no_context, "stream": _no_context, "Stream": Stream, "Event": Event,
    "current_stream": lambda *_: _STREAM, "default_stream": lambda *_: _STREAM, "synchronize": _nothing,
    "is_current_stream_capturing": lambda: False, "set_sync_debug_mode": _sync_debug_mode, "_sleep": _nothing,
    "empty_cache": _nothing, "manual_seed": _nothing, "manual_seed_all": _nothing,
    "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0, "reset_peak_memory_stats": _nothing,
    "mem_get_info": lambda *_: (140 * 2**30, 140 * 2**30),
}  # fmt: skip


class Driver:
    """What Triton asks of a driver before it compiles. The device is the target: each has kernels of its own."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, _):
        return 0

    def get_active_torch_device(self):
        return DEVICE

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, ty):
        return ty

    @staticmethod
    def is_active():
        return True


@dataclass
class Launch:
    """A kernel in one specialisation, as the JIT compiles it, and the first launch that asked for it."""

    kernel: JITFunction
    signature: dict
    constexprs: dict
    attributes: dict
    options: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """Equal for launches that take the same code."""
        parts = (self.kernel._fn_name, self.signature, self.constexprs, self.attributes, self.options.__dict__)
        return repr(parts)

    def compile(self, target: GPUTarget):
        """Compiles it; what the JIT then asks for is in Triton's cache."""
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=target, options=self.options.__dict__)


@contextlib.contextmanager
def put_on(owner, values: dict[str, Any]) -> Generator[None]:
    """Attributes of an object that have other values for a while."""
    before = {name: getattr(owner, name) for name in values if hasattr(owner, name)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextlib.contextmanager
def launches(target: GPUTarget, storage: str = "meta", do: Callable = _nothing) -> Generator[list[Launch]]:
    """Puts the stub in the place of a GPU, and yields the list that every launch is added to.

    Args:
        target: that kernels are compiled for.
        storage: where tensors on the stub really are; "meta" holds no values, so that they may be of any size.
        do: called with every launch and its arguments.
    """
    found: list[Launch] = []
    current = {}

    def run(self, *args, grid, warmup, run=JITFunction.run, **kwargs):
        names = [name for name in self.arg_names if name not in kwargs]
        current["arguments"] = dict(zip(names, args, strict=False)) | kwargs
        current["grid"] = grid if isinstance(grid, tuple) else (grid,)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):  # noqa: ARG001
        arguments = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in current["arguments"].items()}
        found.append(Launch(self, signature, constexprs, attrs, options, current["grid"], arguments))
        do(found[-1], current["arguments"])  # nothing is returned, and so nothing launched

    driver_before = driver._active
    driver.set_active(Driver(target))  # pyright: ignore
    hip = "6.0" if target.backend == "hip" else None
    with (
        put_on(torch.cuda, CUDA | {"get_device_capability": lambda *_: (9, 4) if hip else divmod(target.arch, 10)}),
        put_on(torch, {"Generator": _generator}),
        put_on(torch.version, {"hip": hip, "cuda": None if hip else "13.0"}),
        put_on(JITFunction, {"run": run, "_do_compile": compile}),
        _Mode(storage),
    ):
        try:
            yield found
        finally:
            driver._active = driver_before


def operations() -> dict[Callable, Callable]:
    """Every operation whose file holds a Triton kernel, and its reference in plain torch."""
    found = {}
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("[a-z]*.py")):
        module = importlib.import_module(f"sosd_fast.kernels.{path.stem}")
        if any(isinstance(value, JITFunction) and value.module == module.__name__ for value in vars(module).values()):
            for name, op in list(vars(module).items()):
                if inspect.isfunction(op) and op.__module__ == module.__name__ and hasattr(module, f"{name}_ref"):
                    found[op] = getattr(module, f"{name}_ref")
    return found


def _content(t: Tensor) -> str:
    flat = t.detach().as_subclass(Tensor).flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return f"{t.shape} {t.dtype} {hashlib.sha1(flat.numpy().tobytes()).hexdigest()}"


def _by_reference(op: Callable, reference: Callable) -> Callable:
    taken = inspect.signature(reference).parameters
    known: dict[str, Any] = {}

    @functools.wraps(op)
    def both(*args, **kwargs):
        if not any(isinstance(t, Tensor_) for t in _flat((*args, *kwargs.values()))):
            return op(*args, **kwargs)
        wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
        given = repr(tree_map_only(Tensor, _content, (args, kwargs)))
        if given not in known:  # tests repeat an operation to see that nothing changes
            known.clear()
            known[given] = reference(*wide[0], **{k: v for k, v in wide[1].items() if k in taken})
        truth = known[given]
        found, how = tree_flatten(op(*args, **kwargs))
        expected, _ = tree_flatten(truth)
        for a, b in zip(found, expected, strict=True):
            if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
                raise AssertionError(f"{op.__name__}: {a} is unlike the reference's {b}")
        rounded = [b if a is None else b.to(a.dtype, copy=True) for a, b in zip(found, expected, strict=True)]
        return tree_unflatten(rounded, how)

    return both


@contextlib.contextmanager
def installed(target: GPUTarget) -> Generator[list[Launch]]:
    """Puts a stub that gives right results in the place of a GPU, and yields its launches."""
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(launches(target, "cpu"))
        stack.enter_context(put_on(torch, {"compile": _as_it_is}))
        stack.enter_context(put_on(torch.nn.Module, {"compile": _nothing}))
        stack.enter_context(put_on(torch._C, {"_cuda_getCurrentRawStream": lambda _: 0}))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's type is where it is
        kept = operations()
        replaced = {op: _by_reference(op, reference) for op, reference in kept.items()}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in ("sosd_fast", "bench"):
                for key, value in list(vars(module).items()):
                    if inspect.isfunction(value) and value in replaced:
                        stack.enter_context(put_on(module, {key: replaced[value]}))
        yield found
