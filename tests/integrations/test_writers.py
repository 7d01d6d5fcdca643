"""What the libraries themselves write, in the forms that analyze turns back into values."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sosd_fast.checkpoints.analyze import analyze


def check(path, matrices, steps=(0,)):
    found = list(analyze([path]))
    assert tuple(records[0].step for records in found) == steps
    assert {r.name: r.shape for r in found[-1]} == {name: tuple(W.shape) for name, W in matrices.items()}
    for r in found[-1]:
        S = torch.linalg.svdvals(matrices[r.name].detach().double())
        sd = torch.tensor(r.spectrum, dtype=torch.float64) / r.spectrum.sum()
        assert r.sigma_max == pytest.approx(S[0].item(), rel=1e-5)
        assert torch.linalg.norm(sd - S / S.sum()) <= 1e-6, r.name


def weights(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32"])
def test_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    W, kind = weights(48, 96), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list([f"word {i}" for i in range(1000)])
    writer.add_array("scores", [0.5] * 7)
    data = gguf.quantize(W.numpy(), kind)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", weights(48).numpy())
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    check(tmp_path / "a.gguf", {"blk.0.attn_q.weight": torch.from_numpy(gguf.dequantize(data, kind).copy())})


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = weights(96, 512)
    packed, state = functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested, blocksize=64)
    tensors = {"a.weight": packed} | {f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", {"a.weight": functional.dequantize_4bit(packed, state)})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(tmp_path, bits, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    W = weights(32, 256)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=64, symmetric=symmetric)
    groups = W.view(32, 4, 64)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": W, "weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero})
    packed = compressor.compress(dict(state), scheme)
    save_file({f"a.{k}": v.contiguous() for k, v in packed.items()}, tmp_path / "model.safetensors")
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": args.model_dump()}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}, default=str))
    check(tmp_path, {"a.weight": compressor.decompress(dict(packed), scheme)["weight"]})


def test_torchao(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    torchao.quantize_(model, torchao.Float8WeightOnlyConfig())
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    check(tmp_path, {"0.weight": model[0].weight.dequantize()})


def test_gpt_oss(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40, 2, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(120, 130, (3, 40, 2), dtype=torch.uint8, generator=g)
    W = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(
        {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}, tmp_path / "a.safetensors"
    )
    check(tmp_path / "a.safetensors", {f"mlp.experts.down_proj[{i}]": W[i] for i in range(3)})


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 20))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    matrices = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert len(matrices) == 4
    check(tmp_path, matrices)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"path": tmp_path, "rate": 0.1})
            self.fc = nn.Linear(8, 6)

        def training_step(self, batch, _):
            return self.fc(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    model = Model()
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        max_steps=4, callbacks=[saving], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4))
    assert (tmp_path / "last.ckpt").exists()
    check(tmp_path, {"fc.weight": model.fc.weight}, (2, 4))
