"""Damaged run directories and token shards are read or refused in a sentence, in bounded memory."""

import json
import os
import sys
from pathlib import Path

from prepared import run


def test_mutants():
    """SOSD_MUTANTS=20000 damages as many; a hundred take some seconds."""
    count = int(os.environ.get("SOSD_MUTANTS", 104))
    done = run(Path(__file__).with_name("fuzz_runs.py"), count, 7, timeout=3600)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and not found["failures"], found
    assert sum(sum(kind.values()) for kind in found["kinds"].values()) == count
    assert sum(kind.get("refused", 0) for kind in found["kinds"].values()) > count / 5
    print(found, file=sys.stderr)
