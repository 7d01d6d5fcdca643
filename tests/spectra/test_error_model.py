"""The error model and the choice of precision that all paths share."""

import functools
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from bench.bounds import few_values
from sosd_fast import kernels
from sosd_fast.kernels import Backend
from sosd_fast.kernels.drift import correct, products
from sosd_fast.kernels.tridiagonal import tridiagonal_ref
from sosd_fast.spectra.gram import singular_values
from sosd_fast.spectra.precision import (
    LADDER,
    MODELS,
    SD_TOLERANCE,
    Method,
    choose,
    climb,
    sd_error,
    value_bound,
)
from sosd_fast.spectra.svdvals import _compiled, spectra
from sosd_fast.testing import SPECTRA, matrix, sd_distance, spectrum

needs_C = pytest.mark.skipif(kernels._C is None, reason="the C++ kernels are not built")
NAMES = [*(name for name in SPECTRA if name != "zero"), "trained", "graded", "zero"]
SIZES = [64, 256, 512, 768, 1280]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def drawn(name, m, n, dtype=torch.float32, seed=0):
    """A matrix of `testing.SPECTRA`; "trained": a power law above a Gaussian bulk; "graded": rows of falling size."""
    if name == "trained":
        bulk, head = (matrix(kind, m, n, dtype=torch.float64, seed=seed) for kind in ("gaussian", "power"))
        return (bulk + 3 * math.sqrt(max(m, n)) * head).to(dtype)
    if name == "graded":
        rows = torch.logspace(0, -1.5, m, dtype=torch.float64)
        return (rows[:, None] * matrix("gaussian", m, n, dtype=torch.float64, seed=seed)).to(dtype)
    return matrix(name, m, n, dtype=dtype, seed=seed)


def truth(W):
    return torch.linalg.svdvals(W.double() if W.shape[0] >= W.shape[1] else W.double().mT)


@functools.cache
def known_spectrum(name, r):
    if name in ("gaussian", "uniform", "trained", "graded"):
        return spectra([drawn(name, r, r, torch.float64)], "gram64").S
    return spectrum(name, r)[None]


def by_function(S, dtype, error):
    """The method that a function `error(S, method)` asks for."""
    lowest = LADDER.index(Method.GRAM64 if dtype == torch.float64 else Method.GRAM32)
    return next((m for m in LADDER[lowest:-1] if not error(S, m) > SD_TOLERANCE), LADDER[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_spectrum_gets_the_same_method(name, r, dtype, monkeypatch):
    """By the function of C++, by that of torch, Triton and row shards on the host, and on a device."""
    S = known_spectrum(name, r)
    model = MODELS[Backend.CPP]
    in_cpp = by_function(S, dtype, lambda S, m: kernels._C.sd_error(S, m.value, r, 0.0, math.inf, model)[0])
    for extension in (kernels._C, None):
        monkeypatch.setattr(kernels, "_C", extension)
        assert choose(S, 1, dtype, on_host=True) == [in_cpp]
        if name != "zero":
            assert choose(S, 1, dtype, on_host=False) == [in_cpp]


@pytest.mark.parametrize("r", [1, 5, 64, 700])
def test_cpp_has_the_same_function(r):
    for name in NAMES[:-1]:
        S = (
            spectrum(name, r)
            if name in SPECTRA[2:]
            else torch.rand(r, dtype=torch.float64).sort(descending=True).values
        )
        S = S / kernels.power_of_two(S[0])
        rows = torch.stack([S, 2.0**-800 * S, 2.0**900 * S])  # squares of these vanish, or are infinite
        for method in (*LADDER, Method.BIDIAG32):
            for drift in (0.0, 1e-7, 1e-3):
                dtype, moved = method.dtype(torch.float32), torch.tensor([drift], dtype=torch.float64)
                expected = float(sd_error(S[None], method, 2 * r, dtype=dtype, drift=moved))
                found = kernels._C.sd_error(rows, method.value, 2 * r, drift, math.inf, MODELS[Backend.CPP])
                assert found == pytest.approx(3 * [expected], rel=1e-12), (name, method, drift)


def test_what_the_sanitizers_run_has_the_same_constants():
    source = (Path(__file__).parent.parent / "kernels" / "sanitize.cpp").read_text()
    found = {name: value for name, value in re.findall(r"m\.(\w+) = ([^,;]+)[,;]", source)}
    numerators = {name: [float(part) for part in value.split("/")] for name, value in found.items()}
    assert {name: a / (b[0] if b else 1) for name, (a, *b) in numerators.items()} == MODELS[Backend.CPP]._asdict()


def test_constants_of_the_distribution_are_those_of_all_backends():
    assert len({model._replace(value_root=0.0) for model in MODELS.values()}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r", "inner"), [(64, 80), (256, 256)])  # where the C++ kernels, too, start with a Gram matrix
def test_paths_take_the_same_method(monkeypatch, r, inner, dtype):
    matrices = [drawn(name, r, inner, dtype) for name in NAMES]
    compiled = spectra(matrices)
    monkeypatch.setattr(kernels, "_C", None)
    by_torch = spectra(matrices)
    higher = {Method.BIDIAG32: Method.GRAM64}  # only the C++ kernels have a method between the two of Gram matrices
    alike = [higher.get(method, method) for method in compiled.methods]
    apart = [(a, b) for a, b in zip(alike, by_torch.methods, strict=True) if a != b]
    assert set(apart) <= {(Method.GRAM32, Method.GRAM64)}  # where C++ knows that little was rounded
    assert bool(apart) == (dtype != torch.float64)
    assert len(set(alike)) == (3 if dtype == torch.float32 else 2)  # bfloat16 leaves no rank deficient
    assert (Method.BIDIAG32 in compiled.methods) == (dtype != torch.float64)
    for found in (compiled, by_torch):
        for name, S, error, method, W in zip(NAMES, found.S, found.sd_error, found.methods, matrices, strict=True):
            if name != "zero":
                assert error <= SD_TOLERANCE, (name, method)
                assert sd_distance(S, truth(W)) <= error, (name, method)


@pytest.mark.parametrize(
    ("dtype", "shape", "methods"),
    [(torch.float32, (12, 12), 3), (torch.bfloat16, (8, 16), 2), (torch.float64, (5, 6), 1)],
    ids=str,
)
def test_the_triton_path_takes_the_same_method(device, dtype, shape, methods):
    """But for the last: nothing climbs there. Smaller matrices need fewer methods on a host."""
    names = ["gaussian", "log4", "rank_one"]
    matrices = [drawn(name, *shape, dtype) for name in names]
    previous = torch.stack([truth(W) for W in matrices])
    expected = choose(previous, 3, dtype, on_host=True)
    assert len(set(expected)) == methods
    found = spectra([W.to(device) for W in matrices], previous=previous)
    assert found.methods == tuple(min(method, Method.GRAM64, key=LADDER.index) for method in expected)
    for S, T, error in zip(found.S, previous, found.sd_error, strict=True):
        assert sd_distance(S.cpu(), T) <= error


@pytest.mark.parametrize("method", [Method.GRAM32, Method.BIDIAG32, Method.GRAM64, Method.EXACT])
@pytest.mark.parametrize("r", [64, 300])
def test_bounds_hold(path, r, method):
    matrices = [drawn(name, r, 400) for name in NAMES[:-1]]
    found = spectra(matrices, method)
    for name, S, bound, error, W in zip(NAMES, found.S, found.bound, found.sd_error, matrices, strict=False):
        T = truth(W)
        assert ((S - T).abs() <= bound + 64 * 2.0**-53 * T[0]).all(), name
        assert sd_distance(S, T) <= error + 1e-15, name


def spiked(r, K, first, leading, least, top=20, seed=0):
    """`leading` values from `top` on, of directions that the `first` rows do not touch; others from 1 to `least`."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(n, r, generator=g, dtype=torch.float64) for n in (r, K))
    U[:first, :leading] = 0
    S = torch.cat([top ** (1 - torch.arange(leading) / leading), torch.linspace(1, least, r - leading)]).double()
    return ((torch.linalg.qr(U)[0] * S) @ torch.linalg.qr(V)[0].mT).float()


@needs_C
@pytest.mark.parametrize(("r", "K"), [(40, 40), (64, 300), (160, 170), (256, 256), (300, 320)])
def test_what_a_reduction_rounded_bounds_the_error(r, K):
    matrices = {name: drawn(name, r, K) for name in ("gaussian", "trained", "graded", "log4", "power", "spikes")}
    matrices |= {f"spiked {k} {n}": spiked(r, K, k, n, 0.4) for k in (0, 1, r // 8, r // 2) for n in (1, 4, r // 4)}
    found = spectra(list(matrices.values()), "gram32")
    model = sd_error(found.S, Method.GRAM32, K, dtype=torch.float32, drift=torch.zeros(len(found.S)))
    for name, S, error, W in zip(matrices, found.S, found.sd_error, matrices.values(), strict=True):
        assert sd_distance(S, truth(W)) <= 0.8 * error, name
    ratio = dict(zip(matrices, (found.sd_error / model).tolist(), strict=True))
    assert r < 100 or max(ratio[name] for name in ratio if "spiked" in name) < 0.6, ratio


@needs_C
@pytest.mark.parametrize("apart", [0, 1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize(("r", "K", "size"), [(64, 80, 0.2), (256, 256, 0.1), (256, 256, 0.02), (300, 300, 0.03)])
def test_equal_values_err_by_more_than_single_ones(r, K, size, apart):
    """As in a matrix that is orthogonal but for some directions: values that are equal are moved apart."""
    W = spiked(r, K, 0, 4, 1 - apart, 1 / size)
    found = spectra([W], "gram32")
    assert sd_distance(found.S[0], truth(W)) <= 0.5 * found.sd_error[0]


def several(sizes, r, K, seed=0):
    """Singular values in lots of equal ones: each lot's value and its share of r."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))[0] for n in (r, K))
    counts = [max(1, round(share * r)) for _, share in sizes]
    counts[-1] += r - sum(counts)
    S = torch.cat([torch.full((n,), value, dtype=torch.float64) for n, (value, _) in zip(counts, sizes, strict=True)])
    return ((U * S) @ V.mT).float()


LOTS = {
    "half": ((1, 0.5), (1e-3, 0.5)),
    "quarter": ((1, 0.25), (3e-3, 0.75)),
    "thirds": ((1, 0.33), (0.1, 0.33), (1e-3, 0.34)),
    "few and equal": ((50, 0.01), (1, 0.99)),
    "flat": ((1, 1.0),),
}


@pytest.mark.parametrize(("r", "K"), [(64, 64), (512, 512), (768, 800)], ids=str)
def test_lots_of_equal_values_err_as_those_of_a_random_matrix(path, r, K):
    """By the root of how many there are, which single values do not: half a matrix of small ones had 1.4 its bound."""
    matrices = {name: several(lots, r, K) for name, lots in LOTS.items()}
    for method in ("gram32", "gram64"):
        found = spectra(list(matrices.values()), method)
        for name, S, error, W in zip(matrices, found.S, found.sd_error, matrices.values(), strict=True):
            assert sd_distance(S, truth(W)) <= 0.8 * error, (name, method)


@pytest.mark.parametrize("times", [0.5, 1, 1.8, 2.5, 3])
def test_a_lone_value_may_err_by_three_times_the_root_mean_square(times):
    """A smallest value that is zero, and is found to be the root of some times that of the eigenvalues."""
    r, u = 600, 2.0**-24
    S = torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(0.5, 1e-3, r - 1, dtype=torch.float64)])
    S[-1] = math.sqrt(times * 6 / math.sqrt(r) * u)
    for error in (
        float(sd_error(S[None], Method.GRAM32, r, dtype=torch.float32)),
        kernels._C.sd_error(S[None], "gram32", r, 0.0, math.inf, MODELS[Backend.CPP])[0] if kernels._C else math.inf,
    ):
        assert error >= float(S[-1] / S.sum())


@needs_C
def test_a_trained_matrix_stays_in_float32_with_its_last_spectrum():
    for r in (224, 256):
        W = spiked(r, r, 0, 8, 0.1)
        first = spectra([W])
        assert sd_error(first.S, Method.GRAM32, r, dtype=torch.float32) > 3 * SD_TOLERANCE
        found = spectra([W], previous=first.S)
        assert found.methods == (Method.GRAM32,)
        assert sd_distance(found.S[0], truth(W)) <= found.sd_error[0] <= SD_TOLERANCE


@needs_C
@pytest.mark.parametrize(("r", "K"), [(8, 20), (16, 18), (24, 40), (48, 70), (64, 200), (96, 150)])
def test_a_bound_that_nobody_asks_for_changes_nothing(r, K):
    """It is not computed where the smallest value says that it holds: neither methods nor values may differ."""
    some = []
    for i, least in enumerate(torch.logspace(0, -2.5, 300, dtype=torch.float64)):
        Q, P = (torch.linalg.qr(matrix("gaussian", n, r, dtype=torch.float64, seed=i)).Q for n in (r, K))
        values = torch.logspace(0, float(least.log10()), r, dtype=torch.float64) if i % 2 else torch.ones(r).double()
        values[-1] = least
        some.append(((Q * values) @ P.mT).float())
    known = spectra(some)
    S = torch.empty_like(known.S)
    methods = _compiled(some, "auto", S)
    assert methods == known.methods and torch.equal(S, known.S)
    assert len(set(methods)) > 1, "some must be near the limit"


@needs_C
def test_two_stages_know_nothing_of_what_was_rounded():
    W = spiked(200, 240, 0, 8, 0.2)
    out = {"S": torch.empty(1, 200, dtype=torch.float64), "bound": torch.empty(1, 200, dtype=torch.float64)}
    error = torch.empty(1, dtype=torch.float64)
    for band_from in (1, 10_000):
        kernels._C.svdvals(
            matrices=[W], method="gram32", previous=None, **out, sd_error=error, methods=tuple(Method)[:4], threads=1,
            model=MODELS[Backend.CPP], band_from=band_from,
        )  # fmt: skip
        model = float(sd_error(out["S"], Method.GRAM32, 240, dtype=torch.float32))
        assert (float(error) < 0.6 * model) == (band_from > 1) and float(error) < 1.1 * model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (512, 512)], ids=str)
def test_the_bound_is_within_50_times_the_error_of_gaussian_matrices(path, shape, dtype):
    """In root mean square over matrices; single ones are lucky."""
    matrices = [matrix("gaussian", *shape, seed=50 + seed, dtype=dtype) for seed in range(8)]
    found, expected = spectra(matrices, "gram32"), spectra([W.double() for W in matrices], "gram64")
    errors = torch.tensor([sd_distance(a, b) for a, b in zip(found.S, expected.S, strict=True)], dtype=torch.float64)
    assert (errors <= found.sd_error).all()
    assert found.sd_error.square().mean().sqrt() <= 50 * errors.square().mean().sqrt()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 64), (128, 200), (300, 40), (17, 1500)], ids=str)
def test_few_distinct_values(path, shape, seed):
    """Where equal products round alike, which torch's products do for whole rows."""
    kinds = few_values(*shape, torch.Generator().manual_seed(seed))
    found = spectra(list(kinds.values()))
    for kind, S, bound, error, W in zip(kinds, found.S, found.bound, found.sd_error, kinds.values(), strict=True):
        T = truth(W)
        own = 64 * 2.0**-53
        assert ((S - T).abs() <= bound + own * T[0]).all(), kind
        assert sd_distance(S, T) <= error + own and error <= SD_TOLERANCE, kind


def towards_zero(x):
    """float64 values cut to 24 bits."""
    return (x.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def tensor_core_gram(W, block=32, step=8):
    """W W^T as `syrk` has it of a GPU: three TF32 products, sums cut to float32 towards zero within a block."""
    high = (W.view(torch.int32) & ~0x1FFF).view(torch.float32)
    low = ((W - high).view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    high, total = high.double(), torch.zeros(len(W), len(W))
    for first in range(0, W.shape[1], block):
        partial = torch.zeros(len(W), len(W), dtype=torch.float64)
        for A, B in ((low, high), (high, low), (high, high)):
            for k in range(first, min(first + block, W.shape[1]), step):
                partial = towards_zero(partial + A[:, k : k + step] @ B[:, k : k + step].mT)
        total += partial.float()
    return total.tril() + total.tril(-1).mT


def by_tensor_cores(W):
    """S, what is left of the drift, and the drift taken out, as the Triton path has them of a GPU."""
    G, known = tensor_core_gram(W)[None], products(W[None])
    drift = correct(G, known, W.shape[1])
    d, e = tridiagonal_ref(G)
    T = sum(torch.diag_embed(t.double(), k) for t, k in ((d, 0), (e, 1), (e, -1)))
    return *singular_values(torch.linalg.eigvalsh(T) / (1 + drift), known.squares, drift), float(drift)


@pytest.mark.parametrize("name", [*NAMES[:-1], "signs", "int4", "constant row", "mask"])
def test_the_arithmetic_of_tensor_cores_stays_in_the_bounds(name):
    """The kernels themselves run here on small matrices only."""
    few = few_values(192, 256, torch.Generator().manual_seed(0))
    W = few[name] if name in few else drawn(name, 192, 256)
    W = W / kernels.power_of_two(W.abs().max())
    S, left, drift = by_tensor_cores(W)
    T = truth(W)
    assert sd_distance(S[0], T) <= sd_error(S, Method.GRAM32, 256, dtype=torch.float32, drift=left)
    bound = value_bound(S, Method.GRAM32, 256, Backend.TRITON, dtype=torch.float32)[0]
    assert ((S[0] - T).abs() <= bound + 64 * 2.0**-53 * T[0]).all()
    if name == "gaussian":
        assert -16 * 2.0**-24 < drift < -2 * 2.0**-24, "the cut shows in elements beside the diagonal"


def test_a_drift_is_seen_and_taken_out():
    W = matrix("uniform", 60, 90)
    known = products(W[None])
    G = (W.double() @ W.double().mT)[None]
    moved = (1 + 1e-6) * G
    drift = correct(moved, known, 90)
    assert float(drift) == pytest.approx(1e-6, rel=1e-2)
    S, left = singular_values(torch.linalg.eigvalsh(moved) / (1 + drift), known.squares, drift)
    assert sd_distance(S[0], truth(W)) < 1e-9 and float(left) == pytest.approx(5e-7, rel=1e-2)


def test_climbing():
    asked = []

    def compute(plan):
        asked.append(plan)
        methods.update((i, m) for m, at in plan.items() for i in at)
        return [0.0 if methods[i] == wanted[i] else math.nan if wanted[i] is None else 1.0 for i in range(4)]

    methods = {}
    wanted = [Method.GRAM32, Method.BIDIAG64, None, "never"]
    start = [Method.GRAM32, Method.GRAM32, Method.GRAM32, Method.GRAM64]
    assert climb(compute, start) == (Method.GRAM32, Method.BIDIAG64, Method.GRAM32, Method.BIDIAG64)
    assert asked == [
        {Method.GRAM32: [0, 1, 2], Method.GRAM64: [3]},
        {Method.BIDIAG64: [3], Method.GRAM64: [1]},
        {Method.BIDIAG64: [1]},
    ]


def test_earlier_names_of_methods():
    assert Method("direct64") is Method.BIDIAG64 and str(Method.BIDIAG64) == "bidiag64"
    with pytest.raises(ValueError, match="is not a valid Method"):
        Method("qr")


@pytest.mark.parametrize("on_host", [True, False])
def test_spectra_are_chosen_for_some_at_a_time(monkeypatch, on_host):
    """Alike in one lot and in several, whatever there is among them: torch gives few elements to one thread only."""
    precision = sys.modules["sosd_fast.spectra.precision"]
    good, graded = torch.linspace(2, 1, 24, dtype=torch.float64), 10.0 ** -torch.linspace(0, 7, 24, dtype=torch.float64)
    lost = torch.where(torch.arange(24) < 1, good, 1e-17)
    S = torch.stack([good, graded, lost, 0 * good, good * torch.nan, graded, good])
    asked = []
    monkeypatch.setattr(
        precision, "sd_error", lambda S, *a, do=precision.sd_error, **k: asked.append(S.numel()) or do(S, *a, **k)
    )
    compiled = choose(S, len(S), torch.float32, on_host=on_host)
    assert not asked  # where the extension is there
    monkeypatch.setattr(kernels, "_C", None)
    whole = choose(S, len(S), torch.float32, on_host=on_host)
    assert compiled == whole
    assert set(whole) == {Method.GRAM32, Method.GRAM64, Method.BIDIAG64} and max(asked) > 48
    default = Method.GRAM32 if on_host else Method.GRAM64
    assert whole[0] == whole[6] == Method.GRAM32 and whole[3] == whole[4] == default and whole[2] == Method.BIDIAG64
    monkeypatch.setattr(precision, "ALONE", 50)
    del asked[:]
    assert choose(S, len(S), torch.float32, on_host=on_host) == whole and max(asked) <= 48
