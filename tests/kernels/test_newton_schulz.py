import functools
import sys

import pytest
import torch
from torch.autograd import forward_ad

from sosd_fast import kernels
from sosd_fast.kernels.newton_schulz import COEFFICIENTS, iterate, newton_schulz, newton_schulz_ref, triples_of
from sosd_fast.kernels.normalised import normalised_by_torch
from sosd_fast.testing import matrix

module = sys.modules["sosd_fast.kernels.newton_schulz"]


@pytest.fixture(params=[module.ALONE, 1], ids=["", "divided by the first step"])
def raw(request, monkeypatch):
    """Small matrices, too, as large ones on a CPU."""
    monkeypatch.setattr(module, "ALONE", request.param)


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (64, 64), (127, 509), (509, 127), (3, 20, 30)], ids=str)
def test_singular_values_end_in_the_promised_band(shape):
    G = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = G.clone()
    X = newton_schulz(G)
    S = torch.linalg.svdvals(X)
    S0 = torch.linalg.svdvals(G) / torch.linalg.matrix_norm(G, keepdim=True)[..., 0]
    assert (S < 1.21).all() and ((S > 0.68).sum(-1) >= (S0 > 3e-3).sum(-1)).all()
    assert torch.equal(G, before)


@pytest.mark.usefixtures("raw")
def test_polar_express_finds_the_polar_factor():
    G = matrix("log4", 40, 60, dtype=torch.float64)[:, :40] + 0.05 * torch.eye(40, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G)
    X = newton_schulz(G, steps=12, coefficients="polar_express")
    torch.testing.assert_close(X, U @ Vh, atol=1e-6, rtol=0)


def test_a_matrix_and_its_transpose_agree():
    G = matrix("gaussian", 30, 70, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(G.mT), newton_schulz(G).mT)


@pytest.mark.usefixtures("raw")
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


@pytest.mark.usefixtures("raw")
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
        ({"G": torch.ones(3, 3), "dtype": torch.int8}, "got dtype=torch.int8"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="newton_schulz: .*" + message):
        newton_schulz(arguments.pop("G"), **arguments)


FORMS = [("plain", False), ("plain", True), ("gram", False), ("gram", True)]
# The shape decides the form and the order of the products, the dtype their rounding: each with one of the other.
CASES = [
    *(((2, 37, 150), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ((1, 5), torch.float32),
    ((40, 40), torch.bfloat16),
    ((150, 37), torch.float16),
]


@pytest.mark.parametrize(("form", "symmetric"), FORMS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_every_form_keeps_the_band(device, shape, dtype, form, symmetric):
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    before = G.clone()
    triples = COEFFICIENTS["muon"] * 5
    X = iterate(G, triples, 1e-7, form, symmetric)
    assert X.dtype == dtype and X.shape == G.shape and torch.equal(G, before)
    truth = newton_schulz_ref(G.double(), triples)
    own = dtype == torch.bfloat16 and not G.is_cuda and kernels.multiplies_bfloat16()  # iterates in bfloat16 itself
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
        error = (iterate(G.half(), triples, 1e-7, form, symmetric).double() - truth).norm()
        assert error <= plain


@pytest.fixture
def small_pays(monkeypatch):
    """What only large matrices are worth is done for small ones, too."""
    symmetric = sys.modules["sosd_fast.kernels.symmetric"]
    monkeypatch.setattr(symmetric, "LEAST", 1)
    monkeypatch.setattr(symmetric, "LEAST_BY_QUARTERS", 1)
    ran = []

    def noted(name, run, *arguments):
        ran.append(name)
        return run(*arguments)

    for name in ("normalised", "converted", "symmetrised", "polynomial", "own_product"):
        monkeypatch.setattr(module, name, functools.partial(noted, name, getattr(module, name)))
    return ran


@pytest.mark.parametrize(("form", "symmetric"), FORMS)
@pytest.mark.parametrize(("name", "limit"), [("gaussian", 1e-2), ("log4", 3e-2)])
@pytest.mark.parametrize("shape", [(64, 200), (2, 200, 64), (50, 50)], ids=str)
def test_float16_by_kernels_around_cublas(device, small_pays, shape, name, limit, form, symmetric):
    """Within what is documented, and not much farther from the truth than torch's own operations end."""
    if symmetric and shape != (64, 200):
        pytest.skip("syrk has tests of its own; its interpreter is slow")
    G = matrix(name, *shape[-2:], dtype=torch.float16).expand(shape).to(device)
    before, triples = G.clone(), COEFFICIENTS["muon"] * 5
    X = iterate(G, triples, 1e-7, form, symmetric, torch.float16)
    assert X.dtype == G.dtype and X.shape == G.shape and torch.equal(G, before)
    kept = {"normalised", "converted"}
    if not symmetric:
        kept |= {"polynomial"} | ({"own_product"} if shape != (50, 50) else set())
        kept |= {"symmetrised"} if form == "gram" else set()
    assert set(small_pays) == kept
    truth = newton_schulz_ref(G.double(), triples)
    error = (X.double() - truth).norm() / truth.norm()
    top = torch.linalg.matrix_norm(X.double(), 2).max() / torch.linalg.matrix_norm(truth, 2).max()
    assert error <= limit and 1 - 5e-2 <= top <= 1 + 5e-2
    X = normalised_by_torch(G.mT if shape[-2] > shape[-1] else G, 1e-7, torch.float16)
    for a, b, c in triples:  # with every product rounded once, as by cuBLAS
        A = (X.float() @ X.float().mT).half().float()
        X = (a * X.float() + (b * A + c * A @ A).half().float() @ X.float()).half()
    X = X.mT if shape[-2] > shape[-1] else X
    # the Gram form's own errors come on top: by torch's operations it ends 1e-3 to 3e-3 farther from the truth
    assert error <= 2 * (X.double() - truth).norm() / truth.norm() + (2e-3 if form == "gram" else 0)


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_and_nan_by_kernels_around_cublas(device, small_pays, dtype, form):
    G = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    G = torch.where(G.abs() < 2.0**-6, 2.0**-6, G)
    batch = torch.stack([(G.double() * 2.0**power).to(dtype) for power in (0, *EXTREMES[dtype])])
    triples = COEFFICIENTS["muon"] * 3
    X = iterate(batch, triples, 0.0, form, False, torch.float16)
    assert small_pays and X[0].abs().max() > 0.1 and all(torch.equal(each, X[0]) for each in X)
    for value in (float("nan"), float("inf")):
        batch[1, 3, 4] = value
        broken = iterate(batch, triples, 0.0, form, False, torch.float16)
        assert broken[1].isnan().all() and torch.equal(broken[[0, 2]], X[[0, 2]])
    assert not iterate(torch.zeros_like(batch), triples, 0.0, form, False, torch.float16).any()


EXTREMES = {
    torch.float32: (-115, -64, 64, 124),
    torch.bfloat16: (-115, -64, 64, 124),
    torch.float64: (-990, -550, 550, 1019),
    torch.float16: (-4, 8, 12),
}


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize(("form", "symmetric"), FORMS)
@pytest.mark.parametrize("dtype", list(EXTREMES), ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (16, 40), (40, 16)], ids=str)
def test_the_scale_of_a_matrix_does_not_matter(device, shape, dtype, form, symmetric):
    """Bit for bit, for powers of two; matrices of all scales in one batch."""
    if symmetric and (dtype == torch.float64 or shape != (16, 40)):
        pytest.skip("syrk has no kernel for float64; its interpreter is slow")
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    G = torch.where(G.abs() < 2.0**-6, 2.0**-6, G)  # so that scaling itself is exact
    powers = [0, *EXTREMES[dtype]]
    batch = torch.stack([(G.double() * 2.0**power).to(dtype) for power in powers])
    assert batch.isfinite().all()
    X = iterate(batch, COEFFICIENTS["muon"] * 2, 0.0, form, symmetric)  # the scale is gone before the first step
    assert X[0].abs().max() > 0.1
    for power, each in zip(powers, X, strict=True):
        assert torch.equal(each, X[0]), power


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_ends_of_the_range(dtype):
    """The largest number everywhere, and subnormal ones, are rank one and end near 0.7 to 1.2 of u v^T."""
    info = torch.finfo(dtype)
    for value in (info.max, info.tiny, info.smallest_normal / 8, 1e-40 if dtype != torch.float64 else 1e-310):
        X = newton_schulz(torch.full((6, 10), value, dtype=dtype), eps=0.0)
        S = torch.linalg.svdvals(X.double())
        assert 0.65 < S[0] < 1.25 and S[1] < 1e-1, value


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_broken_matrix_gives_nan_and_leaves_the_others_alone(dtype, form, value, steps):
    G = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = newton_schulz(G, method=form, steps=steps)
    G[1, 3, 4] = value
    X = newton_schulz(G, method=form, steps=steps)
    assert X[1].isnan().all() and torch.equal(X[[0, 2]], expected[[0, 2]])


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_below_eps_the_result_is_proportional(dtype):
    G = torch.randn(8, 20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for norm in (1e-12, 1e-20, 1e-30):
        X = newton_schulz(G / G.norm() * norm, eps=1e-7)
        torch.testing.assert_close(X, 3.4445**5 * G / G.norm() * (norm / 1e-7), rtol=1e-3, atol=0)
    for eps in (0.0, 1e-300, 1e-7, 1e300):
        assert torch.equal(newton_schulz(torch.zeros(8, 20, dtype=dtype), eps=eps), torch.zeros(8, 20, dtype=dtype))
        assert newton_schulz(torch.full((8, 20), 1e-44, dtype=dtype), eps=eps).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (1, 1), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("method", ["plain", "gram"])
def test_it_is_differentiable(shape, method):
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda G: newton_schulz(G, steps=3, method=method), G)
    assert torch.autograd.gradgradcheck(lambda G: newton_schulz(G, steps=2, method=method), G)


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (2, 8, 12)], ids=str)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, loaded by jvp
def test_a_tangent_is_passed_on(shape, form):
    G, V = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triples = COEFFICIENTS["muon"] * 5
    expected = torch.func.jvp(lambda G: newton_schulz_ref(G, triples), (G,), (V,))
    for found in torch.func.jvp(lambda G: newton_schulz(G, method=form), (G,), (V,)), _dual(G, V, form):
        torch.testing.assert_close(found, expected)


def _dual(G, V, form):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(newton_schulz(forward_ad.make_dual(G, V), method=form)))


def test_second_derivatives_function_transforms_and_autocast():
    G = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seconds = []
    for function in (newton_schulz, lambda G: newton_schulz_ref(G, COEFFICIENTS["muon"] * 5)):
        (first,) = torch.autograd.grad(function(G).pow(3).sum(), G, create_graph=True)
        assert first.requires_grad
        seconds.append(torch.autograd.grad(first.square().sum(), G)[0])
        seconds.append(torch.func.grad(lambda G, function=function: function(G).pow(3).sum())(G.detach()))
    for ours, theirs in zip(seconds[:2], seconds[2:], strict=True):
        torch.testing.assert_close(ours, theirs)
    half = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = newton_schulz(half)
    assert torch.equal(found, newton_schulz(half))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [-80, 0, 80])
def test_the_gradient_is_that_of_the_reference(dtype, power):
    """At any scale: beyond 2^64 squares leave float32."""
    power = max(-10, min(power, 10)) if dtype == torch.float16 else power
    G = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (G * 2.0**power).requires_grad_(), G.double().requires_grad_()
    newton_schulz(ours, eps=0.0).square().sum().backward()
    newton_schulz_ref(theirs, COEFFICIENTS["muon"] * 5, 0.0).square().sum().backward()
    assert ours.grad.dtype == dtype
    error = (ours.grad.double() * 2.0**power - theirs.grad).norm() / theirs.grad.norm()
    # The gradient flowing in is twice the forward pass, in the dtype of G.
    assert error <= 64 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("native", [True, False], ids=["native", "not native"])
@pytest.mark.parametrize("name", ["gaussian", "power", "log4"])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 96), (3, 40, 100)], ids=str)
@pytest.mark.parametrize("steps", [5, 8])
def test_bfloat16_by_an_argument(monkeypatch, shape, name, native, steps):
    """Eight steps are the case that one restart alone loses: noise in A grows twelvefold a step."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: native)
    G = matrix(name, *shape[-2:]).expand(shape)
    truth = newton_schulz_ref(G.double(), COEFFICIENTS["muon"] * steps)
    for method in ("auto", "plain", "gram"):
        X = newton_schulz(G, steps=steps, method=method, dtype=torch.bfloat16)
        assert X.dtype == torch.float32 and X.shape == G.shape
        assert torch.equal(X, X.bfloat16()) == native, "it ran in the dtype that it should"
        assert torch.linalg.matrix_norm(X, 2).max() < 1.23, "beyond 1.3 the polynomial grows without end"
        if steps == 5:
            limit = (6e-2 if name == "gaussian" else 1.3e-1) if native else 1e-3
            assert (X - truth).norm() <= limit * truth.norm()


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("shape", [(513, 700), (520, 520), (2, 600, 1300)], ids=str)
def test_products_by_strips(shape, form):
    """Of sides that no strip divides."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    triples = COEFFICIENTS["muon"] * 2
    found, whole = (iterate(G, triples, 1e-7, form, symmetric) for symmetric in (True, False))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("coefficients", ["muon", "polar_express"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_gram_form_of_nearly_rank_one_matrices_stays_in_its_range(dtype, coefficients):
    """As gradients are early in training. In bfloat16, restarted after three steps, values reached 9e4 in 5 steps."""
    g, out = torch.Generator().manual_seed(0), []
    for m in range(2, 9):
        for n in (m, m + 3):
            apart = 10.0 ** (-3 * torch.rand(16, 1, 1, generator=g))
            left, right, rest = (torch.randn(16, *shape, generator=g) for shape in ((m, 1), (1, n), (m, n)))
            for steps in (5, 6, 8):
                triples, W = triples_of(steps, coefficients, 1e-7), (left * right + apart * rest).to(dtype)
                X = iterate(W, triples, 1e-7, "gram", False, dtype)
                out.append(float(torch.linalg.matrix_norm(X.double(), 2).max()))
    assert max(out) < (1.5 if dtype == torch.bfloat16 else 1.3)
