"""Hugging Face's package `kernels`, which this folder hides where the repository's own folder is on sys.path.

So it is in a Python that is started there with `-m`. transformers imports that package wherever it is installed.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def give_way():
    """Puts the next package of the name `kernels` on sys.path in the place of this one, where there is another."""
    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is not None and spec.loader is not None:
        other = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
