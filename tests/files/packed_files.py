"""Weights in four bits and the like, written number by number from the published formulas of their forms."""

import json
import math

import torch
from making import Made, file, made, random
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def digits(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def words(numbers: Tensor, bits: int, order=None) -> Tensor:
    """Packs numbers along the last dimension into words of 32 bits, the first into the lowest bits."""
    count = 32 // bits
    packed = torch.zeros(*numbers.shape[:-1], -(-numbers.shape[-1] // count), dtype=torch.int64)
    for i in range(numbers.shape[-1]):
        place = (order or list(range(count))).index(i % count)
        packed[..., i // count] |= numbers[..., i].long() << (bits * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _gptq(folder, bits, offset, order=None, size=64, form="gptq") -> Made:
    out, groups = 32, 4
    q, z, s = digits(2**bits, size, out), digits(2**bits - 1, groups, out) + offset, torch.rand(groups, out).half()
    g = torch.arange(size) // (size // groups) if order is None else order
    W = torch.tensor([[float(s[g[i], o]) * (int(q[i, o]) - int(z[g[i], o])) for i in range(size)] for o in range(out)])
    tensors = {"a.qweight": words(q.T, bits).T, "a.qzeros": words(z - offset, bits), "a.scales": s, "a.g_idx": g.int()}
    made(folder / "config.json", {"quantization_config": {"bits": bits, "checkpoint_format": form}})
    made(folder / "model.safetensors", tensors | {"a.bias": torch.ones(out), "norm.weight": torch.ones(8)})
    return Made(folder, {"a.weight": W})


@file
def gptq(folder):
    return _gptq(folder, 4, 1)


@file
def gptq_in_eight_bits_by_activations(folder):
    return _gptq(folder, 8, 1, torch.arange(64).roll(7) % 4)


@file
def gptq_v2(folder):
    return _gptq(folder, 4, 0, form="gptq_v2")


@file
def gptq_in_three_bits(folder):
    tensors = {"a.qweight": digits(9, 6, 32).int(), "a.qzeros": digits(9, 4, 3).int(), "a.scales": torch.rand(4, 32)}
    made(folder / "config.json", {"quantization_config": {"bits": 3}})
    made(folder / "model.safetensors", tensors | {"embed.weight": random(6, 8)})
    return Made(folder, {"embed.weight": random(6, 8)}, "left out 3 tensors of GPTQ or AWQ in 3 bits, such as a.q")


@file
def awq(folder):
    size, out, groups = 48, 32, 3
    q, z, s = digits(16, size, out), digits(16, groups, out), torch.rand(groups, out).half()
    W = torch.tensor(
        [[float(s[i // 16, o]) * (int(q[i, o]) - int(z[i // 16, o])) for i in range(size)] for o in range(out)]
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column in each place of a word
    tensors = {"a.qweight": words(q, 4, order), "a.qzeros": words(z, 4, order), "a.scales": s}
    return Made(made(folder / "a.safetensors", tensors), {"a.weight": W})


def _bnb(folder, nested) -> Made:
    m, n, block = 12, 32, 64
    codes, table = digits(16, m * n), torch.linspace(-1, 1, 16)
    blocks = m * n // block
    state = {"shape": [m, n], "blocksize": block, "dtype": "float32", "quant_type": "nf4"}
    absmax = torch.rand(blocks)
    tensors = {"a.weight": torch.tensor([[16 * codes[i] + codes[i + 1]] for i in range(0, m * n, 2)]).to(torch.uint8)}
    if nested:
        small, values, largest = digits(256, blocks), torch.linspace(-1, 1, 256), torch.rand(math.ceil(blocks / 4))
        absmax = torch.tensor([values[small[i]] * largest[i // 4] + 0.25 for i in range(blocks)])
        tensors |= {"a.weight.absmax": small.to(torch.uint8), "a.weight.nested_absmax": largest}
        tensors["a.weight.nested_quant_map"] = values
        state |= {"nested_blocksize": 4, "nested_offset": 0.25, "nested_dtype": "float32"}
    else:
        tensors["a.weight.absmax"] = absmax
    tensors["a.weight.quant_map"] = table
    state = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = state
    W = torch.tensor([float(table[c] * absmax[i // block]) for i, c in enumerate(codes)]).view(m, n)
    return Made(made(folder / "a.safetensors", tensors), {"a.weight": W})


@file
def bitsandbytes_nf4(folder):
    return _bnb(folder, nested=False)


@file
def bitsandbytes_nf4_nested(folder):
    return _bnb(folder, nested=True)


def _compressed(folder, zeros) -> Made:
    m, n, groups = 16, 64, 2
    q, s, z = digits(16, m, n) - 8, torch.rand(m, groups), digits(16, m, groups) - 8
    tensors = {"a.weight_packed": words(q + 8, 4), "a.weight_scale": s, "a.weight_shape": torch.tensor([m, n])}
    if zeros:
        tensors["a.weight_zero_point"] = words((z + 8).T, 4).T
    z = z if zeros else torch.zeros_like(z)
    W = torch.tensor([[float(s[i, j // 32]) * int(q[i, j] - z[i, j // 32]) for j in range(n)] for i in range(m)])
    weights = {"num_bits": 4, "group_size": 32, "symmetric": not zeros}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    made(folder / "config.json", {"quantization_config": settings})
    made(folder / "model.safetensors", tensors)
    return Made(folder, {"a.weight": W})


@file
def compressed_tensors(folder):
    return _compressed(folder, zeros=False)


@file
def compressed_tensors_with_zeros(folder):
    return _compressed(folder, zeros=True)


def _pairs(codes: Tensor) -> Tensor:
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def _e2m1(code) -> float:
    return E2M1[int(code) % 8] * (-1 if int(code) >= 8 else 1)


@file
def nvfp4(folder):
    m, n = 6, 32
    codes, scales, whole = digits(16, m, n), (torch.rand(m, 2) + 0.1).to(torch.float8_e4m3fn), torch.tensor([3.0])
    W = torch.tensor([[_e2m1(codes[i, j]) * float(scales[i, j // 16]) for j in range(n)] for i in range(m)])
    tensors = {"a.weight_packed": _pairs(codes), "a.weight_scale": scales, "a.weight_global_scale": whole}
    tensors |= {"b.weight": _pairs(codes), "b.weight_scale": scales, "b.weight_scale_2": whole[0]}  # ModelOpt's
    return Made(made(folder / "a.safetensors", tensors), {"a.weight": W / 3, "b.weight": W * 3})


@file
def mxfp4_experts(folder):
    """gpt-oss's, whose model has them transposed."""
    shape = 3, 6, 2
    codes, scales = digits(16, *shape, 32), digits(4, *shape) + 125
    W = torch.tensor(
        [[[_e2m1(codes[e, o, i // 32, i % 32]) * 2.0 ** (int(scales[e, o, i // 32]) - 127) for o in range(6)]
          for i in range(64)] for e in range(3)]
    )  # fmt: skip
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": _pairs(codes), f"{name}_scales": scales.to(torch.uint8)}
    return Made(made(folder / "a.safetensors", tensors), {f"{name}[{e}]": W[e] for e in range(3)})


@file
def unknown_form(folder):
    """AQLM's: its codebooks and scales are no weights."""
    tensors = {"a.codes": digits(9, 6, 8, 1).to(torch.int16), "a.codebooks": random(4, 8, 8), "a.scales": random(6, 8)}
    path = made(folder / "a.safetensors", tensors | {"b.weight": random(6, 8)})
    return Made(
        path, {"b.weight": random(6, 8)}, "left out 3 tensors of int16, quantised in an unknown form, such as a."
    )


@file
def four_bit_type_of_safetensors(folder):
    header = {"a": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}
    header["b"] = {"dtype": "F32", "shape": [4, 3], "data_offsets": [8, 56]}
    text = json.dumps(header).encode()
    W = random(4, 3)
    made(folder / "a.safetensors", len(text).to_bytes(8, "little") + text + bytes(8) + W.numpy().tobytes())
    return Made(folder / "a.safetensors", {"b": W}, "left out 1 tensors of F4, quantised in an unknown form, such as a")


@file
def gguf(folder):
    """Llama.cpp's q8_0: 32 numbers of eight bits, with a scale of 16 bits before them."""
    codes, scales = digits(255, 6, 2, 32) - 127, torch.rand(6, 2).half()
    blocks = b"".join(
        scales[i, j].numpy().tobytes() + codes[i, j].to(torch.int8).numpy().tobytes()
        for i in range(6)
        for j in range(2)
    )
    words = [b"a", b"list", b"of", b"words"]
    settings = [(b"general.architecture", 8, string(b"llama")), (b"general.alignment", 4, integer(64))]
    settings.append((b"tokenizer.ggml.tokens", 9, integer(8) + integer(4, 8) + b"".join(map(string, words))))
    text = b"GGUF" + integer(3) + integer(2, 8) + integer(len(settings), 8)
    text += b"".join(string(name) + integer(kind) + value for name, kind, value in settings)
    text += string(b"blk.0.attn_q.weight") + integer(2) + integer(64, 8) + integer(6, 8) + integer(8) + integer(0, 8)
    text += string(b"output.weight") + integer(2) + integer(5, 8) + integer(7, 8) + integer(0) + integer(448, 8)
    text += bytes(-len(text) % 64) + blocks
    text += bytes(448 - len(blocks)) + random(7, 5).numpy().tobytes()
    W = (codes.double() * scales.double()[:, :, None]).flatten(1)
    path = made(folder / "a.gguf", text)
    return Made(path, {"blk.0.attn_q.weight": W, "output.weight": random(7, 5)}, "Run `pip install gguf`", needs="gguf")


def integer(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def string(value: bytes) -> bytes:
    return integer(len(value), 8) + value
