"""Records in pandas, polars and duckdb, from small runs and from one of 100,000 steps."""

import duckdb
import polars
import pytest

import sosd_fast
from bench.records import simulate
from sosd_fast.runs import segments

FIELDS = ["step", "name", "sd_variation", "cosine", "sigma_max", "sd_error"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Closed segments and a live one."""
    patch = pytest.MonkeyPatch()
    patch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", 300_000)
    run_dir = tmp_path_factory.mktemp("run")
    simulate(run_dir, steps=200, matrices=5, r=40)
    patch.undo()
    run = sosd_fast.load(run_dir)
    assert [p.suffix for p in segments.paths(run_dir)].count(".parquet") > 2
    return run


def test_one_table_in_three_libraries(run, tmp_path):
    path = tmp_path / "records.parquet"
    run.to_parquet(path)
    expected = [tuple(getattr(r, f) for f in FIELDS) for r in run.records]
    frame = run.to_pandas()
    assert list(frame[FIELDS].itertuples(index=False, name=None)) == expected
    assert polars.read_parquet(path).select(FIELDS).rows() == expected
    assert duckdb.sql(f"select {', '.join(FIELDS)} from '{path}'").fetchall() == expected
    topk = polars.read_parquet(path)["topk"].to_list()
    assert [tuple(t or ()) for t in topk] == [r.topk for r in run.records]


def test_a_run_directory_without_this_library(run):
    closed = polars.scan_parquet(str(run.run_dir / "records-*.parquet")).select(FIELDS).collect()
    live = polars.read_ndjson(str(run.run_dir / "records.jsonl")).select(FIELDS)
    assert polars.concat([closed, live]).rows() == [tuple(getattr(r, f) for f in FIELDS) for r in run.records]
    count = (
        "select count(*) from (select step from '{0}/records-*.parquet' union all select step from '{0}/records.jsonl')"
    )
    assert duckdb.sql(count.format(run.run_dir)).fetchall() == [(1000,)]


def test_a_hundred_thousand_steps_of_twenty_matrices(tmp_path):
    memory = simulate(tmp_path, steps=100_000, matrices=20, r=16)
    assert max(memory[1:]) <= 1.1 * memory[1], f"memory is flat after the first closed segments: {memory}"
    run = sosd_fast.load(tmp_path)
    sizes = {p.suffix: 0 for p in segments.paths(tmp_path)}
    for p in segments.paths(tmp_path):
        sizes[p.suffix] += p.stat().st_size
    assert sizes[".parquet"] < 125 * 2_000_000 and sizes[".jsonl"] < 40e6, sizes
    frame = run.to_pandas()
    assert len(frame) == 2_000_000 and frame["step"].iloc[-1] == 99_999 and frame.memory_usage(deep=True).sum() < 1e9
    assert 5000 < len(run.spectra(run.names[0])[0]) < 7000
