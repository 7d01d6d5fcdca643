"""Real architectures, small: what their matrices are, of which kinds, and that fused parts are what they are called."""

import dataclasses
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sosd_fast
from sosd_fast.checkpoints.analyze import analyze
from sosd_fast.matrices import find_matrices, kind

transformers = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"max_position_embeddings": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16, "rotary_dim": 4}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 64,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64}
MODERNBERT = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0) | ENCODER
MOE = {"num_experts": 3, "moe_intermediate_size": 16, "head_dim": 8, "num_experts_per_tok": 2}
VISION = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
CAUSAL, SEQUENCES = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
MASKED, CLASSES, IMAGES = (
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)

# Of each: config, its settings, the class with a head, and how many matrices there are of each of KINDS.
ARCHITECTURES = {
    "Llama": ("LlamaConfig", LLAMA, CAUSAL, (8, 6, 1, 1, 0)),
    "GPT-2": ("GPT2Config", GPT, CAUSAL, (8, 4, 2, 0, 0)),
    "GPT-J": ("GPTJConfig", GPT, CAUSAL, (8, 4, 1, 1, 0)),
    "GPT-NeoX": ("GPTNeoXConfig", ENCODER, CAUSAL, (8, 4, 1, 1, 0)),
    "OPT": ("OPTConfig", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}, CAUSAL, (8, 4, 2, 0, 0)),
    "Qwen3-MoE": ("Qwen3MoeConfig", LLAMA | MOE, CAUSAL, (8, 12, 1, 1, 2)),
    "Mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 3}, CAUSAL, (8, 12, 1, 1, 2)),
    "gpt-oss": ("GptOssConfig", LLAMA | {"num_local_experts": 3, "head_dim": 8}, CAUSAL, (8, 12, 1, 1, 2)),
    "Mamba": ("MambaConfig", {**LLAMA, "state_size": 4}, CAUSAL, (0, 0, 1, 0, 12)),
    "RWKV": ("RwkvConfig", LLAMA, CAUSAL, (8, 6, 1, 1, 0)),
    "XLNet": ("XLNetConfig", XLNET, CAUSAL, (10, 4, 1 + 4, 0, 0)),
    "T5": ("T5Config", T5, SEQUENCES, (2 * 4 + 2 * 8 + 2, 8, 1, 0, 0)),
    "BART": ("BartConfig", BART, SEQUENCES, (4 + 8, 4, 3, 0, 0)),
    "BERT": ("BertConfig", ENCODER, CLASSES, (8, 4, 3, 1, 1)),
    "RoBERTa": ("RobertaConfig", ENCODER, CLASSES, (8, 4, 3, 2, 0)),
    "DeBERTa": ("DebertaV2Config", ENCODER, MASKED, (8, 4, 2, 1, 0)),
    "ELECTRA": ("ElectraConfig", ENCODER | {"embedding_size": 16}, MASKED, (8, 4, 4, 1, 0)),
    "ModernBERT": ("ModernBertConfig", MODERNBERT, MASKED, (8, 4, 1, 1, 0)),
    "ViT": ("ViTConfig", VISION | {"image_size": 16, "patch_size": 4}, IMAGES, (8, 4, 1, 1, 0)),
    "ConvNeXt": (
        "ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, IMAGES, (0, 4, 1, 1, 3),
    ),
    "ResNet": (
        "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "basic"}, IMAGES,
        (0, 0, 1, 1, 3),
    ),
}  # fmt: skip
KINDS = ("attention", "mlp", "embedding", "head", "other")


def built(config, settings, auto):
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(getattr(transformers, config)(**settings))


def large(make):
    """A model whose memory is never touched."""
    with torch.device("meta"):
        model = make()
    return model.bfloat16().to_empty(device="cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kinds(name):
    *how, expected = ARCHITECTURES[name]
    found = find_matrices(built(*how))
    counts = Counter(kind(m.name) for m in found)
    assert tuple(counts[k] for k in KINDS) == expected, {k: [m.name for m in found if kind(m.name) == k] for k in KINDS}
    assert all(min(m.tensor().shape) > 1 for m in found) and len({m.name for m in found}) == len(found)


def test_kinds_of_diffusion_models():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=16,
        pooled_projection_dim=16, in_channels=4, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    dit = diffusers.DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8, norm_num_groups=4
    )
    for model in (unet, flux, dit):
        for m in find_matrices(model):
            told = {"attn": "attention", "attn1": "attention", "attn2": "attention", "ff": "mlp", "ff_context": "mlp"}
            expected = [told[part] for part in m.name.split(".") if part in told]
            assert kind(m.name) == (expected[-1] if expected else kind(m.name)), m.name
    assert kind("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight") == "mlp"


# Of each, where its fused layer stands, and the layer that takes what its heads put out.
FUSED = {
    "GPT-2": ("GPT2Config", GPT, CAUSAL, "c_attn", "c_proj"),
    "GPT-NeoX": ("GPTNeoXConfig", ENCODER, CAUSAL, "query_key_value", "dense"),
    "BigCode": ("GPTBigCodeConfig", GPT | {"multi_query": True}, CAUSAL, "c_attn", "c_proj"),
    "BigCode, a head each": ("GPTBigCodeConfig", GPT | {"multi_query": False}, CAUSAL, "c_attn", "c_proj"),
    "BLOOM": ("BloomConfig", ENCODER | {"n_layer": 2, "n_head": 4}, CAUSAL, "query_key_value", "dense"),
    "Falcon 7B": ("FalconConfig", ENCODER | {"multi_query": True}, CAUSAL, "query_key_value", "dense"),
    "Falcon, a head each": ("FalconConfig", ENCODER | {"multi_query": False}, CAUSAL, "query_key_value", "dense"),
    "Falcon 40B": (
        "FalconConfig", ENCODER | {"new_decoder_architecture": True, "num_kv_heads": 2}, CAUSAL, "query_key_value",
        "dense",
    ),
    "MPT": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64}, CAUSAL, "Wqkv", "out_proj"),
    "Phi-3": ("Phi3Config", LLAMA, CAUSAL, "qkv_proj", "o_proj"),
    "CodeGen": ("CodeGenConfig", GPT, CAUSAL, "qkv_proj", "out_proj"),
    "Persimmon": ("PersimmonConfig", ENCODER, CAUSAL, "query_key_value", "dense"),
    "ModernBERT": ("ModernBertConfig", MODERNBERT, MASKED, "Wqkv", "Wo"),
}  # fmt: skip


def heads_output(model, layer, out, run, zeroed=None):
    """What the heads of the first attention put out, where one part of its fused weight is zero."""
    name, fused = next((n, m) for n, m in model.named_modules() if n.endswith(f".{layer}"))
    if zeroed is not None:
        (m,) = [m for m in find_matrices(model) if m.name == f"{name}.weight[{zeroed}]"]
        numbers = torch.arange(fused.weight.numel()).view(fused.weight.shape)
        at = dataclasses.replace(m, parameter=numbers).tensor().flatten()
        kept = fused.weight.detach().clone()
        fused.weight.data.view(-1)[at] = 0
    seen = []
    last = model.get_submodule(f"{name.rpartition('.')[0]}.{out}")
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    with torch.no_grad():
        run(model)
    hook.remove()
    if zeroed is not None:
        fused.weight.data.copy_(kept)
    return seen[0]


def check_parts(model, layer, out, run):
    for name, p in model.named_parameters():
        if name.endswith(f"{layer}.weight"):
            p.data.normal_(0, 0.5)
        elif name.endswith(f"{layer}.bias"):
            p.data.zero_()
    whole, q, k, v = (heads_output(model, layer, out, run, part) for part in (None, "q", "k", "v"))
    assert (v == 0).all(), "without values nothing is put out"
    assert torch.allclose(q, k, atol=1e-5), "without queries or without keys every token is as near as another"
    assert not torch.allclose(whole, q, atol=1e-2) and whole.abs().max() > 0.1


@pytest.mark.parametrize("name", FUSED)
def test_fused_parts_are_what_they_are_called(name):
    *how, layer, out = FUSED[name]
    model = built(*how).eval()
    check_parts(model, layer, out, lambda m: m(input_ids=torch.arange(2, 12)[None]))


@pytest.mark.parametrize("name", [*FUSED, "XLNet", "Mamba", "gpt-oss", "Qwen3-MoE", "ResNet", "ViT"])
def test_saved_weights_have_the_matrices_of_the_model(name, tmp_path):
    model = built(*(ARCHITECTURES | FUSED)[name][:3])
    # save_pretrained has other names for some, and tied weights would come under another name.
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    tracked = sosd_fast.track(model, method="exact", optimizers=[]).latest()
    (records,) = analyze([tmp_path])
    assert {r.name: r.shape for r in records} == {n: r.shape for n, r in tracked.items()}
    for r in records:
        assert r.sigma_max == pytest.approx(tracked[r.name].sigma_max, rel=1e-5)


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224", "vit_tiny_patch16_224"])
def test_fused_parts_of_images_are_what_they_are_called(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    size = model.default_cfg["input_size"]
    deep = (
        nn.ModuleDict({"stage": model.stages[2].blocks[0].attn_block}) if "maxvit" in name else model
    )  # of many heads
    if "maxvit" in name:
        side, width = size[-1] // 16, deep["stage"].attn.qkv.in_features
        check_parts(
            deep,
            "qkv",
            "proj",
            lambda m: m["stage"](torch.randn(1, side, side, width, generator=torch.Generator().manual_seed(0))),
        )
    else:
        check_parts(deep, "qkv", "proj", lambda m: m(torch.randn(1, *size, generator=torch.Generator().manual_seed(0))))


def test_gains_are_no_matrices():
    timm = pytest.importorskip("timm")
    model = large(lambda: timm.create_model("nfnet_f0", pretrained=False))
    left_out = {}
    found = find_matrices(model, left_out=left_out)
    assert len(found) == 82, "44,994 when each row of a gain was one"
    assert Counter(left_out.values())["is a gain"] == sum(n.endswith("gain") for n in left_out) > 0


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX"])
def test_fused_layers_under_adapters_are_cut_as_without(name):
    peft = pytest.importorskip("peft")
    *how, layer, _ = FUSED[name]
    model = built(*how)
    plain = {m.name: m.tensor() for m in find_matrices(model, include=f"*{layer}*")}
    config = peft.LoraConfig(r=2, target_modules=[layer], fan_in_fan_out=name == "GPT-2")
    adapted = find_matrices(peft.get_peft_model(model, config), include=f"*{layer}.base_layer*")
    assert [m.name.removeprefix("base_model.model.").replace(".base_layer", "") for m in adapted] == list(plain)
    assert all(torch.equal(m.tensor(), W) for m, W in zip(adapted, plain.values(), strict=True))


# Of models that were not small to build: what some of their parameters are, None where they are left out.
UNUSUAL = {
    "SamModel": {
        "mask_decoder.mask_tokens.weight": "embedding",
        "vision_encoder.pos_embed": None,  # (1, h, w, d)
        "mask_decoder.iou_prediction_head.proj_in.weight": "head",
    },
    "BlipModel": {"vision_model.embeddings.position_embedding": None},  # (1, n, d)
    "Blip2Model": {"query_tokens": None},  # (1, n, d)
    "FunnelModel": {"encoder.blocks.0.0.attention.q_head.weight": "attention"},
    "LxmertModel": {"encoder.x_layers.0.lang_self_att.output.dense.weight": "attention"},
    "DistilBertModel": {"transformer.layer.0.ffn.lin1.weight": "mlp"},
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_parameters(name):
    model = large(lambda: getattr(transformers, name)(getattr(transformers, name).config_class()))
    left_out = {}
    found = {m.name: kind(m.name) for m in find_matrices(model, left_out=left_out)}
    assert {n: found.get(n) for n in UNUSUAL[name]} == UNUSUAL[name]
    assert all(left_out[n] == "is a table that is broadcast" for n, told in UNUSUAL[name].items() if told is None)


@pytest.mark.parametrize("head_first", [True, False])
def test_convolutions_that_are_fused_are_cut_as_timm_uses_them(head_first):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    torch.manual_seed(0)
    attention = maxxvit.Attention2d(12, 24, dim_head=6, head_first=head_first, bias=False).eval()
    found = {m.name: m.tensor() for m in find_matrices(attention)}
    x, width = torch.randn(1, 12, 3, 3), attention.qkv.out_channels // 3
    assert found["qkv.weight[v]"].shape == (width, 12)
    seen = []
    attention.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    for part in ("q", "k", "v"):
        numbers = torch.arange(attention.qkv.weight.numel()).view(attention.qkv.weight.shape)
        (m,) = [m for m in find_matrices(attention) if m.name == f"qkv.weight[{part}]"]
        at = dataclasses.replace(m, parameter=numbers).tensor().flatten()
        kept = attention.qkv.weight.detach().clone()
        attention.qkv.weight.data.view(-1)[at] = 0
        attention(x)
        attention.qkv.weight.data.copy_(kept)
    q, k, v = seen
    assert (v == 0).all() and torch.allclose(q, k, atol=1e-5) and q.abs().max() > 0.01


def test_real_steps_of_a_fused_model():
    model = built(*FUSED["GPT-NeoX"][:3])
    probe = sosd_fast.track(model, method="full")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(2, 12)[None]
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    latest = probe.latest()
    W = model.gpt_neox.layers[1].attention.query_key_value.weight.detach().double().view(4, 3, 8, 32)
    for i, part in enumerate("qkv"):
        record = latest[f"gpt_neox.layers.1.attention.query_key_value.weight[{part}]"]
        assert record.step == 2 and record.shape == (32, 32)
        S = torch.linalg.svdvals(W[:, i].flatten(0, 1))
        SD = torch.from_numpy(record.spectrum) / record.nuclear_norm
        assert (SD - S / S.sum()).norm() <= record.sd_error <= 1e-6
