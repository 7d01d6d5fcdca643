"""Random small models and loops train bit for bit as without the probe, and steps are counted as outermost calls.

SOSD_LOOPS=500 in the environment tries as many; the suite tries 100.
"""

import os
import random

import pytest
import torch
from arranged import Containing, Inheriting, Prepared, Twice, Wrapping, sgd, sigma_max, steps_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import sosd_fast

LOOPS = int(os.environ.get("SOSD_LOOPS", "100"))
SIZE = 6


class Raising(Wrapping):
    """Ends with an error before anything is changed."""

    def step(self):
        raise RuntimeError("no luck")


class Scaled(nn.Module):
    """A container that is no Sequential, with a parameter of its own that is a gain, and one that is a stack."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(1, SIZE))
        self.experts = nn.Parameter(0.3 * torch.randn(2, SIZE, SIZE))

    def forward(self, x):
        return self.inner(x) * self.gain + (x @ self.experts).mean(0)


def layer(own, depth=0):
    kind = own.choice(
        ["linear", "linear", "conv", "weight_norm", "spectral_norm", "orthogonal", "pruned", "nested", "own"]
    )
    linear = nn.Linear(SIZE, SIZE, bias=own.random() < 0.5)
    if kind == "conv":
        return nn.Sequential(nn.Unflatten(1, (2, SIZE // 2)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten())
    if kind == "weight_norm":
        return parametrizations.weight_norm(linear)
    if kind == "spectral_norm":
        return parametrizations.spectral_norm(linear)
    if kind == "orthogonal":
        return parametrizations.orthogonal(linear)
    if kind == "pruned":
        return prune.l1_unstructured(linear, "weight", amount=0.3)
    if kind == "nested" and depth < 2:
        return nn.Sequential(layer(own, depth + 1), nn.Tanh(), nn.ModuleDict({"a": layer(own, depth + 1)})["a"])
    if kind == "own" and depth < 2:
        return Scaled(layer(own, depth + 1))
    return linear


def built(own, seed):
    """Layers, some tied to or the same as one another, perhaps in another dtype, perhaps wrapped."""
    torch.manual_seed(seed)
    layers = [layer(own) for _ in range(own.randrange(1, 5))]
    plain = [x for x in layers if type(x) is nn.Linear and "weight" in dict(x.named_parameters(recurse=False))]
    if len(plain) > 1 and own.random() < 0.4:
        plain[1].weight = plain[0].weight
    if own.random() < 0.2:
        layers.append(layers[0])
    net = nn.Sequential(*layers)
    if own.random() < 0.15:
        net = net.to(own.choice([torch.float64, torch.bfloat16])) if all(type(x) is nn.Linear for x in layers) else net
    wrapped = own.choice([lambda m: m, lambda m: m, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
    return net, (net if wrapped is torch.optim.swa_utils.AveragedModel else wrapped(net))


def arrangement(own, groups):
    """Optimizers of parameters, one or more, each inheriting, wrapped or contained in another at random."""

    def wrap(optimizer, depth):
        how = own.choice(["plain", "wrapping", "containing", "without parameters", "prepared"])
        if depth == 0 or how == "plain":
            return optimizer
        if how == "wrapping":
            return wrap(Wrapping(optimizer), depth - 1)
        if how == "prepared":
            return wrap(Prepared(optimizer), depth - 1)
        return wrap(Containing([optimizer], own=how == "without parameters"), depth - 1)

    kinds = (sgd, torch.optim.AdamW, lambda p: Inheriting(p, lr=0.01), lambda p: Twice(p, lr=0.01))
    return [wrap(own.choice(kinds)(group), own.randrange(3)) for group in groups]


def train(seed, tracked):
    own = random.Random(seed)
    net, model = built(own, seed)
    dtype = next(net.parameters()).dtype
    parameters = list(net.parameters())
    own.shuffle(parameters)
    cut = own.randrange(len(parameters)) if own.random() < 0.6 else 0
    held = [part for part in (parameters[:cut], parameters[cut:]) if part]
    optimizers = arrangement(own, held)
    every = [1, own.choice([1, 1, 2, 3])][: len(optimizers)]
    freeze = own.random() < 0.3
    own.choice([every.reverse, lambda: None])()
    given, method, audit = (
        own.choice([None, optimizers]),
        own.choice(["full", "auto", "topk", "exact"]),
        own.random() < 0.3,
    )
    probe = sosd_fast.track(model, given, method=method, k=2, audit=audit) if tracked else None
    rounds = own.randrange(1, 9)
    for i in range(rounds):
        failing, evaluated = own.random() < 0.2, own.random() < 0.2
        for n, (optimizer, group) in enumerate(zip(optimizers, held, strict=True)):
            if (i + 1) % every[n]:
                continue
            for p in net.parameters() if freeze else ():
                p.requires_grad_(any(p is q for q in group))
            loss = model(torch.randn(2, SIZE, dtype=dtype)).square().mean()
            if loss.requires_grad:
                loss.backward()
            if failing:
                with pytest.raises(RuntimeError, match="no luck"):
                    Raising(optimizer).step()
            optimizer.step()
            net.requires_grad_(True)
            net.zero_grad()
        if evaluated:
            with torch.no_grad():
                net.eval()(torch.randn(2, SIZE, dtype=dtype))
            net.train()
    if tracked:
        probe.close()
        measured = {id(m.parameter) for m in probe.matrices}  # not given, optimizers of biases alone do not count
        counting = [n for n, group in enumerate(held) if given or measured & set(map(id, group))]
        rounds //= min(every[n] for n in counting)
        assert probe.step_count == rounds, (every, freeze, [type(o).__name__ for o in optimizers])
        for m in probe.matrices if method in ("full", "exact") else ():
            assert steps_of(probe, m.name) == list(range(rounds + 1))
            assert probe.latest()[m.name].sigma_max == pytest.approx(sigma_max(m.tensor().float()), rel=1e-4)
    return [*parameters, *net.buffers(), torch.random.get_rng_state()]


@pytest.mark.parametrize("seed", range(LOOPS))
def test_training_is_the_same_and_steps_are_counted(seed):
    assert all(torch.equal(a, b) for a, b in zip(train(seed, False), train(seed, True), strict=True))
