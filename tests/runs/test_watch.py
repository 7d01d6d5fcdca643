"""The live view, driven in a terminal on a run that grows, and the report that is served."""

import fcntl
import http.client
import math
import os
import pty
import re
import select
import signal
import struct
import termios
import threading
import time

import pytest
import torch
from prepared import Process
from torch import nn

import sosd_fast
from sosd_fast.__main__ import main
from sosd_fast.runs.records import JsonLines, Record, RunWriter
from sosd_fast.runs.serve import make_server
from sosd_fast.runs.watch import snapshot, sparkline, watch


class Growing:
    """A run that grows when it is told to, with a log beside it."""

    def __init__(self, run_dir):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"attn": nn.Linear(12, 12, bias=False), "mlp": nn.Linear(12, 12, bias=False)})
        self.probe = sosd_fast.track(self.net, method="full", optimizers=[], run_dir=run_dir)
        self.log = JsonLines(run_dir / "log.jsonl")

    def train(self, sizes):
        for size in sizes:
            with torch.no_grad():
                for layer in self.net.values():
                    layer.weight += size * torch.randn(12, 12)
            self.probe.step()
            step = self.probe.step_count
            self.log.write({"step": step, "loss": 4 / step, "overhead": 0.0123})

    def close(self):
        self.probe.close()
        self.log.close()


WATCH = """
import sys
from sosd_fast.__main__ import main
sys.exit(main(["watch", sys.argv[1], "--every", "0.05"]))
"""


class Screen:
    """What a process has written to a terminal, without the terminal's control sequences."""

    def __init__(self, width=110, height=40):
        self._ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.text = ""

    def wait_for(self, pattern, seconds=60):
        """Reads until a pattern is there, which it takes away with what stands before it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.S)):
            if time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} is not in {self.text[-2000:]!r}")
            if select.select([self._ours], [], [], 0.1)[0]:
                data = os.read(self._ours, 65536).decode(errors="replace")
                self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
        self.text = self.text[found.end() :]
        return found

    def close(self):
        os.close(self._ours)
        os.close(self.theirs)


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(tmp_path):
    RunWriter(tmp_path).close()
    process = Process(WATCH.replace('"--every", "0.05"', '"--html"'), tmp_path)
    try:
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ shows", process.stdout.readline())[1])
        assert get(port)[0] == 200
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.slow
def test_it_follows_a_run_that_another_process_writes(tmp_path):
    run, screen = Growing(tmp_path), Screen()
    run.train([1e-3] * 30)
    process = Process(WATCH, tmp_path, stdout=screen.theirs, TERM="xterm-256color")
    try:
        screen.wait_for(r"step 30, 2 matrices, loss 0\.1333, overhead 1\.23%.*loss +[▁-█]{20,}.*attention +[▁-█]{20,}")
        screen.wait_for("no events yet")
        run.train([1e-3] * 10 + [5e-2])
        found = screen.wait_for(r"step 41, 2 matrices.*(spike of SD variation at step 41: \w+\.weight \d+\.\d times)")
        assert found[1] in str(run.probe.events[0])
        run.train([math.nan])
        screen.wait_for(r"NaN or Inf in attn\.weight and 1 more at step 42")
        os.kill(process.pid, signal.SIGINT)
        screen.wait_for(r"step 42.*NaN or Inf")  # the last look stays
        assert process.wait(30) == 0
    finally:
        process.kill()
        screen.close()
        run.close()


def test_without_a_terminal_it_prints_once(tmp_path, capsys):
    run = Growing(tmp_path)
    run.train([1e-3] * 30 + [5e-2])
    assert main(["watch", str(tmp_path)]) == 0
    run.close()
    text = capsys.readouterr().out
    assert "step 31, 2 matrices, loss 0.129, overhead 1.23%" in text and "spike of SD variation at step 31" in text
    (mlp,) = re.findall(r"^mlp .*", text, re.M)
    peak = max(r.sd_variation for r in run.probe.records() if r.name == "mlp.weight" and r.step)
    assert mlp.split()[-3:] == [f"{peak:.1e}", "–", "1"] and "█" in mlp
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "expected a run directory" in capsys.readouterr().err


def test_leading_values_only_and_no_log(tmp_path):
    from rich.console import Console

    writer = RunWriter(tmp_path)
    for step in range(4):
        writer.append([Record(step, "h.mlp.w", (64, 64), "topk", sd_variation_carried=1e-3 * step or None)])
    console = Console(width=100, record=True, file=open(os.devnull, "w"))
    console.print(snapshot(tmp_path, 100))
    console.file.close()
    writer.close()
    text = console.export_text()
    assert "estimated from leading values" in text and re.search(r"mlp +▁▅█ +3\.0e-03 +3\.0e-03", text)


def test_a_run_without_records(tmp_path, capsys):
    RunWriter(tmp_path).close()
    watch(tmp_path)
    assert "no records yet" in capsys.readouterr().out


def test_only_the_newest_segments_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", 1000)
    writer = RunWriter(tmp_path)
    for step in range(100):
        writer.append([Record(step, "w", (4, 4), "gram32", 1, sd_variation=1e-3)])
    writer.close()
    from sosd_fast.runs.watch import _Recent

    steps = _Recent(sosd_fast.load(tmp_path)).columns("step")["step"]
    assert steps[-1] == 99 and 5 < len(steps) < 40


def test_sparklines():
    assert sparkline([1, 10, 100], 3) == "▁▅█"
    assert sparkline([1.0] * 9 + [50.0] + [1.0] * 10, 10) == "▁▁▁▁█▁▁▁▁▁", "a single spike stays"
    assert sparkline([math.nan, 1, 0, 2], 4) == " ▁ █" and sparkline([], 4) == "" and sparkline([2.0], 4) == "▁"


def get(port, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host or f"localhost:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_report_is_served_fresh_and_to_this_machine_alone(tmp_path):
    run = RunWriter(tmp_path)
    for step in range(6):
        run.append([Record(step, "h.mlp.w", (4, 4), "gram32", 1, sd_variation=1e-3)])
    server = make_server([tmp_path])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        status, text = get(server.server_port)
        assert status == 200 and "5 steps" in text and "<svg" in text
        run.append([Record(6, "h.mlp.w", (4, 4), "gram32", 1, sd_variation=1e-3)])
        assert "6 steps" in get(server.server_port)[1]
        assert get(server.server_port, "/etc/passwd")[0] == 404
        assert get(server.server_port, host="elsewhere.example")[0] == 403
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        run.close()
    with pytest.raises(ValueError, match="expected a run directory"):
        make_server([tmp_path / "none"])
