"""Each file of tests/files: its spectra are those of its weights, or it is refused in a sentence."""

import importlib.util
import json
import re

import pytest
import torch
from corpus import FILES

from sosd_fast.__main__ import main
from sosd_fast.checkpoints.analyze import analyze, expand


def exact(W):
    S = torch.linalg.svdvals(W.double())
    return S, S / S.sum()


@pytest.mark.parametrize("name", FILES)
def test_what_analyze_gives_or_says(tmp_path, name):
    made = FILES[name](tmp_path)
    missing = made.needs and importlib.util.find_spec(made.needs) is None
    if missing or not made.matrices:
        with pytest.raises(ImportError if missing else ValueError, match=made.says) as refusal:
            list(analyze([made.path]))
        assert str(refusal.value).startswith("analyze: expected ") and "\n" not in str(refusal.value)
        assert not (tmp_path / "ran").exists(), "code was run"
        return
    notes = {}
    found = list(analyze([made.path], notes=notes))
    assert tuple(records[0].step for records in found) == made.steps
    assert [records[0].step for records in found] == sorted(made.steps)
    assert {r.name: r.shape for r in found[-1]} == {name: tuple(W.shape) for name, W in made.matrices.items()}
    for r in found[-1]:
        S, sd = exact(made.matrices[r.name])
        assert abs(r.sigma_max - S[0]) <= 1e-5 * S[0], r.name
        assert torch.linalg.norm(torch.tensor(r.spectrum, dtype=torch.float64) / r.spectrum.sum() - sd) <= 1e-6, r.name
    if made.says and not made.needs:
        assert len(notes) == len(found)
        assert any(re.search(made.says, note) for note in notes[str(expand([made.path])[-1])]), notes


@pytest.mark.parametrize("name", ["a_whole_model", "index_decides", "series_of_files", "fp8_in_blocks"])
def test_on_the_command_line(tmp_path, name, capsys):
    made = FILES[name](tmp_path)
    status = main(["analyze", "--json", "--spectra", str(made.path)])
    out, err = capsys.readouterr()
    if not made.matrices:
        assert status == 2 and not out and len(err.splitlines()) == 1
        return
    found = json.loads(out)
    assert status == 0 and [each["matrices"][0]["step"] for each in found] == list(made.steps)
    assert bool(made.says) == any(each["notes"] for each in found)


def test_the_rule_can_be_overruled(tmp_path, capsys):
    W = torch.randn(4, 32, 9)
    torch.save({"filters": W, "fc": torch.randn(9, 8)}, tmp_path / "a.pt")

    def shapes(**options):
        return {r.name: r.shape for r in next(analyze([tmp_path / "a.pt"], **options))}

    assert shapes() == {"fc": (9, 8)} | {f"filters[{i}]": (32, 9) for i in range(4)}
    assert shapes(flatten="fil*") == {"fc": (9, 8), "filters": (4, 288)}
    torch.save({"filters": W.transpose(0, 1).contiguous(), "fc": torch.randn(9, 8)}, tmp_path / "a.pt")
    assert shapes() == {"fc": (9, 8), "filters": (32, 36)}
    assert shapes(stack=["filters"]) == {"fc": (9, 8)} | {f"filters[{i}]": (4, 9) for i in range(32)}
    for option in ("--stack", "--flatten"):
        assert main(["analyze", str(tmp_path / "a.pt"), option, "fc"]) == 2
        assert "expected a pattern that fits a weight of three or more" in capsys.readouterr().err


def test_a_series_says_what_it_leaves_out(tmp_path, caplog):
    made = FILES["lightning"](tmp_path)
    assert [path.name for path in expand([made.path])] == ["epoch=1-step=50.ckpt", "epoch=1-step=500.ckpt"]
    assert "left out last.ckpt, whose name tells no step" in caplog.text
