"""The real Hugging Face Trainer and Lightning, on tiny random models."""

import csv

import lightning
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger

import sosd_fast
from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.integrations.hugging_face import HuggingFaceCallback
from sosd_fast.integrations.lightning import LightningCallback
from sosd_fast.runs.records import JsonLines

TOKENS = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS = {
    gpt2: {"transformer.h.1.attn.c_attn.weight[q]": (32, 32), "transformer.wte.weight": (64, 32)},
    llama: {"model.layers.1.self_attn.q_proj.weight": (32, 32), "lm_head.weight": (64, 32)},
}


def hugging_face(model, tmp_path, callbacks, steps=6, **options):
    options = {"save_strategy": "no", "logging_steps": 1, "report_to": []} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks
    )


def exact(weight):
    return torch.linalg.svdvals(weight.detach().double()).numpy()


@pytest.mark.parametrize("make", MODELS)
def test_hugging_face_trainer(tmp_path, make):
    plain = make()
    evaluation = {"eval_strategy": "steps", "eval_steps": 3}
    hugging_face(plain, tmp_path / "plain", [], **evaluation).train()
    model, seen = make(), []
    run_dir = tmp_path / "run"
    callback = HuggingFaceCallback(run_dir=run_dir, method="full", on_record=seen.append)
    trainer = hugging_face(model, tmp_path / "out", [callback], **evaluation)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))

    run = sosd_fast.load(run_dir)
    assert {name: run._shapes[name] for name in MODELS[make]} == MODELS[make]
    assert [r.step for r in run.records if r.name == run.names[0]] == list(range(7))
    assert run.records == seen
    weight = dict(model.named_parameters())[list(MODELS[make])[1]]
    S = run.spectra(list(MODELS[make])[1])[1][-1]
    assert S == pytest.approx(exact(weight), rel=1e-5), "of the weights after the last step"
    logged = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    ours = {line["step"]: line for line in run.log if "loss" in line}
    assert {s: line["loss"] for s, line in logged.items()} == {s: line["loss"] for s, line in ours.items()}
    assert [line["step"] for line in run.log if "val_loss" in line] == [3, 6] and "lr" in run.log[0]
    assert not callback.probe.alive
    for name in ("records.jsonl", "log.jsonl"):
        JsonLines(run_dir / name).close()  # it would raise where the callback still held the file


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_resume_and_accumulation(tmp_path, accumulate):
    options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": accumulate}
    for steps, resume in ((4, None), (6, True)):
        callback = HuggingFaceCallback(run_dir=tmp_path, method="full")
        hugging_face(llama(), tmp_path, [callback], steps, lr_scheduler_type="constant", **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None
        )
    run = sosd_fast.load(tmp_path)
    assert [r.step for r in run.records if r.name == "lm_head.weight"] == list(range(7))
    assert [line["step"] for line in run.log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    whole = HuggingFaceCallback(run_dir=tmp_path / "whole", method="full")
    hugging_face(llama(), tmp_path / "w", [whole], 6, lr_scheduler_type="constant", **options).train()
    for resumed, r in zip(run.records, sosd_fast.load(tmp_path / "whole").records, strict=True):
        assert resumed.sigma_max == pytest.approx(r.sigma_max, rel=1e-6)


class Module(lightning.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.model = make()

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module, tmp_path, callbacks, steps=6, **options):
    arguments = {"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    ckpt = options.pop("ckpt_path", None)
    trainer = lightning.Trainer(default_root_dir=str(tmp_path), callbacks=callbacks, **arguments | options)
    torch.manual_seed(0)  # of dropout
    loader = torch.utils.data.DataLoader(TOKENS, batch_size=4)
    trainer.fit(module, loader, torch.utils.data.DataLoader(TOKENS[:8], batch_size=8), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("make", MODELS)
def test_lightning(tmp_path, make):
    plain, module, seen = Module(make), Module(make), []
    fit(plain, tmp_path, [], val_check_interval=3)
    logger = CSVLogger(tmp_path, name="csv")
    callback = LightningCallback(run_dir=tmp_path / "run", method="full", on_record=seen.append)
    fit(module, tmp_path, [callback], logger=logger, val_check_interval=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))

    run = sosd_fast.load(tmp_path / "run")
    assert [r.step for r in run.records if r.name == run.names[0]] == list(range(7)) and run.records == seen
    assert {f"model.{name}" for name in MODELS[make]} <= set(run.names)
    name = f"model.{list(MODELS[make])[1]}"
    assert run.spectra(name)[1][-1] == pytest.approx(exact(dict(module.named_parameters())[name]), rel=1e-5)
    assert [line["step"] for line in run.log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in run.log if "val_loss" in line] == [3, 6]
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row[f"spectra/{name}/sigma_max"]}
    for r in run.records:
        for key, value in scalars(r, METRICS).items():
            assert float(rows[r.step][key]) == value


def test_lightning_resume(tmp_path):
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}")
    options = {"enable_checkpointing": True}
    fit(
        Module(llama), tmp_path, [LightningCallback(run_dir=tmp_path / "run", method="full"), checkpoints], 4, **options
    )
    again = LightningCallback(run_dir=tmp_path / "run", method="full")
    fit(Module(llama), tmp_path, [again], 6, ckpt_path=str(tmp_path / "step=3.ckpt"))
    run = sosd_fast.load(tmp_path / "run")
    steps = [r.step for r in run.records if r.name == "model.lm_head.weight"]
    assert steps == list(range(7)) and again.probe.step_count == 6


def test_lightning_accumulation_counts_optimizer_steps(tmp_path):
    callback = LightningCallback(run_dir=tmp_path / "run", method="full")
    fit(Module(gpt2), tmp_path, [callback], 3, accumulate_grad_batches=2)
    run = sosd_fast.load(tmp_path / "run")
    assert {r.step for r in run.records} == {0, 1, 2, 3} and [x["step"] for x in run.log if "loss" in x] == [1, 2, 3]
    assert 3.5 < run.log[0]["loss"] < 5, "of a random model over 64 tokens, not divided by the accumulation"
