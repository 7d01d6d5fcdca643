"""What a user installs: the source distribution, the wheel, their files, and the types as pyright reads them."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import sosd_fast

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def pip(*arguments, python=sys.executable):
    # -I: a folder of PYTHONPATH with an egg-info would pass for this package installed.
    command = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
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


def test_the_wheel_carries_the_version_of_the_source(wheel):
    assert wheel.name.split("-")[1] == sosd_fast.__version__
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {sosd_fast.__version__}\n" in archive.read(metadata).decode()


def test_the_wheel_works_without_a_compiler_under_another_path(wheel, tmp_path):
    """In a new environment that has nothing but this wheel, and torch and matplotlib by a .pth file."""
    venv.create(tmp_path / "elsewhere", with_pip=True)
    python = tmp_path / "elsewhere" / "bin" / "python"
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-I", "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    # Last in the order, so that the wheel is found before an editable install of this tree. A .pth file that lies in
    # that folder is not read, so that no finder of an editable install is set up.
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    no_compiler = {"PATH": str(python.parent), "CC": "/nowhere", "CXX": "/nowhere", "HOME": str(tmp_path)}
    command = [python, "-I", ROOT / "tests" / "helpers" / "installed.py"]
    done = subprocess.run(command, cwd=tmp_path, env=no_compiler, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    version, folder = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert version == sosd_fast.__version__ and Path(folder) == Path(site) / "sosd_fast"


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux")
def test_the_wheel_needs_nothing_that_is_not_on_every_linux(wheel):
    """So a tag manylinux fits it as it is: no library of this machine has to be copied into it."""
    pytest.importorskip("auditwheel")
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True)
    found = re.search(r'following platform tag:\s+"(\w+)"', done.stdout)
    assert found and found[1].startswith("manylinux_"), done.stdout + done.stderr


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
