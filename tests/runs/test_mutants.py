"""Damaged run directories and token shards are read or refused in a sentence, in bounded memory."""

import json
import os
import sys
from pathlib import Path

import pytest
from prepared import run

from sosd_fast.runs.records import load


def test_mutants():
    """SOSD_MUTANTS=20000 damages as many; fifty take some seconds."""
    count = int(os.environ.get("SOSD_MUTANTS", 52))
    done = run(Path(__file__).with_name("fuzz_runs.py"), count, 7, timeout=3600)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and not found["failures"], found
    assert sum(sum(kind.values()) for kind in found["kinds"].values()) == count
    assert sum(kind.get("refused", 0) for kind in found["kinds"].values()) > count / 5
    print(found, file=sys.stderr)


@pytest.mark.parametrize("old", [b"h.0.attn", b"sd_error"])
@pytest.mark.parametrize("parquet", [False, True])
def test_a_closed_segment_that_is_no_utf_8(tmp_path, parquet, old):
    """Its names, or those of its columns."""
    pytest.importorskip("pyarrow")
    write = (
        "import sys\nsys.path.append(sys.argv[2])\nfrom fuzz_runs import run_in, Path\nrun_in(Path(sys.argv[1]), {})"
    )
    assert run(write.format(parquet), tmp_path / "run", Path(__file__).parent).returncode == 0
    path = sorted((tmp_path / "run").glob("records-*"))[0]
    whole = path.read_bytes()
    if old not in whole:
        pytest.skip("lines name only what was measured")
    path.write_bytes(whole.replace(old, b"\xff" + old[1:]))
    for read in (
        lambda r: r.columns("name", "sigma_max"),
        lambda r: r.spectra("x"),
        lambda r: r.to_parquet(tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match="load: expected"):
            read(load(tmp_path / "run"))
