"""A table of real libraries: each trains some steps with the probe and without it; `pytest -s` prints the table."""

from collections import Counter

import accelerate
import peft
import pytest
import schedulefree
import torch
import transformers
from lightning.fabric import Fabric
from test_trainers import Module, fit, hugging_face, llama
from torch import nn

import sosd_fast
from sosd_fast.integrations.hugging_face import HuggingFaceCallback
from sosd_fast.integrations.lightning import LightningCallback
from sosd_fast.matrices import kind
from sosd_fast.testing import sd_distance

STEPS = 4
TOKENS = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SHORT = {"max_position_embeddings": 32}
GROUPED = TEXT | SHORT | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {  # model type -> options of its configuration
    "gpt2": {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 16},
    "phi": TEXT | SHORT,
    "gpt_neox": TEXT | SHORT,
    "opt": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48,
            "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "t5": {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "bert": TEXT | SHORT,
    "modernbert": TEXT | SHORT | {"global_attn_every_n_layers": 1, "pad_token_id": 0},
}  # fmt: skip
MASKED = {"bert", "modernbert"}


def architecture(name):
    config = transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    config.decoder_start_token_id = config.pad_token_id = 0
    auto = transformers.AutoModelForCausalLM
    if name == "t5":
        auto = transformers.AutoModelForSeq2SeqLM
    elif name in MASKED:
        auto = transformers.AutoModelForMaskedLM
    return auto.from_config(config).train()


def text_loss(net):
    return net(input_ids=TOKENS, labels=TOKENS).loss


def vision():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **options))


def convolutions():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def image_loss(net):
    return net(pixel_values=IMAGES).logits.square().mean()


def lora(**options):
    net = architecture("llama")
    return peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))


def adamw(net):
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def muon_and_adamw(net):
    body = [p for name, p in net.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for p in net.parameters() if all(p is not q for q in body)]
    return [torch.optim.Muon(body, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


def schedule_free(net):
    optimizer = schedulefree.AdamWScheduleFree(net.parameters(), lr=1e-2)
    optimizer.train()
    return optimizer


def bare(loss=text_loss, optimizers=adamw):
    """A loop of one's own."""

    def train(net, track):
        made = optimizers(net)
        probe = track(net)
        for _ in range(STEPS):
            loss(net).backward()
            for optimizer in made if isinstance(made, list) else [made]:
                optimizer.step()
                optimizer.zero_grad()
        return probe

    return train


def accelerated(net, track):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, adamw(net))
    probe = track(prepared)
    for _ in range(STEPS):
        accelerator.backward(text_loss(prepared))
        optimizer.step()
        optimizer.zero_grad()
    return probe


def by_fabric(net, track):
    fabric = Fabric(accelerator="cpu", devices=1)
    prepared, optimizer = fabric.setup(net, adamw(net))
    probe = track(prepared)
    for _ in range(STEPS):
        fabric.backward(text_loss(prepared))
        optimizer.step()
        optimizer.zero_grad()
    return probe


def by_trainer(net, track, tmp_path):
    callbacks = [HuggingFaceCallback(method="full")] if track(None) else []
    hugging_face(net, tmp_path, callbacks, STEPS).train()
    return callbacks and callbacks[0].probe


def by_lightning(net, track, tmp_path):
    module = Module(lambda: net)
    callbacks = [LightningCallback(method="full")] if track(None) else []
    fit(module, tmp_path, callbacks, STEPS)
    return callbacks and callbacks[0].probe


TABLE = {f"transformers {name}": (lambda name=name: architecture(name), bare()) for name in ARCHITECTURES} | {
    "transformers vit": (vision, bare(image_loss)),
    "transformers resnet": (convolutions, bare(image_loss)),
    "peft LoRA": (lora, bare()),
    "peft DoRA": (lambda: lora(use_dora=True), bare()),
    "accelerate": (llama, accelerated),
    "Lightning Fabric": (llama, by_fabric),
    "transformers Trainer": (llama, by_trainer),
    "Lightning Trainer": (llama, by_lightning),
    "torch.optim.Muon and AdamW": (llama, bare(optimizers=muon_and_adamw)),
    "schedulefree AdamW": (llama, bare(optimizers=schedule_free)),
    "torch TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        bare(lambda net: net(torch.ones(2, 5, 16) * torch.arange(5)[:, None]).square().mean()),
    ),
}


@pytest.mark.parametrize("library", TABLE)
def test_a_library_trains_as_without_the_probe(library, tmp_path):
    make, train = TABLE[library]
    more = (tmp_path,) if train in (by_trainer, by_lightning) else ()
    weights, probe = [], None
    for track in (lambda _: None, lambda net: net is None or sosd_fast.track(net, method="full")):
        torch.manual_seed(0)
        net = make()
        torch.manual_seed(1)  # of dropout
        found = train(net, track, *more)
        weights.append({name: p.detach().clone() for name, p in net.named_parameters()})
        probe = found or probe
    plain, tracked = weights
    assert all(torch.equal(plain[name], W) for name, W in tracked.items()), "training is untouched"
    probe.flush()

    names = [m.name for m in probe.matrices]
    records = probe.records()
    assert {r.name for r in records} == set(names)
    assert all([r.step for r in records if r.name == name] == list(range(STEPS + 1)) for name in names)
    assert all(any(name.split("[")[0].endswith(p.removeprefix("model.")) or p.endswith(name.split("[")[0])
                   for p in tracked) for name in names), "named as the parameters are"  # fmt: skip
    errors = []
    for m in probe.matrices:
        S, truth = torch.from_numpy(probe.latest()[m.name].spectrum), torch.linalg.svdvals(m.tensor().double())
        errors.append(sd_distance(S, truth) if truth[0] > 0 else 0.0)
    assert max(errors) <= 1e-6, "of the weights after the last step"
    kinds = ", ".join(f"{count} {each}" for each, count in sorted(Counter(map(kind, names)).items()))
    print(f"\n| {library} | {len(names)} ({kinds}) | {probe.step_count} | {max(errors):.0e} | yes |")
