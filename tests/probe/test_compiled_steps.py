"""Optimizer steps that are compiled, whole and with breaks, are counted at their outermost `step`."""

import pytest
import torch
from arranged import ARRANGED, Containing, backward, model, sgd, sigma_max, steps_of

import sosd_fast


class Whole(torch.optim.Optimizer):
    """Can be compiled as one graph, which torch's own optimizers cannot: they break it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


class WholeInheriting(Whole):
    @torch.no_grad()
    def step(self):
        super().step()


class WholeContaining(Containing):
    @torch.no_grad()
    def step(self):
        super().step()


COMPILED = {
    "inheriting": (ARRANGED["inheriting"], False),
    "containing": (lambda net: Containing([sgd(net[0].parameters()), sgd(net[1].parameters())]), False),
    "without parameters": (ARRANGED["containing, without parameters"], False),
    "whole": (lambda net: Whole(net.parameters()), True),
    "whole, inheriting": (lambda net: WholeInheriting(net.parameters()), True),
    "whole, containing": (lambda net: WholeContaining([Whole(net[0].parameters()), Whole(net[1].parameters())]), True),
    "whole, without parameters": (
        lambda net: WholeContaining([Whole(net[0].parameters()), WholeInheriting(net[1].parameters())], own=True),
        True,
    ),
}
BACKENDS = [(name, "eager") for name in COMPILED] + [
    ("without parameters", "aot_eager"),
    ("whole, without parameters", "aot_eager"),
    ("whole, without parameters", "inductor"),  # which is given the same graphs as aot_eager, and takes seconds
]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_compiled_steps(name, backend):
    make, whole = COMPILED[name]

    def run(tracked):
        torch._dynamo.reset()
        net = model()
        optimizer = make(net)
        step = torch.compile(optimizer.step, backend=backend, fullgraph=whole)
        probe = sosd_fast.track(net, method="full") if tracked else None
        for i in range(4):
            backward(net)
            step()
            net.zero_grad()
            if tracked:
                for layer in ("0", "1"):
                    r = probe.latest()[f"{layer}.weight"]
                    assert r.step == i + 1 and r.sigma_max == pytest.approx(sigma_max(net[int(layer)].weight), rel=1e-5)
        if tracked:
            probe.close()
            assert steps_of(probe) == [0, 1, 2, 3, 4]
        return [p.detach().clone() for p in net.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiler_that_does_not_tell_ends_no_training(whole, caplog, monkeypatch):
    """As of another version of torch."""
    import torch._dynamo.symbolic_convert as dynamo

    from sosd_fast.probe import compiled

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.delattr(dynamo.InstructionTranslator, "current_tx")
        patch.setattr(compiled, "_said", set())
        assert compiled._label(lambda _: False) == compiled._label(lambda _: False) == ""
        assert sum("steps that are compiled are not counted" in m for m in caplog.messages) == 1
    monkeypatch.setattr(compiled, "_label", lambda _: "")  # dynamo itself needs what was missing
    net = model()
    probe, optimizer = sosd_fast.track(net, method="full"), Whole(net.parameters())
    step, before = torch.compile(optimizer.step, backend="eager", fullgraph=whole), sigma_max(net[0].weight)
    for _ in range(2):
        backward(net)
        step()
    assert probe.alive and sigma_max(net[0].weight) != before
    probe.close()
    assert any("the weights changed without a step" in m for m in caplog.messages)
