"""One line tracks any model: which matrices, which names, and which steps."""

import importlib
import itertools
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sosd_fast


def steps(probe):
    return sorted({r.step for r in probe.records()})


def train(net, optimizer, inputs, count=2):
    for _ in range(count):
        net(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Experts(nn.Module):
    """A mixture of experts with stacked weights."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x):
        return torch.einsum("be,bd,edf->bf", self.router(x).softmax(-1), x, self.experts)


class Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.attn = nn.Linear(8, 8, bias=False)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x):
        return self.lm_head(self.attn(self.wte(x)))


class LoRA(nn.Module):
    """A frozen linear layer with a low-rank update that starts at zero."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 10, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(8, 2, bias=False)
        self.lora_B = nn.Linear(2, 10, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def cnn():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), parametrizations.spectral_norm(nn.Linear(6, 4)))


ENCODER = {
    f"layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.in_proj_weight[q]": (16, 16),
        "self_attn.in_proj_weight[k]": (16, 16),
        "self_attn.in_proj_weight[v]": (16, 16),
        "self_attn.out_proj.weight": (16, 16),
        "linear1.weight": (32, 16),
        "linear2.weight": (16, 32),
    }.items()
}


@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (cnn, (2, 3, 8, 8), {"0.weight": (6, 27), "3.weight": (5, 216)}),
        (encoder, (2, 7, 16), ENCODER),
        (
            Experts,
            (5, 8),
            {"experts[0]": (8, 12), "experts[1]": (8, 12), "experts[2]": (8, 12), "router.weight": (3, 8)},
        ),
        (Tied, None, {"wte.weight": (20, 8), "attn.weight": (8, 8)}),
        (
            parametrized,
            (5, 8),
            {"0.weight[original1]": (6, 8), "1.weight": (4, 6)},
        ),
        (LoRA, (5, 8), {"base.weight": (10, 8), "lora_A.weight": (2, 8), "lora_B.weight": (10, 2)}),
    ],
    ids=["cnn", "transformer encoder", "experts", "tied", "parametrized", "lora"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_one_line(make, inputs, expected, compiled, caplog):
    torch.manual_seed(0)
    net = make()
    inputs = torch.randint(20, (4, 6)) if inputs is None else torch.randn(inputs)
    if compiled:
        net = torch.compile(net, backend="eager")
    probe = sosd_fast.track(net, method="full")
    train(net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2), inputs)
    probe.flush()
    latest = probe.latest()
    assert {name: r.shape for name, r in latest.items()} == expected
    assert steps(probe) == [0, 1, 2]
    for name, r in latest.items():
        assert r.sd_variation == 0 if name == "base.weight" else r.sd_variation > 0
    assert not [r for r in caplog.records if r.name == "sosd_fast"]


def test_grouped_queries_stay_whole_unless_asked_for():
    net = nn.ModuleDict({"qkv": nn.Linear(16, 16 + 8, bias=False)})
    assert list(sosd_fast.track(net).latest()) == ["qkv.weight"]
    parts = sosd_fast.track(net, split={"qkv.weight": (16, 4, 4)}).latest()
    assert {name: r.shape for name, r in parts.items()} == {
        "qkv.weight[q]": (16, 16), "qkv.weight[k]": (4, 16), "qkv.weight[v]": (4, 16),
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected parts that add up to 24"):
        sosd_fast.track(net, split={"qkv.weight": 5})


@pytest.mark.parametrize("method", ["full", "topk"])
def test_a_parameter_put_in_the_place_of_another_is_followed(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 8, bias=False))
    probe = sosd_fast.track(net, method=method, k=2)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(5, 12))
    net[0].weight = nn.Parameter(net[0].weight.detach() + 0.1)  # of the same shape
    net[1].weight = nn.Parameter(torch.randn(10, 12))  # of another
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(5, 12))
    probe.flush()
    last = {r.name: r for r in probe.latest().values()}
    assert last["0.weight"].frobenius_norm == pytest.approx(net[0].weight.norm().item(), rel=1e-5)
    assert last["1.weight"].shape == (10, 12)
    assert last["1.weight"].frobenius_norm == pytest.approx(net[1].weight.norm().item(), rel=1e-5)
    assert steps(probe) == [0, 1, 2, 3, 4] and all(r.step == 4 for r in last.values())


def test_optimizers_that_hold_copies_of_the_weights_are_named_once(caplog):
    net = nn.Sequential(nn.Linear(6, 6))
    probe = sosd_fast.track(net)
    masters = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    for _ in range(50):
        for p in masters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert steps(probe) == [0]
    assert sum("pass optimizers=[] and call Probe.step" in message for message in caplog.messages) == 1


def test_a_reference_goes_by_the_names_after_splitting():
    net = nn.Sequential(OrderedDict(fused=nn.Linear(8, 16, bias=False)))
    parts = {"fused.weight": 2}
    S = torch.linalg.svdvals(net.fused.weight.detach()[:8])
    probe = sosd_fast.track(net, split=parts, reference={"fused.weight[0]": S}, method="full")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(5, 8))
    latest = probe.latest()
    assert 0 < latest["fused.weight[0]"].cosine <= 1 and latest["fused.weight[1]"].cosine is None
    with pytest.raises(ValueError, match=r"got reference=\{'fused.weight'\}. The matrices are fused.weight\[0\]"):
        sosd_fast.track(net, split=parts, reference={"fused.weight": S})


def test_parameters_added_midway():
    net = LoRA()
    net.base.requires_grad_(True)
    optimizer = torch.optim.SGD([net.base.weight], lr=0.1)
    probe = sosd_fast.track(net, method="full")
    train(net, optimizer, torch.randn(5, 8))
    probe.flush()
    net.extra = nn.Linear(10, 10, bias=False)
    forward = net.forward
    net.forward = lambda x: net.extra(forward(x))
    optimizer.add_param_group({"params": net.extra.parameters()})
    train(net, optimizer, torch.randn(5, 8), 3)
    probe.flush()
    added = [r for r in probe.records() if r.name == "extra.weight"]
    assert added[0].sd_variation is None
    assert all(r.sd_variation > 0 for r in added[1:]), "not what the same weights give when they are measured twice"
    assert [r.step for r in added][-3:] == [3, 4, 5]
    assert steps(probe) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["full", "auto", "topk"])
def test_a_rank_without_matrices_takes_up_its_first(method, monkeypatch):
    module = importlib.import_module("sosd_fast.track")
    share = module.share

    def late(model, matrices, known=None):
        assignment = share(model, matrices, known)
        return assignment if len(net) > 1 or model is not net else assignment._replace(matrices=[])

    monkeypatch.setattr(module, "share", late)
    net = nn.Sequential(nn.Linear(12, 12, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, optimizer, method=method, k=4)
    train(net, optimizer, torch.randn(5, 12))
    assert not probe.latest()
    net.append(nn.Linear(12, 12, bias=False))
    optimizer.add_param_group({"params": net[1].parameters()})
    train(net, optimizer, torch.randn(5, 12), 3)
    probe.flush()
    assert {name: r.step >= 3 for name, r in probe.latest().items()} == {"0.weight": True, "1.weight": True}


@pytest.mark.parametrize("method", ["full", "auto", "topk"])
def test_a_model_that_is_frozen_and_cast_midway(method):
    net = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))
    probe = sosd_fast.track(net, method=method, k=4, budget=1.0)
    probe.clock = itertools.count().__next__  # seconds, of which each measurement takes a small part
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, torch.randn(5, 16))
    net[0].weight.requires_grad_(False)
    train(net, optimizer, torch.randn(5, 16))
    last = probe.latest()["0.weight"]
    assert last.step == 4 and (last.sd_variation or last.sd_variation_topk or 0) < 1e-6
    net.bfloat16()
    net[0].weight.requires_grad_(True)
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(5, 16).bfloat16())
    probe.flush()
    assert probe.latest()["1.weight"].step >= 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_steps(fused):
    net = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    probe = sosd_fast.track(net, method="full")
    before = net.weight.detach().clone()
    for i in range(6):
        loss = net(torch.randn(3, 6)).square().mean()
        if i in (2, 3):
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert steps(probe) == [0, 1, 2, 3, 4], "two of the six were skipped"
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {}], ids=str)
def test_kinds_of_optimizers(options):
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    probe = sosd_fast.track(net, method="full")
    train(net, torch.optim.AdamW(net.parameters(), **options), torch.randn(3, 6), 3)
    assert steps(probe) == [0, 1, 2, 3] and all(r.sd_variation > 0 for r in probe.latest().values())


@pytest.mark.parametrize("method", ["full", "auto", "topk"])
def test_a_model_that_gains_a_matrix(method):
    net = nn.Sequential(nn.Linear(16, 24, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, method=method, k=4, budget=1.0)
    probe.clock = itertools.count().__next__
    train(net, optimizer, torch.randn(5, 16), 3)
    net.append(nn.Linear(24, 16, bias=False))
    optimizer.add_param_group({"params": net[1].parameters()})
    train(net, optimizer, torch.randn(5, 16), 3)
    probe.flush()
    assert probe.alive and {name: r.step >= 4 for name, r in probe.latest().items()} == dict.fromkeys(
        ("0.weight", "1.weight"), True
    )


def test_weights_that_zero_stage_3_partitioned_are_refused_or_left_out_by_name(caplog):
    def partition(linear):  # as DeepSpeed leaves a parameter between its uses
        linear.weight.ds_shape = linear.weight.shape
        linear.weight.data = torch.empty(0)

    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    partition(net[0])
    with sosd_fast.track(net, method="full") as probe:
        assert list(probe.latest()) == ["1.weight"] and "0.weight), each is partitioned" in str(probe)
    (said,) = caplog.messages
    assert "0.weight is partitioned by DeepSpeed's ZeRO stage 3" in said
    partition(net[1])
    with pytest.raises(ValueError, match=r"whose 0\.weight and others are partitioned .* Use stage 2"):
        sosd_fast.track(net)
