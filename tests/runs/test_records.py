import json
import math
import os
import time

import numpy as np
import pytest
from prepared import Process

import sosd_fast
from sosd_fast.runs import segments
from sosd_fast.runs.records import JsonLines, Record, Run, RunWriter, load

SEGMENT_BYTES = 2000  # about four steps
KILLS = int(os.environ.get("SOSD_KILLS", "6"))  # 1000 to be sure


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
    monkeypatch.setattr("sosd_fast.runs.records.CHUNK_BYTES", 60)
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
if {hide}:
    sys.modules["pyarrow"] = None
import numpy as np
import sosd_fast.runs.records
from sosd_fast.runs.records import Record, RunWriter
sosd_fast.runs.records.SEGMENT_BYTES = 15000  # closed every few steps
writer = RunWriter({run!r}, step={resume!r})
step = 0 if writer.step is None else writer.step + 1
while True:
    S = np.arange(300, 0, -1) + step
    writer.append([Record(step, f"matrix {{i}}", (300, 400), "gram32", 1, 0.5, spectrum=S) for i in range(8)])
    print(step, flush=True)
    step += 1
    time.sleep(1e-3)  # keeps the run small
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    """Each life of the writer resumes where the last one was killed, or a little before, with and without pyarrow."""
    rng = np.random.default_rng(0)
    for life in range(KILLS):
        if life % 3 == 0:  # anew, or the folder's size would decide how long it takes
            run, resume = tmp_path / f"run-{life}", None
        child = Process(CHILD.format(hide=life // 3 % 2, run=str(run), resume=resume))
        first = int(child.stdout.readline())
        time.sleep(float(rng.uniform(0.0, 0.1)))
        child.kill()
        with child.stdout as rest:
            said = [first, *map(int, rest.read().split())]
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


def odd_records(step):
    """What JSON has no words for: NaN, lists of NaN, fields left out."""
    a, b = records(step)
    nan = Record(
        step=step, name="c", shape=(2, 3), method="topk", cosine=math.nan, topk=(math.nan,) * 2, residual=(1.0, 2.0)
    )
    return [a, Record(step=step, name="b", shape=b.shape, method="topk", topk=(2.0,), residual=(0.5,)), nan]


def write(run_dir, steps, of=odd_records, **options):
    writer = RunWriter(run_dir, **options)
    for step in steps:
        writer.append(of(step))
    writer.close()


def as_text(run):
    return [repr(r) for r in run.records]  # in which NaN equals NaN


def test_segments_hold_the_same_as_one_file(tmp_path, form, monkeypatch):
    write(tmp_path / "run", range(30))
    closed = [p for p in segments.paths(tmp_path / "run") if p.name != segments.LIVE]
    assert len(closed) > 3 and {p.suffix for p in closed} == {".jsonl" if form == "json" else ".parquet"}
    monkeypatch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", 1e9)
    write(tmp_path / "one", range(30))
    run, one = load(tmp_path / "run"), load(tmp_path / "one")
    assert as_text(run) == as_text(one) and len(run.records) == 90
    assert run.names == ["a", "b", "c"]
    for r in (run, one):
        table = r.columns("step", "name", "method", "sd_variation", "interval", "cosine")
        assert table["step"].tolist() == [s for s in range(30) for _ in "abc"]
        assert table["name"].tolist() == ["a", "b", "c"] * 30 and table["method"][1] == "topk"
        assert table["sd_variation"][3] == 1.5 and np.isnan(table["sd_variation"][[1, 2]]).all()
        assert table["interval"][0] == 1 and np.isnan(table["interval"][1]) and np.isnan(table["cosine"]).all()
    for x, y in zip(run.spectra("a"), one.spectra("a"), strict=True):
        assert np.array_equal(x, y) and len(x) == 30
    with pytest.raises(ValueError, match="Run.columns: expected one of .*, got fields='spectrum'"):
        run.columns("spectrum")


@pytest.mark.parametrize("step", [0, 3, 11, 12, 13, 17, 28, 29])
def test_resuming_across_segments_leaves_what_a_run_without_a_stop_leaves(tmp_path, form, step):
    write(tmp_path / "run", range(30))
    write(tmp_path / "run", range(step + 1, 34), step=step)
    write(tmp_path / "whole", range(34))
    assert as_text(load(tmp_path / "run")) == as_text(load(tmp_path / "whole"))
    assert np.array_equal(load(tmp_path / "run").spectra("a")[1], load(tmp_path / "whole").spectra("a")[1])
    spectra = [b"".join(p.read_bytes() for p in sorted((tmp_path / d).glob("spectra*"))) for d in ("run", "whole")]
    assert spectra[0] == spectra[1]


def test_a_kill_while_a_segment_is_closed_or_cut(tmp_path, form):
    write(tmp_path, range(30))
    whole = as_text(load(tmp_path))
    path = segments.paths(tmp_path)[1]
    (tmp_path / "records-00001.tmp").write_text("half a Parquet file")
    if form == "pyarrow":  # killed before the lines went
        path.with_suffix(".jsonl").write_text("anything")
    (tmp_path / segments.LIVE).rename(tmp_path / "records-99999.jsonl")  # killed before the new file took the name
    assert as_text(load(tmp_path)) == whole
    write(tmp_path, [30])
    assert len(load(tmp_path).records) == 93


def test_a_torn_step_after_a_closed_segment(tmp_path, form):
    write(tmp_path, range(30))
    live = tmp_path / segments.LIVE
    kept = [r for path in segments.paths(tmp_path)[:-1] for r in segments.rows(path)]
    live.write_bytes(b"")
    writer = RunWriter(tmp_path)
    assert writer.step == kept[-1]["step"]
    writer.append(odd_records(writer.step + 1))
    writer.close()
    os.truncate(live, live.stat().st_size - 5)
    assert len(load(tmp_path).records) == len(kept) == len(load(tmp_path).columns("step")["step"])


@pytest.mark.parametrize("cut", [1, 400])
def test_a_step_in_two_parts_is_torn_as_a_whole(tmp_path, cut):
    """Matrices that a model gains are measured, once more, at the step that was just written."""
    write(tmp_path, range(3))
    writer = RunWriter(tmp_path)
    writer.append(records(3, ("a", "b", "c")))
    writer.append(records(3, ("d", "e")))
    writer.close()
    assert len(load(tmp_path).records) == 14
    live = tmp_path / segments.LIVE
    os.truncate(live, live.stat().st_size - cut)  # into the last line, and into the one before
    assert [r.step for r in load(tmp_path).records][-1] == 2


def test_spectra_are_thinned_by_the_stated_rule_and_a_resume_keeps_it(tmp_path, form, monkeypatch):
    """Three matrices: one always in full, one every 7 steps, one never; measured at steps that grow sparse."""
    monkeypatch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", 40_000)  # two or three segments

    def of(step):
        a, b, c = odd_records(step)
        full = [a] if step % 7 else [a, Record(step=step, name="b", shape=(5, 7), method="gram32", spectrum=np.ones(5))]
        return [*full, *([b] if len(full) == 1 else []), c]

    steps = [*range(990, 1010), *range(1990, 2050), *range(5000, 5100), *range(250_000, 250_300)]
    write(tmp_path / "whole", steps, of)
    run = load(tmp_path / "whole")
    for name in ("a", "b"):
        measured = [s for s in steps if name == "a" or s % 7 == 0]
        kept = []
        for s in measured:
            if not kept or s - kept[-1] >= min(s // 1000, 100):
                kept.append(s)
        assert run.spectra(name)[0].tolist() == kept
    assert set(range(990, 1010)) <= set(run.spectra("a")[0].tolist())
    assert len(run.records) == 3 * len(steps), "no number is thinned"
    lists = [r.step for r in run.records if r.name == "c" and r.topk]
    assert lists[-3:] == [250_000, 250_100, 250_200] and all(
        (r.topk == ()) == (r.residual is None) for r in run.records if r.name == "c"
    )
    for cut in (2003, 5050, 250_150):
        write(tmp_path / "cut", [s for s in steps if s <= cut + 20], of)
        write(tmp_path / "cut", [s for s in steps if s > cut], of, step=cut)
        assert as_text(load(tmp_path / "cut")) == as_text(run)
        assert load(tmp_path / "cut").spectra("a")[0].tolist() == run.spectra("a")[0].tolist()
        for path in (tmp_path / "cut").iterdir():
            path.unlink()


def test_ranks_merge(tmp_path, form):
    for rank, names in enumerate((("a", "shared"), ("b", "shared"))):
        of = lambda step, names=names: records(step, names)  # noqa: E731
        write(tmp_path / f"rank-{rank}", range(8 - rank), of, meta={"matrices": list(names), "rank": rank})
    run = load(tmp_path)
    assert run.names == ["a", "shared", "b"] and run.meta["rank"] == 0
    assert [(r.step, r.name) for r in run.records] == [
        (s, n) for s in range(8) for n in ("a", "shared", "b") if s < 7 or n != "b"
    ]
    assert run.columns("step")["step"].tolist() == [r.step for r in run.records]
    assert run.columns("sd_variation")["sd_variation"].tolist() == [r.sd_variation for r in run.records]
    assert run.spectra("b")[1].shape == (7, 5) and run.spectra("shared")[0].tolist() == list(range(8))
    assert Run.merge([load(tmp_path / "rank-1"), load(tmp_path / "rank-0")]).names == ["b", "shared", "a"]
    write(tmp_path / "other", [0], lambda step: records(step, ("a",), r=6))
    with pytest.raises(ValueError, match=r"expected one model, got a of shape \(5, 7\) and \(6, 7\)"):
        Run.merge([run, load(tmp_path / "other")]).names  # noqa: B018
    with pytest.raises(ValueError, match="Run.merge: expected at least one run"):
        Run.merge([])


VERSION_1 = """
{"step":0,"name":"a","shape":[2,3],"method":"gram32","sigma_max":2.5,"topk":[2.5],"spectrum":[0,0,2],"of":2}
{"step":0,"name":"b","shape":[3,3],"method":"topk","nan":["cosine"],"cosine":null,"topk":[1.0],"of":2}
{"step":1,"name":"a","shape":[2,3],"method":"gram32","interval":1,"sd_variation":0.25,"spectrum":[0,8,2],"of":1}
""".lstrip()


def test_version_1_is_read_and_goes_on_as_version_2(tmp_path, form):
    (tmp_path / "meta.json").write_text('{"format": "sosd_fast", "version": 1, "matrices": ["a", "b"]}')
    (tmp_path / "records.jsonl").write_text(VERSION_1)
    np.array([2.5, 1.5, 2.5, 1.0], dtype="<f4").tofile(tmp_path / "spectra-00000.f32")
    run = load(tmp_path)
    assert [(r.step, r.name, r.sd_variation) for r in run.records] == [(0, "a", None), (0, "b", None), (1, "a", 0.25)]
    assert math.isnan(run.records[1].cosine) and run.spectra("a")[1].tolist() == [[2.5, 1.5], [2.5, 1.0]]
    write(tmp_path, [2], records)
    run = load(tmp_path)
    assert run.meta["version"] == 2 and len(run.records) == 5 and run.spectra("b")[0].tolist() == [2]


def test_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    write(tmp_path, range(3))
    frame = load(tmp_path).to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame["name"].tolist() == ["a", "b", "c"] * 3
    assert frame["shape"].tolist()[2] == (2, 3) and frame["sd_variation"][3] == 1.5
    assert "topk" not in frame and frame["cosine"].isna().all()


def test_parquet_file_of_all_records(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "run", range(5))
    run = load(tmp_path / "run")
    run.to_parquet(tmp_path / "all.parquet")
    table = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [(row["step"], row["name"]) for row in table] == [(r.step, r.name) for r in run.records]
    assert repr(run) == f"Run({str(tmp_path / 'run')!r})"
    with pytest.raises(FileNotFoundError):
        run.to_parquet(tmp_path / "none" / "all.parquet")
