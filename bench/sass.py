"""The loops of compiled kernels, as the assembler wrote them: how many instructions a trip takes, and of which kind."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    opcode: str  # with its modifiers, as in "LDG.E.128"
    line: int  # of the kernel's source
    jumps_to: str | None  # a label


@dataclass(frozen=True)
class Loop:
    """What lies between a label and the last jump back to it."""

    body: tuple[Instruction, ...]

    @property
    def lines(self) -> frozenset[int]:
        """The lines of the source that the loop computes."""
        return frozenset(instruction.line for instruction in self.body)

    def count(self, kind: str = "") -> int:
        """The number of instructions whose opcode begins with `kind`."""
        return sum(each.opcode.startswith(kind) for each in self.body)

    def kinds(self) -> Counter:
        """How many instructions there are of each opcode without its modifiers."""
        return Counter(each.opcode.split(".")[0] for each in self.body)


LINE = re.compile(r'//## File "[^"]*", line (\d+)(.*)')
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*)")


def loops(cubin: bytes) -> list[Loop]:
    """All loops of a kernel, the shortest first, so that the first one which computes a line is the innermost."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [TOOLS / "nvdisasm", "-g", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    found: dict[str, Loop] = {}
    line, inlined = 0, False
    for row in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", row):
            labels[label[1]] = len(code)
        elif place := LINE.search(row):
            # an inlined function's line is followed by the lines of its callers, the outermost last
            line = int(place[1])
        elif each := INSTRUCTION.search(row):
            target = re.search(r"`\((\.L_x_\d+)\)", each[2]) if each[1].startswith("BRA") else None
            code.append(Instruction(each[1], line, target[1] if target else None))
            if target and target[1] in labels:
                found[target[1]] = Loop(tuple(code[labels[target[1]] :]))
    return sorted(found.values(), key=lambda loop: len(loop.body))


def innermost(found: list[Loop], line: int) -> Loop:
    """The shortest loop that computes a line of the source."""
    return next(loop for loop in found if line in loop.lines)
