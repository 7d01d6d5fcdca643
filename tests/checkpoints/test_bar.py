"""A long analysis shows how far it is, on a terminal and nowhere else."""

import os
import pty
import re

import torch
from prepared import Process

from sosd_fast.checkpoints.analyze import analyze

CODE = "import sys\nfrom sosd_fast.__main__ import main\nsys.exit(main(['analyze', '--json', sys.argv[1]]))\n"


def checkpoints(folder):
    torch.save({f"{i}.weight": torch.randn(6, 4 + i) for i in range(5)}, folder / "a.pt")
    return folder / "a.pt"


def test_progress_is_told_of_what_is_read(tmp_path):
    told = []
    list(analyze([checkpoints(tmp_path)] * 2, progress=lambda *each: told.append(each)))
    sizes = [6 * (4 + i) for i in range(5)]
    assert [done for _, done, _ in told] == 2 * [sum(sizes[:i]) for i in range(5)]
    assert {(path.name, total) for path, _, total in told} == {("a.pt", sum(sizes))}


def test_the_bar_is_on_a_terminal_and_the_rest_stays_as_it_is(tmp_path):
    path, shown = checkpoints(tmp_path), []
    for terminal in (True, False):
        read, write = pty.openpty() if terminal else os.pipe()
        out = tmp_path / f"{terminal}.json"
        with open(out, "w") as file:
            process = Process(CODE, path, stdout=file.fileno(), stderr=write, TERM="xterm", COLUMNS="80")
            assert process.wait(120) == 0
        os.close(write)
        shown.append(os.read(read, 100_000).decode() if terminal or not os.fstat(read).st_size else "")
        os.close(read)
    assert re.search(r"a\.pt .*73%", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown[0])) and not shown[1]
    assert (tmp_path / "True.json").read_bytes() == (tmp_path / "False.json").read_bytes()
