"""Run directories that a kill, a full disk, another release or another program left behind."""

import json
import os

import numpy as np
import pytest

import sosd_fast
from sosd_fast.__main__ import main
from sosd_fast.runs import segments
from sosd_fast.runs.records import JsonLines, Record, RunWriter, load

SEGMENT_BYTES = 250  # two steps


def records(step, names=("a", "b")):
    return [Record(step, name, (3, 3), "exact", 1, float(step), spectrum=np.full(3, step)) for name in names]


def write(folder, steps, **options):
    writer = RunWriter(folder, {"matrices": ["a", "b"]}, **options)
    for step in steps:
        writer.append(records(step))
    writer.close()


def steps_of(folder):
    found = [r.step for r in load(folder).records]
    assert found[::2] == found[1::2], "each step is whole"
    return found[::2]


def closed(folder):
    return [path for path in segments.paths(folder) if path.name != segments.LIVE]


@pytest.mark.parametrize("step", [0, 3, 5])
def test_what_a_resume_cut_off_does_not_come_back(tmp_path, form, step):
    """Both forms of each segment are there, as where a kill fell before the JSON lines went."""
    write(tmp_path, range(9))
    for path in closed(tmp_path) if form == "pyarrow" else ():
        row = {"name": "a", "shape": [3, 3], "method": "exact", "of": 1}
        lines = [json.dumps({"step": int(s)} | row) for s in segments.columns(path, ("step",))["step"]]
        path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    write(tmp_path, [step + 1], step=step)
    assert steps_of(tmp_path) == list(range(step + 2))
    write(tmp_path / "ranks" / "rank-00001", range(9))
    for path in closed(tmp_path / "ranks" / "rank-00001") if form == "pyarrow" else ():
        path.with_suffix(".jsonl").touch()
    RunWriter.trim(tmp_path / "ranks" / "rank-00001", step)
    assert steps_of(tmp_path / "ranks" / "rank-00001") == list(range(step + 1))


def test_a_later_format_is_not_written_on(tmp_path):
    write(tmp_path, range(3))
    text = '{"format": "sosd_fast", "version": 3, "new": [1, 2]}'
    (tmp_path / "meta.json").write_text(text)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="expected format version 2 or older, got version=3"):
        RunWriter(tmp_path, step=0)
    with pytest.raises(ValueError, match="got version=3"):
        sosd_fast.track(__import__("torch").nn.Linear(3, 3), run_dir=tmp_path, step=0)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_segment_numbers_are_given_once(tmp_path, form):
    write(tmp_path, range(9))
    first = [segments.number(path) for path in closed(tmp_path)]
    closed(tmp_path)[0].unlink()  # somebody made room
    write(tmp_path, range(9, 12))
    assert steps_of(tmp_path) == list(range(2, 12)), "nothing was written over"
    write(tmp_path, range(4, 9), step=3)
    numbers = [segments.number(path) for path in closed(tmp_path)]
    assert numbers == sorted(numbers) and not {n for n in numbers if n > 1} & set(first)
    assert steps_of(tmp_path) == list(range(2, 9))


def test_more_segments_than_five_digits(tmp_path, form):
    write(tmp_path, range(3))
    for path in closed(tmp_path):
        path.rename(path.with_stem("records-99999"))
    write(tmp_path, range(3, 7))
    assert "records-100000" in {path.stem for path in closed(tmp_path)} and steps_of(tmp_path) == list(range(7))


def test_a_step_in_two_parts_is_whole_where_a_segment_is_closed(tmp_path, form, monkeypatch):
    monkeypatch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", 1)
    writer = RunWriter(tmp_path)
    for step in range(3):
        writer.append(records(step, ("a",)))
        writer.append(records(step, ("b",)))
    writer.close()
    assert steps_of(tmp_path) == [0, 1, 2] and len(closed(tmp_path)) == 2
    write(tmp_path, [3])
    assert steps_of(tmp_path) == [0, 1, 2, 3]


def test_a_step_goes_on_after_it_was_opened_again(tmp_path):
    writer = RunWriter(tmp_path)
    writer.append(records(0, ("a",)))
    writer.close()
    writer = RunWriter(tmp_path)
    writer.append(records(0, ("b", "c")))
    writer.close()
    live = tmp_path / segments.LIVE
    assert [json.loads(line)["of"] for line in live.read_text().splitlines()] == [1, 3, 3]
    os.truncate(live, live.stat().st_size - 1)
    assert not load(tmp_path).records, "a step that is torn is torn as a whole"


@pytest.mark.parametrize("cut", [1, 12, 40, None])
def test_spectra_that_are_lost_are_no_zeros(tmp_path, caplog, cut):
    write(tmp_path, range(5))
    chunk = tmp_path / "spectra-00000.f32"
    if cut:
        os.truncate(chunk, chunk.stat().st_size - cut)
    else:
        chunk.unlink()
    for _ in range(2):  # once more after it was written on
        with pytest.raises(ValueError, match="expected .*spectra-00000.f32 to hold the spectra that records point to"):
            load(tmp_path).spectra("b")
        assert len(load(tmp_path).records) >= 10
        write(tmp_path, [5])
    assert "the spectra that are lost cannot be read" in caplog.text


def test_closed_files_are_forced_to_disk(tmp_path, form, monkeypatch):
    """By the time it is closed, every file has been synced as it was then."""
    synced, real = {}, os.fsync

    def fsync(descriptor):
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("sosd_fast.runs.records.CHUNK_BYTES", 60)
    write(tmp_path, range(12))
    chunks = sorted(tmp_path.glob("spectra-*"))[:-1]
    assert len(chunks) > 2 and len(closed(tmp_path)) > 2
    for path in [*closed(tmp_path), *chunks, tmp_path / "meta.json"]:
        assert synced.get(path.stat().st_ino) == path.stat().st_size, path
    assert tmp_path.stat().st_ino in synced, "and the names in the folder"


def test_a_column_that_a_record_has_gained_reads_as_not_measured(tmp_path, form):
    write(tmp_path, range(7))
    if form == "pyarrow":
        import pyarrow.parquet

        for path in closed(tmp_path):
            table = pyarrow.parquet.read_table(path)
            pyarrow.parquet.write_table(table.drop_columns(["cosine", "residual", "interval"]), path)
    run = load(tmp_path)
    table = run.columns("step", "cosine", "interval", "sd_variation")
    assert np.isnan(table["cosine"]).all() and table["sd_variation"].tolist() == [s for s in range(7) for _ in "ab"]
    assert run.records[0].cosine is None and run.records[0].residual is None
    assert run.spectra("a")[0].tolist() == list(range(7))
    if form == "pyarrow":
        assert run.records[0].interval is None and np.isnan(table["interval"][0])
        run.to_parquet(tmp_path / "all.parquet")
        assert pyarrow.parquet.read_table(tmp_path / "all.parquet")["cosine"].null_count == 14
    write(tmp_path, [4], step=3)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]


META = {
    "no UTF-8": b'{"version": 2, "matrices": ["\xff"]}', "cut": b'{"version"', "empty": b"", "a list": b"[1]",
    "a version that is none": b'{"version": "two"}', "names that are none": b'{"matrices": [[1], 2]}',
    "5,000 digits": b'{"version": %s}' % (b"9" * 5000), "deep": b"[" * 100_000, "not a rank": b'{"rank": {}}',
    "shared by": b'{"shared_by": 3}', "settings": b'{"settings": [1]}', "infinite": b'{"version": 1e999}',
}  # fmt: skip


@pytest.mark.parametrize("case", META)
def test_a_damaged_meta_is_one_line(tmp_path, case, capsys):
    write(tmp_path / "run", range(2))
    (tmp_path / "run" / "meta.json").write_bytes(META[case])
    for act in (load, RunWriter):
        with pytest.raises(ValueError, match=r"load: expected .* got a damaged .*meta.json"):
            act(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "run" / "meta.json").unlink()
    write(tmp_path / "run", [2])
    assert steps_of(tmp_path / "run") == [0, 1, 2], "as the message says"


GOOD = {"step": 0, "name": "a", "shape": [3, 3], "method": "exact", "of": 1}
LINES = [
    "5", "[]", "null", '"a"', "{", "[" * 100_000, '{"step": %s}' % ("9" * 5000), "\x00\x00", "{}",
    *(json.dumps(GOOD | more) for more in (
        {"step": "²"}, {"step": 1.5}, {"step": -1}, {"step": True}, {"step": 2**70}, {"name": None}, {"name": [1]},
        {"shape": 3}, {"shape": [1, 2, 3]}, {"shape": ["a", "b"]}, {"method": 5}, {"cosine": "x"}, {"interval": []},
        {"topk": [1, "a"]}, {"topk": 3.0}, {"nan": ["topk"], "topk": [10**12]}, {"nan": "cosine"}, {"nan": ["step"]},
        {"spectrum": [0, 0]}, {"spectrum": [-1, 0, 3]}, {"spectrum": "abc"}, {"of": "many"},
    )),
]  # fmt: skip


@pytest.mark.parametrize("place", ["live", "closed"])
@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_damaged_line_is_an_error_that_names_the_file(tmp_path, line, place, form):
    write(tmp_path, range(3))
    path = tmp_path / (segments.LIVE if place == "live" else "records-00077.jsonl")
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"(load|Run)[:.]"):
        load(tmp_path).records  # noqa: B018
    for read in (lambda run: run.columns("step", "cosine"), lambda run: run.spectra("a"), lambda run: run.names):
        try:
            read(load(tmp_path))
        except ValueError as error:
            assert str(error).startswith(("load:", "Run.")) and len(str(error).splitlines()) == 1
    with pytest.raises(ValueError, match="load:"):
        RunWriter(tmp_path)


@pytest.mark.parametrize("form", ["pyarrow"], indirect=True)
@pytest.mark.parametrize("cut", [0, 3, 4, 100, -1, -200])
def test_a_damaged_parquet_file_is_one_line(tmp_path, cut, form):
    write(tmp_path, range(5))
    path = closed(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:cut])
    for read in (lambda run: run.records, lambda run: run.columns("step"), lambda run: run.names):
        with pytest.raises(ValueError, match="load: expected") as raised:
            read(load(tmp_path))
        assert path.name in str(raised.value) and len(str(raised.value).splitlines()) == 1


EVENT = {"step": 1, "what": "spike", "names": ["a"], "at": 1}
EVENTS = [{"names": []}, {"names": 3}, {"names": [1]}, {"what": "odd"}, {"step": "x"}, {"at": None}, {"value": "y"}]


@pytest.mark.parametrize("more", EVENTS, ids=range(len(EVENTS)))
def test_a_damaged_event_is_one_line(tmp_path, more, capsys):
    write(tmp_path, range(2))
    (tmp_path / "events.jsonl").write_text(json.dumps(EVENT) + "\n" + json.dumps(EVENT | more) + "\n")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert "damaged line 2 in " in said and "events.jsonl" in said and len(said.splitlines()) == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    RunWriter(tmp_path / "run", {"matrices": ["a"]}).close()  # without a figure to draw
    os.mkfifo(tmp_path / "run" / "log.jsonl")
    os.mkfifo(tmp_path / "run" / "config.json")
    assert load(tmp_path / "run").log == []
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    with pytest.raises(ValueError, match="JsonLines: expected a file, got path="):
        JsonLines(tmp_path / "run" / "log.jsonl")
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(ValueError, match="load: expected a file"):
        load(tmp_path)
