"""Optimizers of real libraries: those that wrap, inherit and contain others, and those that are prepared."""

import accelerate
import lightning
import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

import sosd_fast


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 8, bias=False))


def loss_of(net):
    return net(torch.randn(3, 12, generator=torch.Generator().manual_seed(1))).square().mean()


def closure_of(net):
    def closure():
        net.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    return closure


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


def check(probe, net, steps):
    """One record for each step, all values of the weights as they are now, and each step moved them."""
    assert steps_of(probe) == steps_of(probe, "1.weight") == list(range(steps + 1))
    for name in ("0", "1"):
        W = net.get_submodule(name).weight.detach().double()
        r = probe.latest()[f"{name}.weight"]
        assert r.sigma_max == pytest.approx(torch.linalg.svdvals(W)[0].item(), rel=1e-5)
    assert all(r.sd_variation > 0 for r in probe.records() if r.step)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def sam(net):
    return pytorch_optimizer.SAM(net.parameters(), torch.optim.SGD, lr=1e-2)


def zero(net):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    return ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-2)


def post_local_sgd(net):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(adamw(net), PeriodicModelAverager(period=2, warmup_steps=1))


WRAPPERS = {
    "Lookahead": lambda net: pytorch_optimizer.Lookahead(adamw(net), k=2),
    "OrthoGrad": lambda net: pytorch_optimizer.OrthoGrad(adamw(net)),
    "TRAC": lambda net: pytorch_optimizer.TRAC(adamw(net)),
    "PCGrad": lambda net: pytorch_optimizer.PCGrad(adamw(net)),
    "SAM": sam,
    "WSAM": lambda net: pytorch_optimizer.WSAM(net, net.parameters(), torch.optim.SGD, lr=1e-2),
    "LookSAM": lambda net: pytorch_optimizer.LookSAM(net.parameters(), torch.optim.SGD, lr=1e-2),
    "Lookahead of OrthoGrad": lambda net: pytorch_optimizer.Lookahead(pytorch_optimizer.OrthoGrad(adamw(net))),
    "schedule-free": lambda net: schedulefree.AdamWScheduleFree(net.parameters(), lr=1e-2),
    "Muon": lambda net: torch.optim.Muon(net.parameters(), lr=1e-2),
    "ZeroRedundancyOptimizer": zero,
    "PostLocalSGDOptimizer": post_local_sgd,
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name, given, group):
    def run(tracked):
        net = model()
        optimizer = WRAPPERS[name](net)
        probe = sosd_fast.track(net, optimizer if given else None, method="full") if tracked else None
        if hasattr(optimizer, "train"):
            optimizer.train()
        for _ in range(5):
            closure = closure_of(net)
            if name == "PCGrad":
                optimizer.pc_backward([loss_of(net), 2 * loss_of(net)])
                optimizer.step()
            elif "SAM" in name:
                closure()
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        if tracked:
            probe.close()
            check(probe, net, 5)
        return [p.detach().clone() for p in net.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


def test_the_averaged_weights_of_schedule_free():
    """As docs/steps.md says; the wrapper moves the weights once more after the step of the optimizer inside of it."""
    net = model()
    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(net.parameters(), lr=0.1))
    probe = sosd_fast.track(net, optimizers=[], method="full")
    for _ in range(4):
        optimizer.train()
        closure_of(net)()
        optimizer.step()
        optimizer.eval()
        probe.step()
    check(probe, net, 4)


def test_accelerate_prepared():
    for given in ("prepared", "inner", None):
        net = model()
        inner = adamw(net)
        prepared_net, optimizer = accelerate.Accelerator(cpu=True).prepare(net, inner)
        probe = sosd_fast.track(prepared_net, {"prepared": optimizer, "inner": inner, None: None}[given], method="full")
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(prepared_net).backward()
            optimizer.step()
        check(probe, net, 4)


def test_fabric_prepared():
    for given in (True, False):
        fabric, net = Fabric(accelerator="cpu", devices=1), model()
        prepared_net, optimizer = fabric.setup(net, adamw(net))
        probe = sosd_fast.track(net, optimizer if given else None, method="full")
        for _ in range(4):
            optimizer.zero_grad()
            fabric.backward(loss_of(prepared_net))
            optimizer.step()
        check(probe, net, 4)


class Adversarial(lightning.LightningModule):
    """Two networks that train in turn, each while the other is frozen; the probe is given what Lightning prepared."""

    def __init__(self, given, every=1):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.given, self.every, self.probe = given, every, None
        self.generator, self.critic = nn.Linear(6, 6, bias=False), nn.Linear(6, 5, bias=False)

    def configure_optimizers(self):
        return [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (self.critic, self.generator)]

    def on_train_start(self):
        optimizers = self.optimizers() if self.given else None
        self.probe = sosd_fast.track(nn.ModuleList([self.critic, self.generator]), optimizers, method="full")
        self.kept = self.probe._matrices.model()

    def training_step(self, batch, i):
        for name, optimizer in zip(("critic", "generator"), self.optimizers(), strict=True):
            if name == "generator" and (i + 1) % self.every:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.critic(self.generator(batch[0])).square().mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("every", [1, 5])
def test_lightning_toggles_optimizers(given, every, tmp_path):
    module = Adversarial(given, every)
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(10, 6))))  # fmt: skip
    module.probe.close()
    assert steps_of(module.probe) == list(range(11))
