"""Checkpoints in one file or several, of plain numbers and of eight bits."""

import argparse
from pathlib import Path

import numpy as np
import torch
from making import Made, file, made, random
from torch import Tensor

# Several files


def _llama(folder: Path, words: int) -> Made:
    d, ffn, vocab = 16, 24, 40
    whole = {
        "tok_embeddings.weight": (random(vocab, d), words),
        "norm.weight": (torch.ones(d), None),
        "layers.0.attention.wq.weight": (random(d, d, seed=1), 0),
        "layers.0.attention.wk.weight": (random(8, d), 0),
        "layers.0.attention.wo.weight": (random(d, d, seed=2), 1),
        "layers.0.feed_forward.w1.weight": (random(ffn, d), 0),
        "layers.0.feed_forward.w2.weight": (random(d, ffn), 1),
        "output.weight": (random(vocab, d, seed=3), 0),
    }
    for i in range(2):
        part = {k: W if dim is None else W.chunk(2, dim)[i].clone() for k, (W, dim) in whole.items()}
        made(folder / f"consolidated.0{i}.pth", part)
    made(folder / "params.json", {"dim": d})
    return Made(folder, {k: W for k, (W, dim) in whole.items() if dim is not None})


@file
def llama_in_two_parts(folder):
    return _llama(folder, 1)


@file
def llama_3_in_two_parts(folder):
    return _llama(folder, 0)


@file
def megatron_in_two_parts(folder):
    d = 16
    whole = {
        "embedding.word_embeddings.weight": (random(40, d), 0),
        "embedding.position_embeddings.weight": (random(12, d), None),
        "encoder.layers.0.self_attention.linear_proj.weight": (random(d, d), 1),
        "encoder.layers.0.mlp.linear_fc1.weight": (random(32, d), 0),
        "encoder.layers.0.mlp.linear_fc2.weight": (random(d, 32), 1),
        "encoder.layers.0.mlp.linear_fc1.bias": (random(32), 0),
        "encoder.final_layernorm.weight": (torch.ones(d), None),
    }
    for i in range(2):
        part = {k: W if dim is None else W.chunk(2, dim)[i].clone() for k, (W, dim) in whole.items()}
        state = {"args": argparse.Namespace(hidden_size=d), "iteration": 100, "model": part, "rng_state": [np.ones(3)]}
        made(folder / f"iter_0000100/mp_rank_0{i}/model_optim_rng.pt", state)
    made(folder / "latest_checkpointed_iteration.txt", b"100")
    return Made(folder, {k: W for k, (W, _) in whole.items() if W.ndim > 1}, steps=(100,))


@file
def megatron_with_an_unknown_weight(folder):
    for i in range(2):
        made(folder / f"mp_rank_0{i}_model_states.pt", {"module": {"adapter.strange.weight": random(4, 6, seed=i)}})
    return Made(
        folder, {}, "adapter.strange.weight in mp_rank_00_model_states.pt and mp_rank_01_model_states.pt, and noth"
    )


@file
def deepspeed(folder):
    W = random(6, 8)
    state = {"module": {"a.weight": W}, "optimizer": None, "mp_world_size": 1, "ds_config": {"zero": {"stage": 1}}}
    made(folder / "global_step20/mp_rank_00_model_states.pt", state)
    made(
        folder / "global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        {"optimizer_state_dict": {"m": random(9, 9)}},
    )
    made(folder / "latest", b"global_step20")
    return Made(folder, {"a.weight": W}, steps=(20,))


@file
def deepspeed_stage_3(folder):
    made(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", {"module": {"a.weight": torch.empty(0)}})
    made(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"fp32_flat_groups": [random(48)]})
    return Made(folder, {}, "Run DeepSpeed's zero_to_fp32.py")


@file
def one_key_in_two_files(folder):
    for name, rows in (("a", 32), ("b", 64)):
        made(folder / f"{name}.safetensors", {"w.weight": random(rows, 8)})
    return Made(folder, {}, "expected each weight in one file, got path=.* with w.weight in a.safetensors and b.safet")


@file
def variants_of_one_model(folder):
    for name, dtype in (("model.fp16", torch.float16), ("model", torch.float32)):
        made(folder / f"{name}.safetensors", {"w.weight": random(9, 8).to(dtype)})
    return Made(folder, {}, "w.weight in model.fp16.safetensors and model.safetensors")


@file
def index_decides(folder):
    """A shard holds an old copy of a weight that the index gives another one, and a consolidated file stands beside."""
    a, b = random(6, 8), random(5, 7)
    made(folder / "model-00001-of-00002.safetensors", {"a.weight": a})
    made(folder / "model-00002-of-00002.safetensors", {"a.weight": a + 1, "b.weight": b})
    made(folder / "consolidated.safetensors", {"c.weight": b})
    home = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    made(folder / "model.safetensors.index.json", {"weight_map": home})
    return Made(
        folder, {"a.weight": a, "b.weight": b}, "left out the file consolidated.safetensors: .*does not name it"
    )


@file
def index_names_what_is_not_there(folder):
    made(folder / "model-00001-of-00001.safetensors", {"a.weight": random(6, 8)})
    home = dict.fromkeys(("a.weight", "b.weight"), "model-00001-of-00001.safetensors")
    made(folder / "model.safetensors.index.json", {"weight_map": home})
    return Made(folder, {}, "files without b.weight. Download them again")


@file
def a_shard_is_missing(folder):
    made(folder / "model-00001-of-00003.safetensors", {"a.weight": random(6, 8)})
    made(folder / "model-00003-of-00003.safetensors", {"b.weight": random(6, 8)})
    return Made(folder, {}, "expected all shards of .* without number 2")


@file
def series_of_files(folder):
    for step in (1000, 900, 100):
        made(folder / f"step_{step}.safetensors", {"w.weight": random(9, 8, seed=step)})
    return Made(folder, {"w.weight": random(9, 8, seed=1000)}, steps=(100, 900, 1000))


@file
def lightning(folder):
    for step in (50, 500):
        state = {"epoch": 1, "global_step": step, "hyper_parameters": {"lr": 1e-3}, "optimizer_states": [{"state": {}}]}
        state |= {
            "state_dict": {"model.fc.weight": random(9, 8, seed=step)},
            "loops": {"fit_loop": {"w": random(3, 3)}},
        }
        made(folder / f"checkpoints/epoch=1-step={step}.ckpt", state)
    made(folder / "checkpoints/last.ckpt", state)
    return Made(folder / "checkpoints", {"model.fc.weight": random(9, 8, seed=500)}, "", (50, 500))


@file
def trainers_folder(folder):
    for step in (1000, 900):
        made(folder / f"checkpoint-{step}/model.safetensors", {"w.weight": random(9, 8, seed=step)})
        made(folder / f"checkpoint-{step}/optimizer.pt", {"state": {0: {"exp_avg": random(9, 8)}}})
        made(folder / f"checkpoint-{step}/training_args.bin", {"a": 1})
    return Made(folder, {"w.weight": random(9, 8, seed=1000)}, steps=(900, 1000))


@file
def trainers_folder_with_a_last_model(folder):
    for name in ("checkpoint-900/model", "model"):
        made(folder / f"{name}.safetensors", {"w.weight": random(9, 8)})
    return Made(folder, {"w.weight": random(9, 8)}, "left out the checkpoints in folders of it, checkpoint-900")


@file
def numbers_that_are_no_steps(folder):
    return Made(made(folder / "llama-3.1-8b.safetensors", {"w.weight": random(9, 8)}), {"w.weight": random(9, 8)})


# One file


@file
def model_is_a_name(folder):
    W = random(9, 8)
    state = {
        "model": "resnet50",
        "module": {"epoch": 3},
        "state_dict": {"fc.weight": W},
        "args": argparse.Namespace(lr=1),
    }
    return Made(made(folder / "a.pth", state), {"fc.weight": W})


@file
def tied_in_a_torch_file(folder):
    W = torch.nn.Parameter(random(20, 8))
    return Made(made(folder / "a.pt", {"embed.weight": W, "lm_head.weight": W}), {"embed.weight": W.detach()})


@file
def tied_and_saved_twice(folder):
    """A head with the bits of the embedding is tied; layers that are copies of each other are not."""
    W, V = random(20, 8), random(8, 8)
    tensors = {
        "lm_head.weight": W,
        "model.embed_tokens.weight": W.clone(),
        "h.0.fc.weight": V,
        "h.1.fc.weight": V.clone(),
    }
    matrices = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    return Made(
        made(folder / "a.safetensors", tensors), matrices, "left out lm_head.weight, which is tied to model.embed"
    )


@file
def views(folder):
    W = random(8, 36)
    tensors = {"q": W[:, :12], "t": W.T, "steps": W[::2, ::3], "narrow": W[3:5, 4:9]}
    return Made(made(folder / "a.pt", tensors), {k: v.contiguous() for k, v in tensors.items()})


@file
def old_torch_with_views(folder):
    W = random(8, 36).half()
    tensors = {
        "a": random(3, 5),
        "q": W[:, 1:12],
        "t": W.T,
        "flags": torch.ones(3, dtype=torch.bool),
        "b": random(7, 5),
    }
    path = made(folder / "a.pt", tensors, _use_new_zipfile_serialization=False)
    return Made(path, {k: v.contiguous() for k, v in tensors.items() if v.is_floating_point()})


@file
def of_some_megabytes(folder):
    return Made(made(folder / "a.pt", {"w": random(60_000, 50)}), {"w": random(60_000, 50)})


@file
def expanded(folder):
    tensors = {"w": random(4, 5), "mask": torch.ones(1).expand(10**7, 10**7)}
    return Made(made(folder / "a.pt", tensors), {"w": tensors["w"]}, "left out 1 tensors that are larger than their st")


@file
def mamba(folder):
    tensors = {
        "mixer.conv1d.weight": random(64, 1, 4),
        "mixer.A_log": random(64, 16),
        "mixer.in_proj.weight": random(24, 9),
    }
    matrices = {k: v.flatten(1) for k, v in tensors.items()}
    return Made(made(folder / "a.safetensors", tensors), matrices)


@file
def whisper(folder):
    tensors = {
        "encoder.conv1.weight": random(16, 8, 3),
        "encoder.conv2.weight": random(16, 16, 3),
        "fc1.weight": random(9, 8),
    }
    return Made(made(folder / "a.safetensors", tensors), {k: v.flatten(1) for k, v in tensors.items()})


@file
def experts(folder):
    W = random(4, 6, 5)
    path = made(folder / "a.safetensors", {"mlp.experts.down_proj": W, "ids": torch.ones(4, 4, dtype=torch.int64)})
    matrices = {f"mlp.experts.down_proj[{i}]": W[i] for i in range(4)}
    return Made(path, matrices, "left out 1 tensors of int64, such as ids")


# Eight bits


def _fp8(W: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = (W / scale).to(torch.float8_e4m3fn)
    return codes, codes.double() * scale


@file
def fp8_in_blocks(folder):
    """DeepSeek's, where the last blocks are cut."""
    W, block = random(20, 44), 16
    scales = 0.01 + torch.rand(2, 3)
    wide = scales.repeat_interleave(block, 0)[:20].repeat_interleave(block, 1)[:, :44]
    codes, values = _fp8(W, wide)
    made(folder / "config.json", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}})
    made(folder / "model.safetensors", {"a.weight": codes, "a.weight_scale_inv": scales, "b.weight": W})
    return Made(folder, {"a.weight": values, "b.weight": W})


@file
def fp8_in_blocks_without_a_config(folder):
    scales = 0.01 + torch.rand(2, 3)
    codes, values = _fp8(random(20, 44), scales.repeat_interleave(16, 0)[:20].repeat_interleave(16, 1)[:, :44])
    return Made(made(folder / "a.safetensors", {"a.weight": codes, "a.scale": scales}), {"a.weight": values})


@file
def fp8_by_row_and_by_tensor(folder):
    rows, whole = 0.01 + torch.rand(20, 1), torch.tensor(0.3)
    a, b = _fp8(random(20, 12), rows), _fp8(random(9, 12), whole)
    c = _fp8(random(20, 20), rows)
    tensors = {"a.weight": a[0], "a.weight_scale": rows, "b.weight": b[0], "b.weight_scale": whole}
    tensors |= {"c._weight_qdata": c[0], "c._weight_scale": rows, "b.input_scale": torch.ones(3, 3)}  # torchao's
    return Made(made(folder / "a.safetensors", tensors), {"a.weight": a[1], "b.weight": b[1], "c.weight": c[1]})


@file
def fp8_whose_scale_does_not_fit(folder):
    tensors = {
        "a.weight": random(20, 12).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(7, 5),
        "b": random(4, 3),
    }
    return Made(
        made(folder / "a.safetensors", tensors), {"b": tensors["b"]}, "float8_e4m3fn with scales that do not tell"
    )


@file
def int8_by_row(folder):
    codes, scale = torch.randint(-127, 128, (9, 12), dtype=torch.int8), torch.rand(9, 1)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "b.weight": codes, "b.SCB": torch.rand(9)}
    values = {"a.weight": codes.double() * scale, "b.weight": codes.double() * tensors["b.SCB"].double()[:, None] / 127}
    return Made(made(folder / "a.safetensors", tensors), values)
