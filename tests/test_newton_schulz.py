import pytest
import torch

from sosd_fast.kernels.newton_schulz import COEFFICIENTS, _iterate, newton_schulz, newton_schulz_ref
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


FORMS = [("plain", False), ("plain", True), ("gram", False), ("gram", True)]


@pytest.mark.parametrize(("form", "symmetric"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (40, 40), (2, 37, 150), (150, 37)], ids=str)
def test_every_form_keeps_the_band(device, shape, dtype, form, symmetric):
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    before = G.clone()
    triples = COEFFICIENTS["muon"] * 5
    X = _iterate(G, triples, 1e-7, form, symmetric)
    assert X.dtype == dtype and X.shape == G.shape and torch.equal(G, before)
    truth = newton_schulz_ref(G.double(), triples)
    own = dtype == torch.bfloat16 and form == "plain" and not G.is_cuda  # iterates in bfloat16 itself
    limit = 1e-4 if dtype == torch.float32 else 1e-1 if own else 1.5e-2
    assert (X.double() - truth).norm() <= limit * truth.norm()
    S, S0 = torch.linalg.svdvals(X.double()), torch.linalg.svdvals(G.double())
    S0 /= torch.linalg.matrix_norm(G.double(), keepdim=True)[..., 0]
    assert (S < 1.21).all() and ((S > (0.65 if own else 0.68)).sum(-1) >= (S0 > 3e-3).sum(-1)).all()


@pytest.mark.parametrize("name", ["power", "log4", "rank_one", "zero"])
def test_half_precision_is_no_worse_than_the_plain_iteration_in_bfloat16(device, name):
    """Where most values are tiny, the rounding of X is amplified with them: errors reach 1e-1, and 7e-1 in bfloat16."""
    G = matrix(name, 64, 256, dtype=torch.bfloat16).to(device)
    triples = COEFFICIENTS["polar_express"][:5]
    truth = newton_schulz_ref(G.double(), triples)
    plain = (newton_schulz_ref(G, triples).double() - truth).norm()
    for form, symmetric in FORMS:
        error = (_iterate(G.half(), triples, 1e-7, form, symmetric).double() - truth).norm()
        assert error <= plain
