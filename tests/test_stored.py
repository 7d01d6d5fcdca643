"""Weights that are stored in another form are read through it, one at a time, or left out by name."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from scaled import Scaled
from torch import nn

import sosd_fast
from sosd_fast.checkpoints.analyze import analyze
from sosd_fast.matrices import find_matrices
from sosd_fast.probe.planner import Plan


class Quantized(Scaled):
    """Eight-bit values with a scale per row, which offers its conversion."""

    @classmethod
    def of(cls, W):
        scale = W.abs().amax(1, keepdim=True) / 127
        return cls((W / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Quantized(inner["values"], inner["scale"])

    def dequantize(self):
        return self.values * self.scale


class Broken(Quantized):
    """Offers a conversion that does not work."""

    def dequantize(self):
        raise RuntimeError("no kernel for this device")


class Packed(Quantized):
    """Offers a conversion to another shape."""

    def dequantize(self):
        return self.values[:, ::2] * self.scale


def quantized(kind=Quantized):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))
    for layer in net[:2]:
        layer.weight = nn.Parameter(kind.of(layer.weight.detach()), requires_grad=False)
    return net


@pytest.mark.parametrize("method", ["full", "topk", "auto", "exact"])
def test_a_tensor_that_offers_its_values_is_measured(method, caplog):
    net = quantized()
    probe = sosd_fast.track(net, method=method, k=4, optimizers=[], budget=1.0)
    probe.clock = itertools.count().__next__  # seconds, of which each measurement takes a small part
    for _ in range(2):
        net[0].weight.values.add_(1)  # as training of quantised weights changes them
        probe.step()
    latest = probe.latest()
    assert list(latest) == ["0.weight", "1.weight", "2.weight"] and not caplog.messages
    for name, layer in zip(latest, net, strict=True):
        W = layer.weight.dequantize() if isinstance(layer.weight, Quantized) else layer.weight.detach()
        assert latest[name].step == 2 and latest[name].sigma_max == pytest.approx(
            torch.linalg.matrix_norm(W, 2).item(), rel=1e-4
        )


class Adapted(nn.Module):
    """A quantised layer with an adapter that is trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        W = torch.randn(24, 24)
        self.base = nn.Module()
        self.base.weight = nn.Parameter(Quantized.of(W), requires_grad=False)
        self.down, self.up = nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False)

    def forward(self, x):
        return x @ self.base.weight.dequantize().T + self.up(self.down(x))


def trained(tracked):
    net = Adapted()
    probe = sosd_fast.track(net, method="full") if tracked else None
    optimizer = torch.optim.AdamW([net.down.weight, net.up.weight], lr=0.1)
    losses = []
    for _ in range(5):
        loss = net(torch.randn(3, 24)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net, probe


def test_training_beside_quantised_weights_is_what_it_is_without_the_probe():
    (losses, net, _), (same, again, probe) = trained(False), trained(True)
    assert losses == same and torch.equal(net.up.weight, again.up.weight)
    assert torch.equal(net.base.weight.values, again.base.weight.values)
    latest = probe.latest()
    assert set(latest) == {"base.weight", "down.weight", "up.weight"} and all(r.step == 5 for r in latest.values())
    assert latest["base.weight"].sd_variation < 1e-9 < latest["up.weight"].sd_variation


def test_weights_are_converted_one_at_a_time(monkeypatch):
    net = quantized()
    probe = sosd_fast.track(net, method="full", optimizers=[])
    together, measured = [], probe._measurer._launch_group

    def launch(pending, step, kind, states):
        together.append([t.name for t in states])
        return measured(pending, step, kind, states)

    monkeypatch.setattr(probe._measurer, "_launch_group", launch)
    probe.step()
    assert sorted(together) == [["0.weight"], ["1.weight"], ["2.weight"]]


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Broken, r"is a Broken, whose dequantize\(\) raises RuntimeError"), (Packed, r"is a Packed")],
)
def test_a_tensor_whose_conversion_fails_is_left_out_by_name(kind, why, caplog):
    net = quantized(kind)
    probe = sosd_fast.track(net, method="full", optimizers=[])
    assert list(probe.latest()) == ["2.weight"]
    (said,) = [m for m in caplog.messages if "left out" in m]
    assert said.count(why.replace("\\", "")) == 2 and "0.weight" in said and "1.weight" in said


class Stack(Quantized):
    """A quantised stack of matrices, which counts its conversions."""

    conversions = []

    @classmethod
    def of(cls, W):
        scale = W.abs().amax(2, keepdim=True) / 127
        return cls((W / scale).round().to(torch.int8), scale)

    def dequantize(self):
        Stack.conversions.append(tuple(self.shape))
        return super().dequantize()


class Sliceable(Stack):
    """One that can be sliced."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.select.int:
            whole, dim, index = args
            return cls(whole.values.select(dim, index), whole.scale.select(dim, index))
        return super().__torch_dispatch__(func, types, args, kwargs)


def experts(kind):
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    for module in net.values():
        module.experts = nn.Parameter(kind.of(torch.randn(6, 8, 12)), requires_grad=False)
    return net


@pytest.mark.parametrize(("kind", "conversions"), [(Stack, 2 * [(6, 8, 12)]), (Sliceable, 12 * [(8, 12)])])
def test_a_stack_is_converted_once_or_by_its_slices(kind, conversions):
    net = experts(kind)
    probe = sosd_fast.track(net, method="full", optimizers=[], audit=False)
    probe.step()  # after which the matrices are looked for again
    for _ in range(3):
        Stack.conversions.clear()
        net["b"].experts.values.add_(1)
        probe.step()
        assert Stack.conversions == conversions
    for i in range(6):
        record, W = probe.latest()[f"b.experts[{i}]"], net["b"].experts.dequantize()[i]
        assert record.step == 4 and record.sigma_max == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-3)


def test_a_stack_is_converted_once_for_all_that_a_step_measures():
    net = experts(Stack)
    probe = sosd_fast.track(net, method="full", optimizers=[], audit=False, k=2)
    Stack.conversions.clear()
    pending = probe._measurer.launch(Plan(full=[0, 3, 7, 11], leading=[0, 1, 2, 6, 8]), 1)
    assert Stack.conversions == 2 * [(6, 8, 12)]
    assert not any(found.lost for found in pending.result())


class EightBits(nn.Module):
    """A layer of eight-bit floats, and buffers beside it."""

    def __init__(self, W, **buffers):
        super().__init__()
        self.weight = nn.Parameter(W.to(torch.float8_e4m3fn), requires_grad=False)
        for name, value in buffers.items():
            self.register_buffer(name, value)


def blocks(*shape):
    return torch.rand(shape) + 0.5


W = torch.randn(16, 24).clamp(-8, 8)
SCALED = {
    "one": ({"weight_scale": torch.tensor(0.25)}, lambda s: s),
    "rows": ({"weight_scale": blocks(16, 1)}, lambda s: s),
    "rows without a dimension": ({"scale_weight": blocks(16)}, lambda s: s[:, None]),
    "blocks": ({"weight_scale_inv": blocks(2, 3)}, lambda s: s.repeat_interleave(8, 0).repeat_interleave(8, 1)),
    "beside others": ({"weight_scale": blocks(16, 1), "input_scale": torch.ones(())}, lambda s: s),
}


@pytest.mark.parametrize("case", SCALED)
def test_eight_bit_floats_are_measured_with_their_scale(case):
    buffers, whole = SCALED[case]
    (found,) = find_matrices(nn.Sequential(EightBits(W, **buffers)))
    expected = W.to(torch.float8_e4m3fn).float() * whole(next(iter(buffers.values())))
    assert torch.equal(found.tensor(), expected)
    probe = sosd_fast.track(nn.Sequential(EightBits(W, **buffers)), optimizers=[])
    record = probe.latest()["0.weight"]
    assert record.sigma_max == pytest.approx(torch.linalg.matrix_norm(expected, 2).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 2, 3), (1, 2, 3), (4, 1, 1), (4, 16), (4, 16, 1)], ids=str)
def test_of_a_stack_of_eight_bit_floats_one_matrix_is_scaled_alone(shape):
    stack, scale = torch.randn(4, 16, 24).clamp(-8, 8).to(torch.float8_e4m3fn), blocks(*shape)
    whole = scale[..., None] if len(shape) == 2 else scale
    for dim, size in enumerate(stack.shape):
        whole = whole.repeat_interleave(size // whole.shape[dim], dim)
    found = find_matrices(EightBits(stack, weight_scale_inv=scale))
    assert [m.name for m in found] == [f"weight[{i}]" for i in range(4)]
    assert all(torch.equal(m.tensor(), one) for m, one in zip(found, stack.float() * whole, strict=True))


def test_blocks_that_do_not_divide_the_matrix_need_to_be_told():
    odd = torch.randn(20, 24)
    layer = EightBits(odd, weight_scale_inv=blocks(3, 3))
    with pytest.raises(ValueError, match="a scale that does not tell its blocks"):
        find_matrices(layer)
    layer.block_size = (8, 8)
    expected = odd.to(torch.float8_e4m3fn).float()
    expected *= layer.weight_scale_inv.repeat_interleave(8, 0).repeat_interleave(8, 1)[:20]
    assert torch.equal(find_matrices(layer)[0].tensor(), expected)


@pytest.mark.parametrize(
    ("buffers", "why"),
    [
        ({}, "no scale beside it"),
        ({"weight_scale": torch.ones(()), "weight_scale_inv": torch.ones(())}, "more than one scale beside it"),
        ({"weight_scale": torch.ones(7)}, "a scale that does not tell its blocks"),
    ],
)
def test_eight_bit_floats_without_a_sure_scale_are_left_out(buffers, why, caplog):
    net = nn.ModuleDict({"eight": EightBits(W, **buffers), "plain": nn.Linear(6, 5, bias=False)})
    probe = sosd_fast.track(net, method="full", optimizers=[])
    assert list(probe.latest()) == ["plain.weight"]
    (said,) = [m for m in caplog.messages if "left out" in m]
    assert f"eight.weight has dtype torch.float8_e4m3fn and {why}" in said


def test_a_scale_that_is_a_parameter_is_no_matrix():
    layer = EightBits(W)
    layer.weight_scale_inv = nn.Parameter(blocks(2, 3))
    left_out = {}
    assert [m.name for m in find_matrices(layer, left_out=left_out)] == ["weight"]
    assert left_out == {"weight_scale_inv": "is the scale of another parameter"}


def test_saved_eight_bit_floats_are_measured_with_their_scale(tmp_path):
    layer = EightBits(W, weight_scale_inv=blocks(2, 3))
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    (record,) = next(analyze([tmp_path]))
    plain = {"a.weight": torch.randn(4, 3), "a.weight_scale": torch.zeros(4, 3)}  # not eight bits, so not scaled
    save_file(plain, tmp_path / "plain.safetensors")
    (unscaled,) = next(analyze([tmp_path / "plain.safetensors"]))
    assert unscaled.name == "a.weight" and unscaled.sigma_max > 0
    (found,) = find_matrices(layer)
    assert record.name == found.name and record.sigma_max == pytest.approx(
        torch.linalg.matrix_norm(found.tensor(), 2).item(), rel=1e-5
    )
