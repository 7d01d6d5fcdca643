"""Reads pickles as data: opcodes are walked with pickletools, and nothing that a pickle names is imported or called.

What a pickle may ask for is bounded: operations, bytes, and what may be the key of a dict, whose hash or comparison
would otherwise follow a nesting as deep as its writer likes.
"""

import pickletools
from collections.abc import Callable, Hashable
from typing import IO, Any, NamedTuple

import torch

from sosd_fast.checkpoints.headers import shown

MAX_BYTES = 32 * 2**20  # of a pickle
_MAX_MEMORY = 110 * 2**20  # of the objects in it: 40,000 tensors as torch.save writes them
_EACH, _CONTAINER = 64, 112  # bytes that an operation takes: measured with small strings, dicts, entries of the memo
_MAX_DIMS = 32


class Refused(ValueError):
    """The pickle asks for a function of Python's own or another module's, by the name that it is called by."""


class Name(NamedTuple):
    """A class or function that a pickle names; it is not imported."""

    module: str
    name: str

    def __str__(self):
        return shown(f"{self.module}.{self.name}")


class Inert:
    """Stands in for an object of a class: keeps what it is given, does nothing."""

    def __init__(self, of: object, args: object = ()):
        self.of, self.args = of, args
        self.state: object = None

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(f"{self.__dict__.get('of')} without {name}")


class Storage(NamedTuple):
    """Where a tensor's values lie in a file of torch.save."""

    key: str
    dtype: torch.dtype | None  # None: bytes
    size: int  # in bytes


class Stored(NamedTuple):
    """A tensor of a file of torch.save, before it is read."""

    storage: Storage
    dtype: torch.dtype
    offset: int  # in values
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return numel(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes of the storage from its first value to its last."""
        steps = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (steps + 1) * self.dtype.itemsize if 0 not in self.shape else 0


def numel(shape: tuple[int, ...]) -> int:
    """The number of values of a shape, which may be larger than any tensor's."""
    total = 1
    for n in shape:
        total *= n
    return total


def sizes(value: object) -> tuple[int, ...]:
    """A shape, where it is one: whole numbers, not negative, below 2^63."""
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMS:
        raise ValueError("a shape that is none")
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("a shape that is none")
    return tuple(value)


class _Bounded:
    """What pickletools reads from: a file from which a pickle can take only so much."""

    def __init__(self, file: IO[bytes]):
        self._file, self._left = file, MAX_BYTES

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._left:
            raise ValueError(f"a pickle of more than {MAX_BYTES >> 20} MB")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(2**12)
        self._left -= len(line)
        if self._left < 0 or (len(line) == 2**12 and not line.endswith(b"\n")):
            raise ValueError("a line without an end")
        return line


def load(file: IO[bytes]) -> Any:
    """Reads the pickle that a file goes on with.

    Returns:
        Its value, with `Stored`, `Storage`, `Inert` and `Name` for what is no plain data. A set is a list. Dicts may be
        shared or hold themselves.

    Raises:
        Refused: it names a function that is not known to be harmless.
        Exception: it is damaged, which can show in any way.
    """
    machine, memory = _Machine(), 0
    for opcode, argument, _ in pickletools.genops(_Bounded(file)):  # pyright: ignore[reportArgumentType]
        if opcode.name == "STOP":
            return machine.pop()
        memory += _CONTAINER if opcode.name in _CONTAINERS else _EACH
        if isinstance(argument, str | bytes | bytearray):
            memory += len(argument) * (4 if isinstance(argument, str) and not argument.isascii() else 1)
        if memory > _MAX_MEMORY:
            raise ValueError("a pickle of more parts than weights have")
        machine.run(opcode.name, argument)
    raise EOFError


_CONTAINERS = {
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "DICT", "LIST", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID", "PUT",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "MARK", "GLOBAL", "STACK_GLOBAL",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": None,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
}  # fmt: skip
_ALONE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def run(self, name: str, argument: Any):
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _ALONE:
            self._stack.append(_ALONE[name])
        elif name not in ("PROTO", "FRAME"):
            getattr(self, f"_{name.lower()}")(argument)

    def _put(self, argument: int):
        self._memo[argument] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, argument: int):
        self._stack.append(self._memo[argument])

    _binget = _long_binget = _get

    def _mark(self, _):
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self, _):
        self._stack.pop()

    def _pop_mark(self, _):
        self._items()

    def _dup(self, _):
        self._stack.append(self._stack[-1])

    def _items(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _push(self, value: object):
        self._stack.append(value)

    def _empty_list(self, _):
        self._push([])

    _empty_set = _empty_list

    def _empty_dict(self, _):
        self._push({})

    def _empty_tuple(self, _):
        self._push(())

    def _tuple1(self, _):
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, _):
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self, _):
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _tuple(self, _):
        items = self._items()
        self._push(tuple(items))

    def _list(self, _):
        items = self._items()
        self._push(items)

    _frozenset = _list

    def _dict(self, _):
        items = self._items()
        self._push({})
        self._set(items)

    def _append(self, _):
        item = self.pop()
        self._extend([item])

    def _appends(self, _):
        self._extend(self._items())

    _additems = _appends

    def _setitem(self, _):
        items = self._stack[-2:]
        del self._stack[-2:]
        self._set(items)

    def _setitems(self, _):
        self._set(self._items())

    def _extend(self, items: list[Any]):
        last = self._stack[-1]
        if isinstance(last, list):
            last += items
        elif not isinstance(last, Inert):  # a subclass of list
            raise ValueError("items for what holds none")

    def _set(self, items: list[Any]):
        last = self._stack[-1]
        if isinstance(last, Inert):  # a subclass of dict
            return
        if not isinstance(last, dict):
            raise ValueError("items for what holds none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            last[_key(key)] = value

    def _global(self, argument: str):
        self._push(_name(*argument.split(" ", 1)))

    def _stack_global(self, _):
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is none")
        self._push(_name(module, name))

    def _reduce(self, _):
        args, function = self.pop(), self.pop()
        self._push(_called(function, args))

    def _newobj(self, _):
        args, of = self.pop(), self.pop()
        self._push(_called(of, args))

    def _newobj_ex(self, _):
        self.pop()
        self._newobj(None)

    def _build(self, _):
        state, last = self.pop(), self._stack[-1]
        if isinstance(last, Inert):
            two = isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict)  # of slots
            last.state = state[1] if two else state

    def _binpersid(self, _):
        what = self.pop()
        if not isinstance(what, tuple) or len(what) < 5 or what[0] != "storage":
            raise ValueError("a reference to what is no storage")
        kind, key, count = what[1], what[2], what[4]
        if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**60:
            raise ValueError("a storage of no known type")
        if len(what) > 5 and what[5] is not None:
            raise ValueError("a view of a storage, as torch wrote before 0.4")
        if kind.name not in _STORAGES:
            raise ValueError(f"a storage of type {kind}")
        dtype = _STORAGES[kind.name]
        self._push(Storage(key, dtype, count * (dtype.itemsize if dtype else 1)))


def _key(key: object) -> Hashable:
    return key if isinstance(key, str | int | float | bytes | Inert | torch.dtype) or key is None else Inert(key)


def _name(module: str, name: str) -> Name | torch.dtype:
    """A name, where it is a class by its first letter, data, or known; functions are refused."""
    found = Name(module, name)
    value = getattr(torch, name, None) if module == "torch" else None
    if isinstance(value, torch.dtype):
        return value
    if isinstance(value, torch.qscheme | torch.layout | torch.memory_format):
        return found
    plain = name.rpartition(".")[2].lstrip("_")[:1].isupper() or module.partition(".")[0] == "numpy"
    if (
        plain
        or found in _CALLS
        or str(found) in _HARMLESS
        or (module == "torch._utils" and name.startswith("_rebuild"))
    ):
        return found
    raise Refused(found)


# What torch.save and pickle write for plain data, besides classes; the objects stay inert.
_HARMLESS = {
    "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.dict", "builtins.frozenset", "builtins.list",
    "builtins.object", "builtins.set", "builtins.slice", "copy_reg._reconstructor", "copyreg._reconstructor",
    "torch.device", "torch.serialization._get_layout", "__builtin__.set", "__builtin__.object",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING", "collections.deque",
}  # fmt: skip


def _called(function: object, args: object) -> object:
    if not isinstance(args, tuple):
        raise ValueError("arguments that are no tuple")
    known = _CALLS.get(function) if isinstance(function, Name) else None
    return known(*args) if known else Inert(function, args)


def _tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> object:
    dtype = next((each for each in rest if isinstance(each, torch.dtype)), None)
    if not isinstance(storage, Storage):  # of another device or layout
        return Inert(Name("torch._utils", "_rebuild_tensor"))
    dtype = dtype or storage.dtype
    (offset,), shape, stride = sizes((offset,)), sizes(shape), sizes(stride)
    if dtype is None or len(shape) != len(stride):
        raise ValueError("a tensor without a type")
    return Stored(storage, dtype, offset, shape, stride)


def _typed(function: object, of: object, args: object, _state: object = None) -> object:  # noqa: ARG001
    """A tensor of a subclass: torch.nn.Buffer, fastai's; those that compute in their own way come as wrappers."""
    return _called(function, args)


_CALLS: dict[Name, Callable[..., object]] = {
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Name("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Name("torch._tensor", "_rebuild_from_type_v2"): _typed,
    Name("collections", "OrderedDict"): lambda *items: dict((_key(k), v) for k, v in (items[0] if items else ())),
    Name("collections", "defaultdict"): lambda *_: {},
    Name("torch", "Size"): lambda dims=(): sizes(dims),
}
