"""Folders of torch.distributed.checkpoint; tests/distributed/test_sharded.py reads what several ranks wrote."""

import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign_files import Bomb
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from sosd_fast.checkpoints.analyze import analyze, parameter_alignment
from sosd_fast.checkpoints.files import find_checkpoints


def model(seed=0):
    torch.manual_seed(seed)
    layers = {"attn": torch.nn.Linear(20, 30), "mlp": torch.nn.Linear(30, 20), "experts": torch.nn.Conv1d(4, 8, 3)}
    return torch.nn.ModuleDict(layers)


def save(folder, state):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(state, checkpoint_id=folder)
    return folder


def training_state(m):
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {"model": m.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "loader": {"at": torch.ones(2, 2)}}


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "step-000003", training_state(model()))


@pytest.mark.parametrize("form", ["training", "model", "nested", "bf16"])
def test_values_are_exact(tmp_path, form):
    m = model().to(torch.bfloat16 if form == "bf16" else torch.float32)
    state, prefix = m.state_dict(), ""
    if form == "training":
        state = training_state(m)
    if form == "nested":  # no part of it is called as weights usually are
        state, prefix = {"actor": {"body": m.state_dict()}, "optimizer": {"m": torch.ones(5, 5)}}, "actor.body."
    (records,) = analyze([save(tmp_path / "w", state)])
    weights = {name: p.detach() for name, p in m.named_parameters() if p.ndim > 1}
    weights |= {f"experts.weight[{i}]": w for i, w in enumerate(weights.pop("experts.weight"))}
    assert {r.name.removeprefix(prefix): r.shape for r in records} == {n: tuple(w.shape) for n, w in weights.items()}
    for r in records:
        S = torch.linalg.svdvals(weights[r.name.removeprefix(prefix)].double()).numpy()
        assert np.linalg.norm(r.spectrum / r.spectrum.sum() - S / S.sum()) <= 1e-6


def test_alignment_reads_them(tmp_path):
    for step in (1, 2):
        save(tmp_path / "checkpoints" / f"step-{step}", training_state(model(step)))
    paths = find_checkpoints(tmp_path)
    steps, cosine = parameter_alignment(paths)
    flat = []
    for step in (1, 2):
        m = model(step)
        training_state(m)
        flat.append(torch.cat([p.detach().double().flatten() for p in m.parameters() if p.ndim > 1]))
    expected = [float(f @ flat[1] / f.norm() / flat[1].norm()) for f in flat]
    assert steps == [1, 2] and cosine == pytest.approx(expected, rel=1e-9)


def refuse(path, message):
    with pytest.raises(ValueError, match=message):
        list(analyze([path]))


def test_damage_is_named(tmp_path, folder):
    (index, data), copy = (folder / ".metadata", folder / "__0_0.distcp"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    for keep in (0, 1, 20, 500, index.stat().st_size - 1):
        (copy / ".metadata").write_bytes(index.read_bytes()[:keep])
        refuse(copy, r"analyze: expected a whole file of weights, got path=.*\.metadata, which cannot be read")
    (copy / ".metadata").write_bytes(index.read_bytes())
    for keep in (0, 3000):
        (copy / data.name).write_bytes(data.read_bytes()[:keep])
        refuse(copy, rf"analyze: expected a whole file of weights, got path=.*{data.name}, which cannot .*truncated")
    (copy / data.name).write_bytes(bytes(data.stat().st_size))
    refuse(copy, rf"analyze: expected (a whole file of weights|tensors only), got path=.*{data.name}")
    (copy / data.name).unlink()
    refuse(copy, rf"analyze: expected every rank's file of .* without {data.name}")


def rewrite(folder, change):
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def info(metadata, key="model.attn.weight"):
    return next(info for at, info in metadata.storage_data.items() if at.fqn == key)


def test_what_does_not_fit_is_named(tmp_path, folder):
    def changed(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        rewrite(shutil.copytree(folder, copy), change)
        return copy

    def halve(metadata):
        chunk = metadata.state_dict_metadata["model.attn.weight"].chunks[0]
        chunk.sizes = torch.Size([15, 20])

    def lose(metadata):
        metadata.storage_data = {at: i for at, i in metadata.storage_data.items() if at.fqn != "model.attn.weight"}

    def beyond(metadata):
        metadata.state_dict_metadata["model.attn.weight"].chunks[0].sizes = torch.Size([31, 20])

    def another(metadata):
        vars(info(metadata)).update(vars(info(metadata, "model.mlp.weight")))

    def outside(metadata):
        info(metadata).relative_path = "../__0_0.distcp"

    def packed(metadata):
        info(metadata).transform_descriptors = ["zstd"]

    def empty(metadata):
        metadata.state_dict_metadata = {"step": BytesStorageMetadata()}

    refuse(changed(halve), "without all parts of model.attn.weight")
    refuse(changed(lose), "without a place for the part of model.attn.weight")
    refuse(changed(beyond), "not an index of torch.distributed.checkpoint: model.attn.weight of shape")
    refuse(changed(another), "attn.weight is not the tensor that .metadata tells of")
    refuse(changed(outside), "expected files inside")
    refuse(changed(packed), "under .'zstd'.. Save the weights without extensions")
    refuse(changed(empty), "without a floating-point matrix")
    refuse(changed(lambda metadata: vars(metadata).clear()), "not an index of torch.distributed.checkpoint")


@pytest.mark.parametrize("where", ["index", "planner_data", "tensor"])
def test_code_in_them_is_not_run(tmp_path, folder, where):
    target = tmp_path / "ran"
    bomb = Bomb(target)
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    elif where == "planner_data":
        rewrite(folder, lambda metadata: vars(metadata).update(planner_data={"a": bomb}))
    else:
        torch.save({"w": torch.ones(30, 20), "bomb": bomb}, folder / "bomb.distcp")
        size = (folder / "bomb.distcp").stat().st_size
        new = {"relative_path": "bomb.distcp", "offset": 0, "length": size}
        rewrite(folder, lambda metadata: vars(info(metadata)).update(new))
    refuse(folder, "Nothing in it was run")
    assert not target.exists()
    if where != "tensor":
        pickle.loads((folder / ".metadata").read_bytes())
        assert target.exists(), "the bomb is one"


@pytest.mark.parametrize(
    "code", ["os system", "builtins eval", "torch load", "torch.serialization load", "torch dtype"]
)
def test_other_names_are_refused(folder, code):
    (folder / ".metadata").write_bytes(b"c" + code.replace(" ", "\n").encode() + b"\n.")
    refuse(folder, f"expected an index of torch.distributed.checkpoint, .* with {code.replace(' ', '.')} in it")


def test_the_trainers_folder_of_shards(tmp_path):
    save(tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0", {"model": model().state_dict()})
    save(tmp_path / "checkpoint-10" / "optimizer_0", {"optimizer": {"m": torch.ones(5, 5)}})
    torch.save({}, tmp_path / "checkpoint-10" / "scheduler.pt")
    ((*records,),) = analyze([tmp_path / "checkpoint-10"])
    assert records[0].step == 10 and {r.name for r in records} >= {"attn.weight", "mlp.weight"}
