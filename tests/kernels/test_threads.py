"""The C++ kernels run on the threads that torch's OpenMP runtime has, and where they cannot, they still end, and agree.

All of it happens in one fresh process: a forked one does not use OpenMP, and what hangs must not take the tests along.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.testing import matrix

SIZES = [(256, 256)] * 6 + [(500, 900)]
TASKS = Path("/proc/self/task")

pytestmark = [
    pytest.mark.skipif(kernels._C is None, reason="the C++ kernels are not built"),
    pytest.mark.skipif(not TASKS.exists(), reason="threads are counted by Linux's /proc"),
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="torch runs without such an OpenMP"),
]


def measure():
    """Spectra of several matrices and of a single one, which helpers share."""
    return [spectra([W]).S for W in MATRICES[-1:]] + [spectra(MATRICES[:-1]).S]


def same(found):
    return all(torch.equal(a, b) for a, b in zip(found, EXPECTED, strict=True))


def run_times():
    """Nanoseconds on a core of each thread but this one."""
    found = {}
    for task in TASKS.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended just now
            found[task.name] = int((task / "schedstat").read_text().split()[0])
    del found[str(threading.get_native_id())]
    return found


def settled():
    """The same when threads sleep."""
    before = run_times()
    while True:
        time.sleep(0.05)
        now = run_times()
        if now == before:
            return now
        before = now


def use_torch_threads(count):
    torch.set_num_threads(count)
    torch.randn(600, 600) @ torch.randn(600, 600)
    torch.randn(1_000_000).exp_()


def torch_threads_work():
    use_torch_threads(2)
    before = settled()
    assert same(measure())
    after = run_times()
    return any(after.get(name, 0) - ns > 1e5 for name, ns in before.items())


def one_thread_is_one():
    use_torch_threads(2)
    torch.set_num_threads(1)
    before = settled()
    return same(measure()) and settled() == before


def torch_threads_stay():
    """libgomp ends threads that a smaller region leaves over."""
    use_torch_threads(4)
    before = set(settled())
    found = spectra(MATRICES[:2]).S  # two of the four have something to do
    return torch.equal(found, EXPECTED[1][:2]) and set(run_times()) == before


def nested_regions():
    """A region within a region has one thread, whatever it asks for."""
    torch.set_num_threads(4)
    found = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def work(_):
        torch.set_num_threads(4)
        found.append(same(measure()))

    ctypes.CDLL(None).GOMP_parallel(work, None, 3, 0)
    return found == [True] * 3


def several_callers():
    """Each caller has OpenMP threads of its own, which end with it."""
    use_torch_threads(2)
    before, found = set(settled()), []

    def call():
        torch.set_num_threads(3)
        found.extend(same(measure()) for _ in range(3))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    torch.set_num_threads(2)
    return found == [True] * 12 and set(settled()) <= before


def forked():
    """libgomp waits for ever for threads that the fork has not copied."""
    use_torch_threads(2)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if same(measure()) else 1)
        os._exit(0 if same(measure()) and os.waitpid(grandchild, 0)[1] == 0 else 1)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0 and same(measure())
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    return False


SCENES = [torch_threads_work, one_thread_is_one, torch_threads_stay, nested_regions, several_callers, forked]


@pytest.fixture(scope="module")
def outcomes():
    """What a process that plays all scenes prints, as far as it comes."""
    try:
        done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200)
    except subprocess.TimeoutExpired as hung:
        return (hung.stdout or b"").decode(), (hung.stderr or b"").decode()
    return done.stdout, done.stderr


@pytest.mark.parametrize("scene", [scene.__name__ for scene in SCENES])
def test_scene(scene, outcomes):
    assert f"{scene} True\n" in outcomes[0], outcomes


if __name__ == "__main__":
    MATRICES = [matrix("gaussian", m, n, seed=i) for i, (m, n) in enumerate(SIZES)]
    torch.set_num_threads(1)
    EXPECTED = measure()
    for scene in SCENES:
        print(scene.__name__, scene(), flush=True)
