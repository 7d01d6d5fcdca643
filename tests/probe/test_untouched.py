"""Training is bit for bit what it is without the probe: parametrizations, compiled steps, threads, copies."""

import contextlib
import copy
import io
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.optimizer import register_optimizer_step_pre_hook

import sosd_fast
from sosd_fast.matrices import find_matrices


class Sum(nn.Module):
    """A weight made of two originals, of which computing counts itself in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("computed", torch.zeros(()))

    def forward(self, a, b):
        self.computed += 1
        return a + b * (1 + 1e-3 * self.computed)

    def right_inverse(self, W):
        return W / 2, W / 2


class Noisy(nn.Module):
    """A weight whose computing draws a random number."""

    def forward(self, W):
        return W + 1e-3 * torch.randn(())


def older(function):
    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have the new ones
            return function(module)

    return apply


def registered(make):
    def apply(module):
        parametrize.register_parametrization(module, "weight", make())
        return module

    return apply


def pruned_for_good(module):
    return prune.remove(prune.random_unstructured(module, "weight", 0.3), "weight")


APPLIED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "several originals": registered(Sum),
    "random": registered(Noisy),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "pruned in structure": lambda m: prune.ln_structured(m, "weight", 0.3, n=2, dim=0),
    "pruned for good": pruned_for_good,
    "older weight_norm": older(nn.utils.weight_norm),
    "older spectral_norm": older(nn.utils.spectral_norm),
    "older spectral_norm removed": older(lambda m: nn.utils.remove_spectral_norm(nn.utils.spectral_norm(m))),
}


def parametrized(apply):
    torch.manual_seed(0)
    return nn.Sequential(
        apply(nn.Conv2d(3, 8, 3)), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(),
        apply(nn.Linear(12, 12)),
    )  # fmt: skip


def train(net, tracked, steps=4, cached=False):
    probe = sosd_fast.track(net, method="full") if tracked else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(1)
    for _ in range(steps):
        with parametrize.cached() if cached else contextlib.nullcontext():
            loss = net(torch.randn(4, 3, 6, 6)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if tracked:
        assert probe.latest()["3.weight"].step == steps
    return losses, {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys() and all(torch.equal(one[1][k], other[1][k]) for k in one[1])
    assert torch.equal(one[2], other[2]), "no random number is drawn"


@pytest.mark.parametrize("name", APPLIED)
def test_a_parametrization_is_not_computed(name):
    nets = [parametrized(APPLIED[name]) for _ in range(2)]
    assert_same(*(train(net, tracked) for net, tracked in zip(nets, (False, True), strict=True)))


def test_inside_of_a_cache_of_parametrizations():
    nets = [parametrized(parametrizations.spectral_norm) for _ in range(2)]
    assert_same(*(train(net, tracked, cached=True) for net, tracked in zip(nets, (False, True), strict=True)))


@pytest.mark.parametrize("name", APPLIED)
def test_what_a_kernel_is_made_of_is_flattened_as_the_kernel(name):
    shapes = {m.name: tuple(m.tensor().shape) for m in find_matrices(parametrized(APPLIED[name]))}
    kernels = {n: shape for n, shape in shapes.items() if n.startswith("0.")}
    assert (8, 27) in kernels.values() and set(kernels.values()) <= {(8, 27), (8, 1)}, kernels
    assert not any(n[-2].isdigit() and "," in n for n in kernels), "a stack of small matrices it is not"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_step(backend):
    def run(tracked):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        step, other = torch.compile(optimizer.step, backend=backend), nn.Linear(4, 4)
        probe = sosd_fast.track(net, method="full") if tracked else None
        losses = []
        for i in range(4):
            if i == 3 and tracked:  # others come and go beside a step that is compiled
                sosd_fast.track(other).close()
            loss = net(torch.randn(3, 12)).square().mean()
            loss.backward()
            step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if tracked:
            assert [r.step for r in probe.records() if r.name == "0.weight"] == [0, 1, 2, 3, 4]
            probe.close()
        return losses, {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()

    assert_same(run(False), run(True))


def test_tracked_after_its_step_was_compiled():
    torch._dynamo.reset()
    net = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for tracked in (False, True, True):
        probe = sosd_fast.track(net, method="full") if tracked else None
        net(torch.randn(3, 6)).square().mean().backward()
        step()
        if tracked:
            assert probe.latest()["weight"].step == 1
            probe.close()


def in_threads(*functions):
    """Runs functions at once and raises what any of them raised."""
    errors, start = [], threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def test_threads_that_track_and_close_beside_threads_that_step():
    def slow(*_):  # a hook of someone else's, for torch iterates over what is registered while it runs
        threading.Event().wait(1e-3)

    sosd_fast.track(nn.Linear(4, 4)).close()  # the first one registers the hooks
    handle = register_optimizer_step_pre_hook(slow)
    counts = {}

    def steps(seed):
        net = nn.Linear(8, 6)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        with sosd_fast.track(net, method="full", audit=False) as probe:
            for _ in range(40):
                net(torch.ones(2, 8)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            counts[seed] = [r.step for r in probe.records()]

    def tracks():
        for _ in range(40):
            net = nn.Linear(8, 6)
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
            with sosd_fast.track(net, method="full", audit=False) as probe:
                net(torch.ones(2, 8)).sum().backward()
                optimizer.step()
                assert probe.latest()["weight"].step == 1

    try:
        in_threads(lambda: steps(0), lambda: steps(1), tracks, tracks)
    finally:
        handle.remove()
    assert counts == {0: list(range(41)), 1: list(range(41))}


def test_threads_that_step_optimizers_of_one_model(caplog):
    net = nn.ModuleList(nn.Linear(24, 20, bias=False) for _ in range(2))
    probe = sosd_fast.track(net, method="topk", k=3)

    def steps(linear):
        optimizer = torch.optim.SGD(linear.parameters(), lr=1e-2)
        for _ in range(60):
            linear(torch.ones(2, 24)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # gradients of a thread were read while its backward pass replaced them: a crash
    try:
        in_threads(*(lambda linear=linear: steps(linear) for linear in net))
    finally:
        sys.setswitchinterval(before)
    probe.flush()
    for name in ("0.weight", "1.weight"):
        found = [r.step for r in probe.records() if r.name == name]
        assert found == list(range(len(found))) and 60 <= len(found) - 1 <= 120
    assert not [m for m in caplog.messages if "the probe failed" in m]


def test_copies_and_files_of_a_tracked_model_and_its_optimizer():
    net = nn.Linear(8, 6)
    optimizer = torch.optim.AdamW(net.parameters())
    probe = sosd_fast.track(net, method="full")

    def step(model, optimizer):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()

    step(net, optimizer)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    step(twin, twin_optimizer)
    assert probe.latest()["weight"].step == 1, "a copy is another model"
    for thing in (net, optimizer):
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=False)
    net.share_memory()
    step(net, optimizer)
    assert probe.latest()["weight"].step == 2


def test_an_optimizer_of_odd_state():
    class Odd(torch.optim.SGD):
        __hash__ = None

        def __eq__(self, other):
            raise RuntimeError("not to be compared")

    net, other = nn.Linear(8, 6), nn.Linear(5, 5)
    probe = sosd_fast.track(net, method="full")
    odd, plain = Odd(other.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(2, 8)).sum().backward()
    for _ in range(2):
        odd.step()
        plain.step()
    odd.param_groups = [{"lr": 1.0}]
    with pytest.raises(KeyError):
        odd.step()
    assert probe.latest()["weight"].step == 2
    mine = Odd(net.parameters(), lr=0.1)
    probe = sosd_fast.track(net, mine, method="full")
    mine.step()
    assert probe.latest()["weight"].step == 1
