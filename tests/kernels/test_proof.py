"""The kernels as they are compiled for a GPU, run without one: no race, no access out of bounds, the right result.

Every launch is run with all its programs interleaved at random; faults that are planted must be found.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from prepared import run

TOOL = importlib.util.find_spec("ttsem")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TOOL is None, reason="ttsem is not installed: `make gpu-proof` installs it and runs these tests"),
]
pytest.importorskip("triton")

MAIN = """
import json, sys, triton
sys.path.append(sys.argv[1])
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training", "bench")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
import proof
print(json.dumps(eval(sys.argv[2], vars(proof))))
"""
# Named here, so that pytest can tell them apart; `test_nothing_is_left_out` compares them with the helper's.
CASES = [
    "reduction, shared", "reduction, two matrices shared", "reduction, alone", "reduction, float64, shared",
    "reduction, float64, alone", "eigenproblems", "eigenproblems, float64", "eigenproblems of 80", "eigenvalues", "spectra",
    "spectra, float64", "spectra, bfloat16", "distributions", "products", "products, split", "products, half precision",
    "iterations",
]  # fmt: skip
