"""Readers and writers beside a writer that closes segments all the time."""

import os
import time

import numpy as np
import pytest
from prepared import Process, run

from sosd_fast.runs import segments
from sosd_fast.runs.records import Record, RunWriter, load

SEGMENT_BYTES = 250  # two steps
READS = int(os.environ.get("SOSD_READS", "30"))  # 10000 to be sure

WRITER = """
import sys, time
if {hide}:
    sys.modules["pyarrow"] = None
import numpy as np
import sosd_fast.runs.records as records
records.SEGMENT_BYTES = 250  # two steps
writer = records.RunWriter({run!r}, {{"matrices": ["a", "b"]}})
step = 0
print("begun", flush=True)
while True:
    S = np.full(3, step, dtype=np.float32)
    writer.append([records.Record(step, name, (3, 3), "exact", 1, float(step), spectrum=S) for name in "ab"])
    step += 1
    time.sleep({pause})
    if step == 500:  # more would be thinned, and take long to read
        time.sleep(600)
"""

READER = """
import sys, time
if {hide}:
    sys.modules["pyarrow"] = None
from sosd_fast.runs.records import load
from pathlib import Path
last = i = beside = 0
closed = lambda: len(list(Path({run!r}).glob("records-*.*")))
while i < {reads} or (beside < 5 and last < 1000):  # the writer ends after 500 steps of two records
    i, before = i + 1, closed()
    run = load({run!r})
    if i % 4 == 0:
        found = [(r.step, r.name) for r in run.records]
    elif i % 4 == 1:
        table = run.columns("step", "name", "sd_variation")
        found = list(zip(table["step"].tolist(), table["name"].tolist()))
        assert table["sd_variation"].tolist() == [step for step, _ in found]
    elif i % 4 == 2:
        steps, S = run.spectra("a") if run.names else ((), ())
        assert [row[0] for row in S] == list(steps)
        found = [(step, name) for step in steps for name in "ab"]
    else:
        found = [(r.step, r.name) for r in run.records]
        assert len(run.columns("step")["step"]) >= len(found)
    assert found == [(step, name) for step in range(len(found) // 2) for name in "ab"], (i, found[-9:])
    assert len(found) >= last, (i, "a read sees what the one before saw", last, len(found))
    last = len(found)
    beside += closed() > before
print(beside)
"""


@pytest.mark.slow
@pytest.mark.parametrize("hide", [True, False], ids=["json", "pyarrow"])
def test_each_read_sees_a_prefix_of_the_steps(tmp_path, hide):
    """The folder is begun anew for every 30 reads, or the number of segments would decide how long a read takes."""
    if not hide:
        pytest.importorskip("pyarrow")
    beside = 0
    for first in range(0, READS, 30):
        options = {"run": str(tmp_path / str(first)), "hide": hide, "pause": 2e-3}
        writer = Process(WRITER.format(**options))
        try:
            assert writer.stdout.readline() == "begun\n"
            done = run(READER.format(**options, reads=min(30, READS - first)))
            assert done.returncode == 0, done.stderr
            beside += int(done.stdout)
        finally:
            writer.kill()
            writer.stdout.close()
    print(f"{READS} reads; a segment was closed while {beside} of them ran")


def write(writer, step, names=("a", "b")):
    writer.append([Record(step, name, (3, 3), "exact", 1, float(step), spectrum=np.full(3, step)) for name in names])


@pytest.mark.parametrize("moment", range(12))
def test_segments_close_at_a_chosen_moment_of_a_read(tmp_path, monkeypatch, form, moment):
    """At the `moment`-th look at a folder or a file, the writer writes four steps, and closes two segments."""
    writer = RunWriter(tmp_path)
    for step in range(5):
        write(writer, step)
    looks, real_open, real_scan, written = 0, open, os.scandir, 5

    def struck(real):
        def look(where=".", *args, **kwargs):
            nonlocal looks, written
            if str(where).startswith(str(tmp_path)) and "ab" not in args and "wb" not in args:
                looks += 1
                if looks == moment + 1:
                    monkeypatch.setattr("builtins.open", real_open)
                    monkeypatch.setattr(os, "scandir", real_scan)
                    for _ in range(4):
                        write(writer, written)
                        written += 1
            return real(where, *args, **kwargs)

        return look

    monkeypatch.setattr("builtins.open", struck(real_open))
    monkeypatch.setattr(os, "scandir", struck(real_scan))
    found = load(tmp_path).records
    assert [r.step for r in found[::2]] == list(range(len(found) // 2)) and len(found) >= 10
    steps, S = load(tmp_path).spectra("a")
    assert steps.tolist() == list(range(written)) and S[:, 0].tolist() == list(range(written))
    writer.close()


def test_a_second_writer_that_comes_while_a_segment_closes_is_refused(tmp_path, monkeypatch, form):
    """It opens the file, which gets its closed name, and whose lock is given up, before it asks for the lock."""
    import fcntl

    writer, real = RunWriter(tmp_path), fcntl.flock
    for step in range(3):
        write(writer, step)
    calls = 0

    def flock(*args):
        nonlocal calls
        calls += 1
        if calls == 1:
            writer._close_segment()
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="expected a file that nobody else writes"):
        RunWriter(tmp_path)
    assert calls > 1
    write(writer, 3)
    writer.close()
    assert [r.step for r in load(tmp_path).records[::2]] == [0, 1, 2, 3]


def test_the_file_being_written_always_has_its_name(tmp_path, monkeypatch, form):
    """A second writer that found none would make one, which the first one's takes the place of."""
    writer = RunWriter(tmp_path)
    write(writer, 0)
    real, seen = os.rename, []

    def rename(*args, **kwargs):
        seen.append((tmp_path / segments.LIVE).exists())
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "rename", rename)
    writer._close_segment()
    writer.close()
    assert seen and all(seen) and len(load(tmp_path).records) == 2


def test_without_hard_links(tmp_path, monkeypatch, form):
    def refused(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    writer = RunWriter(tmp_path)
    for step in range(9):
        write(writer, step)
    writer.close()
    assert len(segments.paths(tmp_path)) > 2 and [r.step for r in load(tmp_path).records[::2]] == list(range(9))


def test_a_kill_while_both_names_are_one_file(tmp_path, form):
    writer = RunWriter(tmp_path)
    for step in range(4):
        write(writer, step)
    writer.close()
    os.link(tmp_path / segments.LIVE, tmp_path / f"records-{writer._number:05d}.jsonl")
    assert [r.step for r in load(tmp_path).records[::2]] == [0, 1, 2, 3]
    writer = RunWriter(tmp_path, step=2)
    write(writer, 3)
    writer.close()
    assert [r.step for r in load(tmp_path).records[::2]] == [0, 1, 2, 3]


def test_many_closings_take_no_second_writer(tmp_path, form):
    """Whoever tries all the time is refused each time, or has waited until the first one closed."""
    options = {"run": str(tmp_path / "run"), "hide": True, "pause": 0}
    writer = Process(WRITER.format(**options))
    try:
        assert writer.stdout.readline() == "begun\n"
        end = time.monotonic() + 0.5
        tries = 0
        while time.monotonic() < end:
            with pytest.raises(ValueError, match="expected a file that nobody else writes"):
                RunWriter(tmp_path / "run")
            tries += 1
        assert tries
    finally:
        writer.kill()
        writer.stdout.close()
