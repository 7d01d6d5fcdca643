"""Gram matrices that are computed in parts: triangles of the parts, their sums, and eigenvalues of these."""

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.kernels import Backend
from sosd_fast.kernels.drift import correct, products
from sosd_fast.spectra import gram
from sosd_fast.spectra.gram import set_diagonal, triangles, whole
from sosd_fast.spectra.precision import Method
from sosd_fast.spectra.svdvals import finished, gram_eigenvalues, triangle_eigenvalues

needs_C = pytest.mark.skipif(kernels._C is None, reason="the C++ kernels are not built")
PATHS = [pytest.param("cpp", marks=needs_C), "torch"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_C", None)
        monkeypatch.setattr(kernels, "warn_missing", lambda _: None)
    return request.param


def packed(G):
    return G[..., *torch.triu_indices(G.shape[-1], G.shape[-1])].contiguous()


def summed(parts, dtype, scale=1.0):
    r = parts[0].shape[1]
    out = torch.empty(len(parts), r * (r + 1) // 2, dtype=dtype, device=parts[0].device)
    scales = torch.full((len(parts),), scale, dtype=torch.float64, device=parts[0].device)
    squares, drift = triangles(parts, scales, out)
    return out, squares, drift


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("r", "K"), [(1, 1), (1, 9), (7, 3), (16, 300), (33, 1), (48, 700), (130, 90)])
def test_triangles(path, dtype, given, r, K):
    generator = torch.Generator().manual_seed(r + K)
    parts = [torch.randn(K + more, r, generator=generator).to(given) for more in (0, 5)]
    parts.append(torch.randn(r, K, generator=generator).to(given).mT)  # as other strides
    kept = [A.clone() for A in parts]
    out, squares, drift = summed(parts, dtype, scale=0.5)
    eps = max(torch.finfo(dtype).eps, torch.finfo(given).eps if given == torch.float32 else 0)
    for A, triangle, diagonal in zip(parts, out, squares, strict=True):
        A = A.double() / 2
        norms = A.norm(dim=0)
        error = (whole(triangle[None], r)[0].double() - A.mT @ A).abs()
        assert (error <= (8 + K**0.5) * eps * norms[:, None] * norms).all()
        torch.testing.assert_close(diagonal, norms.square(), rtol=1e-14, atol=0)
    assert drift.abs().max() <= 1e-5 and all(map(torch.equal, parts, kept))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.77])
def test_equal_products_leave_no_drift(path, value):
    """Entries +-value: all products round alike, and chains of their sums drift together."""
    signs = torch.randint(0, 2, (3000, 96), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    A = value * signs
    out, squares, drift = summed([A], torch.float32)
    truth = A.double().mT @ A.double()
    G = whole(out, 96)[0].double()
    off = torch.tril(torch.ones(96, 96), -1).bool()
    left = ((G - truth)[off] * truth[off]).sum() / truth[off].square().sum()
    # Equal elements are rounded alike, by up to 6e-8: 3.1e-8 with vectors of 16 bytes, less with longer ones.
    assert left.abs() <= max(4e-8, gram.DRIFT_LEFT * float(drift.abs())), (left, drift)


@pytest.mark.parametrize("kind", ["gaussian", "signs", "constant", "steep"])
@pytest.mark.parametrize("count", [2, 5])
def test_parts_add_up_to_the_spectrum(path, kind, count):
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(400, 60, generator=generator)
    if kind == "signs":
        W = 0.3 * W.sign()
    elif kind == "constant":
        W = torch.full_like(W, 0.3) + 0.01 * W
    elif kind == "steep":
        W = W * torch.logspace(0, -3, 60)
    truth = torch.linalg.svdvals(W.double())
    dtype = torch.float64 if (double := kind in ("constant", "steep")) else torch.float32
    out, squares, drift = summed(list(W.split(-(-400 // count))), dtype)
    T, total = out.sum(0, keepdim=True), squares.sum(0, keepdim=True)
    set_diagonal(T, total)
    S, left = gram.singular_values(triangle_eigenvalues(T, 60).double(), total, drift.abs().mean()[None])
    one, finite, method = torch.ones(1), torch.ones(1, dtype=torch.bool), Method.GRAM64 if double else Method.GRAM32
    S, bound, sd_error = finished(S, method, 400, Backend.TORCH, dtype, left, one, finite)
    assert ((S[0] - truth).abs() <= bound[0]).all()
    assert (S[0] / S[0].sum() - truth / truth.sum()).norm() <= sd_error[0] <= 1e-5


@needs_C
def test_torch_and_the_kernels_agree_on_what_drifts(monkeypatch):
    A = 0.1 * (torch.randint(0, 2, (3000, 64), generator=torch.Generator().manual_seed(1)) * 2.0 - 1)
    cpp = summed([A], torch.float32)[0]
    monkeypatch.setattr(kernels, "_C", None)
    monkeypatch.setattr(kernels, "warn_missing", lambda _: None)
    assert (cpp - summed([A], torch.float32)[0]).abs().max() <= 2e-6 * cpp.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [1, 2, 7, 16, 17, 33, 96, 130])
def test_eigenvalues(path, dtype, r):
    W = torch.randn(3, r, r + 5, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
    G = (W @ W.mT).to(dtype)
    G = (G + G.mT) / 2
    truth, eps = torch.linalg.eigvalsh(G.double()), torch.finfo(dtype).eps
    T = packed(G)
    kept = T.clone()
    error = (triangle_eigenvalues(T, r) - truth).abs().amax(-1) / truth[:, -1]
    assert (error <= (8 + r**0.5) * eps).all() and torch.equal(T, kept)
    assert torch.equal(whole(T, r), G)
    set_diagonal(T, torch.arange(3.0 * r).view(3, r))
    assert torch.equal(whole(T, r).diagonal(dim1=-2, dim2=-1), torch.arange(3.0 * r, dtype=dtype).view(3, r))


def test_eigenvalues_by_triton(device):
    """The reduction there reads the triangle that LAPACK and the C++ kernels do not."""
    A = torch.randn(1, 40, 21, generator=torch.Generator().manual_seed(0)).to(device)
    T = summed(list(A), torch.float32)[0]
    truth = torch.linalg.eigvalsh(A.double().mT @ A.double())
    assert ((triangle_eigenvalues(T, 21).double() - truth).abs().amax(-1) <= 1e-5 * truth[:, -1]).all()


def test_what_is_not_finite_is_alone(path):
    G = torch.eye(20).expand(4, 20, 20).clone()
    G[1, 3, 9], G[2, 19, 19] = torch.nan, torch.inf
    values = triangle_eigenvalues(packed(G), 20)
    assert path == "torch" or values[1:3].isnan().all()
    torch.testing.assert_close(values[[0, 3]].double(), torch.ones(2, 20, dtype=torch.float64), rtol=1e-7, atol=0)
    parts = [torch.full((4, 20), bad) for bad in (torch.nan, torch.inf)] + [torch.ones(4, 20)]
    out, squares, _ = summed(parts, torch.float32)
    assert torch.equal(out[2], torch.full_like(out[2], 4)) and squares[2].tolist() == [4.0] * 20


@needs_C
def test_it_does_not_depend_on_threads_or_neighbours():
    parts = list(torch.randn(5, 320, 300, generator=torch.Generator().manual_seed(0)))
    threads = torch.get_num_threads()
    T = summed(parts, torch.float32)[0]
    together = triangle_eigenvalues(T, 300)
    try:
        torch.set_num_threads(1)
        assert torch.equal(torch.cat([summed([A], torch.float32)[0] for A in parts]), T)
        assert torch.equal(torch.cat([triangle_eigenvalues(each[None], 300) for each in T]), together)
    finally:
        torch.set_num_threads(threads)


def test_whole_matrices_by_the_library():
    W = torch.randn(2, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = W @ W.mT
    torch.testing.assert_close(gram_eigenvalues(G.clone()), torch.linalg.eigvalsh(G))
    assert correct(G, products(W), 40).abs().max() <= 1e-15


DOUBLES = torch.zeros(2, 3, dtype=torch.float64)


@needs_C
@pytest.mark.parametrize(
    ("T", "values"),
    [
        (torch.zeros(2, 5), DOUBLES),
        (torch.zeros(6), DOUBLES),
        (torch.zeros(3, 6), DOUBLES),
        (torch.zeros(2, 6).half(), DOUBLES),
        (torch.zeros(6, 2).mT, DOUBLES),
        (torch.zeros(2, 6), DOUBLES.float()),
        (torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.float64)),
    ],
)
def test_others_are_refused(T, values):
    with pytest.raises(ValueError, match="expected"):
        kernels._C.gram_eigenvalues(triangles=T, values=values, threads=1)


@needs_C
@pytest.mark.parametrize(
    "changed",
    [
        {"parts": [torch.zeros(4, 3)]},
        {"parts": [torch.zeros(4, 3), torch.zeros(4, 2)]},
        {"parts": [torch.zeros(4, 3), torch.zeros(0, 3)]},
        {"parts": [torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int32)]},
        {"scale": torch.ones(2)},
        {"scale": torch.ones(3, dtype=torch.float64)},
        {"triangles": torch.zeros(2, 5)},
        {"triangles": torch.zeros(2, 6).bfloat16()},
        {"squares": torch.zeros(2, 3)},
        {"squares": torch.zeros(3, dtype=torch.float64)},
        {"drift": torch.zeros(1, dtype=torch.float64)},
    ],
)
def test_other_parts_are_refused(changed):
    given = {
        "parts": [torch.zeros(4, 3), torch.zeros(7, 3)],
        "scale": torch.ones(2, dtype=torch.float64),
        "triangles": torch.zeros(2, 6),
        "squares": DOUBLES.clone(),
        "drift": torch.zeros(2, dtype=torch.float64),
    }
    kernels._C.gram_triangles(**given, threads=1)
    with pytest.raises(ValueError, match="expected"):
        kernels._C.gram_triangles(**given | changed, threads=1)
