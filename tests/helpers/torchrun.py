"""Start processes as torchrun does, one thread each, on a free port, with a hard end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(ranks: int, *command, **environment) -> subprocess.Popen:
    """Starts a script under torchrun, in a session of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            *map(str, command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def descendants(pid: int) -> list[int]:
    """The processes below one, by /proc."""
    lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    children = [int(child) for each in lists for child in each.split()]
    return [each for child in children for each in (child, *descendants(child))]


def finish(process: subprocess.Popen, timeout: float = 120) -> subprocess.CompletedProcess:
    """Waits for the end, or makes one."""
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            for pid in (*descendants(process.pid), process.pid):  # the ranks have sessions of their own
                os.kill(pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def torchrun(ranks: int, *command, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    """Runs a script under torchrun and returns what came of it, also of a failure."""
    return finish(start(ranks, *command, **environment), timeout)
