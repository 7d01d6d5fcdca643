from pathlib import Path

import prepared
import pytest

import sosd_fast

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments):
    done = prepared.run(EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nanochat_style():
    lines = run("nanochat_style.py").splitlines()
    assert len(lines) == 3 and "| SD variation " in lines[-1]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_torchtitan_style_resumes(tmp_path):
    assert "step 40" in run("torchtitan_style.py", tmp_path)
    (tmp_path / "step-000040.pt").unlink()
    whole = sosd_fast.load(tmp_path)
    assert "step 40" in run("torchtitan_style.py", tmp_path)
    again = sosd_fast.load(tmp_path)
    assert {r.step for r in again.records} <= set(range(41)) and max(r.step for r in again.records) > 20
    assert [line["step"] for line in again.log] == list(range(1, 41))
    before = [r for r in whole.records if r.step <= 20]
    assert again.records[: len(before)] == before
    assert "0.layers.1.self_attn.in_proj_weight[q]" in again.names


@pytest.mark.parametrize(("name", "package"), [("hugging_face.py", "accelerate"), ("lightning_module.py", "lightning")])
def test_with_other_libraries(tmp_path, name, package):
    pytest.importorskip(package)
    run(name, tmp_path)
    found = sosd_fast.load(tmp_path)
    assert max(r.step for r in found.records) >= 1 and found.log[-1]["step"] == 20
