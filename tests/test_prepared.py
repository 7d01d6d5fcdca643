"""A forked process is as one that a shell starts: tests that start one see what they would see of that."""

import signal
import subprocess
import sys

import prepared
import pytest

CODE = """
import atexit, os, sys
atexit.register(print, "the end")
print(__name__, sys.argv[1:], os.environ["WORD"], os.getcwd())
{}
"""


@pytest.mark.parametrize("ends", ["pass", "sys.exit(3)", "1 / 0", "os.kill(os.getpid(), 15)", "os._exit(2)"])
def test_output_and_status_are_those_of_a_fresh_interpreter(ends, tmp_path, monkeypatch):
    monkeypatch.setenv("WORD", "word")
    code = CODE.format(ends)
    fresh = subprocess.run([sys.executable, "-c", code, "a", "b c"], capture_output=True, text=True, cwd=tmp_path)
    found = prepared.run(code, "a", "b c", folder=tmp_path)
    assert (found.returncode, found.stdout) == (fresh.returncode, fresh.stdout)
    assert found.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_script_knows_its_name(tmp_path):
    (tmp_path / "beside.py").write_text("value = 7")
    script = tmp_path / "script.py"
    script.write_text("import beside\nprint(__file__, beside.value)")
    assert prepared.run(script).stdout == f"{script} 7\n"


def test_what_does_not_end_is_killed_with_what_it_started():
    with pytest.raises(TimeoutError):
        prepared.run("import os, time\nos.fork()\ntime.sleep(100)", timeout=0.2)
    process = prepared.Process("import time\ntime.sleep(100)")
    process.kill()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


def test_ranks_meet_and_the_first_failure_is_told():
    code = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(x)
dist.destroy_process_group()
raise SystemExit(int(x))
"""
    assert prepared.run_ranks(2, code).returncode == 3


def test_no_line_of_a_process_is_cut_by_another_one(tmp_path):
    code = """
import os, pathlib
pathlib.Path(os.environ["RANK"]).touch()
while len(os.listdir()) < 2:
    pass
for i in range(2000):
    for piece in ("of ", os.environ["RANK"], "\\n"):
        os.write(1 + i % 2, piece.encode())
"""
    done = prepared.run(code, folder=tmp_path, processes=[{"RANK": "0"}, {"RANK": "1"}])
    assert done.stdout == done.stderr == "of 0\n" * 1000 + "of 1\n" * 1000
