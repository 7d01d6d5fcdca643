"""Fused queries, keys and values are cut as their modules use them, or not at all."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sosd_fast
from sosd_fast.checkpoints.analyze import analyze
from sosd_fast.matrices import find_matrices

D, HEADS, HEAD_DIM = 12, 4, 3


def attention(kind, layer, size, /, **settings):
    """A module of a type's name and settings, which is all that is asked of it."""
    module = type(kind, (nn.Module,), {})()
    for name, value in settings.items():
        setattr(module, name, value)
    module.add_module(layer, nn.Linear(D, size, bias=False))
    return module


def rows(W, *heads):
    """The rows of W, ordered by head, of the given heads."""
    return W.view(-1, HEAD_DIM, D)[list(heads)].flatten(0, 1)


# What of the fused heads, in the order of outputs, each model's own code takes for queries, keys and values.
BY_HEAD = {"q": (0, 3, 6, 9), "k": (1, 4, 7, 10), "v": (2, 5, 8, 11)}
CASES = {
    "GPT-NeoX": (
        ("GPTNeoXAttention", "query_key_value", 36),
        {"config": SimpleNamespace(num_attention_heads=4)},
        BY_HEAD,
    ),
    "BLOOM": (("BloomAttention", "query_key_value", 36), {"num_heads": 4}, BY_HEAD),
    "Falcon 7B": (
        ("FalconAttention", "query_key_value", 18),
        {"num_heads": 4, "multi_query": True, "num_kv_heads": 1},
        {"q": (0, 1, 2, 3), "k": (4,), "v": (5,)},
    ),
    "Falcon 40B": (
        ("FalconAttention", "query_key_value", 24),
        {"num_heads": 4, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2},
        {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)},
    ),
    "BigCode, a head each": (("GPTBigCodeAttention", "c_attn", 36), {"num_heads": 4, "multi_query": False}, BY_HEAD),
    "BigCode": (
        ("GPTBigCodeAttention", "c_attn", 18),
        {"num_heads": 4, "multi_query": True},
        {"q": (0, 1, 2, 3), "k": (4,), "v": (5,)},
    ),
    "CodeGen": (
        ("CodeGenAttention", "qkv_proj", 36),
        {"num_attention_heads": 4},
        {"q": (0, 3, 6, 9), "v": (1, 4, 7, 10), "k": (2, 5, 8, 11)},
    ),
    "Phi-3": (
        ("Phi3Attention", "qkv_proj", 24),
        {"config": SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)},
        {"q": (0, 1, 2, 3), "k": (4, 5), "v": (6, 7)},
    ),
    "InternLM2": (
        ("InternLM2Attention", "wqkv", 24),
        {"num_heads": 4, "num_key_value_heads": 2},
        {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)},
    ),
    "torchtitan": (
        ("FusedQKVLinear", "wqkv", 24),
        {"heads_per_kv": 2, "r_dim": 4, "head_dim": 3},
        {"q": (0, 1, 4, 5), "k": (2, 6), "v": (3, 7)},
    ),
    "torchtitan, three squares": (
        ("FusedQKVLinear", "wqkv", 36),
        {"heads_per_kv": 1, "r_dim": 3, "head_dim": 3},
        BY_HEAD,
    ),
    "wqkv of gpt-fast": (
        ("Attention", "wqkv", 36),
        {"n_head": 4, "n_local_heads": 4, "head_dim": 3},
        {"q": (0, 1, 2, 3), "k": (4, 5, 6, 7), "v": (8, 9, 10, 11)},
    ),
    "MaxViT": (("AttentionCl", "qkv", 36), {"num_heads": 4, "head_first": True}, BY_HEAD),
    "timm": (
        ("AttentionCl", "qkv", 36),
        {"num_heads": 4, "head_first": False},
        {"q": (0, 1, 2, 3), "k": (4, 5, 6, 7), "v": (8, 9, 10, 11)},
    ),
    "a subclass": (("Mine", "qkv", 36), {}, {"q": (0, 1, 2, 3), "k": (4, 5, 6, 7), "v": (8, 9, 10, 11)}),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_are_what_the_module_takes_them_for(case):
    (kind, layer, size), settings, parts = CASES[case]
    net = nn.ModuleDict({"attn": attention(kind, layer, size, **settings)})
    W = net["attn"].get_submodule(layer).weight.detach()
    found = {m.name: m.tensor() for m in find_matrices(net)}
    assert list(found) == [f"attn.{layer}.weight[{part}]" for part in parts]
    for part, heads in parts.items():
        assert torch.equal(found[f"attn.{layer}.weight[{part}]"], rows(W, *heads)), part
    probe = sosd_fast.track(net, optimizers=[], method="full")
    for name, record in probe.latest().items():
        assert record.sigma_max == pytest.approx(torch.linalg.matrix_norm(found[name], 2).item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"num_heads": 8, "num_kv_heads": 2}, {"n_head": 8, "n_query_groups": 2}, {"num_heads": 8, "head_dim": 3}],
    ids=str,
)
def test_unequal_parts_that_add_up_to_three_squares_stay_whole(settings):
    for layer in ("qkv", "to_qkv", "c_attn"):
        net = attention("Mine", layer, 36, **settings)
        assert [m.name for m in find_matrices(net)] == [f"{layer}.weight"]
        assert len(find_matrices(net, split={f"{layer}.weight": (24, 6, 6)})) == 3, "what is asked for is done"


def test_a_subclass_of_a_known_attention_is_cut_as_it_is():
    base = type("BloomAttention", (nn.Module,), {})
    module = type("Mine", (base,), {})()
    module.num_heads, module.query_key_value = HEADS, nn.Linear(D, 36)
    q = find_matrices(module)[0]
    assert torch.equal(q.tensor(), rows(module.query_key_value.weight.detach(), 0, 3, 6, 9))


def test_saved_weights_are_cut_by_the_config_beside_them(tmp_path):
    W = torch.randn(36, D)
    save_file({"transformer.h.0.self_attention.query_key_value.weight": W}, tmp_path / "model.safetensors")
    assert [r.name[-8:] for r in next(analyze([tmp_path]))] == ["e.weight"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "n_head": 4}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        q, k, v = next(analyze([path]))
        for record, heads in ((q, (0, 3, 6, 9)), (k, (1, 4, 7, 10)), (v, (2, 5, 8, 11))):
            assert record.name.endswith(f"weight[{'qkv'[heads[0]]}]")
            assert record.sigma_max == pytest.approx(torch.linalg.matrix_norm(rows(W, *heads), 2).item(), rel=1e-5)
    (tmp_path / "config.json").write_text("not JSON")
    assert len(next(analyze([tmp_path]))) == 1
