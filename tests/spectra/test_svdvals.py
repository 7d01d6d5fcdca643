import math
import os
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import run

import sosd_fast
from sosd_fast.spectra.precision import SD_TOLERANCE
from sosd_fast.spectra.svdvals import mixes_shapes, spectra
from sosd_fast.testing import SPECTRA, assert_svdvals_close, matrix, sd_distance

SHAPES = [
    (1, 7),  # a row
    (7, 1),  # a column
    (1, 1),
    (2, 3),
    (64, 64),
    (127, 509),  # primes: no tile fits
    (1000, 17),  # tall
    (40, 300),  # wide
    (256, 256),
]
TABLE = ["gaussian", "power", "log4", "spikes"]  # the spectra of the published error table
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(W):
    return torch.linalg.svdvals(W.double())


def pairs(first, second, third):
    """Covers all pairs of values of three lists, in as many cases as the first two lists have pairs.

    The values of the third list, which may be no longer than the others, take turns.
    """
    cases = [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]
    for x, one in enumerate((first, second, third)):
        for y, other in enumerate((first, second, third)):
            assert x == y or {(case[x], case[y]) for case in cases} == {(a, b) for a in one for b in other}
    return cases


@pytest.mark.parametrize(("name", "shape", "dtype"), pairs(SPECTRA, SHAPES, DTYPES), ids=str)
def test_auto_meets_the_tolerance_and_its_bound(path, name, shape, dtype):
    """On each path every pair of spectrum, shape and dtype, but not every triple: 198 cases of 792.

    The three meet in pairs only. The dtype decides how a matrix is read, which depends on its shape, and how exact the
    spectrum is, which depends on the spectrum; spectrum and shape decide the method and the error. From there on all
    matrices are float32 or float64 and take the same code.
    """
    W = matrix(name, *shape, dtype=dtype)
    before = W.clone()
    S, bound = sosd_fast.svdvals(W, return_bound=True)
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    S_ref = truth(W)
    eps = torch.finfo(torch.float32).eps
    assert_svdvals_close(S, S_ref, eps=eps, size=max(shape), limit=bound)
    if S_ref[0] > 0:
        assert sd_distance(S, S_ref) <= SD_TOLERANCE
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    ("name", "method", "shape"),
    pairs(SPECTRA, ["gram32", "bidiag32", "gram64", "exact"], [(64, 64), (127, 509), (40, 2000)]), ids=str,
)  # fmt: skip
def test_every_method_keeps_its_bounds(path, method, name, shape):
    W = matrix(name, *shape)
    result = spectra([W], method)
    S_ref = truth(W)
    eps = torch.finfo(torch.float64 if method == "gram64" else torch.float32).eps
    loss = eps**-0.5 if method.startswith("gram") else 1.0  # squaring loses half the digits of small values
    assert_svdvals_close(result.S[0], S_ref, eps=eps * loss, size=max(shape), limit=result.bound[0])
    if S_ref[0] > 0:
        assert sd_distance(result.S[0], S_ref) <= result.sd_error[0] + 1e-15


@pytest.mark.parametrize("size", [(512, 512), (256, 2048)], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_full_size_spectra(path, name, size):
    W = matrix(name, *size)
    result = spectra([W])
    S_ref = truth(W)
    assert sd_distance(result.S[0], S_ref) <= min(SD_TOLERANCE, result.sd_error[0])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("r", [128, 512])
def test_the_bound_on_the_distribution_over_many_matrices(r, dtype):
    """Half-precision weights err several times as much in float32, as a benchmark found out."""
    matrices = [matrix("gaussian", r, r, seed=seed, dtype=dtype) for seed in range(16)]
    quick, precise = spectra(matrices), spectra(matrices, "gram64")
    for S, S_ref, limit in zip(quick.S, precise.S, quick.sd_error, strict=True):
        assert sd_distance(S, S_ref) <= min(limit, SD_TOLERANCE)


def test_the_safety_test_chooses_the_precision(path):
    chosen = {name: spectra([matrix(name, 96, 384)]).methods[0] for name in ("gaussian", "log4", "rank_one")}
    assert chosen == {"gaussian": "gram32", "log4": "gram64", "rank_one": "bidiag64"}
    assert sd_distance(spectra([matrix("log4", 96, 384)], "gram32").S[0], truth(matrix("log4", 96, 384))) > SD_TOLERANCE


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((96, 96), "bidiag32"),
        ((120, 96), "bidiag32"),
        ((96, 121), "gram64"),  # longer
        ((32, 32), "gram64"),  # in lanes
        ((33, 40), "bidiag32"),
        ((768, 768), "bidiag32"),
        ((769, 769), "gram64"),
    ],
    ids=str,
)
def test_nearly_square_matrices_are_not_squared_in_float64(shape, expected):
    W = matrix("log4", *shape)
    for previous in (None, truth(W)[None]):
        found = spectra([W], previous=previous)
        assert found.methods == (expected,)
        assert sd_distance(found.S[0], truth(W)) <= found.sd_error[0] <= SD_TOLERANCE
    assert spectra([matrix("rank_one", *shape)]).methods == ("bidiag64",)
    assert spectra([W.double()]).methods == ("gram64",)


def test_a_batch_mixes_precisions(path):
    W = torch.stack([matrix(name, 96, 384) for name in ("gaussian", "log4", "rank_one", "gaussian")])
    result = spectra(list(W))
    assert result.methods == ("gram32", "gram64", "bidiag64", "gram32")
    for S, matrix_ in zip(sosd_fast.svdvals(W.reshape(2, 2, 96, 384)).reshape(4, -1), W, strict=True):
        assert torch.equal(S, sosd_fast.svdvals(matrix_))


def test_earlier_spectra_choose_where_to_start(path):
    easy, hard = matrix("gaussian", 96, 384), matrix("log4", 96, 384)
    previous = torch.stack([truth(hard), truth(easy)])
    result = spectra([easy, hard], "auto", previous)
    assert result.methods == ("gram64", "gram64"), "the first starts higher than it must, the second is redone"
    for S, W in zip(result.S, (easy, hard), strict=True):
        assert sd_distance(S, truth(W)) <= SD_TOLERANCE


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.01, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_earlier_spectra_cannot_mislead(path, value, dtype):
    W = matrix("gaussian", 60, 150, dtype=dtype)
    for previous in (truth(W) * value, truth(W) + value, truth(W).flip(0)):
        assert sd_distance(spectra([W], "auto", previous[None].contiguous()).S[0], truth(W)) <= SD_TOLERANCE


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["auto", "gram32", "exact"])
def test_scale(path, scale, method):
    W = matrix("gaussian", 40, 160)
    S = sosd_fast.svdvals(W * scale, method=method)
    torch.testing.assert_close(S / scale, sosd_fast.svdvals(W, method=method), rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_in_float64(path, scale):
    W = matrix("gaussian", 20, 30, dtype=torch.float64)
    torch.testing.assert_close(sosd_fast.svdvals(W * scale) / scale, truth(W), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["auto", "gram32", "gram64", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_leaves_the_others_alone(path, method, value):
    W = torch.stack([matrix("gaussian", 30, 50, seed=i) for i in range(3)])
    whole = sosd_fast.svdvals(W, method=method)
    W[1, 3, 4] = value
    S, bound = sosd_fast.svdvals(W, method=method, return_bound=True)
    assert S[1].isnan().all() and bound[1].isnan().all()
    assert torch.equal(S[[0, 2]], whole[[0, 2]])


def test_hilbert(path):
    i = torch.arange(1, 65, dtype=torch.float64)
    W = 1 / (i[:, None] + i[None, :] - 1)
    assert sd_distance(sosd_fast.svdvals(W), truth(W)) <= SD_TOLERANCE
    assert sd_distance(sosd_fast.svdvals(W.float()), truth(W.float())) <= SD_TOLERANCE


@pytest.mark.parametrize(
    "view",
    [lambda W: W.mT, lambda W: W[::2, 1::3], lambda W: W.flip(0), lambda W: W[:, :1].expand(-1, 20)],
    ids=["transposed", "strided", "flipped", "expanded"],
)
def test_views(path, view):
    W = matrix("gaussian", 90, 120)
    assert_svdvals_close(sosd_fast.svdvals(view(W)), truth(view(W)), eps=1.2e-7, size=120)


def test_autocast_and_matmul_precision_do_not_reach_in(path):
    W = matrix("gaussian", 96, 384)
    plain = sosd_fast.svdvals(W)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            S = sosd_fast.svdvals(torch.nn.Parameter(W))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    S = S.detach()
    if path == "extension":
        assert torch.equal(S, plain)
    else:  # there products are taken in float64, which differs by the rounding of float32
        assert (S - plain).abs().max() <= 8 * 2.0**-24 * plain[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(9, 5), (1, 8, 8), (3, 40, 60), (2, 3, 16, 200), (2, 1, 70, 70)], ids=str)
def test_values_alone_are_those_with_bounds(path, size, dtype):
    class Own(torch.nn.Parameter):
        pass

    W = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for values in (W.to(dtype), W.mT.to(dtype), (W * 2.0**-130).to(dtype)):
        expected, _ = sosd_fast.svdvals(values, return_bound=True)
        assert expected.shape == (*size[:-2], min(size[-2:])) and expected.any()
        for held in (values, torch.nn.Parameter(values), Own(values)):
            with torch.no_grad():
                assert torch.equal(sosd_fast.svdvals(held), expected)


def test_empty_batch():
    S, bound = sosd_fast.svdvals(torch.empty(3, 0, 5, 4), return_bound=True)
    assert S.shape == bound.shape == (3, 0, 4)


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.ones(3), r"svdvals: expected a matrix .*got W.shape=\(3,\)"),
        (torch.ones(3, 3, dtype=torch.int32), r"got W.dtype=torch.int32. Convert it"),
        (torch.ones(3, 3, dtype=torch.complex64), r"got W.dtype=torch.complex64"),
        (torch.ones(0, 5), r"expected at least one row and one column, got W.shape=\(0, 5\)"),
        ([[1.0]], r"expected a tensor, got W=list"),
    ],
)
def test_bad_input(W, message):
    with pytest.raises(ValueError, match=message):
        sosd_fast.svdvals(W)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"expected one of auto, gram32, gram64, exact, got method='qr'"):
        sosd_fast.svdvals(torch.ones(2, 2), method="qr")


def test_bits_do_not_depend_on_the_thread_count():
    shapes = [(300, 300), (64, 64), (128, 700), (20, 20), (500, 900)]
    matrices = [matrix("gaussian", m, n) for m, n in shapes] + [matrix("rank_one", 100, 100)]
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found[threads] = [spectra([W] * 3) for W in matrices]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 8):
        for a, b in zip(found[1], found[threads], strict=True):
            assert torch.equal(a.S, b.S) and torch.equal(a.bound, b.bound) and a.methods == b.methods


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """In a process of its own, for the choice is made once; a machine without the set takes the next lower one."""
    keys = "extension and (broken or views or scale or mislead or (tolerance and 127))"
    done = run(
        "import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))",
        *("-q", "-x", "-p", "no:cacheprovider", "-k", keys, __file__),
        SOSD_ISA=isa,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # none is needed, and their imports take time
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_after_a_fork():
    W = [matrix("gaussian", 300, 300, seed=i) for i in range(3)]
    expected = spectra(W).S
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(spectra(W).S, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    decay=st.floats(0, 12),
    zeros=st.floats(0, 1),
    scale=st.floats(-20, 20),
    dtype=st.sampled_from(DTYPES[:3]),
)
def test_random_spectra(m, n, seed, decay, zeros, scale, dtype):
    r = min(m, n)
    generator = torch.Generator().manual_seed(seed)
    S = 10 ** (-decay * torch.rand(r, dtype=torch.float64, generator=generator))
    S = torch.where(torch.rand(r, generator=generator) < zeros, 0.0, S).double()
    U, V = (torch.linalg.qr(torch.randn(size, r, dtype=torch.float64, generator=generator)).Q for size in (m, n))
    W = (U * S @ V.mT * 10**scale).to(dtype)
    result = spectra([W])
    S_ref = truth(W)
    assert_svdvals_close(result.S[0], S_ref, eps=1.2e-7, size=max(m, n), limit=result.bound[0])
    if S_ref[0] > 0:
        assert sd_distance(result.S[0], S_ref) <= min(SD_TOLERANCE, result.sd_error[0] + 1e-15)


@pytest.mark.parametrize("scale", [1e-42, 1e-44, 3e-45])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_counts_that_results_are_multiples_of_the_smallest_number(scale, seed):
    W = scale * torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
    truth = torch.linalg.svdvals(W.double() * 2.0**149) * 2.0**-149
    S, bound = sosd_fast.svdvals(W, return_bound=True)
    assert ((S.double() - truth).abs() <= bound.double()).all()
    assert not sosd_fast.svdvals(0 * W, return_bound=True)[1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [20, 48, 130])  # in lanes, one by one, in several panels
def test_matrices_of_one_short_side_keep_their_spectra_beside_one_another(dtype, r):
    shapes = [(r, r), (5 * r, r), (r, r + 3), (r, 400), (r, r), (r + 70, r)]
    kinds = ("gaussian", "log4", "rank_one", "power", "half_zeros", "gaussian")
    matrices = [matrix(kind, m, n, dtype=dtype) for kind, (m, n) in zip(kinds, shapes, strict=True)]
    assert mixes_shapes(matrices[0], "auto")
    alone = [spectra([W]) for W in matrices]
    for previous in (None, torch.cat([found.S for found in alone])):
        together = spectra(matrices, previous=previous)
        for i, W in enumerate(matrices):
            own = spectra([W], previous=None if previous is None else previous[i : i + 1])
            assert together.methods[i] == own.methods[0]
            for found, expected in zip(together[:3], own[:3], strict=True):
                assert torch.equal(found[i], expected[0])
