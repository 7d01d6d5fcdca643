"""Launches that cover every Triton kernel, each with what its result errs by, and faults to plant in them."""

import contextlib
import functools
import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import interleaved
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.compile_report import around_cublas, recorded, target_of
from bench.stub_gpu import Launch, launches, put_on
from sosd_fast.kernels import drift
from sosd_fast.kernels.chase import chase
from sosd_fast.kernels.distribution import singular_distribution, singular_distribution_ref
from sosd_fast.kernels.eigh import eigh, eigh_ref
from sosd_fast.kernels.leading import leading_step, leading_step_ref
from sosd_fast.kernels.newton_schulz import newton_schulz
from sosd_fast.kernels.sturm import sturm, sturm_ref
from sosd_fast.kernels.syrk import syrk, syrk_ref
from sosd_fast.kernels.tridiagonal import tridiagonal
from sosd_fast.spectra.svdvals import spectra

TARGET = target_of("90")
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Edit = Callable[[str], str]

# ---- launches


def normal(*shape: int, dtype=FLOAT32) -> Tensor:
    """Gaussian numbers on the stub, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=FLOAT64).to(dtype).cuda()


def symmetric(*shape: int, dtype=FLOAT32) -> Tensor:
    """Gram matrices."""
    X = normal(*shape[:-1], shape[-1] + 3, dtype=FLOAT64)
    return (X @ X.mT).to(dtype)


def diagonal(n: int, dtype=FLOAT32) -> Tensor:
    """A nearly diagonal matrix."""
    return (
        torch.diag_embed(torch.linspace(-1, 2, n, dtype=dtype).cuda())[None]
        + 1e-5 * symmetric(1, n, n, dtype=dtype) / n
    )


def plain(t: Tensor) -> Tensor:
    """On the CPU, in float64."""
    return t.cpu().double()


def error(found: Tensor, truth: Tensor) -> float:
    """The largest one, relative to the largest entry."""
    return float((plain(found) - plain(truth)).abs().max() / plain(truth).abs().max())


def reduction(A: Tensor, programs: int | None = None, band_from: int | None = None) -> float:
    """Of the eigenvalues of T."""
    d, e = map(plain, tridiagonal(A, programs=programs, band_from=band_from))
    T = torch.diag_embed(d) + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    return error(torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(plain(A)))


def factored(A: Tensor, rows: int, width: int, once: bool) -> float:
    """The same by bands, whose panels are read as those of larger matrices are."""
    passes = {"ROWS": rows, "WIDTH": width, "ONCE": once}
    with put_on(sys.modules["sosd_fast.kernels.band"], {"_passes": lambda *_: passes}):
        return reduction(A, 1, band_from=1)


def chased(B: int, r: int, programs: int) -> float:
    """Of the eigenvalues of T, for bands by few programs to a matrix."""
    band = torch.zeros(B, r + 64, 64, dtype=FLOAT64).cuda()
    A = symmetric(B, r, r, dtype=FLOAT64).tril(32).triu(-32)
    for j in range(r):
        column = A[:, j : j + 33, j]
        band[:, j, : column.shape[1]] = column
    d, e = map(plain, chase(band, r, programs, many=False))
    T = torch.diag_embed(d) + torch.diag_embed(e[:, : r - 1], 1) + torch.diag_embed(e[:, : r - 1], -1)
    return error(torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(plain(A)))


def eigenproblems(A: Tensor) -> float:
    """Of V^T diag(values) V."""
    values, vectors = map(plain, eigh(A))
    return error(vectors.mT @ (values[..., None] * vectors), A)


def bisection(r: int, dtype: torch.dtype, *, few: bool = True) -> float:
    """Of eigenvalues, from rows that lie apart in memory; of few matrices or as of many."""
    d, e = normal(2, 2 * r, dtype=dtype)[:, ::2], normal(2, r, dtype=dtype)[:, 1:]
    with put_on(sys.modules["sosd_fast.kernels.sturm"], {} if few else {"SCHEDULERS": 0}):
        return error(sturm(d, e), sturm_ref(plain(d), plain(e)))


def singular_values(dtype: torch.dtype, method: str, *shapes: tuple[int, int]) -> float:
    """Of the singular values of matrices with one short side."""
    Ws = [normal(*shape, dtype=dtype) for shape in shapes]
    S = spectra(Ws, method).S
    return max(error(S[i], torch.linalg.svdvals(plain(W))) for i, W in enumerate(Ws))


def by_bands(*arguments) -> float:
    """The same, of matrices that are reduced by way of bands."""
    module = sys.modules["sosd_fast.kernels.tridiagonal"]
    with put_on(module, {"BAND_FROM": dict.fromkeys(module.BAND_FROM, 1)}):
        return singular_values(*arguments)


def distributions(r: int, dtype: torch.dtype, others: int, apart: int) -> float:
    """Of p, and its statistics; from rows that lie apart in memory or not."""
    rows = [normal(3, r + apart, dtype=dtype).abs()[:, apart:] for _ in range(1 + others)]
    found, truth = singular_distribution(*rows), singular_distribution_ref(*map(plain, rows))
    return max(error(a, b) for a, b in zip(found, truth, strict=True) if a is not None)


def products(A: Tensor, C: Tensor | None = None, **factors) -> float:
    """Of alpha s^2 A A^T + beta C + shift I."""
    wide = {name: plain(value) if isinstance(value, Tensor) else value for name, value in factors.items()}
    return error(syrk(A, None, C, **factors), syrk_ref(plain(A), None, None if C is None else plain(C), **wide))


def elements(W: Tensor, scale: Tensor | None) -> float:
    """Of those of W W^T that are computed in float64."""
    found, truth = drift.products(W, scale), drift.products_ref(plain(W), None if scale is None else plain(scale))
    return max(error(a, b) for a, b in zip(found, truth, strict=True))


def polar(*shape: int, dtype: torch.dtype) -> float:
    """Of an iteration in half precision."""
    G = normal(*shape, dtype=dtype)
    return error(newton_schulz(G, steps=2), newton_schulz(plain(G), steps=2))


def around(*shape: int, dtype: torch.dtype) -> float:
    """Of one step, for which another library multiplies."""
    G = normal(*shape, dtype=dtype)
    return error(around_cublas(G), newton_schulz(plain(G), steps=1))


def step(dtype: torch.dtype, *shapes: tuple[int, int]) -> float:
    """Of the leading values after a step; its eigenproblems have cases of their own."""
    Ws = [normal(*shape, dtype=dtype) for shape in shapes]
    interleaved.ANYWHERE[:] = Ws
    n, b = min(shapes[0]), 40
    start = torch.linalg.qr(normal(n, b).cpu()).Q.mT.contiguous().cuda()
    V, norms = start.expand(len(Ws), b, n).contiguous(), torch.stack([W.double().norm() for W in Ws])
    arguments = V, 0 * V, start, norms, 4.0
    with put_on(sys.modules["sosd_fast.kernels.leading"], {"eigh": eigh_ref}):
        S = leading_step(Ws, *arguments)[0]
    truth = leading_step_ref([plain(W) for W in Ws], *(plain(x) if isinstance(x, Tensor) else x for x in arguments))[0]
    return error(S, truth)


SCALE = torch.tensor([0.5, 4.0], dtype=FLOAT64)
CASES: dict[str, tuple[Callable[[], float], float]] = {  # what its result may err by
    "reduction, shared": (lambda: max(reduction(symmetric(1, 48, 48)) for _ in range(3)), 1e-6),
    "reduction, two matrices shared": (lambda: reduction(symmetric(2, 32, 32), 2), 1e-6),
    "reduction, alone": (lambda: reduction(symmetric(2, 32, 32), 1), 1e-6),
    "bands": (lambda: reduction(symmetric(1, 100, 100), 3, band_from=1), 1e-6),
    "bands by few": (lambda: chased(2, 80, 3), 1e-13),
    "bands, a longer panel": (lambda: factored(symmetric(1, 64, 64), 16, 1024, True), 1e-6),
    "bands, a panel in turns": (lambda: factored(symmetric(1, 64, 64), 8, 1024, False), 1e-6),
    "bands, longer panels in float64": (lambda: max(factored(symmetric(1, 64, 64, dtype=FLOAT64), 8, 512, once)
                                        for once in (True, False)), 1e-13),
    "bands of spectra in float64": (lambda: max(by_bands(FLOAT32, "gram64", (r, r)) for r in (32, 37)), 1e-6),
    "bands in float64": (lambda: reduction(symmetric(2, 40, 40, dtype=FLOAT64), 1, band_from=1), 1e-13),
    "spectra": (lambda: singular_values(FLOAT32, "gram32", (32, 32), (32, 48), (48, 32), (64, 32)), 1e-5),
    "spectra, odd": (lambda: singular_values(FLOAT32, "gram32", (37, 37), (37, 74), (74, 37)), 1e-5),
    "spectra, one": (lambda: singular_values(FLOAT32, "gram32", (101, 32)), 1e-5),
    "spectra, alone": (lambda: singular_values(FLOAT32, "gram32", (16, 16), (16, 16)), 1e-5),
    "spectra in float64": (lambda: singular_values(FLOAT32, "gram64", (32, 32), (32, 48)), 1e-6),
    "spectra in float64, odd": (lambda: singular_values(FLOAT32, "gram64", (37, 37), (37, 74)), 1e-6),
    "spectra in float64, one": (lambda: singular_values(FLOAT32, "gram64", (101, 32)), 1e-6),
    "spectra in float64, alone": (lambda: singular_values(FLOAT32, "gram64", (16, 16), (16, 16)), 1e-6),
    "eigenvalues": (lambda: max(bisection(45, FLOAT32), bisection(150, FLOAT32), bisection(32, FLOAT64),
                    *(bisection(96, d, few=False) for d in (FLOAT32, FLOAT64))), 1e-6),
    "eigenproblems": (lambda: eigenproblems(symmetric(2, 21, 21)), 1e-5),
    "eigenproblems in float64": (lambda: eigenproblems(symmetric(1, 20, 20, dtype=FLOAT64)), 1e-13),
    # nearly diagonal, which takes few sweeps
    "eigenproblems of 80": (lambda: eigenproblems(diagonal(80)), 1e-5),
    "eigenproblems of 80 in float64": (lambda: eigenproblems(diagonal(80, dtype=FLOAT64)), 1e-13),
    "eigenproblems of 192": (lambda: eigenproblems(diagonal(192)), 1e-5),
    "distributions": (lambda: max(distributions(r, d, o, a) for r, d, o, a in
                      ((45, FLOAT32, 2, 1), (300, FLOAT64, 2, 1), (2100, FLOAT32, 2, 0), (2100, FLOAT64, 2, 0),
                       (48, FLOAT64, 0, 0), (16, FLOAT32, 1, 1), (528, FLOAT64, 2, 0), (528, FLOAT32, 2, 0))), 1e-6),
    "products": (lambda: max(products(normal(2, 48, 96)), products(normal(1, 70, 37)), products(normal(2, 37, 70).mT),
                 products(normal(2, 80, 96)[:, ::2, ::2], symmetric(2, 40, 40), beta=0.5, shift=2.0),
                 products(normal(2, 45, 45), scale=SCALE.cuda(), alpha=2.0)), 1e-5),
    "products, split": (lambda: products(normal(1, 16, 3100)), 1e-5),
    "products in float64": (lambda: max(elements(W, s) for d in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16) for W in
                            (normal(2, 48, 80, dtype=d), normal(2, 80, 48, dtype=d).mT, normal(2, 37, 74, dtype=d),
                             normal(2, 74, 37, dtype=d).mT) for s in (None, SCALE.cuda())), 1e-14),
    "products in float64, shared": (lambda: elements(normal(1, 5, 4200), None), 1e-14),
    "products, half precision": (lambda: max(products(W, scale=s) for d in (BFLOAT16, FLOAT16) for W in
                                 (normal(2, 48, 336, dtype=d), normal(2, 336, 144, dtype=d).mT,
                                  normal(2, 48, 128, dtype=d), normal(2, 128, 48, dtype=d).mT,
                                  normal(2, 37, 74, dtype=d), normal(2, 74, 37, dtype=d).mT)
                                 for s in (None, SCALE.cuda())), 1e-5),
    "steps": (lambda: step(FLOAT32, (48, 48), (48, 96), (96, 48)), 1e-4),
    "steps, half precision": (lambda: step(BFLOAT16, (48, 48), (48, 96), (96, 48)), 1e-4),
    "steps, odd": (lambda: max(step(d, (45, 45), (45, 90), (90, 45)) for d in (FLOAT32, BFLOAT16)), 1e-4),
    "iterations": (lambda: max(polar(2, 48, 96, dtype=FLOAT16), polar(2, 64, 128, dtype=FLOAT16),
                   polar(2, 48, 48, dtype=BFLOAT16), polar(1, 45, 45, dtype=BFLOAT16)), 2e-2),
    "iterations by cuBLAS": (lambda: max(around(2, r, 2 * r, dtype=d) for r in (80, 69)
                             for d in (FLOAT32, BFLOAT16, FLOAT16)), 2e-2),
}  # fmt: skip


def kernels() -> set[str]:
    """The Triton kernels in `kernels/`: its compiled functions that no other one calls."""
    found: dict[str, JITFunction] = {}
    for path in Path(sys.modules["sosd_fast.kernels"].__path__[0]).glob("[a-z]*.py"):
        names = vars(importlib.import_module(f"sosd_fast.kernels.{path.stem}"))
        found |= {name: each for name, each in names.items() if isinstance(each, JITFunction)}
    called = {name for each in found.values() for name in each.fn.__code__.co_names}
    return {name for name in found if name not in called}


def left_out() -> tuple[list[str], list[str]]:
    """Kernels that no case launches, and specialisations that the report compiles and no case launches."""
    torch.use_deterministic_algorithms(True)
    with launches(TARGET, "cpu") as record:
        for call, _ in CASES.values():
            with contextlib.suppress(torch.linalg.LinAlgError):  # nothing is run, so that results are NaN
                call()
    known = {launch.key for launch in record}
    compiled = [name for name, launch in recorded(TARGET, [""]) if launch.key not in known]
    return sorted(kernels() - {launch.kernel.__name__ for launch in record}), compiled


class Enough(Exception):
    """Something was found, where that is all that is asked for."""


def check(case: str, edit: Edit = str, first: bool = False) -> tuple[Counter[str], float, int]:
    """Runs a case, and tells what was found, what its result errs by, and how many launches were run."""
    texts: dict[str, str] = {}
    found: Counter[str] = Counter()
    runs = []

    def do(launch: Launch, arguments: dict):
        if launch.key not in texts:
            texts[launch.key] = edit(launch.compile(TARGET).asm["ttgir"])
        found.update(
            interleaved.run(
                launch, texts[launch.key], arguments, seed=len(runs), often=(0.1, 0.7, 0.02)[len(runs) % 3], first=first
            )
        )
        runs.append(launch)
        if first and found:
            raise Enough

    errs = math.inf
    torch.use_deterministic_algorithms(True)  # what nobody wrote is NaN
    with launches(TARGET, "cpu", do), contextlib.suppress(Enough, torch.linalg.LinAlgError):
        errs = CASES[case][0]()
    return found, errs, len(runs)


# ---- faults


def without(text: str, what: str, n: int) -> str:
    """TTGIR without the n-th line that holds something."""
    lines = text.splitlines(keepends=True)
    del lines[[i for i, line in enumerate(lines) if what in line][n]]
    return "".join(lines)


def replaced(what: str, by: str) -> Edit:
    """Puts something in another's place, which must be there."""

    def edit(text: str) -> str:
        found, count = re.subn(what, by, text)
        assert count, f"nothing to replace: {what}"
        return found

    return edit


@contextlib.contextmanager
def source(where: tuple[str, ...], what: str, by: str):
    """Changes the source of the first of some functions of a file; the others call it, and are read again too."""
    file, *functions = where
    changed, *_ = found = [getattr(sys.modules[f"sosd_fast.kernels.{file}"], name) for name in functions]
    before = changed.src
    assert what in before, f"nothing to replace: {what}"

    def put(text: str):
        changed._unsafe_update_src(text)
        for each in found:
            each.hash = None

    put(before.replace(what, by))
    try:
        yield
    finally:
        put(before)


WAIT = ("tridiagonal", "_wait", "_tridiagonal_kernel")
ACQUIRE = 'while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:\n            pass\n'
REDUCTION = ("tridiagonal", "_tridiagonal_kernel")
CHASE = ("chase", "_chase_kernel")
MORE, FEWER = "programs * (event - first_event) + 1", "programs * (event - first_event) - 1"
COUNT = "programs * (event - first_event)"
Change = tuple[tuple[str, ...], str, str]  # where, what, by what
FAULTS: dict[str, tuple[str, Edit | Change | dict, str]] = {  # case, change, what is to be found
    "the release is relaxed": ("reduction, shared", replaced("add, release", "add, relaxed"), "another program"),
    "the acquire is relaxed": ("reduction, shared", replaced("add, acquire", "add, relaxed"), "another program"),
    "nobody uses what the acquire gives": (
        "reduction, shared", (WAIT, ACQUIRE, ACQUIRE[6:-30] + "\n"), "another program"),
    "a wait for one program fewer": ("reduction, shared", (REDUCTION, COUNT, FEWER), "another program"),
    "a wait for one program more": ("reduction, shared", (REDUCTION, COUNT, MORE), "waits for ever"),
    "a chase whose release is relaxed": ("bands by few", replaced("add, release", "add, relaxed"), "another program"),
    "a chase that waits for one round fewer": (
        "bands by few", (CHASE, "turn + 2 * SWEEPS,", "turn + 2 * SWEEPS - 1,"), "another program"),
    "reads what programs write just now": (
        "reduction, shared", (REDUCTION, "y_last + part * pitch", "y_now + part * pitch"),
        "another program"),
    "two programs with one part of y": (
        "reduction, shared", (REDUCTION, "(program + 1) * pitch", "(program // 2 + 1) * pitch"), "another program"),
    "rotations by tiles that several warps hold": ("eigenproblems", {"PAIRS": 8}, "another warp"),
    "a store of one value too many": (
        "eigenvalues", (("sturm", "_sturm_kernel"), "mask=wanted < r", "mask=wanted <= r"),
        "writes values_ptr out of bounds"),
    "a load of one row too many": (
        "products", (("syrk", "_syrk_kernel"), "rows % m, columns % m", "rows % (m + 1), columns % m"),
        "reads A_ptr out of bounds"),
    "a load between rows": (
        "distributions", (("distribution", "_singular_distribution_kernel"), "S_ptr += row * r",
                          "S_ptr += row * r - 1"),
        "reads S_ptr out of bounds"),
    "a copy that is not waited for": ("products", replaced("num = 2 : i32", "num = 3 : i32"), "still on its way"),
    "a copy over what a product reads": (
        "products, half precision", replaced("pendings = 0", "pendings = 2"), "that a product still reads"),
}  # fmt: skip


def plant(name: str) -> str:
    """Plants a fault, and tells what is wrong with what is found: nothing if it is what should be."""
    case, change, wanted = FAULTS[name]
    edit = str
    with contextlib.ExitStack() as stack:
        if isinstance(change, tuple):
            stack.enter_context(source(change[0], *change[1:]))
        elif isinstance(change, dict):
            stack.enter_context(put_on(sys.modules["sosd_fast.kernels.eigh"], change))
        else:
            edit = change
        found = check(case, edit, first=True)[0]
    return "" if len(found) == 1 and wanted in str(found) else f"{wanted!r} is not in {dict(found)}"


def barriers(case: str) -> dict[str, Counter[str]]:
    """What is found without each of the barriers of a case's kernel, by the barrier's place in the code."""
    texts: list[str] = []
    check(case, lambda text: texts.append(text) or text, first=True)
    count = texts[0].count("gpu.barrier")
    return {f"{i + 1} of {count}": check(case, functools.partial(without, what="gpu.barrier", n=i), first=True)[0]
            for i in range(count)}  # fmt: skip
