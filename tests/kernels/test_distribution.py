import math

import pytest
import torch

import sosd_fast
from sosd_fast import kernels
from sosd_fast.kernels.distribution import (
    STATISTICS,
    singular_distribution,
    singular_distribution_ref,
    statistics_of,
)


@pytest.fixture(params=["extension", "torch", "triton"])
def place(request):
    """Runs a test on each path, and says on which device: the C++ kernels, torch's operations, the Triton kernel."""
    if request.param == "triton":
        return request.getfixturevalue("device")
    if request.param == "torch":
        request.getfixturevalue("monkeypatch").setattr(kernels, "_C", None)
    elif kernels._C is None:
        pytest.skip("the C++ extension is not built")
    return "cpu"


def spectra(*shape, dtype=torch.float64, seed=0):
    S = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return S.sort(-1, descending=True).values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 127), (2, 4, 64), (0, 8)], ids=str)
def test_against_the_reference(place, dtype, shape):
    S, previous, reference = (spectra(*shape, dtype=dtype, seed=i).to(place) for i in range(3))
    copies = [t.clone() for t in (S, previous, reference)]
    d = singular_distribution(S, previous, reference)
    expected = singular_distribution_ref(S.double(), previous.double(), reference.double())
    assert d.sd.dtype == dtype
    torch.testing.assert_close(d.sd, expected.sd.to(dtype))
    for name in d._fields[1:]:
        value = getattr(d, name)
        assert value.dtype == torch.float64 and value.shape == shape[:-1]
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-12, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip((S, previous, reference), copies, strict=True))


def test_by_hand(place):
    d = sosd_fast.singular_distribution(
        *torch.tensor([[3.0, 1.0], [1.0, 1.0], [4.0, 3.0]], dtype=torch.float64, device=place)
    )  # fmt: skip
    assert d.sd.tolist() == [0.75, 0.25]
    assert d.variation_l2.item() == pytest.approx(math.sqrt(0.125))
    assert d.variation_l1.item() == pytest.approx(0.5)
    assert d.variation_linf.item() == pytest.approx(0.25)
    assert d.cosine.item() == pytest.approx(15 / (math.sqrt(10) * 5))
    assert d.nuclear_norm.item() == 4
    assert d.frobenius_norm.item() == pytest.approx(math.sqrt(10))
    assert (d.sigma_max.item(), d.sigma_min.item()) == (3, 1)
    assert d.stable_rank.item() == pytest.approx(10 / 9)
    assert d.spectral_entropy.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert d.effective_rank.item() == pytest.approx(math.exp(d.spectral_entropy.item()))
    assert d.participation_ratio.item() == pytest.approx(100 / 82)


def test_each_row_is_compared_with_its_own(place):
    S = spectra(4, 50).to(place)
    d = singular_distribution(S, S * 7, S)
    assert d.variation_l2.max() < 1e-16 and (d.cosine - 1).abs().max() < 1e-15


def test_small_variations_survive(place):
    S = spectra(1, 256).to(place)
    other = S.clone()
    other[0, 0] += 1e-8 * S.sum()
    d = singular_distribution(S, other)
    assert d.variation_linf.item() == pytest.approx(1e-8, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale(place, scale):
    S = spectra(2, 40).to(place)
    plain, scaled = singular_distribution(S), singular_distribution((S * scale).float())
    for name in ("stable_rank", "effective_rank", "spectral_entropy", "participation_ratio"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.frobenius_norm / scale, plain.frobenius_norm, rtol=1e-6, atol=0)


def test_zero_and_nan_spectra_give_nan_and_leave_the_others_alone(place):
    S = spectra(4, 10).to(place)
    whole = singular_distribution(S, S.flip(-1), S)
    S[1] = 0
    S[2, 3] = math.nan
    d = singular_distribution(S, S.flip(-1), S)
    for name in d._fields:
        value, expected = getattr(d, name), getattr(whole, name)
        if name not in ("nuclear_norm", "frobenius_norm", "sigma_max", "sigma_min"):
            assert value[1].isnan().all(), name
        assert value[2].isnan().all(), name
        assert torch.equal(value[[0, 3]], expected[[0, 3]]), name
    assert d.nuclear_norm[1] == d.frobenius_norm[1] == d.sigma_max[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_ends_of_the_range(place, dtype):
    """Bit for bit the same distribution at every scale that the dtype holds, for powers of two."""
    S, previous, reference = (spectra(1, 12, dtype=dtype, seed=i) + 0.25 for i in range(3))
    limits = (-120, 127) if dtype == torch.float32 else (-1015, 1023)
    plain = singular_distribution(*(t.to(place) for t in (S, previous, reference)))
    for power in limits:
        given = [(t * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)).to(place) for t in (S, previous, reference)]
        assert all(t.isfinite().all() for t in given)
        d = singular_distribution(*given)
        for name in set(d._fields) - {"nuclear_norm", "frobenius_norm", "sigma_max", "sigma_min"}:
            assert torch.equal(getattr(d, name), getattr(plain, name)), (name, power)
        for name in ("frobenius_norm", "sigma_max", "sigma_min"):
            expected = float(getattr(plain, name)) * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)
            assert float(getattr(d, name)) == expected, (name, power)
    small = torch.tensor([3.0, 2.0, 1.0], dtype=dtype) * torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # subnormal
    found = singular_distribution(small.to(place))
    assert found.sd.tolist() == singular_distribution(torch.tensor([3.0, 2.0, 1.0], dtype=dtype).to(place)).sd.tolist()
    assert found.nuclear_norm.item() == 6 * small[2].item() and found.effective_rank.item() == pytest.approx(
        2.749459274
    )


def test_the_largest_values_where_subnormals_are_flushed(place):
    """2^-1023, the inverse of their power of two, is subnormal."""
    S = torch.tensor([1.5, 0.75, 0.75], dtype=torch.float64, device=place) * 2.0**1023
    flushes = torch.set_flush_denormal(True)
    try:
        found = singular_distribution(S, S.flip(-1), S)
    finally:
        torch.set_flush_denormal(False)
    assert found.sd.tolist() == [0.5, 0.25, 0.25] and found.variation_l1.item() == 0.5, flushes


def test_a_norm_beyond_float64_is_inf_and_the_rest_is_right(place):
    d = singular_distribution(torch.full((4,), 1e308, dtype=torch.float64, device=place))
    assert d.nuclear_norm.item() == d.frobenius_norm.item() == math.inf
    assert d.sd.tolist() == [0.25] * 4 and d.stable_rank.item() == 4 and d.sigma_max.item() == 1e308


def test_a_spectrum_that_holds_infinity_gives_nan(place):
    S = spectra(2, 10).to(place)
    S[0, 0] = math.inf
    d = singular_distribution(S, S.flip(-1), S)
    assert all(getattr(d, name)[0].isnan().all() and getattr(d, name)[1].isfinite().all() for name in d._fields)


@pytest.mark.parametrize("value", [3.0, 0.1, 1e-310, 1.7e308])
def test_one_value_has_no_entropy(place, value):
    for S in ([value], [value, 0.0, 0.0]):
        d = singular_distribution(torch.tensor(S, dtype=torch.float64, device=place))
        assert d.spectral_entropy.item() == 0 and d.effective_rank.item() == d.stable_rank.item() == 1
        assert d.participation_ratio.item() == 1 and d.sd.tolist()[0] == 1


def test_spectra_longer_than_a_block(place):
    S, previous = spectra(2, 2500, seed=1).to(place), spectra(2, 2500, seed=2).to(place).float()
    d, expected = singular_distribution(S, previous, S.flip(0)), singular_distribution_ref(S, previous, S.flip(0))
    for name in d._fields:
        torch.testing.assert_close(
            getattr(d, name), getattr(expected, name), rtol=1e-7 if place == "cpu" else 1e-12, atol=0
        )


def test_views(place):
    S = spectra(6, 40).to(place)
    d, expected = singular_distribution(S[::2, ::2], S[1::2, ::2]), singular_distribution_ref(S[::2, ::2], S[1::2, ::2])
    torch.testing.assert_close(d.variation_l2, expected.variation_l2)
    torch.testing.assert_close(d.sd, expected.sd)


def test_without_previous_and_reference(place):
    d = singular_distribution(spectra(3).to(place))
    assert d.variation_l2 is d.variation_l1 is d.variation_linf is d.cosine is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, dtype=torch.int64),), "got S=torch.int64"),
        ((torch.ones(3, dtype=torch.bfloat16),), "got S=torch.bfloat16"),
        (([1.0],), "got S=list"),
        ((torch.ones(2, 0),), r"got S.shape=\(2, 0\)"),
        ((torch.ones(3), torch.ones(4)), r"expected previous shaped .* got previous.shape=\(4,\)"),
        ((torch.ones(3), None, torch.ones(4)), r"got reference.shape=\(4,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="singular_distribution: .*" + message):
        singular_distribution(*arguments)


def test_a_missing_extension_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_C", None)
    kernels.warn_missing.cache_clear()
    singular_distribution(spectra(3))
    singular_distribution(spectra(3))
    assert sum("sosd_fast._C is not built" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, 64, 100])
def test_what_leading_values_have_of_the_variation(place, dtype, k):
    S, previous, reference = (spectra(3, 64, dtype=dtype, seed=i).to(place) for i in range(3))
    found = statistics_of(S, previous, reference, k)
    named = dict(zip(STATISTICS, found.unbind(-1), strict=True))
    expected = singular_distribution_ref(S.double(), previous.double(), reference.double())
    for name in expected._fields[1:]:
        torch.testing.assert_close(named[name], getattr(expected, name), rtol=1e-12, atol=1e-15)
    if k:
        p, q = (t.double() / t.double().sum(-1, keepdim=True) for t in (S, previous))
        compiled = place == "cpu" and kernels._C is not None and not kernels.interpreted
        atol = 1e-15 if compiled or dtype == torch.float64 else 1e-7  # others take it from distributions in float32
        torch.testing.assert_close(named["variation_topk"], (p - q)[:, :k].norm(dim=-1), rtol=1e-12, atol=atol)
