"""A training loop of no more than it takes."""

import torch


def train(net, steps=1, lr=1e-3):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        net(torch.ones(2, net[0].in_features)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
