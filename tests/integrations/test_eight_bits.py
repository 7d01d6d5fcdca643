"""A model whose layers transformers made eight-bit, saved by it, is measured as the values that it computes with."""

import json

import pytest
import torch

from sosd_fast.checkpoints.analyze import analyze


def test_a_folder_of_eight_bit_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    sizes = {"hidden_size": 256, "intermediate_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=70, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    expected = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    layers = {n: m for n, m in model.model.named_modules() if type(m) is torch.nn.Linear}
    assert len(layers) == 14
    for name, layer in layers.items():
        eight = fp8.FP8Linear(layer.in_features, layer.out_features, block_size=(128, 128))
        rows, columns = eight.weight_scale_inv.shape
        scale = torch.rand(rows, columns) + 0.5
        eight.weight.data = (layer.weight.detach() * 1000).clamp(-400, 400).to(torch.float8_e4m3fn)
        eight.weight_scale_inv.data = scale
        wide = scale.repeat_interleave(128, 0)[: layer.out_features].repeat_interleave(128, 1)[:, : layer.in_features]
        expected[f"model.{name}.weight"] = eight.weight.detach().float() * wide
        model.model.set_submodule(name, eight)
    model.save_pretrained(tmp_path, max_shard_size="300kB")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = transformers.FineGrainedFP8Config(weight_block_size=(128, 128)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (records,) = analyze([tmp_path])
    assert {r.name: r.shape for r in records} == {name: tuple(W.shape) for name, W in expected.items()}
    for r in records:
        S = torch.linalg.svdvals(expected[r.name].double())
        sd = torch.tensor(r.spectrum, dtype=torch.float64) / r.spectrum.sum()
        assert torch.linalg.norm(sd - S / S.sum()) <= 1e-6, r.name
