import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from training.model import PRESETS, Config, RMSNorm, Transformer, apply_rope, resized, rope_tables

GPT2 = Config(n_layer=2, n_head=2, width=16, ff_width=32, context=12, vocab=31)
LLAMA = Config(2, 2, 16, 32, 12, 31, activation="swiglu", norm_gain=True, tied=False)
KINDS = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def build(config, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


def tokens(config, batch=2, seed=1):
    return torch.randint(config.vocab, (batch, config.context), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # body 12 * 12 d², embedding 50304 d, tied: the "124 M" of GPT-2 small without its position table
        ("gpt2-small", 12 * 12 * 768**2 + 50304 * 768),
        ("gpt2-medium", 24 * 12 * 1024**2 + 50304 * 1024),
        # body L (4 d² + 3 * 4 d²), two gains a layer and a last one, embedding and head apart
        ("llama-0.5b", 15 * (16 * 1280**2 + 2 * 1280) + 1280 + 2 * 32000 * 1280),
        ("llama-2b", 30 * (16 * 2048**2 + 2 * 2048) + 2048 + 2 * 32000 * 2048),
        ("gpt2-nano", 4 * 12 * 256**2 + 256 * 256),
        ("llama-nano", 4 * (16 * 256**2 + 2 * 256) + 256 + 2 * 256 * 256),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count
    usual = {"gpt2-small": 124e6, "gpt2-medium": 355e6, "llama-0.5b": 0.5e9, "llama-2b": 2e9}
    assert count == pytest.approx(usual.get(name, count), rel=0.08)


def test_presets_are_those_of_the_paper():
    shape = {name: (c.n_layer, c.width, c.n_head, c.ff_width, c.context) for name, c in PRESETS.items()}
    assert shape["gpt2-small"] == (12, 768, 6, 3072, 1024)
    assert shape["gpt2-medium"] == (24, 1024, 16, 4096, 1024)
    assert shape["llama-0.5b"] == (15, 1280, 20, 5120, 2048)
    assert shape["llama-2b"] == (30, 2048, 32, 8192, 2048)
    assert PRESETS["nano"] is PRESETS["gpt2-nano"]
    assert {c.activation for n, c in PRESETS.items() if n.startswith("llama")} == {"swiglu"}


def test_resizing_keeps_the_head_and_the_ratio_of_the_feed_forward():
    small = PRESETS["gpt2-small"]
    assert resized(small) == small
    wide = resized(small, layers=2, width=1024)
    assert (wide.n_layer, wide.width, wide.n_head, wide.ff_width, wide.context) == (2, 1024, 8, 4096, 1024)
    with pytest.raises(ValueError, match=r"a multiple of the head width 128, got width=800"):
        resized(small, width=800)


def test_parameter_names():
    names = {name for name, _ in build(GPT2).named_parameters()}
    layer = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert names == {"wte.weight"} | {f"h.{i}.{part}.weight" for i in range(2) for part in layer}
    names = {name for name, _ in build(LLAMA).named_parameters()}
    layer = {"attn.c_attn", "attn.c_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "attn_norm", "mlp_norm"}
    expected = {f"h.{i}.{part}.weight" for i in range(2) for part in layer}
    assert names == expected | {"wte.weight", "norm.weight", "lm_head.weight"}


def test_head_is_tied_only_in_gpt2():
    gpt2, llama = build(GPT2), build(LLAMA)
    assert gpt2.lm_head.weight is gpt2.wte.weight
    assert llama.lm_head.weight is not llama.wte.weight


def test_initial_scales():
    model = build(PRESETS["gpt2-nano"])
    for name, weight in model.named_parameters():
        std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
        # the standard error of a sample deviation is std / sqrt(2 n): five of them
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), name


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_initial_loss_is_near_that_of_a_uniform_guess(name):
    model, config = build(PRESETS[name]), PRESETS[name]
    x = tokens(config, batch=2)
    y = tokens(config, batch=2, seed=2)
    # logits start with a standard deviation of 0.02 * sqrt(256) = 0.32, which adds 0.32² / 2 = 0.05 nats
    assert model(x, y).item() == pytest.approx(math.log(256), abs=0.15)


@KINDS
def test_loss_is_the_cross_entropy_of_the_logits(config):
    model, x, y = build(config), tokens(config), tokens(config, seed=2)
    logits = model(x)
    assert logits.shape == (2, config.context, config.vocab)
    picked = logits.log_softmax(-1).gather(-1, y[..., None])
    torch.testing.assert_close(model(x, y), -picked.mean())


@KINDS
def test_a_later_token_does_not_change_earlier_logits(config):
    model, x = build(config), tokens(config)
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-5  # and every later position does see it


@KINDS
def test_forward_matches_a_plain_fp64_reference(config):
    model, x = build(config).double(), tokens(config)
    model.cos, model.sin = (table.double() for table in rope_tables(config.context, config.width // config.n_head))
    weights = dict(model.named_parameters())

    def norm(name, z):
        return z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights.get(f"{name}.weight", torch.ones(()))

    def rope(z):  # z (T, D): pairs as complex numbers
        half = z.shape[-1] // 2
        angles = torch.complex(model.cos[:, half:], model.sin[:, half:])
        turned = torch.complex(z[:, :half], z[:, half:]) * angles
        return torch.cat((turned.real, turned.imag), -1)

    mask = torch.full((config.context, config.context), float("-inf")).triu(1)
    for row, got in zip(x, model(x), strict=True):
        z = weights["wte.weight"][row]
        for i in range(config.n_layer):
            q, k, v = (norm(f"h.{i}.attn_norm", z) @ weights[f"h.{i}.attn.c_attn.weight"].T).chunk(3, -1)
            heads = []
            for qh, kh, vh in zip(*(part.chunk(config.n_head, -1) for part in (q, k, v)), strict=True):
                scores = rope(qh) @ rope(kh).T / math.sqrt(qh.shape[-1])
                heads.append((scores + mask).softmax(-1) @ vh)
            z = z + torch.cat(heads, -1) @ weights[f"h.{i}.attn.c_proj.weight"].T
            mlp = {n.split(".")[-2]: w for n, w in weights.items() if n.startswith(f"h.{i}.mlp.")}
            u = norm(f"h.{i}.mlp_norm", z)
            if config.activation == "swiglu":
                z = z + (F.silu(u @ mlp["gate_proj"].T) * (u @ mlp["up_proj"].T)) @ mlp["down_proj"].T
            else:
                z = z + (u @ mlp["c_fc"].T).clamp_min(0) ** 2 @ mlp["c_proj"].T
        reference = norm("norm", z) @ weights["wte.weight" if config.tied else "lm_head.weight"].T
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-12)


def test_the_gradient_of_a_tied_embedding_is_whole():
    model, x, y = build(GPT2), tokens(GPT2), tokens(GPT2, seed=2)
    model(x, y).backward()
    found = model.wte.weight.grad
    assert found.layout is torch.strided
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x, y).backward()
    torch.testing.assert_close(found, model.wte.weight.grad)
    # and by hand, with embedding and head apart
    apart = Transformer(replace(GPT2, tied=False))
    apart.load_state_dict({**model.state_dict(), "lm_head.weight": model.wte.weight})
    apart(x, y).backward()
    torch.testing.assert_close(found, apart.wte.weight.grad + apart.lm_head.weight.grad)
    # where something untied them, no head's gradient makes the embedding's whole
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach().clone())
    model.zero_grad()
    model(x, y).backward()
    assert model.wte.weight.grad.layout is torch.strided


def test_rope_keeps_norms_and_depends_on_distance_only():
    cos, sin = rope_tables(32, 8)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = apply_rope(q.expand(32, 8), cos, sin), apply_rope(k.expand(32, 8), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(32))
    torch.testing.assert_close(turned_q[0], q)
    scores = turned_q @ turned_k.T  # (32, 32), constant along diagonals
    for distance in range(-20, 20):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1


def test_rope_keeps_the_dtype_and_turns_in_float32():
    cos, sin = rope_tables(1024, 8)
    x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = apply_rope(x, cos, sin)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), cos, sin).bfloat16())


def test_rms_norm_by_hand():
    norm = RMSNorm(GPT2)
    assert norm.weight is None
    x = torch.zeros(16)
    x[0] = 8.0  # mean square 4
    torch.testing.assert_close(norm(x)[0], torch.tensor(4.0))


@KINDS
def test_meta_device_then_init_equals_direct_construction(config):
    with torch.device("meta"):
        late = Transformer(config)
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    late.init_weights()
    direct = build(config)
    torch.manual_seed(0)  # torch's own layers drew while they were built
    direct.init_weights()
    assert (late.lm_head.weight is late.wte.weight) == config.tied
    assert torch.equal(late(tokens(config)), direct(tokens(config)))


@KINDS
def test_bfloat16_autocast_is_close_and_trains(config):
    model, x, y = build(config), tokens(config), tokens(config, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, y)
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(model(x, y).item(), rel=2e-2)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


@KINDS
def test_compiles_as_one_graph(config):
    model, x, y = build(config), tokens(config), tokens(config, seed=2)
    expected = model(x, y)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x, y), expected)


def test_errors():
    with pytest.raises(ValueError, match=r"Transformer: expected at most context=12 tokens, got T=13\. Shorten"):
        build(GPT2)(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got activation='gelu'"):
        Config(1, 1, 8, 8, 8, 8, activation="gelu")
    with pytest.raises(ValueError, match=r"got width=18, n_head=2"):
        Config(1, 2, 18, 8, 8, 8)
