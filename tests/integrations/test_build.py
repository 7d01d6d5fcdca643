"""What a user installs: the source distribution, the wheel, their files, and the types as pyright reads them."""

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def pip(*arguments, python=sys.executable):
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def wheel_of(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("sosd_fast-*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A bare copy of the tree as it is now: its links, and nothing that was built."""
    left_out = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info", "*.so")
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "copy", symlinks=True, ignore=left_out))
    shutil.rmtree(copy / "runs", ignore_errors=True)  # of trainings; sosd_fast/runs stays
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return wheel_of(checkout, tmp_path_factory.mktemp("wheel"))


def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert all(info.file_size or info.filename.endswith((".typed", "__init__.py")) for info in archive.infolist())
        return archive.namelist()


def test_the_wheel_holds_every_file_once(wheel):
    names = files(wheel)
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "sosd_fast").rglob("*.py")}
    python |= {f"sosd_fast/kernels/{name}" for name in KERNELS}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(python)
    assert {"sosd_fast/py.typed"} < set(names) and any(name.endswith("/report.html") for name in names)
    assert sum(name.startswith("sosd_fast/_C") for name in names) == 1
    assert {name.split("/")[0] for name in names} == {"sosd_fast", wheel.name.rsplit("-cp", 2)[0] + ".dist-info"}


def test_the_source_distribution_builds_the_same_wheel(checkout, wheel, tmp_path):
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    python = sorted(Path(m.name).name for m in members if "kernels" in m.name and m.name.endswith(".py"))
    assert python == KERNELS
    assert files(wheel_of(sdist, tmp_path)) == files(wheel)


def test_an_editable_install_reads_the_kernels_of_the_tree(checkout, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("install", "--no-deps", "-e", checkout, python=python)
    find = "import importlib.util as u; print(u.find_spec('sosd_fast').origin, u.find_spec('kernels'))"
    done = subprocess.run([python, "-I", "-c", find], cwd=tmp_path, capture_output=True, text=True, check=True)
    origin, kernels = done.stdout.split()
    assert Path(origin).parent == checkout / "sosd_fast" and kernels == "None"
    assert (checkout / "sosd_fast" / "kernels").is_symlink() and list((checkout / "sosd_fast").glob("_C*.so"))


def test_the_types_of_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    settings |= {"include": ["sosd_fast"], "stubPath": str(ROOT / "typings")}
    (tmp_path / "site" / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "site")
    found = json.loads(done.stdout)
    wrong = [f"{Path(d['file']).name}: {d['message']}" for d in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] > 20 and not wrong, "\n".join(wrong)
