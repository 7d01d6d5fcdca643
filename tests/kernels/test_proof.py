"""The kernels as they are compiled for a GPU, run without one: no race, no access out of bounds, and the right result.

The programs of a launch take turns at random, and faults that are planted must be found.
"""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
from prepared import run

pytest.importorskip("triton")
TOOL = importlib.util.find_spec("ttsem")
if TOOL is None or TOOL.origin is None:
    pytest.skip("ttsem is not installed: `make gpu-proof` installs it and runs this file", allow_module_level=True)
pytestmark = pytest.mark.slow

MAIN = """
import json, sys, triton
sys.path.append(sys.argv[1])
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training", "bench")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
import proof
print(json.dumps(eval(sys.argv[2], vars(proof))))
"""
GROUPS = ["reduction", "bands", "spectra", "eigen", "distributions", "products", "steps", "iterations"]


def proved(expression):
    """What an expression gives among the names of the helper, in a process of its own: here kernels are interpreted."""
    done = run(MAIN, str(Path(TOOL.origin).parents[1]), expression, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def names():
    return proved("[[*CASES], [*FAULTS]]")


@pytest.mark.parametrize("group", GROUPS)
def test_compiled_kernels_are_clean(group):
    rows = proved(f"{{name: [*check(name), CASES[name][1]] for name in CASES if name.startswith({group!r})}}")
    assert rows
    for name, (found, error, launches, bound) in rows.items():
        assert not found, (name, found)
        assert launches and error <= bound, (name, error)


def test_nothing_is_left_out():
    """Every kernel of the directory, in every specialisation that `bench.compile_report` compiles, and every case."""
    assert proved("left_out()") == [[], []]
    cases, _ = names()
    assert not [case for case in cases if not case.startswith(tuple(GROUPS))]


@pytest.mark.parametrize("of_reduction", [True, False])
def test_planted_faults_are_found(of_reduction):
    rows = proved(f"{{x: plant(x) for x in FAULTS if FAULTS[x][0].startswith('reduction') is {of_reduction}}}")
    assert len(rows) >= 5 and not any(rows.values()), rows


@pytest.mark.parametrize("case", ["reduction, shared", "reduction, alone", "eigenproblems"])
def test_every_barrier_is_needed(case):
    rows = proved(f"barriers({case!r})")
    assert len(rows) >= 2 and all(rows.values()), rows
