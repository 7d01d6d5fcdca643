"""What happened before what, for the warps of several programs: vector clocks, of warps and of memory."""

from collections.abc import Callable

import numpy as np


class Clocks:
    """What each warp of a launch knows of the others.

    Args:
        programs: of the launch.
        warps: of a program.
        found: called with each race.
    """

    def __init__(self, programs: int, warps: int, found: Callable[[str], None]):
        self.warps, self.count, self.found = warps, programs * warps, found
        self.known = np.eye(self.count, dtype=np.int32)
        self.released: dict[int, np.ndarray] = {}
        self.lines: list[str] = [""]

    def barrier(self, program: int):
        """All warps of a program have met."""
        own = np.arange(program * self.warps, (program + 1) * self.warps)
        self.known[own] = self.known[own].max(0)
        self.known[own, own] += 1

    def atomic(self, program: int, address: int, acquires: bool, releases: bool):
        """The first warp of a program changed or looked at a counter."""
        agent = program * self.warps
        given = self.released.setdefault(address, np.zeros(self.count, np.int32))
        if acquires:
            np.maximum(self.known[agent], given, out=self.known[agent])
        if releases:  # what later atomics of others leave standing: they change the counter, and do not overwrite it
            np.maximum(given, self.known[agent], out=given)
            self.known[agent, agent] += 1

    def number(self, line: str) -> int:
        """Stands for a line of the kernel."""
        if line not in self.lines:
            self.lines.append(line)
        return self.lines.index(line)


class Cells:
    """The elements of a tensor, and who read and wrote them when.

    Several programs may write the same value to one element, as those of a reduction do that compute alike: whoever
    reads it has to know of one of those writes. A value that differs begins a new version.
    """

    def __init__(self, name: str, size: int, clocks: Clocks):
        self.name, self.clocks = name, clocks
        self.untouched = True
        self.version = np.zeros(size, np.int32)
        shape = size, clocks.count
        self.wrote, self.read_at = np.zeros(shape, np.int32), np.zeros(shape, np.int32)  # times of agents
        self.wrote_version = np.full(shape, -1, np.int32)
        self.wrote_line, self.read_line = np.zeros(shape, np.int16), np.zeros(shape, np.int16)

    def read(self, agents: np.ndarray, cells: np.ndarray, line: int):
        """Each of some warps reads an element."""
        if not self.untouched:
            now = self.wrote_version[cells] == self.version[cells, None]
            known = now & (self.wrote[cells] <= self.clocks.known[agents])
            for i in np.flatnonzero(now.any(1) & ~known.any(1)):
                other = int(np.flatnonzero(now[i])[0])
                self._report("reads", line, "was written", int(self.wrote_line[cells[i], other]), agents[i], other)
        self.read_at[cells, agents] = self.clocks.known[agents, agents]
        self.read_line[cells, agents] = line

    def write(self, agents: np.ndarray, cells: np.ndarray, same: np.ndarray, line: int):
        """Each of some warps writes an element; `same` says which of them already had that value."""
        self.untouched &= not cells.size
        changed, by = cells[~same], agents[~same]
        for times, lines, what in (
            (self.wrote, self.wrote_line, "was written"),
            (self.read_at, self.read_line, "was read"),
        ):
            unknown = times[changed] > self.clocks.known[by]
            unknown[np.arange(by.size), by] = False
            for i, other in zip(*np.nonzero(unknown), strict=True):
                self._report("writes", line, what, int(lines[changed[i], other]), by[i], int(other))
        self.version[changed] += 1
        self.wrote[cells, agents] = self.clocks.known[agents, agents]
        self.wrote_version[cells, agents] = self.version[cells]
        self.wrote_line[cells, agents] = line

    def _report(self, does: str, line: int, done: str, before: int, agent: int, other: int):
        warps, lines = self.clocks.warps, self.clocks.lines
        who = "another warp" if agent // warps == other // warps else "another program"
        self.clocks.found(f"{lines[line]} {does} {self.name}, which {done} by {who} at {lines[before]}")
