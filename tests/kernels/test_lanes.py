"""Small matrices, of which a vector of the C++ kernels holds one in each lane."""

import math

import pytest
import torch

import sosd_fast
from sosd_fast import kernels
from sosd_fast.spectra.precision import Method
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.testing import matrix

pytestmark = pytest.mark.skipif(kernels._C is None, reason="the extension is not built")

KINDS = ("gaussian", "log4", "rank_one", "spikes", "zero")
# r = 1, 2, 3; around a block of four rows and a vector; the largest; beyond
SHAPES = [(1, 1), (1, 1024), (2, 2), (3, 40), (5, 5), (8, 128), (16, 17), (16, 64), (23, 44), (32, 32)]
SHAPES += [(16, 65), (32, 33), (33, 33), (7, 1500)]


def truth(W):
    return torch.linalg.svdvals(W.double())


def drawn(shape, count, dtype=torch.float32):
    names = [*KINDS, *["gaussian"] * max(0, count - len(KINDS))][:count]
    return [
        torch.zeros(shape, dtype=dtype) if name == "zero" else matrix(name, *shape, seed=seed, dtype=dtype)
        for seed, name in enumerate(names)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_keeps_the_bounds_and_its_members_are_independent(shape, dtype):
    matrices = drawn(shape, 21, dtype)
    for method in ("auto", "gram32", "gram64"):
        found = spectra(matrices, method)
        for i, W in enumerate(matrices):
            S = truth(W)
            assert ((found.S[i] - S).abs() <= found.bound[i] + 1e-14 * S[0]).all(), (method, i)
            alone = spectra([W.mT.contiguous().mT], method)  # strides do not matter, either
            assert torch.equal(alone.S[0], found.S[i]) and torch.equal(alone.bound[0], found.bound[i]), (method, i)
            assert alone.methods[0] == found.methods[i]


def test_special_matrices_leave_their_neighbours_alone():
    ordinary = torch.stack(drawn((12, 20), 20)[5:])
    W = ordinary.clone()
    W[1, 3, 4], W[4, 0, 0], W[6] = math.nan, math.inf, 0
    W[8] *= 2.0**100
    W[9] *= 2.0**-100
    found, before = spectra(W), spectra(ordinary)
    kept = [i for i in range(len(W)) if i not in (1, 4, 6, 8, 9)]
    assert torch.equal(found.S[kept], before.S[kept])
    assert found.S[[1, 4]].isnan().all() and found.bound[[1, 4]].isnan().all()
    assert (found.S[6] == 0).all() and found.sd_error[[1, 4, 6]].isnan().all()
    assert torch.equal(found.S[8], 2.0**100 * before.S[8])
    assert torch.equal(found.S[9], 2.0**-100 * before.S[9])


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -143), (torch.bfloat16, -130), (torch.float64, -1061)])
@pytest.mark.parametrize("shape", [(8, 8), (40, 70)], ids=str)
def test_subnormal_entries_keep_the_bounds_in_every_precision(shape, dtype, exponent):
    signs = torch.where(torch.rand(6, *shape) < 0.5, -1.0, 1.0).double() * (torch.rand(6, *shape) < 0.7)
    W = torch.ldexp(torch.ldexp(signs, torch.tensor(exponent // 2)), torch.tensor(exponent - exponent // 2)).to(dtype)
    truth = torch.linalg.svdvals(signs)
    for method in ("gram32", "bidiag32", "gram64", "bidiag64", "auto"):
        found = spectra(W, method)
        S, bound = (
            torch.ldexp(torch.ldexp(x, torch.tensor(-exponent // 2)), torch.tensor(-exponent - (-exponent // 2)))
            for x in (found.S, found.bound)
        )
        assert ((S - truth).abs() <= bound + 1e-14 * truth[:, :1]).all(), method


def test_each_member_climbs_by_itself():
    W = torch.stack([matrix(name, 16, 64) for name in ("gaussian", "log4", "rank_one") * 9])
    assert spectra(W).methods == (Method.GRAM32, Method.GRAM64, Method.BIDIAG64) * 9


def test_square_ones_start_in_float64_unless_an_earlier_spectrum_asks_for_less():
    W = torch.linalg.qr(torch.randn(9, 16, 16)).Q
    cold = spectra(W)
    assert cold.methods == (Method.GRAM64,) * 9
    warm = spectra(W, previous=cold.S)
    assert warm.methods == (Method.GRAM32,) * 9 and ((warm.S - cold.S).abs() <= warm.bound + cold.bound).all()


@pytest.mark.parametrize("r", [33, 192])
def test_larger_squares_start_without_a_gram_matrix_unless_an_earlier_spectrum_asks_for_less(r):
    W = torch.linalg.qr(torch.randn(3, r, r)).Q
    cold = spectra(W)
    assert cold.methods == (Method.BIDIAG32,) * 3
    warm = spectra(W, previous=cold.S)
    assert warm.methods == (Method.GRAM32,) * 3 and ((warm.S - cold.S).abs() <= warm.bound + cold.bound).all()
    assert spectra(torch.randn(2, r, r + 30)).methods == (Method.GRAM32,) * 2


def test_one_tensor_and_its_matrices_give_the_same():
    W = torch.randn(2, 9, 2, 14).permute(1, 0, 3, 2)[::2]  # (5, 2, 14, 2), no stride of 1 but the rows'
    flat = W.reshape(-1, 14, 2)
    together, apart = spectra(flat), spectra(list(flat))
    assert torch.equal(together.S, apart.S) and together.methods == apart.methods
    values = sosd_fast.svdvals(W)
    assert isinstance(values, torch.Tensor) and torch.equal(values.reshape(-1, 2), together.S.float())
    expanded = torch.randn(6, 8).expand(3, 6, 8)
    assert torch.equal(spectra(expanded).S[2], spectra([expanded[0]]).S[0])


def test_threads_change_nothing():
    W = torch.randn(400, 12, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = spectra(W)
        torch.set_num_threads(2)
        assert torch.equal(spectra(W).S, one.S)
    finally:
        torch.set_num_threads(threads)
