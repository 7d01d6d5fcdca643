"""The operations put together on a GPU; without one, on small matrices in Triton's interpreter."""

import functools
import sys
import warnings

import pytest
import torch

import sosd_fast
from sosd_fast import kernels
from sosd_fast.kernels.eigh import eigh, library
from sosd_fast.kernels.newton_schulz import fastest_form, newton_schulz_ref
from sosd_fast.spectra.gram import gram_eigenvalues
from sosd_fast.spectra.precision import SD_TOLERANCE
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.testing import assert_svdvals_close, matrix, sd_distance

native = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def truth(W):
    """On a GPU where there is one: beside others' threads LAPACK takes up to a minute there."""
    W = W.double().cpu() if not torch.cuda.is_available() or min(W.shape) < 256 else W.double().cuda()
    W = W if W.shape[0] >= W.shape[1] else W.mT
    return torch.linalg.svdvals(W, driver="gesvd" if W.is_cuda else None).cpu()


@functools.cache
def gaussian(shape, dtype, seed):
    W = matrix("gaussian", *shape, dtype=dtype, seed=seed)
    return W, truth(W)


@pytest.fixture
def forbid_waiting():
    """Makes whatever waits for the device an error, as far as torch notices."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "shape"), [("gaussian", (5, 9)), ("log4", (7, 6))])
def test_spectra_meet_their_bounds(device, name, shape, dtype):
    matrices = [matrix(name, *shape, dtype=dtype).to(device)]
    for method, eps in (("gram32", 2.0**-24), ("gram64", 2.0**-53)):
        if method == "gram32" and dtype == torch.float64:
            continue
        found = spectra(matrices, method)
        assert found.methods == (method,) and found.S.device.type == device
        for i, W in enumerate(matrices):
            limit = found.bound[i]
            assert_svdvals_close(found.S[i], truth(W), eps=eps**0.5, size=max(shape), limit=limit)
            assert sd_distance(found.S[i].cpu(), truth(W)) <= found.sd_error[i]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (2, 2, 5, 3), (0, 3, 4)], ids=str)
def test_shapes(device, shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    before = W.clone()
    S, bound = sosd_fast.svdvals(W, return_bound=True)
    expected = torch.linalg.svdvals(W.double()) if W.numel() else S.double()
    assert S.shape == bound.shape == (*shape[:-2], min(shape[-2:])) and S.device == W.device
    assert ((S - expected).abs() <= bound).all() and torch.equal(W, before)


def test_precision_follows_from_an_earlier_spectrum(device):
    matrices = [matrix(name, 8, 16).to(device) for name in ("gaussian", "log4", "rank_one", "zero")]
    first = spectra(matrices)
    assert first.methods == ("gram64",) * 4
    second = spectra(matrices, previous=first.S.cpu())
    assert second.methods[:3] == ("gram32", "gram64", "gram64")
    for i in range(3):
        assert sd_distance(second.S[i].cpu(), truth(matrices[i])) <= max(SD_TOLERANCE, float(second.sd_error[i]))
    assert torch.equal(second.S[3], torch.zeros_like(second.S[3])) and first.S[3].sum() == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scale_and_nan(device, size):
    matrices = [matrix("gaussian", 3, 5, seed=seed).to(device) for seed in range(3)]
    expected = truth(matrices[0]) * size
    matrices[0] = matrices[0] * size
    matrices[1][1, 3] = torch.nan if size < 1 else torch.inf
    for method in ("gram32", "gram64"):
        found = spectra(matrices, method)
        torch.testing.assert_close(found.S[0].cpu(), expected, rtol=1e-4, atol=0)
        assert found.S[1].isnan().all() and found.bound[1].isnan().all() and found.sd_error[1].isnan()
        alone = spectra(matrices[2:], method).S[0]
        # cuBLAS may sum in another order for one matrix than for three
        torch.testing.assert_close(found.S[2], alone, rtol=0.0 if method == "gram32" else 1e-12, atol=0.0)


def test_chunks_agree_with_the_whole(device, monkeypatch):
    matrices = [matrix("gaussian", 5, 3, seed=seed).to(device) for seed in range(3)]
    whole = spectra(matrices, "gram32")
    several = [matrices[0], matrix("gaussian", 3, 7).to(device), matrices[2]]
    at_once = spectra(several, "gram32")
    monkeypatch.setattr(sys.modules["sosd_fast.spectra.launched"], "CHUNK_BYTES", 2 * 4 * (5 * 3 + 3 * 3))
    parts = spectra(matrices, "gram32")
    mixed = spectra(several, "gram32")
    assert torch.equal(mixed.S[::2], whole.S[::2])  # shapes with one short side go together
    assert all(torch.equal(a, b) for a, b in zip(at_once[:3], mixed[:3], strict=True))  # each in its place
    assert torch.equal(parts.S, whole.S) and torch.equal(parts.bound, whole.bound)


def test_one_reduction_takes_what_was_copied_in_chunks(device, monkeypatch):
    module, sizes = sys.modules["sosd_fast.spectra.launched"], []
    matrices = [matrix("gaussian", 5, 3, seed=seed).to(device) for seed in range(3)]
    whole = spectra(matrices, "gram32").S

    def counted(batches, do=module.gram_eigenvalues_all):
        sizes.append([len(G) for G in batches])
        return do(batches)

    monkeypatch.setattr(module, "gram_eigenvalues_all", counted)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 3 * 3)  # the Gram matrices, and copies of one matrix
    assert torch.equal(spectra(matrices, "gram32").S, whole) and sizes == [[3]]
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 4 * 3 * 3)
    assert torch.equal(spectra(matrices, "gram32").S, whole) and sizes[1:] == [[2], [1]]


def test_one_reduction_takes_both_precisions(device, monkeypatch):
    """The bands of all are chased at once, and each matrix's spectrum is the one it has alone."""
    module, sizes = sys.modules["sosd_fast.kernels.tridiagonal"], []
    matrices = [matrix("gaussian" if i % 2 else "log4", 12, 20).to(device) for i in range(4)]
    previous = spectra(matrices, "gram64").S.cpu()
    monkeypatch.setattr(module, "BAND_FROM", dict.fromkeys(module.BAND_FROM, 1))
    monkeypatch.setattr(module, "chase", lambda *a, do=module.chase: sizes.append(len(a[0])) or do(*a))
    found = spectra(matrices, previous=previous)
    assert found.methods == ("gram64", "gram32") * 2 and sizes == [4]
    for i, method in enumerate(found.methods):
        alone = spectra(matrices[i : i + 1], method)
        torch.testing.assert_close(found.S[i], alone.S[0], rtol=1e-12 if method == "gram64" else 0, atol=0)
        for name in ("bound", "sd_error"):
            torch.testing.assert_close(getattr(found, name)[i], getattr(alone, name)[0], rtol=1e-12, atol=0)


def test_sides_up_to_8192_are_reduced_by_the_kernel(device, monkeypatch):
    class Reached(Exception):
        """The kernel would have been launched."""

    def reduction(G, overwrite):
        raise Reached(G.shape[-1])

    monkeypatch.setattr(sys.modules["sosd_fast.spectra.gram"], "tridiagonal", reduction)
    for r in (2049, 4096, 8192):
        with pytest.raises(Reached, match=str(r)):
            gram_eigenvalues(torch.empty(1, 1, 1, device=device).expand(1, r, r))


def test_wider_than_the_kernels_goes_to_the_library(device, monkeypatch):
    W = matrix("gaussian", 24, 30).to(device)
    monkeypatch.setitem(kernels.LARGEST, "tridiagonal", 16)
    monkeypatch.setattr(sys.modules["sosd_fast.spectra.gram"], "tridiagonal", None)
    found = spectra([W], "gram64")
    assert sd_distance(found.S[0].cpu(), truth(W)) <= 1e-12


def test_torch_may_say_that_its_watch_for_waits_is_a_prototype():
    """What torch 2.11 and 2.13 say in `set_sync_debug_mode`, once a process, would end the test that forbids waits."""
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        stacklevel=1,
    )


def test_a_missing_triton_is_said_once(monkeypatch, caplog):
    class Cuda:
        device, is_cuda = torch.device("cuda"), True

    monkeypatch.setattr(kernels, "triton", None)
    kernels.warn_missing.cache_clear()
    assert {kernels.backend_of(op, Cuda) for op in ("svdvals", "syrk", "svdvals")} == {kernels.Backend.TORCH}
    assert sum("pip install triton" in message for message in caplog.messages) == 1
    kernels.warn_missing.cache_clear()


@native
@pytest.mark.parametrize(
    "shape", [(768, 768), (768, 3072), (3072, 768), (1024, 1024), (127, 509), (2048, 2048)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_sizes(shape, dtype):
    known = [gaussian(shape, dtype, seed) for seed in range(1 if min(shape) > 1024 else 3)]
    for method in ("gram32", "gram64"):  # the expected values take most of the time
        found = spectra([W.cuda() for W, _ in known], method)
        for S, (_, expected), bound, sd_error in zip(found.S, known, found.bound, found.sd_error, strict=True):
            assert ((S.cpu() - expected).abs() <= bound.cpu()).all()
            assert sd_distance(S.cpu(), expected) <= min(float(sd_error), SD_TOLERANCE)


def lots(S, r):
    """Matrices (4, r, r + 8) of singular values S (r,), on the GPU."""
    U, V = (torch.linalg.qr(torch.randn(4, n, r, device="cuda", dtype=torch.float64))[0] for n in (r, r + 8))
    return (U * S.cuda()) @ V.mT


@native
@pytest.mark.parametrize("r", [96, 256, 512, 768, 1280])
def test_bounds_of_kinds(r):
    """Square Gaussian matrices, whose smallest values are lost at times, and values in lots of equal ones."""
    i, one = torch.arange(r), torch.ones(r, dtype=torch.float64)
    kinds = {
        "gaussian": torch.randn(24, r, r, device="cuda"),
        "half": lots(torch.where(i < r // 2, one, 1e-3), r),
        "few and equal": lots(torch.where(i < 4, 50 * one, one), r),
        "flat": lots(one, r),
        "steps": lots(10.0 ** -(i * 3 // r).double(), r),
        "power": lots((1 + i.double()) ** -0.7, r),
    }
    for name, W in kinds.items():
        W = W.float()
        expected = torch.linalg.eigvalsh(W.double() @ W.double().mT).clamp(min=0).sqrt().flip(-1)
        found = spectra([*W], "gram32")
        assert ((found.S - expected).abs() <= found.bound).all(), name
        for S, T, error in zip(found.S, expected, found.sd_error, strict=True):
            assert sd_distance(S, T) <= error, name


@native
@pytest.mark.parametrize("r", [4096])
def test_one_large_matrix(r):
    W = torch.randn(r, r, device="cuda")
    found = spectra([W], "gram32")
    expected = torch.linalg.eigvalsh(W.double() @ W.double().mT).clamp(min=0).sqrt().flip(-1)
    assert ((found.S[0] - expected).abs() <= found.bound[0]).all()


@native
def test_programs_that_wait_run_beside_products_and_beside_others():
    """Reductions on two streams, and products on a third: what waits must not wait for ever, nor differ."""
    G = torch.randn(12, 512, 520, device="cuda")
    G, X = G @ G.mT, torch.randn(4096, 4096, device="cuda")
    expected = kernels.tridiagonal.tridiagonal(G)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        with torch.cuda.stream(streams[2]):
            for _ in range(4):
                torch.mm(X, X)
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                found.append(kernels.tridiagonal.tridiagonal(G))
    torch.cuda.synchronize()
    for d, e in found:
        assert torch.equal(d, expected[0]) and torch.equal(e, expected[1])


@native
@pytest.mark.parametrize("count", [1, 12, 72, 300])
def test_programs_of_a_matrix_wait_for_one_another(count):
    """Many times over: a race would show as a difference."""
    G = torch.randn(count, 200, 220, device="cuda")
    G = G @ G.mT
    d, e = kernels.tridiagonal.tridiagonal(G)
    expected = torch.linalg.eigvalsh(G.double())
    found = kernels.sturm.sturm(d, e)
    assert ((found - expected).abs() <= 64 * 2.0**-24 * expected[:, -1:]).all()
    for _ in range(20):
        again = kernels.tridiagonal.tridiagonal(G)
        assert torch.equal(again[0], d) and torch.equal(again[1], e)


@native
def test_nothing_waits_for_the_device(forbid_waiting):
    matrices = [torch.randn(96, 96, device="cuda") for _ in range(6)]
    previous = torch.rand(6, 96, dtype=torch.float64).sort(-1, descending=True).values + 0.1
    previous[3:] = 10.0 ** -torch.linspace(0, 6, 96, dtype=torch.float64)  # these need float64
    found = spectra(matrices, previous=previous)
    assert set(found.methods) == {"gram32", "gram64"}
    sosd_fast.svdvals(torch.stack(matrices))
    sosd_fast.singular_distribution(found.S, found.S, found.S)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leading_values_do_not_wait_either(forbid_waiting, dtype):
    W = [torch.randn(96, 96, device="cuda").to(dtype) for _ in range(3)]
    W += [torch.randn(96, 160, device="cuda").to(dtype) for _ in range(2)]
    state = sosd_fast.topk_svdvals(W, 16).state
    for _ in range(2):
        S, _, state = sosd_fast.topk_svdvals(W, 16, state=state)
    sosd_fast.topk_svdvals(torch.stack(W[:3]), 16)
    torch.cuda.set_sync_debug_mode("default")
    for found, A in zip(S, W, strict=True):
        assert ((found.cpu() / truth(A)[:16] - 1).abs() < 2e-2).all()


@native
@pytest.mark.parametrize("n", [80, 120, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_eigenproblems_at_full_size(n, dtype):
    A = torch.randn(72, n, n, device="cuda", dtype=dtype)
    A = A @ A.mT / n
    values, V = eigh(A)
    V, S = V.double(), values.double()
    eps, norm = torch.finfo(dtype).eps / 2, S[:, :1]
    assert ((V @ A.double() - S[..., None] * V).norm(dim=-1) <= 4 * n * eps * norm).all()
    assert ((V @ V.mT - torch.eye(n, device="cuda")).abs() <= 16 * eps).all()
    for _ in range(5):  # a race would show as a difference
        assert torch.equal(eigh(A)[0], values)


@native
def test_svdvals_runs_on_the_current_stream():
    W = torch.randn(4, 256, 256, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        S = sosd_fast.svdvals(W)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(W.double()), rtol=1e-5, atol=1e-5)


@native
def test_the_library_agrees():
    G = torch.randn(5, 100, 100, device="cuda", dtype=torch.float64)
    G = G @ G.mT
    torch.testing.assert_close(library("eigvalsh", G).cpu(), torch.linalg.eigvalsh(G.cpu()), rtol=1e-11, atol=1e-11)


@native
@pytest.mark.parametrize("shape", [(2, 768, 768), (2, 768, 3072), (2, 3072, 768), (512, 512), (127, 509)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_newton_schulz(shape, dtype):
    G = torch.randn(*shape, device="cuda").to(dtype)
    X = sosd_fast.newton_schulz(G)
    expected = newton_schulz_ref(G.double(), ((3.4445, -4.7750, 2.0315),) * 5)
    assert X.dtype == dtype and (X.double() - expected).norm() <= 1.5e-2 * expected.norm()
    S, S0 = torch.linalg.svdvals(X.double()), torch.linalg.svdvals(G.double())
    S0 /= torch.linalg.matrix_norm(G.double(), keepdim=True)[..., 0]
    assert (S < 1.21).all() and ((S > 0.68).sum(-1) >= (S0 > 3e-3).sum(-1)).all()
    assert fastest_form.cache_info().currsize


@native
def test_muon_follows_torch():
    pytest.importorskip("torch.optim._muon")
    torch.manual_seed(0)
    shapes = [(256, 256)] * 3 + [(256, 1024)] * 2
    start = [0.1 * torch.randn(s, device="cuda") for s in shapes]
    targets = [torch.randn_like(w) for w in start]
    ends = []
    for optimizer_class in (sosd_fast.Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = optimizer_class(weights, lr=0.02)
        for _ in range(10):
            optimizer.zero_grad()
            sum((w - t).square().mean() for w, t in zip(weights, targets, strict=True)).backward()
            optimizer.step()
        ends.append(torch.cat([w.detach().flatten() for w in weights]))
    assert (ends[0] - ends[1]).norm() <= 2e-2 * ends[1].norm()


@native
def test_precisions_that_run_side_by_side_give_the_same_every_time():
    matrices = [matrix("log4" if i % 3 else "gaussian", 768, 768, seed=i).cuda() for i in range(9)]
    previous = spectra(matrices, "gram64").S.cpu()
    first = spectra(matrices, previous=previous)
    assert set(first.methods) == {"gram32", "gram64"}
    for _ in range(20):
        again = spectra(matrices, previous=previous)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
