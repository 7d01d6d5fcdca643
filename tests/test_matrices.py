import pytest
import torch
from torch import nn

from sosd_fast.matrices import find_matrices, kind


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.c_attn = nn.Linear(8, 24)
        self.conv = nn.Conv2d(3, 5, 2)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Parameter(torch.randn(2, 3, 4, 6))
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight


def test_names_shapes_and_order():
    found = find_matrices(nn.ModuleDict({"h": Model()}))
    shapes = {m.name: tuple(m.tensor().shape) for m in found}
    assert shapes == {
        "h.experts[0,0]": (4, 6), "h.experts[0,1]": (4, 6), "h.experts[0,2]": (4, 6),
        "h.experts[1,0]": (4, 6), "h.experts[1,1]": (4, 6), "h.experts[1,2]": (4, 6),
        "h.wte.weight": (20, 8),
        "h.c_attn.weight[q]": (8, 8), "h.c_attn.weight[k]": (8, 8), "h.c_attn.weight[v]": (8, 8),
        "h.conv.weight": (5, 12),
    }  # fmt: skip


def test_views_follow_the_parameter():
    model = nn.ModuleDict({"h": Model()})
    found = {m.name: m for m in find_matrices(model)}
    with torch.no_grad():
        model["h"].c_attn.weight[8:16] = 7
        model["h"].experts[1, 2] = 5
    assert (found["h.c_attn.weight[k]"].tensor() == 7).all() and not (found["h.c_attn.weight[q]"].tensor() == 7).any()
    assert (found["h.experts[1,2]"].tensor() == 5).all()
    assert found["h.c_attn.weight[v]"].tensor().data_ptr() == model["h"].c_attn.weight[16:].data_ptr()
    assert not found["h.wte.weight"].tensor().requires_grad


def test_include_exclude_and_split():
    model = nn.ModuleDict({"h": Model()})
    assert [m.name for m in find_matrices(model, include="*wte*")] == ["h.wte.weight"]
    assert not any("experts" in m.name for m in find_matrices(model, exclude=("*experts*", "*wte*")))
    names = [m.name for m in find_matrices(model, include="*wte*", split={"*wte*": (12, 8)})]
    assert names == ["h.wte.weight[0]", "h.wte.weight[1]"]
    wide = nn.ParameterDict({"c_attn": nn.Parameter(torch.arange(48.0).reshape(4, 12))})
    parts = find_matrices(wide, split={"c_attn": 3})
    assert [p.name for p in parts] == ["c_attn[q]", "c_attn[k]", "c_attn[v]"]
    assert torch.equal(parts[1].tensor(), wide["c_attn"][:, 4:8])


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(4, 4))
    assert [m.name for m in find_matrices(torch.compile(model))] == ["0.weight"]
    inner = nn.Sequential(torch.compile(nn.Linear(4, 4)))
    assert [m.name for m in find_matrices(inner)] == ["0.weight"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.0.attn.c_attn.weight[q]", "attention"),
        ("h.0.attn.c_proj.weight", "attention"),
        ("h.0.mlp.c_proj.weight", "mlp"),
        ("wte.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.mlp.down_proj.weight", "mlp"),
        ("model.embed_tokens.weight", "embedding"),
        ("layers.0.linear1.weight", "mlp"),
        ("0.weight", "other"),
    ],
)
def test_kind(name, expected):
    assert kind(name) == expected


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.LayerNorm(4), {}, "expected a model with at least one parameter of two dimensions, got model=LayerNorm"),
        (nn.Linear(4, 4), {"include": "*attn*"}, r"got include='\*attn\*'. The model has weight"),
        (nn.Linear(4, 4), {"exclude": "*"}, r"got include=\('\*',\), exclude=\('\*',\)"),
        (nn.Linear(4, 4), {"split": {"weight": 3}}, "expected parts that add up to 4, dimension 0 of weight"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        find_matrices(model, **options)
