import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import sosd_fast
from sosd_fast.records import JsonLines, Record, RunWriter, load


def records(step, names=("a", "b"), r=5):
    return [
        Record(
            step=step, name=name, shape=(r, 7), method="gram32", interval=1, sd_variation=step + 0.5, sigma_max=2.0,
            topk=(3.0, 1.0), spectrum=np.arange(r, 0, -1) + step,
        )
        for name in names
    ]  # fmt: skip


def test_round_trip(tmp_path):
    writer = RunWriter(tmp_path / "run", {"settings": {"k": 2}})
    for step in range(4):
        writer.append(records(step))
    odd = Record(
        step=4, name="a", shape=(5, 7), method="topk", cosine=math.nan, topk=(math.nan,) * 2, residual=(0.1, 0.2)
    )
    writer.append([odd, *records(4, ("b",))])
    writer.close()
    run = sosd_fast.load(tmp_path / "run")
    assert run.names == ["a", "b"] and run.meta["settings"] == {"k": 2}
    assert run.records[:8] == [r for step in range(4) for r in records(step)]
    back = run.records[8]
    assert math.isnan(back.cosine) and len(back.topk) == 2 and all(map(math.isnan, back.topk))
    assert back.residual == (0.1, 0.2) and back.sd_variation is None
    steps, S = run.spectra("a")
    assert steps.tolist() == [0, 1, 2, 3] and S.shape == (4, 5) and S[2].tolist() == [7, 6, 5, 4, 3]
    assert run.spectra("b")[0].tolist() == [0, 1, 2, 3, 4]


def test_lines_are_plain_json(tmp_path):
    writer = RunWriter(tmp_path)
    writer.append([Record(step=0, name="a", shape=(2, 2), method="topk", sigma_max=math.inf)])
    writer.close()
    line = (tmp_path / "records.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["name"] == "a"


def test_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("sosd_fast.records.CHUNK_BYTES", 60)
    writer = RunWriter(tmp_path)
    for step in range(10):
        writer.append(records(step))
    writer.close()
    assert len(list(tmp_path.glob("spectra-*.f32"))) > 3
    assert [row[0] for row in load(tmp_path).spectra("b")[1]] == [5 + step for step in range(10)]
    writer = RunWriter(tmp_path, step=4)
    writer.append(records(5))
    writer.close()
    assert [row[0] for row in load(tmp_path).spectra("b")[1]] == [5 + step for step in range(6)]


@pytest.mark.parametrize("cut", [1, 10, 150, 250])
def test_a_torn_end_is_left_out_and_cut_off(tmp_path, cut):
    writer = RunWriter(tmp_path)
    for step in range(3):
        writer.append(records(step))
    writer.close()
    path = tmp_path / "records.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert [r.step for r in load(tmp_path).records] == [0, 0, 1, 1]
    writer = RunWriter(tmp_path)
    assert writer.step == 1
    writer.append(records(2))
    writer.close()
    run = load(tmp_path)
    assert [r.step for r in run.records] == [0, 0, 1, 1, 2, 2]
    assert run.spectra("b")[1][2].tolist() == records(2)[1].spectrum.tolist()


def test_resuming_trims_later_steps(tmp_path):
    writer = RunWriter(tmp_path)
    for step in range(6):
        writer.append(records(step))
    writer.close()
    writer = RunWriter(tmp_path, step=3)
    assert writer.step == 3
    writer.append(records(4))
    writer.close()
    run = load(tmp_path)
    assert [r.step for r in run.records[::2]] == [0, 1, 2, 3, 4]
    assert run.spectra("a")[1][:, 0].tolist() == [5, 6, 7, 8, 9]


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_records import records
from sosd_fast.records import RunWriter
writer = RunWriter({run!r}, step={resume!r})
step = 0 if writer.step is None else writer.step + 1
while True:
    writer.append(records(step, names=[f"matrix {{i}}" for i in range(8)], r=300))
    print(step, flush=True)
    step += 1
    time.sleep(1e-3)  # keeps the run small
"""


def test_kill_9_at_ten_random_moments(tmp_path):
    """Each life of the writer resumes where the last one was killed, or a little before."""
    run, rng = tmp_path / "run", np.random.default_rng(0)
    resume = None
    for _ in range(10):
        code = CHILD.format(tests=os.path.dirname(__file__), run=str(run), resume=resume)
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        first = int(child.stdout.readline())
        time.sleep(float(rng.uniform(0.0, 0.1)))
        child.send_signal(signal.SIGKILL)
        said = [first, *map(int, child.communicate()[0].split())]
        assert first == (0 if resume is None else resume + 1)

        back = load(run)
        steps = sorted({r.step for r in back.records})
        assert steps == list(range(steps[-1] + 1)), "no step is missing"
        assert steps[-1] in (said[-1], said[-1] + 1), "what was said to be written is there"
        assert len(back.records) == 8 * len(steps), "no step is double or torn"
        for name in ("matrix 0", "matrix 7"):
            at, S = back.spectra(name)
            assert at.tolist() == steps and (S[:, 0] == 300 + at).all()
        resume = max(0, said[-1] - int(rng.integers(0, 3)))


def test_json_lines_trims_and_refuses_a_second_writer(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonLines(path)
    log.write({"step": 0}, {"step": 1}, {"step": 2})
    with pytest.raises(ValueError, match="expected a file that nobody else writes"):
        JsonLines(path)
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 3')
    log = JsonLines(path, step=1)
    log.write({"step": 2, "x": 1})
    log.flush()
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
        {"step": 2, "x": 1},
    ]


def test_bad_directories(tmp_path):
    with pytest.raises(ValueError, match="load: expected a run directory with a meta.json"):
        load(tmp_path)
    RunWriter(tmp_path / "run").close()
    (tmp_path / "run" / "meta.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="got version=99"):
        load(tmp_path / "run")
    writer = RunWriter(tmp_path / "damaged")
    writer.append(records(0))
    writer.close()
    path = tmp_path / "damaged" / "records.jsonl"
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(ValueError, match="damaged line 1"):
        load(tmp_path / "damaged")


def test_unknown_name(tmp_path):
    RunWriter(tmp_path).close()
    with pytest.raises(ValueError, match="got name='x'"):
        load(tmp_path).spectra("x")


def test_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    writer = RunWriter(tmp_path)
    writer.append(records(0))
    writer.close()
    frame = load(tmp_path).to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame["name"].tolist() == ["a", "b"]
