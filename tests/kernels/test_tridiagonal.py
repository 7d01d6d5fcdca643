import contextlib
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from every import EVERY

from sosd_fast import kernels
from sosd_fast.kernels import Backend, triton
from sosd_fast.kernels.tridiagonal import tridiagonal, tridiagonal_all, tridiagonal_ref
from sosd_fast.testing import SPECTRA, matrix

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def gram(name, r, dtype=torch.float64, device="cpu", seed=0):
    W = matrix(name, r, r + 3, dtype=torch.float64, seed=seed)
    G = W @ W.mT
    return ((G + G.mT) / 2).to(device, dtype)


def tridiagonal_exact(A):
    """The reduction in extended precision, for float64 matrices: LAPACK's own errors are ten times the kernel's."""
    A = A.cpu().numpy().astype(np.longdouble)
    for j in range(len(A) - 2):
        v = A[j + 1 :, j].copy()
        beta = -np.copysign(np.sqrt(v @ v), v[0])
        v[0] -= beta
        v *= np.sqrt(2 / (v @ v)) if v.any() else 0
        trailing = A[j + 1 :, j + 1 :]
        p = (trailing * v).sum(1)
        w = p - (p @ v) / 2 * v
        trailing -= np.outer(v, w) + np.outer(w, v)
        A[j + 1, j] = beta
    return A.diagonal(), A.diagonal(-1)


def eigenvalues(d, e):
    """Those of a tridiagonal matrix, by bisection in extended precision."""
    d, e = np.asarray(d, np.longdouble), np.asarray(e, np.longdouble)
    radius = np.abs(np.append(e, 0)) + np.abs(np.insert(e, 0, 0))
    low, high = np.full(len(d), (d - radius).min()), np.full(len(d), (d + radius).max())
    for _ in range(70):
        x, below, q = (low + high) / 2, 0, 1.0
        for d_i, square in zip(d, np.insert(e * e, 0, 0), strict=True):
            q = d_i - x - square / np.where(q == 0, np.longdouble(1e-300), q)
            below = below + (q < 0)
        left = below > np.arange(len(d))
        low, high = np.where(left, low, x), np.where(left, x, high)
    return (low + high) / 2


def assert_same_eigenvalues(d, e, A, stages=1):
    """Backward error: a few eps |A| a reflector at most, and they average out: 1 to 3 where r is 64 to 531.

    Flat spectra err by 27 units at 256, and in two stages by 37 (LOG.md#two-stages-on-gpus).
    """
    if A.dtype == torch.float64:
        truth = eigenvalues(*tridiagonal_exact(A))
    else:
        truth = torch.linalg.eigvalsh(A.double()).cpu().numpy()
    error = np.abs(eigenvalues(d.cpu().numpy(), e.cpu().numpy()) - truth).max()
    units = error / (EPS[A.dtype] * max(np.abs(truth).max(), 1e-300))
    assert units <= (4 + 2 * A.shape[-1] ** 0.5) * (1.5 if stages == 2 else 1), units


# Sides, and programs to a matrix. 16 is a panel, and what sides are padded to a multiple of. The interpreter takes
# minutes for the last ones: `make check` runs them. Types differ in rounding alone: each has one of the larger sizes.
SIZES = [(1, 1), (2, 1), (3, 1), (16, 1), (3, 3)]
CASES = [(64, 1, torch.float32), (45, 3, torch.float64)]
if EVERY:
    SIZES += [(45, 1), (45, 3), (64, 1), (64, 3), (200, 1), (200, 3), (531, 1), (531, 3)]
    CASES = []
CASES += [(*size, dtype) for size in SIZES for dtype in EPS]


@pytest.mark.parametrize(("r", "programs", "dtype"), CASES, ids=str)
def test_eigenvalues_survive(device, r, programs, dtype):
    A = gram("gaussian", r, dtype, device)
    before = A.clone()
    d, e = tridiagonal(A, programs=programs)
    assert d.shape == (r,) and e.shape == (r - 1,) and d.dtype == e.dtype == dtype
    assert_same_eigenvalues(d, e, A)
    assert torch.equal(A, before)
    if programs == 1:
        assert_same_eigenvalues(*tridiagonal_ref(A), A)


@pytest.mark.parametrize("name", ["zero", "rank_one", "half_zeros", "repeated", "log10", "spikes"])
def test_special_spectra(device, name):
    A = gram(name, 10, torch.float32, device)
    assert_same_eigenvalues(*tridiagonal(A), A)


def test_several_programs_share_a_matrix(device):
    A = gram("gaussian", 18, torch.float32, device)  # more than one panel
    d, e = tridiagonal(A, programs=3)
    assert_same_eigenvalues(d, e, A)
    if device == "cuda":  # where programs run at once
        again = tridiagonal(A, programs=3)
        assert torch.equal(d, again[0]) and torch.equal(e, again[1])


def test_programs_of_an_event_do_not_depend_on_their_order(device, monkeypatch):
    """In the interpreter they run one after the other, so that a race would show as a dependence on the order."""
    if device == "cuda":
        pytest.skip("needs the interpreter")
    A = gram("gaussian", 18, torch.float64)
    expected = tridiagonal(A, programs=3)
    builder = triton.runtime.interpreter.interpreter_builder
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z, put=builder.set_grid_idx: put(x, builder.grid_dim[1] - 1 - y, z)
    )
    found = tridiagonal(A, programs=3)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_programs_read_nothing_that_others_write_meanwhile(device, monkeypatch):
    """Between two waits a program may read what it wrote itself, as others did alike, and what nobody writes."""
    if device == "cuda":
        pytest.skip("needs the interpreter")
    module, builder = sys.modules["sosd_fast.kernels.tridiagonal"], triton.runtime.interpreter.interpreter_builder
    read, written = defaultdict(set), defaultdict(set)  # of programs, addresses

    def watched(name, found):
        do = getattr(builder, name)

        def access(ptrs, *rest):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            found[builder.grid_idx[1]].update(ptrs.data[mask.data.astype(bool)].tolist())
            return do(ptrs, *rest)

        monkeypatch.setattr(builder, name, access)

    class Watched:
        events = 0

        def __getitem__(self, grid, kernel=module._tridiagonal_kernel):
            def launch(**arguments):
                read.clear()
                written.clear()
                kernel[grid](**arguments)
                Watched.events += 1
                for program in range(grid[1]):
                    others = set().union(*(written[other] for other in range(grid[1]) if other != program))
                    assert not (read[program] & others) - written[program], arguments["first_event"]

            return launch

    watched("create_masked_load", read)
    watched("create_masked_store", written)
    monkeypatch.setattr(module, "_tridiagonal_kernel", Watched())
    A = gram("gaussian", 40, torch.float32)
    assert_same_eigenvalues(*tridiagonal(A, programs=3), A)
    assert Watched.events == 42  # 40 columns, and 2 updates


def test_sides_that_this_kernel_takes():
    class Cuda:
        is_cuda = True

        def __init__(self, *shape):
            self.shape = shape

    for r, backend in ((2048, Backend.TRITON), (4096, Backend.TRITON), (8192, Backend.TRITON), (8193, Backend.TORCH)):
        assert kernels.backend_of("tridiagonal", Cuda(3, r, r)) is backend


def test_how_many_programs(monkeypatch):
    module = sys.modules["sosd_fast.kernels.tridiagonal"]
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def programs(B, r, dtype=torch.float32):
        return module._programs(B, r, dtype, torch.device("cuda", 0))

    assert module.PER_SM == {torch.float32: 4, torch.float64: 3}
    assert programs(72, 768) == 7 and programs(72, 768, torch.float64) == 5 and programs(300, 64) == 1
    assert programs(1, 1) == 1 and programs(1, 64) == 2 and programs(1, 4096) == 31 and programs(1, 768) == 18
    with monkeypatch.context() as several:
        several.setattr(torch.distributed, "is_initialized", lambda: True)
        several.setattr(torch.distributed, "get_world_size", lambda: 8)
        assert programs(9, 768) == 7 and programs(72, 768) == 1  # on half of the multiprocessors at most
        several.setattr(torch.distributed, "get_world_size", lambda: 1)
        assert programs(72, 768) == 7
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert programs(9, 768) == 1


def test_programs_that_wait_are_launched_in_turn(monkeypatch):
    module = sys.modules["sosd_fast.kernels.turns"]
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"the launch on {self.name}"

    def launch(device, stream):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(stream))
        with module._in_turn(torch.device("cuda", device)):
            assert module._lock.locked()
            said.append(f"{stream} launches")

    monkeypatch.setattr(module, "_launched", {})
    for device, stream in ((0, "first"), (0, "second"), (1, "third"), (0, "first")):
        launch(device, stream)
    with pytest.raises(RuntimeError), module._in_turn(torch.device("cuda", 1)):
        raise RuntimeError("refused")
    assert not module._lock.locked() and module._launched[torch.device("cuda", 1)] == "the launch on third"
    assert said == [
        "first launches",
        "second waits for the launch on first",
        "second launches",
        "third launches",
        "first waits for the launch on second",
        "first launches",
        "first waits for the launch on third",
    ]


def test_a_refused_cooperative_launch_is_made_alone(device, monkeypatch, caplog):
    module, turns = (sys.modules[f"sosd_fast.kernels.{name}"] for name in ("tridiagonal", "turns"))

    class Cuda(torch.Tensor):
        is_cuda = True

    class Refusing:
        def __getitem__(self, grid, kernel=module._tridiagonal_kernel):
            def launch(launch_cooperative_grid=False, **arguments):
                if launch_cooperative_grid:
                    raise RuntimeError("too many blocks in cooperative launch")
                return kernel[grid](**arguments)

            return launch

    A = gram("gaussian", 32, torch.float32, device)
    alone = tridiagonal(A, programs=1)
    monkeypatch.setattr(module, "_tridiagonal_kernel", Refusing())
    if device == "cpu":
        monkeypatch.setattr(turns, "_in_turn", contextlib.nullcontext)
    turns._warn_alone.cache_clear()
    for _ in range(2):
        found = module._launch(A.clone()[None].as_subclass(Cuda), 32, 3)
        assert torch.equal(found[0][0], alone[0]) and torch.equal(found[1][0, :-1], alone[1])
    assert sum("several programs to a matrix" in message for message in caplog.messages) == 1
    turns._warn_alone.cache_clear()


def test_only_one_triangle_is_read(device):
    A = gram("gaussian", 10, torch.float32, device)
    d, e = tridiagonal(A.triu() + torch.full_like(A, torch.nan).tril(-1))
    whole = tridiagonal(A)
    assert torch.equal(d, whole[0]) and torch.equal(e, whole[1])


def test_batches_strides_and_nan(device):
    A = torch.stack([gram("gaussian", 6, torch.float32, device, seed) for seed in range(4)]).reshape(2, 2, 6, 6)
    d, e = tridiagonal(A)
    assert d.shape == (2, 2, 6) and e.shape == (2, 2, 5)
    for view in (A.mT, torch.stack([A, A], -1)[..., 0]):
        found = tridiagonal(view)
        assert torch.equal(found[0], d) and torch.equal(found[1], e)
    A[0, 1, 2, 4] = A[0, 1, 4, 2] = torch.nan
    d2, e2 = tridiagonal(A.clone(), overwrite=True)
    assert (d2[0, 1].isnan().any() or e2[0, 1].isnan().any()) and torch.equal(d2[1], d[1]) and torch.equal(e2[1], e[1])
    assert torch.equal(d2[0, 0], d[0, 0])
    assert tridiagonal(A[:0])[0].shape == (0, 2, 6)


@pytest.mark.parametrize(
    ("r", "dtype"),
    [(3, torch.float32), (45, torch.float64), (64, torch.float32)]
    + [(r, dtype) for r in (1, 2, 33, 45, 64, 200, 531) for dtype in EPS] * EVERY,
    ids=str,
)
def test_two_stages(device, r, dtype):
    A = gram("gaussian", r, dtype, device)
    d, e = tridiagonal(A.triu() + torch.full_like(A, torch.nan).tril(-1), band_from=1)
    assert d.shape == (r,) and e.shape == (r - 1,) and d.dtype == e.dtype == dtype
    assert_same_eigenvalues(d, e, A)


def test_what_has_several_dtypes_is_chased_at_once(device, monkeypatch):
    module, chased = sys.modules["sosd_fast.kernels.tridiagonal"], []
    batches = [torch.stack([gram(name, 45, dtype, device) for name in ("gaussian", "flat")]) for dtype in EPS]
    expected = [tridiagonal(A, band_from=1) for A in batches]
    monkeypatch.setattr(module, "chase", lambda *a, do=module.chase: chased.append(len(a[0])) or do(*a))
    for sides, times in (((46, 45), [2]), ((45, 45), [4])):  # of the dtypes: what is below goes one by one
        monkeypatch.setattr(module, "BAND_FROM", dict(zip(EPS, sides, strict=True)))
        del chased[:]
        found = tridiagonal_all([A.clone() for A in batches])
        assert chased == times
        for i, ((d, e), A) in enumerate(zip(found, batches, strict=True)):
            assert d.shape == (2, 45) and e.shape == (2, 44) and d.dtype == e.dtype == A.dtype
            if sides[i] == 45:
                assert torch.equal(d, expected[i][0]) and torch.equal(e, expected[i][1])
            for j in range(2):
                assert_same_eigenvalues(d[j], e[j], A[j], stages=2)


def test_special_spectra_in_two_stages(device):
    names = ["half_zeros", "flat"] + [name for name in SPECTRA if EVERY]
    A = torch.stack([gram(name, 66 if EVERY else 34, torch.float32, device) for name in [*names, "gaussian"]])
    A[-1, 3, 5] = A[-1, 5, 3] = torch.nan
    d, e = tridiagonal(A, band_from=1)
    for i in range(len(names)):
        assert_same_eigenvalues(d[i], e[i], A[i], stages=2)
    assert d[-1].isnan().any() or e[-1].isnan().any()


def test_by_way_of_bands_from_some_side_on(monkeypatch):
    """Where an H100 gains; `gram_eigenvalues`, and so all spectra of CUDA tensors, ask for no other."""
    module = sys.modules["sosd_fast.kernels.tridiagonal"]
    went = []

    class Reached(Exception):
        pass

    def reached(way):
        def instead(*_):
            went.append(way)
            raise Reached

        return instead

    monkeypatch.setattr(kernels, "interpreted", True)
    monkeypatch.setattr(module.band, "banded", reached("two"))
    monkeypatch.setattr(module, "_launch", reached("one"))
    for dtype, side in module.BAND_FROM.items():
        for r in (side - 1, side, 2048):
            with pytest.raises(Reached):
                tridiagonal(torch.zeros((), dtype=dtype).expand(r, r), overwrite=True)
    assert went == ["one", "two", "two"] * 2


def test_how_many_programs_chase(monkeypatch):
    module = sys.modules["sosd_fast.kernels.chase"]
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid[1], arguments["SWEEPS"], arguments["COOPERATIVE"]))

    class Cuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "_chase_kernel", Kernel())
    monkeypatch.setattr(sys.modules["sosd_fast.kernels.turns"], "_in_turn", contextlib.nullcontext)

    def chases(B, r):
        module.chase(torch.empty(1, 1, 1, dtype=torch.float64).expand(B, r + 64, 64).as_subclass(Cuda), r)
        return launched.pop()

    assert module.PER_SM == 8
    assert chases(16, 4096) == (65, 1, True) and chases(1, 4096) == (65, 1, True)  # as many as find work
    assert chases(300, 2048) == (3, 1, True) and chases(600, 2048) == (1, 4, False)
    with monkeypatch.context() as several:
        several.setattr(torch.distributed, "is_initialized", lambda: True)
        several.setattr(torch.distributed, "get_world_size", lambda: 8)
        assert chases(16, 4096) == (4, 4, True)  # half of the multiprocessors, four sweeps each
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chases(16, 4096) == (1, 4, False)
