"""The loops of compiled kernels, as the assembler wrote them: how many instructions a turn takes, and of which kind."""

import re
from dataclasses import dataclass

from bench.sass import disassembled


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    name: str  # with its modifiers, as in "LDG.E.128"
    line: int  # of the kernel's source


@dataclass(frozen=True)
class Loop:
    """What lies between a label and the last jump back to it."""

    body: tuple[Instruction, ...]

    def count(self, name: str = "", modifier: str = "") -> int:
        """The number of instructions whose name begins with `name` and holds `modifier`."""
        return sum(each.name.startswith(name) and modifier in each.name for each in self.body)


def innermost_loop(cubin: bytes, line: int) -> Loop:
    """The shortest loop that computes a line of the kernel's source."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: dict[str, Loop] = {}
    at = 0
    for row in disassembled(cubin, "-g", "-c", tool="nvdisasm").splitlines():
        if label := re.match(r"(\.L_x_\d+):", row):
            labels[label[1]] = len(code)
        elif place := re.search(r'//## File "[^"]*", line (\d+)', row):
            at = int(place[1])
        elif each := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*)", row):
            code.append(Instruction(each[1], at))
            target = re.search(r"`\((\.L_x_\d+)\)", each[2])
            if each[1].startswith("BRA") and target and target[1] in labels:
                loops[target[1]] = Loop(tuple(code[labels[target[1]] :]))
    return min(
        (loop for loop in loops.values() if any(each.line == line for each in loop.body)),
        key=lambda loop: len(loop.body),
    )
