"""Weights that torchao, quanto and bitsandbytes have quantised."""

import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.matrices import find_matrices


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 128, bias=False)).bfloat16()


def by_torchao(config):
    def apply(model):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())

    return apply


def for_training(model):
    training = pytest.importorskip("torchao.prototype.quantized_training")
    pytest.importorskip("torchao.quantization").quantize_(model, training.int8_weight_only_quantized_training())


def to_nf4(model):
    nf4 = pytest.importorskip("torchao.quantization", reason="torchao").to_nf4
    for layer in model:
        layer.weight = nn.Parameter(nf4(layer.weight.detach(), 64, 4), requires_grad=False)


def by_quanto(values):
    def apply(model):
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, values))
        quanto.freeze(model)

    return apply


QUANTIZED = {
    "torchao int8": (by_torchao("Int8WeightOnlyConfig"), 0.01),
    "torchao float8": (by_torchao("Float8WeightOnlyConfig"), 0.05),
    "torchao int8 training": (for_training, 0.01),
    "torchao NF4": (to_nf4, 0.15),
    "quanto int8": (by_quanto("qint8"), 0.01),
    "quanto int4": (by_quanto("qint4"), 0.15),
    "quanto float8": (by_quanto("qfloat8"), 0.05),
}  # how, and how far the quantised values may be from the given ones, relatively


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_are_measured(name, caplog):
    apply, tolerance = QUANTIZED[name]
    model = net()
    given = {n: p.detach().float() for n, p in model.named_parameters()}
    apply(model)
    assert all(type(layer.weight) not in (nn.Parameter, torch.Tensor) for layer in model), "quantised it is"
    found = {m.name: m.tensor() for m in find_matrices(model)}
    assert list(found) == list(given)
    probe = sosd_fast.track(model, method="full", optimizers=[])
    probe.step()
    assert not [r for r in caplog.records if r.name == "sosd_fast"]
    for n, record in probe.latest().items():
        assert torch.linalg.matrix_norm(found[n].float() - given[n]) <= tolerance * torch.linalg.matrix_norm(given[n])
        S = torch.linalg.svdvals(found[n].double())
        assert record.step == 1 and torch.allclose(torch.from_numpy(record.spectrum), S, rtol=0, atol=1e-6 * S[0])


def test_packed_weights_are_left_out_by_name_and_adapters_measured(caplog):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    model = nn.ModuleDict({"base": layer.to("cpu"), "lora": nn.Linear(64, 4, bias=False)})
    model["base"](torch.randn(2, 64))
    probe = sosd_fast.track(model, method="full")
    optimizer = torch.optim.SGD(model["lora"].parameters(), lr=0.1)
    for _ in range(2):
        model["lora"](model["base"](torch.randn(2, 64))).square().mean().backward()
        optimizer.step()
    latest = probe.latest()
    assert list(latest) == ["lora.weight"] and latest["lora.weight"].step == 2
    (said,) = [m for m in caplog.messages if "left out" in m]
    assert "base.weight is a Params4bit" in said


def test_eight_bit_layers_of_transformers_are_measured_with_their_scales():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(256, 300, block_size=(128, 128))  # three blocks of rows, the last one not whole
    scale = torch.rand(3, 2) + 0.5
    layer.weight.data = torch.randn(300, 256).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = scale
    expected = layer.weight.float() * scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)
    (found,) = find_matrices(layer)
    assert found.name == "weight" and torch.equal(found.tensor(), expected.detach())
