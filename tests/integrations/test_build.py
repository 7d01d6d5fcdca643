"""What a user installs: the wheel, its files, and its types as pyright reads them."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_wheel_and_its_types(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("sosd_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"sosd_fast/py.typed", "sosd_fast/report.html", "sosd_fast/kernels/__init__.py"} <= set(names)
    assert any(name.startswith("sosd_fast/_C") for name in names) and not any(n.startswith("tests") for n in names)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    settings |= {"include": ["sosd_fast"], "stubPath": str(ROOT / "typings")}
    (tmp_path / "site" / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "site")
    found = json.loads(done.stdout)
    wrong = [f"{Path(d['file']).name}: {d['message']}" for d in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] > 20 and not wrong, "\n".join(wrong)
