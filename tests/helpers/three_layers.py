"""A model of three layers and its training, for tests of what a probe sees."""

import torch
from torch import nn


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64, bias=False), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8))


def loss(net):
    return net(torch.ones(4, 48)).square().mean() + sum(p.square().sum() for p in net.parameters())


def train(net, optimizers, steps, after=lambda: None):
    for _ in range(steps):
        loss(net).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after()


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)
