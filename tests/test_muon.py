import pytest
import torch

import sosd_fast

OPTIONS = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "weight_decay": 0.0},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.9},
]
NAMES = ["default", "no nesterov", "match rms"]


def train(optimizer_class, steps=20, **options):
    torch.manual_seed(0)
    shapes = ((30, 50), (50, 30), (40, 40), (30, 50), (20, 90), (30, 50))  # of one shape are updated together
    weights = [torch.nn.Parameter(0.1 * torch.randn(s)) for s in shapes]
    targets = [torch.randn_like(w) for w in weights]
    optimizer = optimizer_class(weights, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((w - t).square().mean() for w, t in zip(weights, targets, strict=True)).backward()
        optimizer.step()
    return torch.cat([w.detach().flatten() for w in weights])


class PlainMuon(torch.optim.Optimizer):
    """The rule, matrix by matrix, in float32."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=None):
        super().__init__(params, {})
        self.rule = lr, weight_decay, momentum, nesterov, adjust_lr_fn

    @torch.no_grad()
    def step(self):
        lr, weight_decay, momentum, nesterov, adjust = self.rule
        for p in self.param_groups[0]["params"]:
            M = self.state[p].get("M", torch.zeros_like(p)) * momentum + (1 - momentum) * p.grad
            self.state[p]["M"] = M
            X = (1 - momentum) * p.grad + momentum * M if nesterov else M
            m, n = p.shape
            X = X.T if m > n else X
            X = X / X.norm()
            for _ in range(5):
                A = X @ X.T
                X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
            X = X.T if m > n else X
            ratio = 0.2 * max(m, n) ** 0.5 if adjust else max(1, m / n) ** 0.5
            p.copy_(p - lr * weight_decay * p - lr * ratio * X)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_muon_agrees_with_the_plain_rule(options):
    ours, plain = train(sosd_fast.Muon, ns_dtype=torch.float32, **options), train(PlainMuon, **options)
    assert (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon to compare with")
def test_muon_agrees_with_torch(options):
    ours, theirs = train(sosd_fast.Muon, **options), train(torch.optim.Muon, **options)
    assert (ours - theirs).norm() <= 2e-2 * theirs.norm()  # torch iterates in bfloat16


def test_bfloat16_is_the_default_where_the_cpu_multiplies_it(monkeypatch):
    def bits(native, dtype=None):
        monkeypatch.setattr("sosd_fast.kernels.multiplies_bfloat16", lambda: native)
        monkeypatch.setattr("sosd_fast.muon.multiplies_bfloat16", lambda: native)
        return train(sosd_fast.Muon, steps=2, lr=0.02, ns_dtype=dtype)

    assert torch.equal(bits(True), bits(True, torch.bfloat16))
    assert torch.equal(bits(False), bits(True, torch.float32))
    assert not torch.equal(bits(True), bits(False))
    with pytest.raises(ValueError, match="Muon: expected .*, got ns_dtype=torch.int8"):
        sosd_fast.Muon([torch.nn.Parameter(torch.ones(3, 3))], ns_dtype=torch.int8)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"Muon: expected matrices, got a parameter of shape \(3,\)"):
        sosd_fast.Muon([torch.torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="got adjust_lr_fn='rms'"):
        sosd_fast.Muon([torch.torch.nn.Parameter(torch.ones(3, 3))], adjust_lr_fn="rms")
    with pytest.raises(ValueError, match="got lr=-1"):
        sosd_fast.Muon([torch.torch.nn.Parameter(torch.ones(3, 3))], lr=-1)


def test_muon_takes_a_closure_and_skips_what_has_no_gradient():
    used, unused = (torch.torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = sosd_fast.Muon([used, unused], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9
    assert not torch.equal(used, torch.ones(3, 3)) and torch.equal(unused, torch.ones(3, 3))


def test_fused_matrices_are_orthogonalised_apart():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(60, 20))
    apart = [torch.nn.Parameter(p.clone()) for p in fused.detach().chunk(3)]
    both = sosd_fast.Muon([fused], lr=0.1, split=3), sosd_fast.Muon(apart, lr=0.1)
    for _ in range(3):
        gradient = torch.randn(60, 20)
        fused.grad = gradient
        for p, g in zip(apart, gradient.chunk(3), strict=True):
            p.grad = g
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat(apart).detach(), rtol=1e-5, atol=1e-6)
    whole = torch.nn.Parameter(fused.detach().clone())
    whole.grad = fused.grad
    sosd_fast.Muon([whole], lr=0.1).step()
    both[0].step()
    assert (whole - fused).norm() > 1e-2, "not what one matrix gives"


def test_a_split_that_does_not_divide():
    with pytest.raises(ValueError, match="divides 10 rows, got split=3"):
        sosd_fast.Muon([torch.torch.nn.Parameter(torch.ones(10, 4))], split=3)


def test_a_state_from_before_split():
    optimizer = sosd_fast.Muon([torch.torch.nn.Parameter(torch.ones(6, 4))])
    state = optimizer.state_dict()
    del state["param_groups"][0]["split"], state["param_groups"][0]["ns_dtype"]
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_size_of_gradients_does_not_matter(dtype):
    """Beyond 1.8e19 the sum of squares leaves float32; small ones need a small eps, as torch's do."""
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    updates = []
    for power in (0, -110, -80, 80, 120):
        p = torch.nn.Parameter(torch.zeros(12, 20, dtype=dtype))
        p.grad = (gradient.double() * 2.0**power).to(dtype)
        optimizer = sosd_fast.Muon([p], lr=1.0, eps=0.0)
        optimizer.step()
        updates.append(p.detach())
    for update in updates:
        torch.testing.assert_close(update, updates[0], rtol=1e-5, atol=1e-5)
    assert (torch.linalg.svdvals(updates[0].double()) > 0.5).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("ns_steps", value) for value in (0, -1, 2.5, True, None, "5")],
        *[
            ("ns_coefficients", value)
            for value in ("quintic", (), (1.0, 2.0), ((1.0, 2.0),), None, 3.0, ("a", "b", "c"))
        ],
        *[("eps", value) for value in (-1e-7, float("nan"), float("inf"), None, "small")],
    ],
)
def test_options_of_the_iteration_are_checked_at_construction(name, value):
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=rf"^Muon: expected .*, got {name}=.*\. \S.*\.$"):
        sosd_fast.Muon([parameter], **{name: value})
    of_function = {"ns_steps": "steps", "ns_coefficients": "coefficients", "eps": "eps"}[name]
    with pytest.raises(ValueError, match=rf"^newton_schulz: expected .*, got {of_function}=.*\. \S.*\.$"):
        sosd_fast.newton_schulz(torch.ones(3, 3), **{of_function: value})


@pytest.mark.parametrize("coefficients", ["polar_express", "muon", [1.5, -0.5, 0], [(2, -1.5, 0.5), (1.5, -0.5, 0.0)]])
def test_coefficients_of_any_kind(coefficients):
    assert torch.isfinite(train(sosd_fast.Muon, steps=2, ns_coefficients=coefficients)).all()


def test_a_refused_group_leaves_no_trace():
    kept, refused = (torch.torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    optimizer = sosd_fast.Muon([kept], lr=0.1)
    for group in (
        {"params": [refused, torch.torch.nn.Parameter(torch.ones(3))]},
        {"params": [refused], "split": 4},
        {"params": [refused], "adjust_lr_fn": "rms"},
        {"params": [refused], "lr": -1.0},
        {"params": [refused], "lr": torch.ones(2)},
        {"params": [refused], "ns_steps": -1},
    ):
        with pytest.raises(ValueError, match="Muon: expected"):
            optimizer.add_param_group(group)
        assert [g["params"] for g in optimizer.param_groups] == [[kept]]
    kept.grad, refused.grad = torch.ones(6, 4), torch.ones(6, 4)
    optimizer.step()
    assert torch.equal(refused, torch.ones(6, 4)) and not torch.equal(kept, refused)
    optimizer.add_param_group({"params": [refused]})  # it was not taken for one that is there


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_as_learning_rate(shape):
    by_tensor = train(sosd_fast.Muon, lr=torch.full(shape, 0.02, dtype=torch.float64))
    torch.testing.assert_close(by_tensor, train(sosd_fast.Muon, lr=0.02), rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_refused_before_anything_is_updated():
    other, embedding = torch.torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Embedding(6, 4, sparse=True)
    optimizer = sosd_fast.Muon([other, embedding.weight])
    other.grad = torch.ones(3, 3)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="Muon: expected dense gradients, got one of layout torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3, 3))


@pytest.mark.parametrize("shape", [(0, 12), (12, 0)], ids=str)
def test_an_empty_parameter_is_left_alone(shape):
    weights = [torch.nn.Parameter(torch.ones(*shape)), torch.nn.Parameter(torch.ones(4, 3))]
    for w in weights:
        w.grad = torch.ones_like(w)
    sosd_fast.Muon(weights, lr=0.1).step()
    assert weights[0].shape == shape and (weights[1] < 1).all()
    assert sosd_fast.newton_schulz(weights[0]).shape == shape
