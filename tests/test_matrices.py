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


class OwnConvolution(nn.Module):
    """A convolution that is no torch.nn.Conv1d, with a kernel as long as its channels are many."""

    def __init__(self):
        super().__init__()
        self.kernel_size, self.stride, self.padding = (9,), (1,), (0,)
        self.weight = nn.Parameter(torch.randn(6, 8, 9))


class Holder(nn.Module):
    """A module with one parameter."""

    def __init__(self, name, *shape):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class HeadNorm(nn.Module):
    """Normalizes each head by itself."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class Modulated(nn.Module):
    """A convolution whose kernel has a dimension more: for the images of a batch, or for kernels that are mixed."""

    def __init__(self, kernel_size, *shape):
        super().__init__()
        self.kernel_size, self.padding = kernel_size, 0
        self.weight = nn.Parameter(torch.randn(shape))


class ModulatedConv2d(Modulated):
    """StyleGAN2's."""


# Name of the module, the module, and what is found in it: shapes, or why nothing is.
FORMS = {
    "conv": (nn.Conv2d(3, 5, 2), [(5, 12)]),
    "long kernel": (nn.Conv1d(8, 4, 9), [(4, 72)]),
    "own": (OwnConvolution(), [(6, 72)]),
    "depthwise": (nn.Conv1d(6, 6, 4, groups=6), [(6, 4)]),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), [(4, 54)]),
    "used as a kernel": (Holder("weight", 8, 3, 5), [(8, 15)]),
    "used as a plane kernel": (Holder("weight", 8, 3, 5, 5), [(8, 75)]),
    "rel_attn": (Holder("q", 12, 3, 4), [(12, 12)]),
    "stack": (Holder("weight", 3, 8, 12), 3 * [(8, 12)]),
    "experts": (Holder("down_proj", 9, 4, 6), 9 * [(4, 6)]),
    "one_expert": (Holder("w1", 1, 4, 6), [(4, 6)]),
    "pos_embed": (Holder("table", 1, 7, 12), "is a table that is broadcast"),
    "tokens": (Holder("table", 1, 1, 7, 12), "is a table that is broadcast"),
    "plane": (Holder("table", 1, 12, 7, 7), "is a table that is broadcast"),
    "factors": (Holder("factors", 12, 1, 1, 1), "has a single row or column"),
    "a gain a head": (HeadNorm(3, 4), "is the gain of a normalization"),
    "own gain": (Holder("gain", 12, 3), "is a gain"),
    "layer scale": (Holder("layer_scale_1", 4, 8), "is a gain"),
    "modulation": (Holder("scale_shift_table", 6, 12), "is a gain"),
    "norm_proj": (nn.Linear(4, 8, bias=False), [(8, 4)]),
    "q_norm": (nn.Linear(4, 8, bias=False), [(8, 4)]),
    "gamma": (nn.Linear(4, 8, bias=False), [(8, 4)]),
    "modulated": (ModulatedConv2d(3, 1, 6, 8, 3, 3), [(6, 72)]),
    "to RGB": (ModulatedConv2d(1, 1, 3, 8, 1, 1), [(3, 8)]),
    "modulated, of any name": (Modulated((3, 3), 1, 6, 8, 3, 3), [(6, 72)]),
    "dynamic": (ModulatedConv2d(3, 4, 6, 3, 3, 3), 4 * [(6, 27)]),
    "dynamic, of any name": (Modulated(3, 4, 6, 8, 3, 3), 4 * [(6, 72)]),
    "one output": (nn.Conv3d(4, 1, 3, bias=False), "has a single row or column"),
    "own, one output": (Modulated((3, 3, 3), 1, 4, 3, 3, 3), "has a single row or column"),
    "own, in time": (Modulated((1, 3, 3), 4, 5, 1, 3, 3), [(4, 45)]),
    "attn": (Holder("qkv", 3, 12, 12), 3 * [(12, 12)]),
    "heads before": (Holder("qkv", 3, 4, 12, 3), 3 * [(12, 12)]),
    "heads after": (Holder("to_qkv", 3, 12, 4, 3), 3 * [(12, 12)]),
    "heads as rows": (Holder("qkv_weight", 3, 4, 3, 12), 3 * [(12, 12)]),
    "no queries": (Holder("weight", 3, 4, 12, 3), [(3, 144)]),
    "cls_token": (Holder("token", 1, 1, 12), "has a single row or column"),
    "gate": (nn.Linear(12, 1, bias=False), "has a single row or column"),
    "experts' bias": (Holder("down_proj_bias", 4, 12), "is a bias"),
    "norm": (nn.LayerNorm((6, 4), bias=False), "is the gain of a normalization"),
    "keras": (nn.ParameterDict({"a/conv1d/kernel": torch.randn(3, 5, 8)}), [(15, 8)]),
    "keras, named": (nn.ParameterDict({"a/stem/kernel": torch.randn(3, 3, 5, 8)}), [(45, 8)]),
    "keras, depthwise": (nn.ParameterDict({"depthwise_conv2d/kernel": torch.randn(3, 3, 5, 1)}), [(9, 5)]),
    "keras, attention": (nn.ParameterDict({"attention/query/kernel": torch.randn(12, 3, 4)}), [(12, 12)]),
    "keras, biases": (nn.ParameterDict({"attention/query/bias": torch.randn(3, 4)}), "is a bias"),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_a_matrix(name):
    module, expected = FORMS[name]
    left_out = {}
    found = find_matrices(nn.ModuleDict({name: module, "other": nn.Linear(3, 2, bias=False)}), left_out=left_out)
    shapes = [tuple(m.tensor().shape) for m in found if m.name != "other.weight"]
    reasons = [why for key, why in left_out.items() if key != f"{name}.bias"]
    assert (shapes, reasons) == (([], [expected]) if isinstance(expected, str) else (expected, []))


def test_heads_are_unfolded():
    W = torch.arange(3 * 4 * 12 * 3.0).view(3, 4, 12, 3)  # (part, heads, width, head_dim)
    forms = {"qkv": W, "to_qkv": W.movedim(2, 1), "w_qkv": W.movedim(2, 3)}
    for name, form in forms.items():
        holder = Holder(name, *form.shape)
        holder.get_parameter(name).data.copy_(form)
        found = find_matrices(holder)
        assert [m.name for m in found] == [f"{name}[{part}]" for part in "qkv"]
        for m, part in zip(found, W, strict=True):
            whole = part.movedim(1, 0).flatten(1)  # (width, heads head_dim)
            assert torch.equal(m.tensor(), whole.T if name == "w_qkv" else whole)


def test_kernels_that_are_mixed_are_named_one_by_one():
    layer = ModulatedConv2d(3, 2, 6, 8, 3, 3)
    found = find_matrices(layer)
    assert [m.name for m in found] == ["weight[0]", "weight[1]"]
    assert torch.equal(found[1].tensor(), layer.weight.detach()[1].flatten(1))
    (modulated,) = find_matrices(ModulatedConv2d(3, 1, 6, 8, 3, 3))
    assert modulated.name == "weight"


@pytest.mark.parametrize(
    ("settings", "queries"),
    [
        ({}, None),
        ({"head_first": False}, slice(0, 12)),
        ({"head_first": True}, [0, 1, 2, 9, 10, 11, 18, 19, 20, 27, 28, 29]),
    ],
    ids=str,
)
def test_a_convolution_of_size_one_is_cut_where_its_module_tells_how(settings, queries):
    attention = nn.Module()
    attention.num_heads = 4
    for name, value in settings.items():
        setattr(attention, name, value)
    attention.to_qkv = nn.Conv2d(12, 36, 1, bias=False)
    found = {m.name: m.tensor() for m in find_matrices(attention)}
    whole = attention.to_qkv.weight.detach().flatten(1)
    if queries is None:
        assert list(found) == ["to_qkv.weight"] and torch.equal(found["to_qkv.weight"], whole)
        assert len(find_matrices(attention, split={"*to_qkv.weight": 3})) == 3, "what is asked for is done"
    else:
        assert list(found) == [f"to_qkv.weight[{part}]" for part in "qkv"]
        assert torch.equal(found["to_qkv.weight[q]"], whole[queries])


def test_a_model_without_matrices_says_why():
    with pytest.raises(
        ValueError, match=r"expected at least one matrix .*\(weight has a single row or column\)\. Excl"
    ):
        find_matrices(nn.Linear(4, 1))
