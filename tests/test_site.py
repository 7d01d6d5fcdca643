"""The site is built without a warning, and has every public name."""

import functools
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import sosd_fast

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "training/README.md")),
    *(ROOT / "training/paper").rglob("*.md"),
    *(ROOT / "docs").glob("*.md"),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from a copy of what it is made of, without a warning."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder / "site"],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder / "site"


def public_names() -> set[str]:
    """What a user may name: `sosd_fast`'s own names, the members of its classes, and what pages and examples import."""
    names = set()
    for name in sosd_fast.__all__:
        value = getattr(sosd_fast, name)
        full = "sosd_fast.track.track" if name == "track" else f"sosd_fast.{name}"
        names.add(full)
        if value in (sosd_fast.Probe, sosd_fast.Run):
            names |= {f"{full}.{member}" for member, of in inspect.getmembers(value) if _is_public(member, of)}
        elif value in (sosd_fast.Record, sosd_fast.Distribution, sosd_fast.TopK):
            names |= {f"{full}.{field}" for field in value.__annotations__}
    sources = [code for page in PAGES if page.name != "architecture.md" for _, code in FENCE.findall(page.read_text())]
    for text in [*sources, *(path.read_text() for path in (ROOT / "examples").glob("*.py"))]:
        for module, imported in re.findall(r"^\s*from (sosd_fast\.[\w.]+) import ([\w, ]+)", text, re.M):
            names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return names


def _is_public(name: str, value) -> bool:
    return not name.startswith("_") and (callable(value) or isinstance(value, property | functools.cached_property))


def test_the_site_has_every_public_name(site):
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    missing = sorted(public_names() - {entry.split()[0] for entry in entries})
    assert len(public_names()) > 60 and not missing


def test_the_site_shows_the_pages_and_pictures(site):
    home = (site / "index.html").read_text()
    assert 'src="loss.png"' in home and (site / "loss.png").is_file() and (site / "training/paper/index.html").is_file()
    assert (site / "source/sosd_fast/spectra/precision.py/index.html").is_file()


def test_a_broken_page_breaks_the_site(site, tmp_path):  # noqa: ARG001
    left_out = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=left_out)
    with (copy / "docs/tutorial.md").open("a") as page:
        page.write("\n[nowhere](no-such-page.md)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode and "no-such-page.md" in done.stderr + done.stdout
