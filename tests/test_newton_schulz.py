import pytest
import torch

import sosd_fast
from sosd_fast.kernels.newton_schulz import newton_schulz
from sosd_fast.testing import matrix


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (64, 64), (127, 509), (509, 127), (3, 20, 30)], ids=str)
def test_singular_values_end_in_the_promised_band(shape):
    G = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = G.clone()
    X = newton_schulz(G)
    S = torch.linalg.svdvals(X)
    S0 = torch.linalg.svdvals(G) / torch.linalg.matrix_norm(G, keepdim=True)[..., 0]
    assert (S < 1.21).all() and ((S > 0.68).sum(-1) >= (S0 > 3e-3).sum(-1)).all()
    assert torch.equal(G, before)


def test_polar_express_finds_the_polar_factor():
    G = matrix("log4", 40, 60, dtype=torch.float64)[:, :40] + 0.05 * torch.eye(40, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G)
    X = newton_schulz(G, steps=12, coefficients="polar_express")
    torch.testing.assert_close(X, U @ Vh, atol=1e-6, rtol=0)


def test_a_matrix_and_its_transpose_agree():
    G = matrix("gaussian", 30, 70, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(G.mT), newton_schulz(G).mT)


@pytest.mark.parametrize(("name", "limit"), [("gaussian", 1e-4), ("log4", 5e-4), ("power", 5e-4), ("rank_one", 1e-3)])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (2, 40, 100), (96, 96)], ids=str)
def test_the_gram_form_agrees_with_the_plain_one(name, limit, shape):
    G = (
        torch.stack([matrix(name, *shape[-2:], seed=i) for i in range(shape[0])])
        if len(shape) == 3
        else matrix(name, *shape)
    )
    before = G.clone()
    for coefficients, steps in (("muon", 5), ("polar_express", 3), ("muon", 1)):
        expected = newton_schulz(G.double(), steps=steps, coefficients=coefficients, method="plain")
        found = newton_schulz(G, steps=steps, coefficients=coefficients, method="gram")
        assert found.shape == G.shape and (found - expected).norm() <= limit * expected.norm()
        exact = newton_schulz(G.double(), steps=steps, coefficients=coefficients, method="gram")
        assert (exact - expected).norm() <= 1e-8 * expected.norm()
    assert torch.equal(G, before)


def test_zero_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"G": torch.ones(3)}, r"got G=\(3,\)"),
        ({"G": torch.ones(3, 3, dtype=torch.int32)}, "torch.int32"),
        ({"G": torch.ones(3, 3), "steps": 0}, "got steps=0"),
        ({"G": torch.ones(3, 3), "coefficients": "quintic"}, "got coefficients='quintic'"),
        ({"G": torch.ones(3, 3), "method": "fast"}, "got method='fast'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="newton_schulz: .*" + message):
        newton_schulz(arguments.pop("G"), **arguments)


def train(optimizer_class, steps=20, **options):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(0.1 * torch.randn(s)) for s in ((30, 50), (50, 30), (40, 40))]
    targets = [torch.randn_like(w) for w in weights]
    optimizer = optimizer_class(weights, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((w - t).square().mean() for w, t in zip(weights, targets, strict=True)).backward()
        optimizer.step()
    return torch.cat([w.detach().flatten() for w in weights])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02},
        {"lr": 0.02, "nesterov": False, "weight_decay": 0.0},
        {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.9},
    ],
    ids=["default", "no nesterov", "match rms"],
)
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon to compare with")
def test_muon_agrees_with_torch(options):
    ours, theirs = train(sosd_fast.Muon, **options), train(torch.optim.Muon, **options)
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()  # torch iterates in bfloat16


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"Muon: expected matrices, got a parameter of shape \(3,\)"):
        sosd_fast.Muon([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="got adjust_lr_fn='rms'"):
        sosd_fast.Muon([torch.nn.Parameter(torch.ones(3, 3))], adjust_lr_fn="rms")
    with pytest.raises(ValueError, match="got lr=-1"):
        sosd_fast.Muon([torch.nn.Parameter(torch.ones(3, 3))], lr=-1)


def test_muon_takes_a_closure_and_skips_what_has_no_gradient():
    used, unused = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = sosd_fast.Muon([used, unused], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9
    assert not torch.equal(used, torch.ones(3, 3)) and torch.equal(unused, torch.ones(3, 3))
