"""The callbacks count the Trainers' own steps, begin anew with a new training, and log where the Trainers log."""

import logging

import mlflow
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainers import Module, exact, fit, gpt2, hugging_face, llama
from torch import nn
from transformers.integrations.integration_utils import TensorBoardCallback

import sosd_fast
from sosd_fast.integrations.common import METRICS, scalars
from sosd_fast.integrations.hugging_face import HuggingFaceCallback
from sosd_fast.integrations.lightning import LightningCallback

HEAD = "lm_head.weight"


def steps(run_dir, name=HEAD):
    return [r.step for r in sosd_fast.load(run_dir).records if r.name.endswith(name)]


class FlatMasters(torch.optim.Optimizer):
    """Trains one flat float32 copy of all weights, as DeepSpeed's ZeRO stages 1 and 2 and Megatron do."""

    def __init__(self, params, lr=1e-2):
        self.weights = list(params)
        self.flat = nn.Parameter(nn.utils.parameters_to_vector(self.weights).detach().clone())
        super().__init__([self.flat], {"lr": lr})
        self.inner = torch.optim.AdamW([self.flat], lr=lr)

    def zero_grad(self, set_to_none=True):  # noqa: ARG002
        for p in self.weights:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.flat.grad = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                                    for p in self.weights])  # fmt: skip
        self.inner.step()
        at = 0
        for p in self.weights:
            p.copy_(self.flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        return loss


class Flat(Module):
    def configure_optimizers(self):
        return FlatMasters(self.parameters())


def by_hugging_face(model, folder, callbacks):
    trainer = hugging_face(model, folder, callbacks)
    optimizer = FlatMasters(model.parameters())
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer.train()


def by_lightning(model, folder, callbacks):
    module = Flat(llama)
    module.model = model
    fit(module, folder, callbacks)


@pytest.mark.parametrize(
    ("train", "callback"),
    [(by_hugging_face, HuggingFaceCallback), (by_lightning, LightningCallback)],
    ids=["hugging face", "lightning"],
)
def test_steps_that_no_hook_can_see(tmp_path, train, callback):
    plain, model = llama(), llama()
    train(plain, tmp_path / "plain", [])
    train(model, tmp_path, [callback(run_dir=tmp_path / "run", method="full")])
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert steps(tmp_path / "run") == list(range(7))
    name = next(name for name in sosd_fast.load(tmp_path / "run").names if name.endswith(HEAD))
    S = sosd_fast.load(tmp_path / "run").spectra(name)[1]
    assert S[-1] == pytest.approx(exact(model.lm_head.weight), rel=1e-5) and S[0] != pytest.approx(S[-1], rel=1e-3)


class TwoOptimizers(Module):
    """A generator and its critic: both step in each batch, each while the other is frozen."""

    def __init__(self, make):
        super().__init__(make)
        self.critic, self.automatic_optimization = nn.Linear(64, 2), False

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1), torch.optim.SGD(self.critic.parameters(), lr=0.1)

    def training_step(self, batch, _):
        for optimizer, loss in zip(
            self.optimizers(),
            (
                lambda: self.model(input_ids=batch, labels=batch).loss,
                lambda: self.critic(self.model(input_ids=batch).logits.detach()).square().mean(),
            ),
            strict=True,
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            value = loss()
            self.manual_backward(value)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return value


def test_a_batch_in_which_two_optimizers_step_is_a_step(tmp_path):
    callback = LightningCallback(run_dir=tmp_path / "run", method="full")
    module = TwoOptimizers(llama)
    trainer = fit(module, tmp_path, [callback], steps=12)
    assert trainer.global_step == 12, "as Lightning counts"
    assert steps(tmp_path / "run") == steps(tmp_path / "run", "critic.weight") == list(range(7))
    S = sosd_fast.load(tmp_path / "run").spectra("critic.weight")[1][-1]
    assert S == pytest.approx(exact(module.critic.weight), rel=1e-5)


def test_a_second_training_is_a_run_of_its_own(tmp_path, caplog):
    callback = HuggingFaceCallback(run_dir=tmp_path / "a", method="full")
    for count in (4, 3):
        hugging_face(llama(), tmp_path, [callback], count).train()
    trainer = hugging_face(llama(), tmp_path, [callback], 2)
    trainer.train()
    trainer.train()
    assert steps(tmp_path / "a") == [0, 1, 2, 3, 4] and steps(tmp_path / "a/fit-2") == [0, 1, 2, 3]
    assert steps(tmp_path / "a/fit-3") == steps(tmp_path / "a/fit-4") == [0, 1, 2]
    assert len(sosd_fast.load(tmp_path / "a").log) == 4 and len(sosd_fast.load(tmp_path / "a/fit-2").log) == 3
    said = [m for m in caplog.messages if "another training begins" in m]
    assert len(said) == 3 and str(tmp_path / "a/fit-2") in said[0]


def test_a_second_fit_is_a_run_of_its_own_and_one_that_goes_on_is_not(tmp_path):
    callback = LightningCallback(run_dir=tmp_path / "a", method="full")
    trainer = fit(Module(llama), tmp_path, [callback], 4)
    trainer.fit_loop.epoch_loop.max_steps = 6
    loader = torch.utils.data.DataLoader(torch.randint(64, (64, 16)), batch_size=4)
    trainer.fit(Module(llama), loader)
    went_on = trainer.global_step
    fit(Module(llama), tmp_path, [callback], 3)
    assert went_on == 6 and steps(tmp_path / "a") == list(range(7)) and steps(tmp_path / "a/fit-2") == [0, 1, 2, 3]


def test_a_resumed_training_goes_on(tmp_path):
    callback = HuggingFaceCallback(run_dir=tmp_path / "a", method="full")
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    hugging_face(llama(), tmp_path, [callback], 4, **options).train()
    hugging_face(llama(), tmp_path, [callback], 6, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert steps(tmp_path / "a") == list(range(7)) and not (tmp_path / "a/fit-2").exists()


def test_the_loggers_of_the_trainer_get_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")  # whose threads race to make one folder
    seen = []
    callback = HuggingFaceCallback(method="full", on_record=seen.append)
    # GPT-2's fused matrices have brackets in their names, which MLflow refuses.
    model, plain = gpt2(), gpt2()
    hugging_face(plain, tmp_path / "plain", [], 4).train()
    trainer = hugging_face(model, tmp_path, [callback], 4, logging_steps=2, report_to=["tensorboard", "mlflow"])
    trainer.train()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    expected = {
        (r.step, f"train/{key}"): value for r in seen if r.step in (2, 4) for key, value in scalars(r, METRICS).items()
    }
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events*") if path.stat().st_size > 2000}
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {
        (e.step, key): e.value for key in events.Tags()["scalars"] if "spectra" in key for e in events.Scalars(key)
    }
    assert found == pytest.approx(expected, rel=1e-6) and any(".weight.q/" in key for _, key in expected)

    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    client = mlflow.MlflowClient()
    for (step, key), value in expected.items():
        key = key if key in run.data.metrics else key.removeprefix("train/")
        assert any(
            m.step == step and m.value == pytest.approx(value) for m in client.get_metric_history(run.info.run_id, key)
        )
    assert all(len(line) < 20 for line in trainer.state.log_history), "the console stays readable"


class Broken(TensorBoardCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
        if any("spectra" in key for key in logs or {}):
            raise ConnectionError("no network")


@pytest.mark.expects_probe_failure
def test_a_logger_that_fails_ends_no_training(tmp_path, caplog):
    callback = HuggingFaceCallback(method="full")
    hugging_face(llama(), tmp_path, [callback, Broken()]).train()
    assert callback.probe.step_count == 6
    assert sum("Broken failed" in m for m in caplog.messages) == 1 and "no network" in caplog.text


def partitioned():
    """A model as DeepSpeed's ZeRO stage 3 leaves it between uses: parameters without elements, small ones whole."""
    net = llama()
    for i, p in enumerate(net.parameters()):
        p.ds_id, p.ds_shape = i, p.shape
        if p.ndim > 1:
            p.data = torch.empty(0)
    return net


@pytest.mark.expects_probe_failure
@pytest.mark.parametrize("whole", [False, True])
def test_partitioned_parameters_are_refused_in_words(whole, caplog):
    net = nn.ModuleList([partitioned()] + [nn.Linear(4, 4)] * whole)
    if whole:
        probe = sosd_fast.track(net)
        assert [m.name for m in probe.matrices] == ["1.weight"]
        assert "partitioned by DeepSpeed's ZeRO stage 3" in caplog.text
    else:
        with pytest.raises(ValueError, match=r"track: expected whole parameters.*ZeRO stage 3.*Use stage 2"):
            sosd_fast.track(net)
        callback = HuggingFaceCallback(method="full")
        callback.attach(net, 0, 1, True)
        assert callback.probe is None and "training goes on without the spectra. track: expected whole" in caplog.text
        assert callback.advance(1, []), "the Trainer's steps go on"
        callback.detach()


@pytest.mark.expects_probe_failure
def test_a_model_that_cannot_be_followed_ends_no_training(tmp_path, caplog):
    for callback in (HuggingFaceCallback(include=["none"]), LightningCallback(include=["none"])):
        if isinstance(callback, HuggingFaceCallback):
            hugging_face(llama(), tmp_path, [callback]).train()
        else:
            assert fit(Module(llama), tmp_path, [callback]).global_step == 6
        assert callback.probe is None
    errors = [r for r in caplog.records if r.name == "sosd_fast" and r.levelno == logging.ERROR]
    assert len(errors) == 2 and all("got include='none'" in r.getMessage() for r in errors)
