"""The package: what works without what, and what the architecture names; test_architecture.py has the imports."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import prepared
import pytest
import torch

from sosd_fast.__main__ import doctor, main

ROOT = Path(__file__).resolve().parent.parent


ANEW = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training")]:
    del sys.modules[name]
"""


def run_anew(code, *arguments):
    """Runs code that imports the library anew; torch, whose import takes seconds, is there already."""
    done = prepared.run(ANEW + code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_without_the_extension_and_optional_packages():
    run_anew(
        """
for name in ("sosd_fast._C", "triton", "cupy", "matplotlib", "rich", "scipy", "pandas", "pyarrow", "safetensors"):
    sys.modules[name] = None
import torch, sosd_fast
from sosd_fast import kernels
assert kernels._C is None
net = torch.nn.Linear(200, 100)
probe = sosd_fast.track(net)
net.weight.data += 0.1
probe.step()
record = probe.latest()["weight"]
S = torch.linalg.svdvals(net.weight.detach().double())
assert abs(record.sigma_max / S[0] - 1) < 1e-3, record
"""
    )


def test_import_is_light():
    writers = "from sosd_fast.callbacks import TensorBoardWriter, WandbWriter"
    code = f"import torch; import sosd_fast, sys; {writers}; print(*sys.modules)"
    heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    ).stdout.split()
    optional = {"matplotlib", "rich", "scipy", "pandas", "triton", "cupy", "pyarrow", "safetensors", "transformers"}
    optional -= {"triton"} if torch.version.cuda else set()
    assert not (optional | {"lightning", "wandb", "tensorboard"}) & set(heavy)


def test_callbacks_by_the_name_of_their_first_release():
    """Each name is that of its new module; those of libraries that are not installed say what to install."""
    import sosd_fast.callbacks
    from sosd_fast.integrations import tensorboard, wandb

    assert sosd_fast.callbacks.TensorBoardWriter is tensorboard.TensorBoardWriter
    assert sosd_fast.callbacks.WandbWriter is wandb.WandbWriter
    for name, library in (("HuggingFaceCallback", "transformers"), ("LightningCallback", "lightning")):
        if importlib.util.find_spec(library) is None:
            with pytest.raises(ImportError, match=f"{name}: expected .* Run `pip install {library}"):
                getattr(sosd_fast.callbacks, name)
        else:
            assert getattr(sosd_fast.callbacks, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Callback'"):
        sosd_fast.callbacks.Callback  # noqa: B018


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-integrations.txt", "requirements-docs.txt"])
def test_pins_serve_as_constraints(file):
    """A name and a version each: pip refuses constraints with extras."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    assert not [line for line in lines if line and not re.fullmatch(r"[\w-]+==[\w.]+", line)]


def test_public_names():
    import sosd_fast.track

    assert callable(sosd_fast.track)
    for name in sosd_fast.__all__:
        assert getattr(sosd_fast, name).__doc__


def test_there_is_one_version():
    """That of the source: setuptools reads it from there, and CITATION.cff repeats it."""
    import sosd_fast

    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", sosd_fast.__version__)
    assert f"\nversion: {sosd_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_doctor(capsys):
    text = "\n".join(doctor())
    assert f"torch       {torch.__version__}" in text and "svdvals                C++" in text
    assert main(["doctor"]) == 0 and capsys.readouterr().out.strip() == text.strip()


PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAME = r"`([A-Za-z_][\w.]+)(?:\(.*?\))?`"


def defines(file: str, name: str) -> bool:
    """Whether a file of Python defines a name anywhere, or one of C++ has it outside of comments."""
    text = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
    if not file.endswith(".py"):
        return re.search(rf"^(?!\s*//).*\b{name}\b", text, re.M) is not None
    return re.search(rf"^ *(?:(?:class|def) {name}\b|{name}(?:: [^=\n]+)? = )", text, re.M) is not None


def wrong_rows(page: str) -> list[str]:
    """The names in the rows of a page's tables that none of the files of their row has, and how many rows there are."""
    wrong = []
    for what, where in re.findall(r"^\| (.*) \| (`.*`) \|$", page, re.M):
        files = re.findall(r"`([\w/.]+)`", where)
        names = [part for name in re.findall(NAME, what) for part in name.split(".")]
        wrong += [f"{name} in {where}" for name in names if not any(defines(file, name) for file in files)]
    return wrong


def test_the_rows_of_the_architecture_are_as_described():
    """Each name of a row is in one of its files."""
    assert len(re.findall(r"^\| .*`\w+`.* \| `.*` \|$", PAGE, re.M)) > 25
    assert not wrong_rows(PAGE)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("| `choose` and `climb` | `sosd_fast/spectra/precision.py` |", []),
        ("| `Recorder.add` | `sosd_fast/probe/recorder.py` |", []),
        ("| `choose` and `Auditor` | `sosd_fast/probe/measurement.py` |", ["choose", "Auditor"]),
        ("| `Record` | `sosd_fast/probe/measurement.py` |", ["Record"]),  # which imports it
        ("| `solve` | `kernels/cpu/nowhere.cpp` |", ["solve"]),
    ],
)
def test_a_wrong_row_is_found(row, expected):
    assert [each.split(" in ")[0] for each in wrong_rows(row)] == expected


def test_what_the_architecture_names_is_there():
    """Whatever looks like a path is one, and every other name in backquotes is a word of the code."""
    wrong = [path for path in re.findall(r"`((?:\w+/)+[\w.]*)`", PAGE) if not (ROOT / path).exists()]
    named = {part for each in re.findall(NAME, PAGE) if not (ROOT / each).exists() for part in each.split(".")}
    code = "".join(
        path.read_text()
        for room in ("kernels", "sosd_fast", "bench", "tests")
        for path in (ROOT / room).rglob("*.*")
        if path.suffix in (".py", ".cpp", ".hpp") and path != Path(__file__).resolve()
    )
    assert not wrong and not [name for name in named if not re.search(rf"\b{name}\b", code)]


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "not installed"])
def test_the_folder_of_kernels_hides_no_package_of_that_name(tmp_path, installed):
    """A Python that is started in the repository has it first on sys.path; transformers imports Hugging Face's."""
    if installed:
        package = tmp_path / "kernels"
        package.mkdir()
        (package / "__init__.py").write_text("from kernels.layer import kernelize")
        (package / "layer.py").write_text("kernelize = 'theirs'")
    code = """
assert sys.path[0] == ""
sys.path.append(sys.argv[1])
import kernels, sosd_fast.kernels as own
print(getattr(kernels, "kernelize", None), own.backend_of is not None, kernels.__file__)
"""
    expected = ["theirs", "True", f"{tmp_path}/kernels/__init__.py"]
    assert run_anew(code, tmp_path).split() == (
        expected if installed else ["None", "True", f"{ROOT}/kernels/__init__.py"]
    )
