"""What befalls a process with a probe: a full disk, a folder that goes, a fork, its end. Training goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from plain_loop import train
from prepared import Process, run
from torch import nn

import sosd_fast


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


START = """
import gc, logging, os, resource, shutil, signal, stat, sys, time, torch
from torch import nn
import sosd_fast
from sosd_fast.runs import records
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stdout)
run_dir = sys.argv[1]
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 30))
def train(net, steps):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        net(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
net = model()
"""


def python(code, run_dir):
    return run(START + textwrap.dedent(code), run_dir)


@pytest.mark.parametrize("file", ["spectra-00000.f32", "records.jsonl"])
def test_a_full_disk(file, tmp_path):
    done = python(
        f"""
        heard = []
        probe = sosd_fast.track(net, method="full", run_dir=run_dir, on_record=lambda r: heard.append(r.step))
        train(net, 10)
        # The limit is on each file alone: the other one is made small, and its records go before it is full.
        limit(os.path.getsize(os.path.join(run_dir, "{file}")) + 100)
        train(net, 10)
        limit(resource.RLIM_INFINITY)
        assert [r.step for r in probe.records() if r.name == "0.weight"] == list(range(21))
        assert probe.latest()["0.weight"].step == 20 and max(heard) == 20
        twin = model(); train(twin, 20)
        assert all(map(torch.equal, net.parameters(), twin.parameters()))
        probe.flush(); probe.close()
        """,
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and done.stdout.count("ERROR") == 1 and "File too large" in done.stdout, done.stdout
    assert f"run_dir={tmp_path} cannot be written at step" in done.stdout and "track again to go on" in done.stdout
    found = sosd_fast.load(tmp_path)
    kept = [r.step for r in found.records if r.name == "0.weight"]
    assert kept == list(range(len(kept))) and len(kept) >= 11
    assert len(found.spectra("0.weight")[0]) == len(kept)
    net = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 30))
    with sosd_fast.track(net, method="full", run_dir=tmp_path) as probe:  # there is room again
        train(net)
        assert steps_of(probe) == list(range(len(kept) + 1))


@pytest.mark.parametrize("how", ["probe.close()", "del net; gc.collect(); gc.collect()", "pass", "del probe, net"])
def test_a_full_disk_at_the_end(how, tmp_path):
    done = python(
        f"""
        probe = sosd_fast.track(net, method="full", run_dir=run_dir)
        train(net, 3)
        limit(1)
        train(net, 1)
        {how}
        print("alive")
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("ERROR") == 1, done.stdout + done.stderr
    assert done.stdout.endswith("alive\n")
    assert [r.step for r in sosd_fast.load(tmp_path).records if r.name == "0.weight"] == [0, 1, 2, 3]


def test_a_run_directory_that_is_removed(tmp_path):
    done = python(
        """
        probe = sosd_fast.track(net, method="full", run_dir=run_dir)
        train(net, 3)
        shutil.rmtree(run_dir)
        train(net, 3)
        assert [r.step for r in probe.records() if r.name == "0.weight"] == [4, 5, 6]
        """,
        tmp_path / "run",
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("ERROR") == 1, done.stdout + done.stderr
    assert "was removed" in done.stdout


def test_a_run_directory_that_turns_read_only(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if os.getuid() == 0:  # whom no permission stops
        base = Path(tempfile.gettempdir())
        for folder in (run_dir, tmp_path, *(parent for parent in tmp_path.parents if base in parent.parents)):
            folder.chmod(0o777)
        os.chown(run_dir, 65534, 65534)
    done = python(
        """
        import torch._dynamo  # as long as this user may read Python's own files
        if os.getuid() == 0:
            os.setegid(65534); os.seteuid(65534)
        records.SEGMENT_BYTES = 4000
        probe = sosd_fast.track(net, method="full", run_dir=run_dir)
        os.chmod(run_dir, 0o500)
        train(net, 6)
        os.chmod(run_dir, 0o700)
        assert [r.step for r in probe.records() if r.name == "0.weight"] == list(range(7))
        """,
        run_dir,
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("ERROR") == 1, done.stdout + done.stderr
    assert "Permission denied" in done.stdout


FORKS = """
def forked(function):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_a_forked_process_that_trains(tmp_path):
    done = python(
        FORKS
        + """
import threading
probe = sosd_fast.track(net, method="full", run_dir=run_dir)
log = records.JsonLines(os.path.join(run_dir, "log.jsonl"))
train(net, 3)
held, done = threading.Event(), threading.Event()
def holds():  # inside the probe's lock
    probe.clock = time.perf_counter
    held.set()
    done.wait()
    return time.perf_counter()
probe.clock = holds
thread = threading.Thread(target=probe.step)
thread.start()
held.wait()
def child():
    twin = model()
    train(twin, 3)
    train(net, 4); train(twin, 4)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    log.write({"step": 99}); log.flush(); log.close()
    probe.step(); probe.flush(); probe.close()
    with sosd_fast.track(net, method="full") as own:
        train(net, 1)
        assert own.latest()["0.weight"].step == 1
forked(child)
done.set()
thread.join()
""",
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.count("was forked from one that measures its model") == 1, done.stdout
    assert [r.step for r in sosd_fast.load(tmp_path).records if r.name == "0.weight"] == [0, 1, 2, 3, 4]
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_the_parent_goes_on_beside_its_children(tmp_path):
    done = python(
        FORKS
        + """
probe = sosd_fast.track(net, method="full", run_dir=run_dir)
for _ in range(4):
    train(net, 1)
    forked(lambda: train(net, 3))
train(net, 1)
probe.close()
""",
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert [r.step for r in sosd_fast.load(tmp_path).records if r.name == "0.weight"] == [0, 1, 2, 3, 4, 5]


def test_resumed_while_workers_of_a_killed_run_live(tmp_path):
    code = START + textwrap.dedent("""
        from torch.utils.data import DataLoader
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 10**6
            def __getitem__(self, i):
                return torch.ones(40)
        def stay(_):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if __name__ == "__main__":
            probe = sosd_fast.track(net, method="full", run_dir=run_dir)
            log = records.JsonLines(os.path.join(run_dir, "log.jsonl"))
            batches = iter(DataLoader(
                Data(), 2, num_workers=2, persistent_workers=True, multiprocessing_context="fork", worker_init_fn=stay
            ))
            next(batches)
            train(net, 2)
            print(*(w.pid for w in batches._workers), flush=True)
            time.sleep(100)
    """)
    process = Process(code, tmp_path)
    with process.stdout as stdout:
        workers = list(map(int, stdout.readline().split()))
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # they do not notice that their parent is gone
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        net = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 30))
        with sosd_fast.track(net, method="full", run_dir=tmp_path) as probe:
            train(net)
            assert steps_of(probe) == [0, 1, 2, 3]
        sosd_fast.runs.records.JsonLines(tmp_path / "log.jsonl").close()
        assert all(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def test_nothing_is_said_when_the_interpreter_ends(tmp_path):
    """A fresh one, in which the module `sosd_fast.track` was imported, and `track` is called again and again."""
    code = """
import sosd_fast.track
sosd_fast.track(net, method="full")
a, b = sosd_fast.track(net, method="full", run_dir=run_dir), sosd_fast.track(net, method="topk", k=4)
net.itself = [net, a]
train(net, 3)
print(b.latest()["0.weight"].step)
"""
    done = subprocess.run([sys.executable, "-c", START + code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "3\n" and done.stderr == "", done.stdout + done.stderr
    assert max(r.step for r in sosd_fast.load(tmp_path).records) == 3
