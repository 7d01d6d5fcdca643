"""A table of real libraries: each trains some steps with the probe and without it; `pytest -s` prints the table."""

from collections import Counter

import accelerate
import datasets
import diffusers
import keras
import peft
import pytest
import pytorch_optimizer
import schedulefree
import tokenizers
import torch
import torchao
import transformers
import trl
from lightning.fabric import Fabric
from optimum import quanto
from test_trainers import Module, fit, hugging_face, llama
from torch import Tensor, nn

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


def unet():
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.UNet2DModel(16, down_block_types=down, up_block_types=up, **sizes)


def graph():
    import torch_geometric  # which warns when it is imported

    return torch_geometric.nn.GCN(8, 16, num_layers=2, out_channels=4)


def graph_loss(net):
    return net(torch.eye(20, 8), torch.arange(120).view(2, 60) * 7 % 20).square().mean()


def to_torchao(net):
    torchao.quantization.quantize_(net, torchao.quantization.Int8WeightOnlyConfig())


def to_quanto(net):
    quanto.quantize(net, weights=quanto.qint8)
    quanto.freeze(net)


def resnet18():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=4)


def timm_vit():
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)


def by_forward(net):
    return net(IMAGES).square().mean()


def lora(quantize=None, **options):
    net = architecture("llama")
    if quantize:
        quantize(net.model)
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


def sam(net):
    return pytorch_optimizer.SAM(net.parameters(), torch.optim.SGD, lr=1e-2)


def bare(loss=text_loss, optimizers=adamw, closures=False):
    """A loop of one's own; some optimizers want a closure, which computes the gradients again."""

    def train(net, track, *_):
        made = optimizers(net)
        probe = track(net)
        for _ in range(STEPS):
            loss(net).backward()
            for optimizer in made if isinstance(made, list) else [made]:
                optimizer.step(*[lambda: loss(net).backward()] * closures)
                optimizer.zero_grad()
        return probe

    return train


def accelerated(net, track, *_):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, adamw(net))
    probe = track(prepared)
    for _ in range(STEPS):
        accelerator.backward(text_loss(prepared))
        optimizer.step()
        optimizer.zero_grad()
    return probe


def by_fabric(net, track, *_):
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


def by_sft_trainer(net, track, tmp_path):
    words = ["[pad]", "[eos]", *"a cat sat on the mat and dog ran over hill".split()]
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    callbacks = [HuggingFaceCallback(method="full")] if track(None) else []
    trl.SFTTrainer(
        net,
        trl.SFTConfig(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            disable_tqdm=True, report_to=[], save_strategy="no", bf16=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["the cat sat on a mat", "a dog ran over the hill"] * 4}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=split, pad_token="[pad]", eos_token="[eos]"
        ),
        callbacks=callbacks,
    ).train()  # fmt: skip
    return callbacks and callbacks[0].probe


def keras_model():
    keras.utils.clear_session()  # which gives layers the same names again
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([
        layers.Input((8, 8, 3)), layers.Conv2D(5, 3), layers.Reshape((36, 5)), layers.Conv1D(8, 2), layers.LSTM(6),
        layers.Dense(4),
    ])  # fmt: skip


class StepOfKeras(keras.callbacks.Callback):
    """As docs/integrations.md has it."""

    def __init__(self, probe):
        super().__init__()
        self.probe = probe

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        self.probe.step()


def by_keras(net, track, *_):
    probe = track(net, optimizers=[])
    net.compile("adam", "mse")
    inputs = IMAGES.permute(0, 2, 3, 1)[:, :8, :8].numpy()
    callbacks = [StepOfKeras(probe)] if probe else []
    net.fit(inputs, inputs[:, 0, :4, 0], batch_size=1, verbose=0, callbacks=callbacks)
    return probe


TABLE = {f"transformers {name}": (lambda name=name: architecture(name), bare()) for name in ARCHITECTURES} | {
    "transformers vit": (vision, bare(image_loss)),
    "transformers resnet": (convolutions, bare(image_loss)),
    "peft LoRA": (lora, bare()),
    "peft DoRA": (lambda: lora(use_dora=True), bare()),
    "peft LoRA on torchao int8": (lambda: lora(to_torchao), bare()),
    "peft LoRA on quanto int8": (lambda: lora(to_quanto), bare()),
    "accelerate": (llama, accelerated),
    "Lightning Fabric": (llama, by_fabric),
    "transformers Trainer": (llama, by_trainer),
    "Lightning Trainer": (llama, by_lightning),
    "trl SFTTrainer": (llama, by_sft_trainer),
    "Keras 3 on torch": (keras_model, by_keras),
    "diffusers UNet2DModel": (
        unet,
        bare(lambda net: net(IMAGES[..., :16, :16], torch.arange(4)).sample.square().mean()),
    ),
    "torch_geometric GCN": (graph, bare(graph_loss)),
    "torchvision resnet18": (resnet18, bare(by_forward)),
    "timm vit_tiny": (timm_vit, bare(by_forward)),
    "torch.optim.Muon and AdamW": (llama, bare(optimizers=muon_and_adamw)),
    "schedulefree AdamW": (llama, bare(optimizers=schedule_free)),
    "pytorch_optimizer Lookahead": (
        llama,
        bare(optimizers=lambda net: pytorch_optimizer.Lookahead(adamw(net), k=2)),
    ),
    "pytorch_optimizer SAM": (llama, bare(optimizers=sam, closures=True)),
    "torch TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        bare(lambda net: net(torch.ones(2, 5, 16) * torch.arange(5)[:, None]).square().mean()),
    ),
}


def values(p):
    """A copy of a parameter, of a quantised one what it stands for."""
    return p.detach().clone() if type(p) in (nn.Parameter, Tensor) else p.dequantize().detach()


@pytest.mark.parametrize("library", TABLE)
def test_a_library_trains_as_without_the_probe(library, tmp_path):
    make, train = TABLE[library]
    weights, probe = [], None
    for track in (lambda *_, **__: None, lambda net, **how: net is None or sosd_fast.track(net, method="full", **how)):
        torch.manual_seed(0)
        net = make()
        torch.manual_seed(1)  # of dropout
        found = train(net, track, tmp_path)
        weights.append({name: values(p) for name, p in net.named_parameters()})
        probe = found or probe
    plain, tracked = weights
    assert all(torch.equal(plain[name], W) for name, W in tracked.items()), "training is untouched"
    probe.flush()

    names = [m.name for m in probe.matrices]
    records = probe.records()
    assert {r.name for r in records} == set(names)
    assert all([r.step for r in records if r.name == name] == list(range(STEPS + 1)) for name in names)
    given = [p.replace("/", ".").removeprefix("model.") for p in tracked]  # Keras writes paths
    plain_names = [name.split("[")[0] for name in names]
    assert all(any(n.endswith(p) or p.endswith(n) for p in given) for n in plain_names), "named as the parameters are"
    errors = []
    for m in probe.matrices:
        S, truth = torch.from_numpy(probe.latest()[m.name].spectrum), torch.linalg.svdvals(m.tensor().double())
        errors.append(sd_distance(S, truth) if truth[0] > 0 else 0.0)
    assert max(errors) <= 1e-6, "of the weights after the last step"
    kinds = ", ".join(f"{count} {each}" for each, count in sorted(Counter(map(kind, names)).items()))
    print(f"\n| {library} | {len(names)} ({kinds}) | {max(errors):.0e} |")
