import json
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

import sosd_fast
from sosd_fast.__main__ import main
from sosd_fast.checkpoints.analyze import analyze, parameter_alignment
from sosd_fast.checkpoints.files import find_checkpoints
from sosd_fast.matrices import find_matrices


def weights(seed=0, scale=0.0):
    g = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(seed)
    shapes = {
        "h.10.attn.c_attn.weight": (24, 72), "h.2.attn.c_attn.weight": (24, 72), "h.2.mlp.weight": (40, 24),
        "moe.experts": (3, 16, 20), "conv.weight": (8, 3, 5, 5), "ln.bias": (24,), "head.weight": (50, 24),
    }  # fmt: skip
    tensors = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    return {k: t + scale * torch.randn(t.shape, generator=noise) for k, t in tensors.items()} | {
        "ids": torch.ones(2, 2).long()
    }


def sharded(folder, tensors):
    folder.mkdir()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def safetensors(path, tensors):
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def torch_file(path, tensors, suffix=".pt", wrap=lambda t: t, **options):
    torch.save(wrap(tensors), path.with_suffix(suffix), **options)
    return path.with_suffix(suffix)


FORMS = {
    "safetensors": safetensors,
    "shards": sharded,
    "state_dict": torch_file,
    "bin": lambda path, t: torch_file(path, t, ".bin"),
    "old torch": lambda path, t: torch_file(path, t, _use_new_zipfile_serialization=False),
    "compiled": lambda path, t: torch_file(path, {f"_orig_mod.{k}": v for k, v in t.items()}),
    "checkpoint": lambda path, t: torch_file(
        path, t, ".ckpt", lambda t: {"step": 3, "model": t, "optimizer": {"state": {0: {"exp_avg": torch.ones(9, 9)}}}}
    ),
    "nested": lambda path, t: torch_file(
        path, {"a": {k: v for k, v in t.items()}, "optimizer": {"exp_avg": torch.ones(9, 9)}}
    ),
}


def exact(W):
    S = torch.linalg.svdvals(W.double()).numpy()
    return S, S / S.sum()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_exact_spectra(tmp_path, form):
    tensors = weights()
    path = FORMS[form](tmp_path / "w", tensors)
    (records,) = analyze([path])
    parts = {
        f"{name}[{part}]": tensors[name][:, 24 * i : 24 * (i + 1)]
        for name in ("h.2.attn.c_attn.weight", "h.10.attn.c_attn.weight")
        for i, part in enumerate("qkv")
    }
    parts |= {f"moe.experts[{i}]": tensors["moe.experts"][i] for i in range(3)}
    parts |= {"conv.weight": tensors["conv.weight"].flatten(1)}
    parts |= {name: tensors[name] for name in ("h.2.mlp.weight", "head.weight")}
    prefix = "a." if form == "nested" else ""
    assert {r.name for r in records} == {prefix + name for name in parts}
    for r in records:
        S, sd = exact(parts[r.name.removeprefix(prefix)])
        assert r.shape == tuple(parts[r.name.removeprefix(prefix)].shape) and r.step == 0
        assert np.linalg.norm(r.spectrum / r.spectrum.sum() - sd) <= 1e-6 and np.all(np.diff(r.spectrum) <= 0)
        assert r.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-5)
        assert r.sd_variation is None and r.cosine is None
    if form in ("safetensors", "shards"):
        names = [r.name for r in records]
        assert names.index("h.2.attn.c_attn.weight[q]") < names.index("h.10.attn.c_attn.weight[q]"), "2 before 10"


def test_variation_between_checkpoints(tmp_path):
    steps = (100, 200, 1000)
    paths = [torch_file(tmp_path / f"step-{s}", weights(s, 0.01)) for s in steps]
    found = list(analyze(paths))
    assert [r[0].step for r in found] == list(steps)
    for earlier, later in zip(found, found[1:], strict=False):
        for a, b in zip(earlier, later, strict=True):
            change = exact(weights(b.step, 0.01)["head.weight"])[1] - exact(weights(a.step, 0.01)["head.weight"])[1]
            assert b.interval == b.step - a.step
            if b.name == "head.weight":
                assert b.sd_variation == pytest.approx(np.linalg.norm(change), abs=1e-6)
    assert 0.9 < found[-1][0].cosine < 1
    wrong = torch_file(tmp_path / "other", {"head.weight": torch.ones(9, 9)})
    with pytest.raises(ValueError, match="expected checkpoints of one model, got head.weight with 9"):
        list(analyze([paths[0], wrong]))


class Mamba(nn.Module):
    """The parameters of a Mamba block, and some that other models have."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(16, 64, bias=False), nn.Linear(32, 16, bias=False)
        self.conv1d = nn.Conv1d(32, 32, 4, groups=32)
        self.x_proj, self.dt_proj = nn.Linear(32, 10, bias=False), nn.Linear(2, 32)
        self.A_log, self.D = nn.Parameter(torch.randn(32, 4)), nn.Parameter(torch.ones(32))
        self.pos_embed, self.cls_token = nn.Parameter(torch.randn(1, 7, 16)), nn.Parameter(torch.randn(1, 1, 16))
        self.gain, self.plane = nn.Parameter(torch.ones(16, 1, 1, 1)), nn.Parameter(torch.randn(1, 3, 7, 7))
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.long_conv = nn.Conv1d(8, 4, 9)
        self.norm = parametrizations.spectral_norm(nn.Linear(6, 4))
        self.rel_attn = nn.ParameterDict({"q": torch.randn(16, 4, 4), "r_w_bias": torch.randn(4, 4)})
        self.experts = nn.ParameterDict({"w1": torch.randn(5, 4, 6), "w1_bias": torch.randn(5, 6)})
        self.attn = nn.MultiheadAttention(16, 4)


class Tied(nn.Module):
    """A model of which several names have one embedding."""

    def __init__(self):
        super().__init__()
        self.shared, self.head_conv = nn.Embedding(20, 16), nn.Conv2d(20, 16, 1, bias=False)
        self.encoder, self.decoder = (nn.ModuleDict({"embed_tokens": nn.Embedding(20, 16)}) for _ in range(2))
        self.other_embeddings = nn.Embedding(20, 16)
        self.zero_embeddings, self.zero_head = nn.Embedding(9, 16), nn.Linear(16, 9, bias=False)
        self.lm_head = nn.Linear(16, 20, bias=False)
        for layer in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            layer.weight = self.shared.weight
        nn.init.zeros_(self.zero_embeddings.weight)
        nn.init.zeros_(self.zero_head.weight)


def copies(path, tensors):
    return safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()})


@pytest.mark.parametrize("save", [torch_file, copies])
def test_tied_weights_are_measured_once(tmp_path, save):
    model = Tied()
    tracked = [m.name for m in find_matrices(model)]
    (records,) = analyze([save(tmp_path / "w", model.state_dict())])
    assert sorted(r.name for r in records) == sorted(tracked) and "shared.weight" in tracked and len(tracked) == 5
    embeddings = {"a_head.weight": torch.ones(4, 3), "wte.weight": torch.arange(12.0).view(4, 3)}
    (records,) = analyze([copies(tmp_path / "x", embeddings)])
    assert len(records) == 2


class Adapter(nn.Module):
    """A layer with an adapter, as peft's LoRA has it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.ModuleDict({"default": nn.Linear(12, 2, bias=False)})


def test_fused_layers_under_adapters_are_cut_as_without(tmp_path):
    attention = type("BloomAttention", (nn.Module,), {})
    model = nn.ModuleDict({"attn": attention(), "h": nn.ModuleDict({"c_attn": Adapter(nn.Linear(12, 36, bias=False))})})
    model["attn"].num_heads, model["attn"].query_key_value = 4, Adapter(nn.Linear(12, 36, bias=False))
    found = {m.name: m.tensor() for m in find_matrices(model)}
    names = [f"attn.query_key_value.base_layer.weight[{part}]" for part in "qkv"]
    assert [name for name in found if "attn.query" in name and "[" in name] == names
    W = model["attn"].query_key_value.base_layer.weight.detach().view(4, 3, 3, 12)  # head by head
    assert all(torch.equal(found[name], W[:, i].flatten(0, 1)) for i, name in enumerate(names))
    assert [n for n in found if "c_attn.base" in n] == [f"h.c_attn.base_layer.weight[{part}]" for part in "qkv"]
    (records,) = analyze([safetensors(tmp_path / "w", {k: v for k, v in model.state_dict().items() if "h." in k})])
    assert {r.name for r in records} == {name for name in found if "h." in name}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("synthesis.conv1.weight", (1, 6, 8, 3, 3), [(6, 72)]),
        ("video.conv1.weight", (6, 8, 1, 3, 3), [(6, 72)]),
        ("mixed.conv1.weight", (4, 6, 32, 3, 3), 4 * [(6, 288)]),
        ("attn.qkv", (3, 4, 12, 3), 3 * [(12, 12)]),
        ("attn.q_norm.weight", (4, 8), []),
        ("attn.norm_proj.weight", (4, 8), [(4, 8)]),
        ("pos_embed", (1, 9, 8), []),
        ("layer_scale", (4, 8), []),
    ],
    ids=str,
)
def test_what_names_and_shapes_tell(tmp_path, name, shape, expected):
    tensors = {name: torch.randn(shape), "other.weight": torch.randn(2, 3)}
    (records,) = analyze([safetensors(tmp_path / "w", tensors)])
    assert [r.shape for r in records if r.name != "other.weight"] == expected


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
@pytest.mark.parametrize("save", [torch_file, safetensors])
def test_matrices_are_those_of_track(tmp_path, save, wrap):
    model = wrap(nn.Sequential(nn.Embedding(20, 16), Mamba()))
    tracked = {m.name: tuple(m.tensor().shape) for m in find_matrices(model)}
    (records,) = analyze([save(tmp_path / "w", model.state_dict())])
    # The state that spectral_norm keeps are vectors; the weights are what parameters are.
    assert {r.name: r.shape for r in records} == tracked
    assert tracked["1.conv1d.weight"] == (32, 4) and tracked["1.rel_attn.q"] == (16, 16)
    assert tracked["1.conv.weight[original1]"] == (8, 27) and tracked["1.experts.w1[4]"] == (4, 6)


def test_weights_without_a_matrix_are_refused(tmp_path):
    path = torch_file(tmp_path / "gains", {"gain": torch.ones(8, 1, 1)})
    with pytest.raises(ValueError, match="in which no tensor is a matrix"):
        list(analyze([path]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dtypes(tmp_path, dtype):
    W = torch.randn(30, 20).to(dtype)
    (records,) = analyze([safetensors(tmp_path / "w", {"w": W})])
    assert np.linalg.norm(records[0].spectrum / records[0].spectrum.sum() - exact(W)[1]) <= 1e-6


class Bomb:
    target = ""

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    target = tmp_path / "ran"
    monkeypatch.setattr(Bomb, "target", str(target))
    for path, save in (
        (tmp_path / "a.pt", torch.save),
        (tmp_path / "b.bin", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        save({"w": torch.ones(2, 2), "bomb": Bomb()}, path)
        with pytest.raises(ValueError, match=r"analyze: expected tensors only, got path=.*Nothing in it was run"):
            list(analyze([path]))
        assert not target.exists()
    assert main(["analyze", str(tmp_path / "a.pt")]) == 2
    torch.load(tmp_path / "a.pt", weights_only=False)["bomb"].close()
    assert target.exists(), "the bomb is one"


def test_damaged_and_missing_files(tmp_path):
    def refuse(path, message):
        with pytest.raises(ValueError, match=message):
            list(analyze([path]))

    for path in (safetensors(tmp_path / "a", weights()), torch_file(tmp_path / "b", weights())):
        whole = path.read_bytes()
        for keep in (0, 5, len(whole) // 2, len(whole) - 50):
            path.write_bytes(whole[:keep])
            refuse(path, r"analyze: expected (a whole file of weights|tensors only), got path=")
    refuse(tmp_path / "nothing", "It does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "expected a folder with .safetensors, .* with none")
    refuse(torch_file(tmp_path / "vectors", {"b": torch.ones(4), "n": torch.ones(3, 3).long()}), "without a floating")
    folder = sharded(tmp_path / "shards", weights())
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, "expected all shards of .* without model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuse(folder, "expected an index with a weight_map")
    for outside in ("../a.safetensors", str(tmp_path / "a.safetensors"), None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": outside}}))
        refuse(folder, "expected files inside")


def test_nan_weights_are_null(tmp_path, capsys):
    tensors = {"good": torch.randn(6, 5), "bad": torch.full((6, 5), torch.nan)}
    assert main(["analyze", "--json", "--spectra", str(torch_file(tmp_path / "w", tensors))]) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    good, bad = found["matrices"]
    assert found["notes"] == ["null stands for NaN and infinities in bad"]
    assert len(good["spectrum"]) == 5 and good["sigma_max"] == good["spectrum"][0]
    assert bad["sigma_max"] is None and bad["spectrum"] == [None] * 5


def test_command(tmp_path, capsys):
    paths = [str(sharded(tmp_path / f"checkpoint-{s}", weights(s, 0.01))) for s in (10, 20)]
    assert main(["analyze", *paths, "--run-dir", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "checkpoint-20, step 20" in text and "h.10.attn.c_attn.weight[q]" in text and "SD variation" in text
    run = sosd_fast.load(tmp_path / "run")
    assert len(run.records) == 24 and run.spectra("head.weight")[0].tolist() == [10, 20]
    assert main(["analyze", *paths, "--run-dir", str(tmp_path / "run")]) == 2
    assert (
        "expected a new or empty folder" in capsys.readouterr().err and len(sosd_fast.load(run.run_dir).records) == 24
    )
    assert main(["analyze", str(tmp_path / "none"), "--run-dir", str(tmp_path / "new")]) == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    path = safetensors(tmp_path / "w", weights())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="Run `pip install safetensors`"):
        list(analyze([path]))


def test_parameter_alignment(tmp_path):
    for step, scale in ((5, 1.0), (30, 0.1), (200, 0.0)):
        sharded(tmp_path / f"checkpoint-{step}", weights(step, scale))
    paths = find_checkpoints(tmp_path)
    assert [p.name for p in paths] == ["checkpoint-5", "checkpoint-30", "checkpoint-200"]
    steps, cosine = parameter_alignment(paths)
    flat = [torch.cat([t.double().flatten() for t in weights(*a).values() if t.ndim > 1 and t.is_floating_point()])
            for a in ((5, 1.0), (30, 0.1), (200, 0.0))]  # fmt: skip
    expected = [float(f @ flat[-1] / f.norm() / flat[-1].norm()) for f in flat]
    assert steps == [5, 30, 200] and cosine == pytest.approx(expected, rel=1e-9) and cosine[-1] == pytest.approx(1)
