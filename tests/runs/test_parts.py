"""Run directories of several ranks, written by hand: what is missing, told apart, merged and cut off."""

import json

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.runs.records import Run, RunWriter, load
from sosd_fast.runs.schema import Record


def write(folder, names, steps, rank=None, shared_by=None, value=1.0):
    meta = {"matrices": names} | ({} if rank is None else {"rank": rank, "shared_by": shared_by})
    writer = RunWriter(folder, meta)
    for step in steps:
        writer.append([Record(step, name, (2, 2), "exact", sigma_max=value) for name in names])
    writer.close()


def test_ranks_that_share_work_have_one_model(tmp_path, caplog):
    # Two stages of two ranks each, all of whose matrices are called alike; a matrix moved within the first stage.
    write(tmp_path / "rank-00000", ["a", "b"], [0, 1], 0, [0, 1], 1.0)
    write(tmp_path / "rank-00001", ["b"], [1, 2], 1, [0, 1], 1.0)
    write(tmp_path / "rank-00002", ["a", "c"], [0, 1, 2], 2, [2, 3], 2.0)
    found = load(tmp_path)
    assert found.names == ["a[rank 0]", "b", "a[rank 2]", "c"] and found.missing_ranks == [3]
    assert [(r.step, r.name) for r in found.records if r.name in "bc"] == [
        (0, "b"), (0, "c"), (1, "b"), (1, "c"), (2, "b"), (2, "c"),
    ]  # fmt: skip
    assert {r.sigma_max for r in found.records if r.name == "a[rank 2]"} == {2.0}
    table = found.columns("name", "sigma_max")
    assert set(table["sigma_max"][table["name"] == "a[rank 0]"]) == {1.0} and len(table["name"]) == len(found.records)
    assert "the records of rank 3 are missing" in caplog.text and "told apart: a[rank 0], a[rank 2]." in caplog.text
    again = Run.merge([load(path) for path in sorted(tmp_path.glob("rank-*"))])
    assert again.names == found.names and again.missing_ranks == [3] and again.records == found.records


def test_matrices_that_a_model_gained_are_told_apart(tmp_path):
    for rank in range(2):
        write(tmp_path / f"rank-0000{rank}", ["same"] if rank else ["other"], [0], rank, [rank])
        writer = RunWriter(tmp_path / f"rank-0000{rank}", {"matrices": [], "rank": rank, "shared_by": [rank]})
        writer.append([Record(1, "late", (2, 2), "exact", sigma_max=rank)])
        writer.close()
    assert {(r.name, r.sigma_max) for r in load(tmp_path).records if r.step} == {
        ("late[rank 0]", 0),
        ("late[rank 1]", 1),
    }


def test_ranks_joined_by_another_number_of_ranks(tmp_path, caplog):
    # Four ranks, then two in the same directory: all of them had the one model.
    write(tmp_path / "rank-00000", ["a"], [0, 1], 0, [0, 1])
    write(tmp_path / "rank-00001", ["b"], [0, 1], 1, [0, 1])
    write(tmp_path / "rank-00002", ["a", "c"], [0], 2, [0, 1, 2, 3])
    write(tmp_path / "rank-00003", ["d"], [0], 3, [0, 1, 2, 3])
    found = load(tmp_path)
    assert found.names == ["a", "b", "c", "d"] and found.missing_ranks == [] and caplog.text == ""
    assert [(r.step, r.name) for r in found.records] == [(0, "a"), (0, "b"), (0, "c"), (0, "d"), (1, "a"), (1, "b")]


def test_directories_of_the_first_release_are_merged(tmp_path, caplog):
    write(tmp_path / "rank-00000", ["a"], [0, 1])
    write(tmp_path / "rank-00001", ["a", "b"], [0, 1])
    found = load(tmp_path)
    assert found.names == ["a", "b"] and len(found.records) == 4 and found.missing_ranks == [] and caplog.text == ""


def test_one_process_goes_on_where_several_wrote(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    write(tmp_path / "rank-00000", ["0.weight"], [0, 1, 2, 3], 0, [0, 1])
    write(tmp_path / "rank-00001", ["1.weight"], [0, 1, 2, 3], 1, [0, 1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with sosd_fast.track(net, optimizer, method="full", run_dir=tmp_path, step=2):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    found = load(tmp_path)
    expected = [(step, name) for step in range(4) for name in ("0.weight", "1.weight")]
    assert [(r.step, r.name) for r in found.records] == expected
    assert {r.method for r in found.records if r.step == 3} != {"exact"}, "what was cut off is there no more"
    assert json.loads((tmp_path / "meta.json").read_text()).get("rank") is None


@pytest.mark.parametrize("step", [0, 2])
def test_trim_leaves_what_somebody_writes(step, tmp_path):
    write(tmp_path, ["a"], range(4))
    writer = RunWriter(tmp_path)
    RunWriter.trim(tmp_path, step)
    assert len(load(tmp_path).records) == 4
    writer.close()
    RunWriter.trim(tmp_path, step)
    assert [r.step for r in load(tmp_path).records] == list(range(step + 1))
