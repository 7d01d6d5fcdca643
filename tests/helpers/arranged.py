"""Optimizers that inherit from others, wrap and contain them, and a small model to train with them."""

import torch
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 8, bias=False))


def backward(net):
    net(torch.randn(3, 12, generator=torch.Generator().manual_seed(1))).square().mean().backward()


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr)


def steps_of(probe, name="0.weight"):
    return [r.step for r in probe.records() if r.name == name]


def sigma_max(weight):
    return torch.linalg.svdvals(weight.detach().double())[0].item()


class Inheriting(torch.optim.SGD):
    """Calls the `step` that it inherits."""

    def step(self, closure=None):
        return super().step(closure)


class Twice(Inheriting):
    """Inherits from one that does."""

    def step(self, closure=None):
        super().step()
        return super().step(closure)


class Wrapping(torch.optim.Optimizer):
    """Holds the parameter groups of an optimizer, and changes the weights after it, as Lookahead does."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)


class Containing(torch.optim.Optimizer):
    """Contains optimizers, and holds all of their parameters or one of nobody's."""

    def __init__(self, optimizers, own=False):
        held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        super().__init__([nn.Parameter(torch.zeros(1))] if own else held, {})
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


class Prepared(torch.optim.Optimizer):
    """Has no hooks of torch, as what accelerate, Fabric and Lightning put around an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self):
        self.optimizer.step()


ARRANGED = {
    "inheriting": lambda net: Inheriting(net.parameters(), lr=0.1),
    "inheriting twice": lambda net: Twice(net.parameters(), lr=0.1),
    "wrapping": lambda net: Wrapping(sgd(net.parameters())),
    "wrapping twice": lambda net: Wrapping(Wrapping(Inheriting(net.parameters(), lr=0.1))),
    "containing": lambda net: Containing([sgd(net[0].parameters()), torch.optim.AdamW(net[1].parameters())]),
    "containing, without parameters": lambda net: Containing(
        [sgd(net[0].parameters()), sgd(net[1].parameters())], True
    ),
    "prepared": lambda net: Prepared(Wrapping(sgd(net.parameters()))),
}
