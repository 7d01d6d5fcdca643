"""Compiled code: its instructions, its loops, and how long a warp takes for a turn of one, in a model."""

import inspect
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from bench.stub_gpu import MULTIPROCESSORS, Launch

LATENCY = {  # cycles until a result is there
    "ATOM": 600, "ATOMG": 600, "LDS": 30, "LDSM": 33, "SHFL": 26, "MUFU": 40, "LDC": 30, "DFMA": 16, "DADD": 16,
    "DMUL": 16, "DMMA": 40,
}  # fmt: skip
OTHER = 20  # of another operation that says by a scoreboard when it is done, or that it has read its operands
L1, L2, HBM = 38, 280, 800  # of a load


@dataclass
class Instruction:
    """One instruction and what its control bits say."""

    address: int
    text: str
    stall: int  # cycles until the next may be issued
    writes: int  # the scoreboard that says that its result is there; 7 is none
    reads: int  # that its operands have been read
    waits: int  # a mask of scoreboards

    @property
    def name(self) -> str:
        """The operation, without its modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0].rstrip(";")


@dataclass
class Loop:
    """Code between the target of a backward branch and the branch, without the loops inside."""

    first: int
    last: int
    own: list[Instruction] = field(default_factory=list)
    inside: list["Loop"] = field(default_factory=list)
    known: dict[int, float] = field(default_factory=dict)

    def count(self, *names: str) -> int:
        """How many of its own instructions are such operations."""
        return sum(i.name in names for i in self.own)

    def cycles(self, load: int = L2) -> float:
        """Cycles that one warp takes for a turn, once it goes round and round, given the latency of a load."""
        if load not in self.known:
            self.known[load] = timed(self.own * 3, load) - timed(self.own * 2, load)
        return self.known[load]

    def all(self) -> list["Loop"]:
        """This loop and all inside."""
        return [self, *(each for loop in self.inside for each in loop.all())]


def disassembled(cubin: bytes, *options: str, tool: str = "cuobjdump") -> str:
    """What NVIDIA's tools say of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[Instruction]:
    """The code of the first function in a cubin."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(.*?);?\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    found = []
    for address, text, control in re.findall(pattern, disassembled(cubin, "-sass")):
        bits = int(control, 16) >> 41
        stall, write, read, waits = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        found.append(Instruction(int(address, 16), text, stall, write, read, waits))
    return found


def lines(cubin: bytes, launch: Launch) -> dict[int, int]:
    """The line of a kernel's source file that each instruction was compiled from, by its address."""
    found, line = {}, 0
    name = Path(inspect.getsourcefile(launch.kernel.fn) or "").name
    for row in disassembled(cubin, "-g", "-c", tool="nvdisasm").splitlines():
        if place := re.search(r'//## File "([^"]*)", line (\d+)', row):
            line = int(place[2]) if Path(place[1]).name == name else line
        elif at := re.search(r"/\*([0-9a-f]{4,})\*/", row):
            found[int(at[1], 16)] = line
    return found


def timed(code: list[Instruction], load: int) -> float:
    """Cycles until one warp has issued instructions, one after the other, as their control bits say."""
    now, ready = 0.0, [0.0] * 8
    for i in code:
        for board in range(6):
            if i.waits >> board & 1:
                now = max(now, ready[board])
        latency = load if i.name == "LDG" else LATENCY.get(i.name, OTHER)
        ready[i.writes] = max(ready[i.writes], now + latency)
        ready[i.reads] = max(ready[i.reads], now + OTHER)
        now += max(i.stall, 1)
    return now


def loops(code: list[Instruction]) -> Loop:
    """The whole code as a loop that is run once, with the loops inside it."""
    ends = {}
    for i in code:
        if i.name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", i.text)) and int(to[1], 16) < i.address:
            first = int(to[1], 16)
            ends[first] = max(ends.get(first, 0), i.address)
    root = Loop(-1, code[-1].address + 1)
    found = [root]
    for first, last in sorted(ends.items(), key=lambda e: (e[0], -e[1])):
        parent = min((x for x in found if x.first <= first and last <= x.last), key=lambda x: x.last - x.first)
        if any(x is not parent and first <= x.last and x.first <= first for x in parent.inside):
            continue  # overlaps another: a continued loop
        found.append(Loop(first, last))
        parent.inside.append(found[-1])
    for i in code:
        inner = min((x for x in found if x.first <= i.address <= x.last), key=lambda x: x.last - x.first)
        inner.own.append(i)
    return root


@dataclass
class Code:
    """A launch, its compiled loops, and how many of its programs are on a multiprocessor at once."""

    launch: Launch
    root: Loop
    together: int
    lines: dict[int, int] = field(default_factory=dict)  # of the source, by addresses

    @property
    def warps(self) -> float:
        """Of each of the four schedulers of a multiprocessor."""
        return self.together * self.launch.options.num_warps / 4

    @property
    def waves(self) -> int:
        """How often a multiprocessor is filled with programs."""
        return math.ceil(math.prod(self.launch.grid) / (MULTIPROCESSORS * self.together))

    def turn(self, loop: Loop, load: int = L2) -> float:
        """Cycles of a turn of a loop in all programs of a multiprocessor: of a warp's latencies, or of issuing."""
        return max(loop.cycles(load), self.warps * len(loop.own))

    def most(self, *names: str) -> Loop:
        """The innermost loop with the most instructions of some names."""
        return max((x for x in self.root.all() if not x.inside), key=lambda x: x.count(*names))


_COMPILED: dict[str, tuple[int, int, Loop, dict[int, int]]] = {}  # by the key of a launch


def code_of(launch: Launch) -> Code:
    """Compiles a launch for an H100 and reads its code."""
    if launch.key not in _COMPILED:
        binary = launch.compile(GPUTarget("cuda", 90, 32))
        cubin = binary.asm["cubin"]
        registers = int(re.search(r"REG:(\d+)", disassembled(cubin, "-res-usage"))[1])  # pyright: ignore
        _COMPILED[launch.key] = registers, binary.metadata.shared, loops(instructions(cubin)), lines(cubin, launch)
    registers, shared, root, where = _COMPILED[launch.key]
    threads = 32 * launch.options.num_warps
    fit = min(65536 // (math.ceil(registers / 8) * 8 * threads), 2048 // threads, 32)
    fit = min(fit, 232448 // max(shared + 1024, 1))
    together = max(1, min(fit, math.ceil(math.prod(launch.grid) / MULTIPROCESSORS)))
    return Code(launch, root, together, where)
