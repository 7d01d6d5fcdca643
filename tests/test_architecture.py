"""The import graph: no circle, one direction, no private name of another room, and no code in a room's __init__; sizes.

Imports inside functions count as those at a module's top. Imports for type checkers alone may form a circle, which
never runs, but keep the direction.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sosd_fast

ROOT = Path(__file__).resolve().parent.parent

# Who may import what, by prefixes of modules' names; the longest prefix that fits a module is its unit. "sosd_fast"
# among what may be imported means the public names. `runs.report` is a unit of its own: it draws saved weights, too.
MAY_IMPORT = {
    "sosd_fast.kernels": ["sosd_fast._C"],
    "sosd_fast.kinds": [],
    "sosd_fast.places": [],
    "sosd_fast.fused": ["sosd_fast.places"],
    "sosd_fast.stored": [],
    "sosd_fast.matrices": ["sosd_fast.kinds", "sosd_fast.places", "sosd_fast.fused", "sosd_fast.stored"],
    "sosd_fast.testing": [],
    "sosd_fast.spectra": ["sosd_fast.kernels"],
    "sosd_fast.distributed": ["sosd_fast.kernels", "sosd_fast.spectra", "sosd_fast.matrices"],
    "sosd_fast.runs": ["sosd_fast.matrices"],
    "sosd_fast.checkpoints": [
        "sosd_fast.kernels", "sosd_fast.spectra", "sosd_fast.matrices", "sosd_fast.places", "sosd_fast.fused",
        "sosd_fast.stored", "sosd_fast.runs.records", "sosd_fast.runs.text",
    ],
    "sosd_fast.runs.report": ["sosd_fast.runs", "sosd_fast.checkpoints", "sosd_fast.matrices"],
    "sosd_fast.runs.serve": ["sosd_fast.runs", "sosd_fast.runs.report"],
    "sosd_fast.probe": [
        "sosd_fast.kernels", "sosd_fast.spectra", "sosd_fast.distributed", "sosd_fast.matrices", "sosd_fast.stored",
        "sosd_fast.runs.records", "sosd_fast.runs.events", "sosd_fast.runs.onset",
    ],
    "sosd_fast.muon": ["sosd_fast.kernels", "sosd_fast.distributed"],
    "sosd_fast.track": [
        "sosd_fast.probe", "sosd_fast.distributed", "sosd_fast.matrices", "sosd_fast.runs.records",
        "sosd_fast.runs.events",
    ],
    "sosd_fast.integrations": [
        "sosd_fast.track", "sosd_fast.distributed", "sosd_fast.runs.records", "sosd_fast.runs.events",
    ],
    "sosd_fast.callbacks": ["sosd_fast.integrations"],
    "sosd_fast": ["sosd_fast."],  # the package's own __init__, which collects the public names
    "sosd_fast.__main__": ["sosd_fast."],
    "training": ["sosd_fast", "sosd_fast.matrices", "sosd_fast.runs", "sosd_fast.spectra"],
    "bench": ["sosd_fast", "sosd_fast.", "training"],
}  # fmt: skip


# The extension, and the GPU kernels themselves, which the report on their compilation asks for, are no room's secret.
PRIVATE = r"_(?!C$|_|\w+_kernel$)"


class Import(NamedTuple):
    """One name that a module takes from another, also as its attribute; empty where the module itself is taken."""

    importer: str
    module: str
    name: str
    only_for_types: bool


def modules(root: Path) -> dict[str, Path]:
    """The modules of a tree by name; kernels/ is sosd_fast.kernels, which a link leads to."""
    found = {}
    for folder in ("sosd_fast", "kernels", "training", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[:2] != ("sosd_fast", "kernels"):
                name = ".".join(parts).removesuffix(".__init__")
                found[f"sosd_fast.{name}" if folder == "kernels" else name] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import of the tree's own modules, wherever in a module it stands."""
    known = modules(root) | {"sosd_fast._C": root}
    own = {"sosd_fast", "kernels", "training", "bench"}
    found = []
    for importer, path in known.items():
        tree = ast.parse(path.read_text()) if path.suffix == ".py" else ast.Module([], [])
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        taken_by: dict[str, str] = {}  # the name that a module has in this one
        for node, only_for_types in _nodes(tree):
            if isinstance(node, ast.Import):
                found += [Import(importer, alias.name, "", only_for_types) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    whole = f"{module}.{alias.name}"
                    taken = (whole, "") if whole in known else (module, alias.name)
                    found.append(Import(importer, *taken, only_for_types))
                    if whole in known:
                        taken_by[alias.asname or alias.name] = whole
        for node, only_for_types in _nodes(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken_by:
                found.append(Import(importer, taken_by[node.value.id], node.attr, only_for_types))
    return [each for each in found if each.module.split(".")[0] in own]


def _nodes(tree: ast.AST, only_for_types: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, only_for_types
        checked = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        yield from _nodes(node, only_for_types or checked)


def unit(module: str) -> str:
    """The longest prefix of a module's name in the table; the package itself has no part in its modules."""
    parts = module.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next((p for p in prefixes if p in MAY_IMPORT and (p != "sosd_fast" or p == module)), "")


def room(module: str) -> str:
    """The folder that a module lies in: a room of the library, or one of the top level."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "sosd_fast" else parts[:1])


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """What remains of a graph where nodes without an edge from, or to, another remaining one go again and again."""
    edges, before = {(a, b) for a, b in edges if a != b}, None
    while edges != before:
        before, from_, to = edges, {a for a, _ in edges}, {b for _, b in edges}
        edges = {(a, b) for a, b in edges if a in to and b in from_}
    return sorted({a for a, _ in edges})


def faults(root: Path) -> list[str]:
    """What is wrong with the imports of a tree, one line each."""
    found, known = imports(root), modules(root)
    wrong = [f"{module}: belongs to no unit of the table" for module in known if not unit(module)]
    run = {(each.importer, each.module) for each in found if not each.only_for_types}
    for kind, edges in (("modules", run), ("units", {(unit(a), unit(b)) for a, b in run if unit(a) and unit(b)})):
        if left := circle(edges):
            wrong.append(f"a circle of {kind}, among {', '.join(left)}")
    for each in found:
        by, of = each.importer, each.module
        allowed = MAY_IMPORT.get(unit(by), [])
        fits = any(of == p or of.startswith(p if p.endswith(".") else f"{p}.") and p != "sosd_fast" for p in allowed)
        if unit(by) != unit(of) and not fits:
            wrong.append(f"{by}: imports {of}, which lies above or beside it")
        last = each.name or of.rpartition(".")[2]
        if room(by) != room(of) and re.match(PRIVATE, last):
            wrong.append(f"{by}: imports {of}'s private {last}")
    for module, path in known.items():
        if path.name == "__init__.py" and module not in ("sosd_fast", "sosd_fast.kernels"):
            tree = ast.parse(path.read_text())
            if not ast.get_docstring(tree) or len(tree.body) > 1:
                wrong.append(f"{module}: its __init__ is more or less than a docstring")
    return wrong


def test_the_import_graph():
    assert not faults(ROOT)


def test_every_room_has_an_init():
    """Or setuptools, which looks for packages, would leave it out of a wheel."""
    rooms = [path for path in (ROOT / "sosd_fast").iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert len(rooms) >= 7 and all((path / "__init__.py").is_file() for path in rooms)


PLANTED = {
    "a circle in a room": (
        {"sosd_fast/runs/a.py": "def f():\n    from sosd_fast.runs import b", "sosd_fast/runs/b.py": "from . import a"},
        "a circle of modules, among sosd_fast.runs.a, sosd_fast.runs.b",
    ),
    "a circle of rooms": (
        {
            "sosd_fast/runs/a.py": "import sosd_fast.checkpoints.a", "sosd_fast/checkpoints/a.py": "",
            "sosd_fast/checkpoints/b.py": "import sosd_fast.runs.b", "sosd_fast/runs/b.py": "",
        },
        "a circle of units, among sosd_fast.checkpoints, sosd_fast.runs",
    ),
    "upwards": (
        {"sosd_fast/spectra/a.py": "def f():\n    import sosd_fast.probe.a", "sosd_fast/probe/a.py": ""},
        "sosd_fast.spectra.a: imports sosd_fast.probe.a, which lies above or beside it",
    ),
    "upwards, for types": (
        {"kernels/a.py": "if TYPE_CHECKING:\n    from sosd_fast.spectra.a import S", "sosd_fast/spectra/a.py": "S = 1"},
        "sosd_fast.kernels.a: imports sosd_fast.spectra.a, which lies above or beside it",
    ),
    "the public names, from inside": (
        {"sosd_fast/__init__.py": "track = 1", "sosd_fast/probe/a.py": "from sosd_fast import track"},
        "sosd_fast.probe.a: imports sosd_fast, which lies above or beside it",
    ),
    "by the top level's name": (
        {"kernels/__init__.py": "", "sosd_fast/spectra/a.py": "import kernels"},
        "sosd_fast.spectra.a: imports kernels, which lies above or beside it",
    ),
    "a private name": (
        {"sosd_fast/spectra/a.py": "_b = 1", "bench/a.py": "from sosd_fast.spectra.a import _b"},
        "bench.a: imports sosd_fast.spectra.a's private _b",
    ),
    "a private name, through its module": (
        {"sosd_fast/spectra/a.py": "_b = 1", "bench/a.py": "from sosd_fast.spectra import a\na._b"},
        "bench.a: imports sosd_fast.spectra.a's private _b",
    ),
    "a private module": (
        {"sosd_fast/spectra/_a.py": "", "sosd_fast/probe/a.py": "from sosd_fast.spectra import _a"},
        "sosd_fast.probe.a: imports sosd_fast.spectra._a's private _a",
    ),
    "code in an __init__": (
        {"sosd_fast/spectra/__init__.py": '"""Spectra."""\n\nX = 1'},
        "sosd_fast.spectra: its __init__ is more or less than a docstring",
    ),
    "a room that nobody drew": (
        {"sosd_fast/cellar/a.py": ""},
        "sosd_fast.cellar.a: belongs to no unit of the table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found(case, tmp_path):
    files, expected = PLANTED[case]
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    assert expected in faults(tmp_path)


def test_the_page_draws_the_arrows_of_the_table():
    """All rooms of the library; `matrices` and what stands beside it, which most may import, have no arrows."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = {row: set(to.split(", ")) for row, to in re.findall(r"^([\w.]+) +→ (.*)$", page, re.M)}
    for row in ("spectra", "distributed", "probe", "track", "integrations", "checkpoints", "runs.report"):
        allowed = {name.removeprefix("sosd_fast.") for name in MAY_IMPORT[f"sosd_fast.{row}"]}
        assert drawn[row] == allowed - {"matrices", "places", "fused", "stored"}, row


def test_what_is_allowed_is_no_fault(tmp_path):
    files = {
        "kernels/__init__.py": "import sosd_fast._C", "kernels/a.py": "from sosd_fast import kernels\n_b = 1",
        "kernels/b.py": "from sosd_fast.kernels.a import _b", "sosd_fast/__init__.py": "import sosd_fast.spectra.a",
        "sosd_fast/spectra/__init__.py": '"""Spectra."""', "sosd_fast/spectra/a.py": "from sosd_fast.kernels import a",
        "sosd_fast/runs/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sosd_fast.runs.b",
        "sosd_fast/runs/b.py": "import sosd_fast.runs.a", "training/a.py": "import sosd_fast, training.b",
        "training/b.py": "import torch._C", "bench/a.py": "from sosd_fast.kernels import a\na._a_kernel",
    }  # fmt: skip
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    assert not faults(tmp_path)


def test_files_stay_small():
    folders = ("sosd_fast", "kernels", "training", "bench", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    long = [f"{file.relative_to(ROOT)}" for file in files if len(file.read_text().splitlines()) > 400]
    assert len(files) > 150 and not long
    assert len((ROOT / "sosd_fast/probe/probe.py").read_text().splitlines()) <= 250


def test_a_probe_has_few_parts():
    with sosd_fast.track(torch.nn.Linear(4, 4), method="full") as probe:
        assert 5 < len(vars(probe)) <= 12, list(vars(probe))
