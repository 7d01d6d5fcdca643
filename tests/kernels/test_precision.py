"""The precision of float32 products: taken in float32 by us, and torch's settings as they were afterwards."""

import itertools
import threading

import pytest
import torch

from sosd_fast.kernels import full_precision, precision
from sosd_fast.spectra.topk import topk_svdvals

needs_backends = pytest.mark.skipif(not precision._BY_BACKEND, reason="torch < 2.9 has one setting")
KEYS = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul")]
KEYS += [("mkldnn", "conv"), ("mkldnn", "rnn")]
CHOICES = [
    ("none", "ieee", "tf32", "bf16"),
    *[("none", "ieee", "tf32")] * 2,
    *[("none", "ieee", "tf32", "bf16")] * 2,
]


def get(key):
    return torch._C._get_fp32_precision_getter(*key)


def put(key, value):
    torch._C._set_fp32_precision_setter(*key, value)


def readings():
    """What is in force now, and would be after any later change of a setting above the operations'."""
    found = [[get(key) for key in KEYS]]
    for later in ("ieee", "tf32", "none"):
        put(("generic", "all"), later)
        found.append([get(key) for key in KEYS])
    for backend in ("cuda", "mkldnn"):
        put((backend, "all"), "ieee")
        found.append([get(key) for key in KEYS])
        put((backend, "all"), "tf32")
        found.append([get(key) for key in KEYS])
    return found


def reset():
    """Makes every setting what a fresh process has; other tests, and torch's older setter, leave their own."""
    torch.set_float32_matmul_precision("highest")  # which writes newer settings as well: they are put back after it
    if precision._BY_BACKEND:
        for key in KEYS:
            put(key, "none")


@pytest.fixture(autouse=True)
def settings():
    """Gives each test the settings of a fresh process, and leaves them so."""
    reset()
    yield
    reset()


def inside(backend):
    """Enters it for a backend; for "cuda" without a GPU, which torch.autocast would warn of."""
    return full_precision("cpu") if backend == "cpu" else precision._PINS[backend].held()


@needs_backends
@pytest.mark.parametrize("backend", ["cpu", "cuda", "mkldnn"])
def test_every_combination_of_settings_is_as_it_was(backend):
    for values in itertools.product(*CHOICES):
        expected = []
        for entered in (False, True):
            for key, value in zip(KEYS, values, strict=False):
                put(key, value)
            if entered:
                before = [get(key) for key in KEYS]
                with inside(backend), inside(backend):
                    if backend == "cpu":
                        assert [get(key) for key in KEYS] == before
                    else:
                        assert get((backend, "matmul")) in ("ieee", "none")
                assert [get(key) for key in KEYS] == before
                assert readings() == expected, values
            else:
                expected = readings()


@needs_backends
def test_a_later_global_setting_reaches_every_backend():
    torch.backends.fp32_precision = "tf32"
    topk_svdvals(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), 2)
    with precision._PINS["cuda"].held():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "mkldnn"])
def test_the_older_setting_is_as_it_was(backend, legacy):
    torch.set_float32_matmul_precision(legacy)
    with pytest.raises(RuntimeError, match="ours"), inside(backend), inside(backend):
        raise RuntimeError("ours")
    assert torch.get_float32_matmul_precision() == legacy
    assert torch.backends.cuda.matmul.allow_tf32 == (legacy != "highest")


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_threads_that_overlap(backend):
    """The first one in leaves first, while the others still need full precision."""
    torch.set_float32_matmul_precision("medium")
    pin, seen, faults = precision._PINS[backend], [], []
    entered, leave = threading.Barrier(5), [threading.Event() for _ in range(4)]

    def measure(i):
        try:
            with pin.held():
                entered.wait(60)
                leave[i].wait(60)
                seen.append(precision._is_full(backend))
        except Exception as fault:  # noqa: BLE001
            faults.append(fault)

    threads = [threading.Thread(target=measure, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    entered.wait(60)
    for event, thread in zip(leave, threads, strict=True):
        event.set()
        thread.join(60)
    assert not faults and seen == [True] * 4
    assert torch.get_float32_matmul_precision() == "medium" and not precision._is_full(backend)


def test_many_threads_leave_the_setting():
    torch.set_float32_matmul_precision("medium")
    W = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))

    def measure():
        for _ in range(20):
            topk_svdvals(W, 3)
            with precision._PINS["cuda"].held():
                pass

    threads = [threading.Thread(target=measure) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.get_float32_matmul_precision() == "medium"


@needs_backends
def test_another_thread_on_the_cpu_keeps_its_setting_while_we_measure():
    put(("mkldnn", "matmul"), "bf16")
    seen = []
    with full_precision("cpu"):
        thread = threading.Thread(target=lambda: seen.append(get(("mkldnn", "matmul"))))
        thread.start()
        thread.join(60)
    assert seen == ["bf16"]


@needs_backends
def test_a_setting_made_meanwhile_is_kept():
    put(("cuda", "matmul"), "tf32")
    with precision._PINS["cuda"].held():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_products_do_not_depend_on_the_setting():
    """Every kind of product of float32 tensors on the CPU, against float64; bfloat16 would err by 4e-3."""
    torch.set_float32_matmul_precision("medium")
    own = torch.Generator().manual_seed(0)
    A, B, v = (torch.randn(*s, generator=own) for s in ((2, 64, 64), (2, 64, 64), (64,)))
    a, b, w = A.double(), B.double(), v.double()
    with full_precision("cpu"):
        out = torch.empty(64, 64)
        buffer = torch.ones(64, 64)
        found = [A @ B, A[0] @ B[0], A[0] @ v, torch.mm(A[0], B[0], out=out), torch.baddbmm(A, A, B, beta=2, alpha=3)]
        found += [torch.addmm(A[0], A[0], B[0]), torch.einsum("bij,bkj->bik", A, B), buffer.addmm_(A[0], B[0])]
        assert found[3] is out and found[7] is buffer and (a @ b).dtype == torch.float64
        assert (A[0].bfloat16() @ B[0].bfloat16()).dtype == torch.bfloat16
    truth = [a @ b, a[0] @ b[0], a[0] @ w, a[0] @ b[0], 2 * a + 3 * a @ b, a[0] + a[0] @ b[0], a @ b.mT]
    truth.append(1 + a[0] @ b[0])
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x, y.float(), rtol=1e-6, atol=1e-6)
