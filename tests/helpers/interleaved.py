"""Runs what Triton compiled for a GPU without one: all programs of a launch at once, their steps interleaved at random.

Programs really wait for one another. Each access to global memory is checked against the bounds of the tensor that its
pointer belongs to, and, by vector clocks of warps, for an order with what other warps did there; which warp holds which
element, the layouts of the compiled code say. Copies into shared memory arrive when they are waited for, and products
on tensor cores read it until then. What is not seen: shared memory that the compiler uses on its own, for reductions,
changes of layout and results of atomics, whose barriers it sets later; these count as none here, though they hold some.
"""

import contextlib
import ctypes
import functools
import itertools
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from clocks import Cells, Clocks
from torch import Tensor
from ttgir import parsed
from ttsem.interp import Interp
from ttsem.interp2 import LayoutInterp
from ttsem.races import apply_many
from ttsem.values import MemDesc

from bench.stub_gpu import Launch

FAR = 40  # bits of the distance between tensors, so that a wrong address still says whose pointer it was made from
ACQUIRES, RELEASES = (2, 4), (3, 4)  # of Triton's MemSemantic
ANYWHERE: list[Tensor] = []  # that kernels find by addresses in memory
PATIENCE = 2000  # looks at counters, none of which changed


class EndedEarly(Exception):
    """Of a launch: what was to be found is found."""


class Turns:
    """Lets one program run at a time; at each step that others could notice, another may go on instead."""

    def __init__(self, count: int, seed: int, often: float):
        self.random, self.often = random.Random(seed), often
        self.waiting = [threading.Semaphore(0) for _ in range(count)]
        self.live = list(range(count))
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def step(self, me: int, waits: bool = False):
        """Goes on with another program, now and then, or surely where this one waits for others."""
        if not waits and self.random.random() >= self.often:
            return
        following = self.random.choice([each for each in self.live if not waits or each != me] or [me])
        if following != me:
            self.waiting[following].release()
            self.waiting[me].acquire()
            if self.error is not None:
                raise SystemExit

    def run(self, programs: list[Callable[[], None]]):
        """Runs all to their end."""

        def body(me: int):
            self.waiting[me].acquire()
            try:
                if self.error is None:
                    programs[me]()
            except SystemExit:
                pass
            except BaseException as error:
                self.error = self.error or error
            self.live.remove(me)
            if self.live:
                self.waiting[self.random.choice(self.live)].release()
            else:
                self.ended.set()

        threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(programs))]
        for thread in threads:
            thread.start()
        self.waiting[self.random.choice(self.live)].release()
        self.ended.wait()
        if self.error is not None:
            raise self.error


class Buffer:
    """A tensor that a kernel was given a pointer to."""

    def __init__(self, name: str, index: int, t: Tensor, storages: dict[int, Cells], clocks: Clocks):
        t = t.detach().as_subclass(Tensor)
        self.name, self.base, self.item = name, (2 * index + 1) << FAR - 1, t.element_size()
        reach = 1 + sum((side - 1) * abs(stride) for side, stride in zip(t.shape, t.stride(), strict=True))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * (reach * self.item)).from_address(t.data_ptr()))
        inside = torch.zeros(reach, dtype=torch.bool)
        inside.as_strided(t.shape, t.stride()).fill_(True)  # not what lies between the rows of a slice
        self.inside = inside.numpy()
        storage = t.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = Cells(name, storage.nbytes() // self.item, clocks)
        self.cells, self.first = storages[storage.data_ptr()], t.storage_offset()


class Run:
    """What the programs of a launch share, and what is found of them."""

    def __init__(self, launch: Launch, arguments: dict[str, Any], seed: int, often: float, first: bool):
        grid = (*launch.grid, 1, 1)[:3]
        self.grid, self.programs = grid, list(itertools.product(*map(range, grid)))
        self.faults, self.unchanged, self.first = Counter(), 0, first
        self.clocks = Clocks(len(self.programs), launch.options.num_warps, self.found)
        self.turns = Turns(len(self.programs), seed, often)
        self.buffers: list[Buffer] = []
        self.values, storages = [], {}
        for name, kind in launch.signature.items():
            if kind == "constexpr":
                continue
            value = arguments[name]
            if isinstance(value, Tensor):
                self.buffers.append(Buffer(name, len(self.buffers), value, storages, self.clocks))
                value = np.int64(self.buffers[-1].base)
            self.values.append(value if kind[0] == "*" else {"i": np.int32, "f": np.float32}[kind[0]](value))

        self.anywhere = {t.data_ptr(): len(self.buffers) + i for i, t in enumerate(ANYWHERE)}
        for t in ANYWHERE:
            self.buffers.append(Buffer("a matrix", len(self.buffers), t, storages, self.clocks))

    def found(self, text: str):
        """Keeps a finding; ends the launch with it where the first one is enough."""
        self.faults[text] += 1
        if self.first:
            raise EndedEarly


class Program(LayoutInterp):
    """One program of a launch; also the memory that it sees."""

    tracing = False  # what ttsem asks of a memory
    access_log = None

    def __init__(self, module, run: Run, me: int):
        super().__init__(module, self, run.grid, run.clocks.warps, 32)  # pyright: ignore
        self.whole, self.me = run, me
        self.parts: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
        self.used = {name for op in _all(module) for name in op.operands}
        self.copies: deque[list[tuple]] = deque()  # groups: into shared memory, not yet there
        self.group: list[tuple] = []
        self.products: deque[list[np.ndarray]] = deque()  # what tensor cores still read

    # ---- operations

    def eval_op(self, op):
        self.op, name = op, op.name
        if name == "gpu.barrier":
            self.whole.turns.step(self.me)
            self.whole.clocks.barrier(self.me)
        elif name == "ttg.async_commit_group":
            self.copies.append(self.group)
            self.group = []
        elif name == "ttg.async_wait":
            while len(self.copies) > op.attrs["num"]:
                for into, values in self.copies.popleft():
                    into[...] = values
        elif name == "ttng.warp_group_dot_wait":
            while len(self.products) > op.attrs["pendings"]:
                self.products.popleft()
        elif name in ("ttg.local_load", "ttng.warp_group_dot", "ttg.local_store"):
            shared = [value.data for value in map(self.value, op.operands) if isinstance(value, MemDesc)]
            for into, _ in itertools.chain(*self.copies, self.group):
                if any(np.may_share_memory(into, each) for each in shared):
                    self.fault("uses shared memory that a copy is still on its way to")
            if name == "ttg.local_store":
                self.free(shared)
            elif op.attrs.get("isAsync"):
                self.products.append(shared)
        if name == "tt.int_to_ptr":  # of a tensor's first element
            address = int(np.asarray(self.value(op.operands[0])))
            self.bind_results(op, [np.int64(self.whole.buffers[self.whole.anywhere[address]].base)])
            return
        Interp.eval_op(self, op)
        if name == "ttg.async_copy_global_to_local":
            into = self.value(op.operands[1]).data
            self.free([into])
            self.group.append((into, into.copy()))
            into[...] = undefined(into.dtype)

    def free(self, shared):
        """Reports shared memory that is written while tensor cores read it."""
        if any(np.may_share_memory(a, b) for read in self.products for a in read for b in shared):
            self.fault("writes shared memory that a product still reads")

    def fault(self, text: str):
        """Keeps a finding, with its line."""
        self.whole.found(f"{self.line} {text}")

    @property
    def line(self) -> str:
        """Of the kernel, for the operation at work."""
        return (self.op.loc or "").removeprefix('loc("').removesuffix('")')

    # ---- memory

    def held(self, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """Warps, and elements of the present operation's pointers that they hold; each `alone`, or all copies."""
        kind = self.op.operand_types[0]
        shape, key = tuple(kind.shape or ()), (kind.encoding, kind.shape, alone)
        if key not in self.parts:
            found, warps = [], self.whole.clocks.warps
            layout = self.layout_of(kind) if shape else None
            assert layout is not None or not shape, f"ttsem does not know the layout {kind.encoding}"
            for warp in range(warps):
                elements = np.zeros(1, np.int64)
                if layout is not None:
                    sides = {d: layout.get_in_dim_size(d) for d in ("register", "lane") if layout.has_in_dim(d)}
                    at = dict(zip(sides, np.ix_(*map(np.arange, sides.values())), strict=True))
                    if layout.has_in_dim("warp"):
                        at["warp"] = np.array(warp % layout.get_in_dim_size("warp"))
                    where = apply_many(layout, at)
                    axes = [where[f"dim{i}"].reshape(-1) % side for i, side in enumerate(shape)]
                    elements = np.unique(np.ravel_multi_index(axes, shape))
                found.append(elements)
            elements, of = np.concatenate(found), np.repeat(np.arange(warps), [each.size for each in found])
            if alone:  # one of the threads that hold a copy stores it
                elements, first = np.unique(elements, return_index=True)
                of = of[first]
            self.parts[key] = of + self.me * warps, elements
        return self.parts[key]

    def find(self, pointers, mask, what: str) -> tuple[Buffer, np.ndarray, np.ndarray]:
        """The tensor, the byte offsets of all pointers, and which of them are asked for and inside."""
        flat = np.asarray(pointers, np.int64).reshape(-1)
        live = (
            np.ones(flat.size, bool) if mask is None else np.broadcast_to(mask, np.shape(pointers)).reshape(-1).copy()
        )
        owners = np.unique(flat[live if live.any() else slice(1)] >> FAR)
        assert owners.size == 1, "one access with pointers to several tensors"
        buffer = self.whole.buffers[int(owners[0])]
        at = flat - buffer.base
        inside = (at >= 0) & (at % buffer.item == 0) & (at < buffer.bytes.size)
        inside[inside] = buffer.inside[at[inside] // buffer.item]
        if (live & ~inside).any():
            wrong = at[live & ~inside] // buffer.item
            self.fault(f"{what} {buffer.name} out of bounds, at {wrong[0]} of {buffer.inside.size}")
        return buffer, at, live & inside

    def take(self, buffer: Buffer, at: np.ndarray, dtype) -> np.ndarray:
        """Values as they are."""
        assert np.dtype(dtype).itemsize == buffer.item, f"{buffer.name} is read as {dtype}"
        return buffer.bytes.view(dtype)[at // buffer.item]

    def load(self, pointers, mask, other, dtype) -> np.ndarray:
        """Reads global memory."""
        self.whole.turns.step(self.me)
        buffer, at, live = self.find(pointers, mask, "reads")
        found = np.empty(np.shape(pointers), dtype)
        found[...] = undefined(np.dtype(dtype)) if other is None else other
        found.reshape(-1)[live] = self.take(buffer, at[live], dtype)
        line = self.whole.clocks.number(self.line)
        warps, elements = self.held(alone=False)
        asked = live[elements]
        buffer.cells.read(warps[asked], at[elements[asked]] // buffer.item + buffer.first, line)
        return found

    def store(self, pointers, values, mask):
        """Writes global memory."""
        self.whole.turns.step(self.me)
        buffer, at, live = self.find(pointers, mask, "writes")
        values = np.ascontiguousarray(np.broadcast_to(values, np.shape(pointers))).reshape(-1)
        bits = f"u{buffer.item}"
        same = np.zeros(values.size, bool)
        same[live] = self.take(buffer, at[live], bits) == values[live].view(bits)
        line = self.whole.clocks.number(self.line)
        warps, elements = self.held(alone=True)
        asked = live[elements]
        warps, elements = warps[asked], elements[asked]
        buffer.cells.write(warps, at[elements] // buffer.item + buffer.first, same[elements], line)
        places = at[live] // buffer.item
        if np.unique(places).size < places.size:
            order = np.argsort(places, kind="stable")
            twice = places[order][1:] == places[order][:-1]
            stored = values[live].view(bits)[order]
            if (twice & (stored[1:] != stored[:-1])).any():
                self.fault(f"writes two values to one element of {buffer.name}")
        buffer.bytes.view(values.dtype)[places] = values[live]

    def atomic(self, kind, pointers, values, mask, **_) -> np.ndarray:
        """Adds to a counter, by the first thread."""
        whole = self.whole
        whole.turns.step(self.me, waits=not np.any(values))
        assert kind == "add" and not np.shape(pointers), "only counters are known"
        buffer, at, live = self.find(pointers, mask, "writes")
        found = self.take(buffer, at, np.asarray(values).dtype).copy()
        if live.all():
            buffer.bytes.view(found.dtype)[at // buffer.item] += values
        whole.unchanged = 0 if np.any(values) else whole.unchanged + 1
        if whole.unchanged > PATIENCE * len(whole.programs):
            self.fault("waits for ever")
            raise EndedEarly
        used, order = self.op.results[0] in self.used, self.op.attrs["sem"]
        # Triton leaves out an acquire whose result nobody uses
        whole.clocks.atomic(self.me, int(pointers), used and order in ACQUIRES, order in RELEASES)
        return found.reshape(())


def undefined(dtype: np.dtype):
    """What stands for a value that nobody has defined; bfloat16, which is kept as bits, also gets NaN."""
    return np.array(np.nan if dtype.kind == "f" else -1).astype(dtype)


def _all(module):
    waiting = list(module.ops)
    for op in waiting:  # which grows
        yield op
        waiting += [inner for region in op.regions for block in region.blocks for inner in block.ops]


def run(
    launch: Launch, text: str, arguments: dict[str, Any], *, seed: int = 0, often: float = 0.1, first: bool = False
) -> Counter[str]:
    """Runs a launch on the memory of its arguments.

    Args:
        launch: that the stub of a GPU recorded.
        text: TTGIR, as compiled for it.
        arguments: of the launch, with tensors that have values.
        seed: of the order in which programs go on.
        often: the part of steps after which another program may go on.
        first: end with the first finding.

    Returns:
        What is wrong, each with how often it was found; empty if nothing is.
    """
    whole = Run(launch, arguments, seed, often, first)
    module = parsed(text)
    name = next(name for name in module.funcs if name != "unfinished")
    programs = [Program(module, whole, i) for i in range(len(whole.programs))]

    def start(i: int):
        with np.errstate(all="ignore"):
            programs[i].run(name, list(whole.values), whole.programs[i])

    with contextlib.suppress(EndedEarly):
        whole.turns.run([functools.partial(start, i) for i in range(len(programs))])
    return whole.faults
