"""Random matrices of every dtype, layout, scale and special value through the four functions for tensors.

Each call must raise nothing, give values within the bounds that its docstring states, NaN for the matrices that hold
NaN or Inf and for no others, and leave its input as it was, bit by bit. Truth is float64, of the matrix divided by a
power of two, which is exact. Inputs are drawn from seeds: one beyond its bound can be drawn again.
"""

import contextlib
import functools
import itertools
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import sosd_fast
from bench.harness import card, finish, parser, show
from sosd_fast import kernels
from sosd_fast.kernels.newton_schulz import HALF, newton_schulz_ref, triples_of
from sosd_fast.testing import SPECTRA, matrix

wide = functools.partial(torch.promote_types, torch.float32)  # the dtype of the values of matrices of a dtype
DTYPES = {torch.float64: (-320, 308), torch.float32: (-44, 38), torch.bfloat16: (-40, 38), torch.float16: (-7, 4)}
LAYOUTS = (
    "contiguous", "transposed", "columns apart", "rows apart", "offset", "flipped", "equal rows", "equal columns",
    "one number", "batch last", "equal batch",
)  # fmt: skip
SPECIAL = (
    "NaN", "Inf", "-Inf", "one NaN matrix", "one entry", "zeros", "-0", "subnormal", "spread", "largest", "signs",
)  # fmt: skip
SLACK = 4 * 2.0**-53  # of the truth, times sqrt(m + n), relative to its largest value
ROUND = 1024  # inputs that the processes are given at a time
# What newton_schulz states, relative to |X|_F, whatever the spectrum.
POLAR = {torch.float64: 1e-10, torch.float32: 2e-2, torch.bfloat16: 2e-1, torch.float16: 5e-2}


class Input(NamedTuple):
    """A matrix or a batch of them, and the memory that it lies in."""

    W: Tensor  # (..., m, n)
    memory: Tensor
    layout: str
    special: str

    def __str__(self):
        return f"{self.layout}, {self.special}, {tuple(self.W.shape)}, {str(self.W.dtype)[6:]}"


def draw(seed: int) -> Input:
    """Draws an input."""
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    dtype = list(DTYPES)[rng.integers(4)]
    largest = 120 if rng.random() < 0.02 else 24
    m, n = (round(math.exp(rng.random() * math.log(largest))) for _ in range(2))
    if rng.random() < 0.02:
        m, n = [(0, n), (m, 0), (0, 0)][rng.integers(3)]
    batch = [(), (), (1,), (3,), (2, 2), (3, 3), (0,)][rng.integers(7)]
    special = SPECIAL[rng.integers(len(SPECIAL))] if rng.random() < 0.4 else "none"
    exponent = rng.uniform(*DTYPES[dtype]) * math.log2(10) if rng.random() < 0.6 else 0.0
    name = ("gaussian", "uniform", *SPECTRA)[rng.integers(2 + len(SPECTRA))]
    values = torch.empty(math.prod(batch), m, n, dtype=torch.float64)
    for i in range(len(values) if values.numel() else 0):
        values[i] = matrix(name, m, n, dtype=torch.float64, seed=seed + i)
    values = changed(scaled(values, int(exponent)), special, dtype, rng).to(dtype)
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    return Input(*laid_out(values.reshape(*batch, m, n), layout, rng), layout, special)


def changed(X: Tensor, special: str, dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    """Puts special values into matrices (B, m, n) of float64 that a dtype is to hold."""
    if not X.numel():
        return X
    limits, X = torch.finfo(dtype), X.clone()
    at = tuple(int(rng.integers(side)) for side in X.shape)
    tiny = limits.smallest_normal * limits.eps  # the smallest number above 0
    if special in ("NaN", "Inf", "-Inf"):
        X[at] = float(special)
    elif special == "one NaN matrix":
        X[0] = math.nan
    elif special == "one entry":
        X = torch.zeros_like(X).index_put_(tuple(torch.tensor([i]) for i in at), X[at].reshape(1))
    elif special in ("zeros", "-0"):
        X = torch.full_like(X, float(special.replace("zeros", "0")))
    elif special == "subnormal":
        X = tiny * torch.randint(-9, 10, X.shape).double()
    elif special == "spread":
        X = torch.randn(X.shape).sign().double() * torch.from_numpy(10.0 ** rng.uniform(*DTYPES[dtype], X.shape))
    elif special == "largest":
        X = limits.max * torch.randint(-1, 2, X.shape).double()
    elif special == "signs":
        X = float(X.abs().max()) * torch.randn(X.shape).sign().double()
    return X


def laid_out(X: Tensor, layout: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Returns X (..., m, n) in a layout, and the memory around it, in which what is not X is NaN."""
    *batch, m, n = X.shape

    def within(shape, view) -> tuple[Tensor, Tensor]:
        memory = torch.full((math.prod(shape) + 8,), math.nan, dtype=X.dtype)
        offset = int(rng.integers(8)) if layout == "offset" else 0
        found = view(memory[offset : offset + math.prod(shape)].view(shape))
        found.copy_(X)
        return found, memory

    if layout in ("equal rows", "equal columns", "one number", "equal batch") and X.numel():
        few = {"equal rows": X[..., :1, :], "equal columns": X[..., :1], "one number": X[..., :1, :1]}
        memory = (few[layout] if layout in few else X[:1]).contiguous()
        return memory.expand(X.shape), memory
    if layout == "transposed":
        return within((*batch, n, m), lambda a: a.mT)
    if layout == "columns apart":
        return within((*batch, m, 2 * n), lambda a: a[..., 1::2])
    if layout == "rows apart":
        return within((*batch, 3 * m, n), lambda a: a[..., 1::3, :])
    if layout == "batch last" and batch:
        return within((m, n, *batch), lambda a: a.permute(*range(2, a.ndim), 0, 1))
    if layout == "flipped":
        flipped = X.flip(-2, -1)
        return flipped, flipped
    return within(tuple(X.shape), lambda a: a)


class Truth(NamedTuple):
    """What is known of a finite matrix in float64, divided by 2^exponent."""

    X: Tensor  # (m, n), whose largest entry is near 1
    exponent: int
    S: Tensor  # (r,)
    slack: float

    def near_one(self, T: Tensor | float) -> Tensor:
        """What stands beside the matrix, divided by the same power of two."""
        return scaled(torch.as_tensor(T, dtype=torch.float64), -self.exponent)

    @classmethod
    def of(cls, W: Tensor) -> "Truth":
        """Computes it."""
        exponent = math.frexp(float(W.double().abs().max()))[1]
        X = scaled(W, -exponent)
        S = torch.linalg.svdvals(X if X.shape[0] >= X.shape[1] else X.mT)
        return cls(X, exponent, S, SLACK * math.sqrt(sum(X.shape)) * float(S[0]))


def scaled(T: Tensor, exponent: int) -> Tensor:
    """T times 2^exponent in float64: exact, but for what becomes subnormal, or too large."""
    with np.errstate(over="ignore", under="ignore"):
        return torch.as_tensor(np.ldexp(T.double().numpy(), exponent))


def bits(T: Tensor) -> Tensor:
    """The same memory as integers, of which NaN equals itself."""
    return T.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[T.dtype.itemsize])


def over(error: Tensor, bound: Tensor | float) -> float:
    """The largest error over its bound; infinite where either is no number."""
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(ratio.nan_to_num(math.inf).max()) if ratio.numel() else 0.0


def of_svdvals(W: Tensor, truths: list[Truth | None], rng: np.random.Generator) -> float:
    """The errors of `svdvals` over their bounds, and of SD over 1e-6 where the method promises that."""
    method = ("auto", "auto", "auto", "gram32", "gram64", "exact")[rng.integers(6)]
    S, bound = sosd_fast.svdvals(W, method=method, return_bound=True)
    assert S.shape == bound.shape == (*W.shape[:-2], min(W.shape[-2:])) and S.dtype == wide(W.dtype)
    worst, limits = 0.0, torch.finfo(S.dtype)
    for s, b, truth in zip(S.reshape(-1, S.shape[-1]), bound.reshape(-1, S.shape[-1]), truths, strict=True):
        if truth is None:
            assert s.isnan().all(), "no NaN"
            continue
        assert (s[:-1] >= s[1:]).all() and (s >= 0).all()
        fits = truth.S < truth.near_one(limits.max) * (1 - 1e-6)  # others are infinite
        found, given = (truth.near_one(t[fits]) for t in (s, b))
        worst = max(worst, over((found - truth.S[fits]).abs(), given + truth.slack))
        total = float(truth.S.sum())
        tiny = truth.near_one(limits.smallest_normal * limits.eps)
        if method == "auto" and fits.all() and float(tiny) * len(s) < 1e-8 * total:  # no subnormal values
            worst = max(worst, over((found / found.sum() - truth.S / total).norm(), 1e-6))
    return worst


def of_topk(W: Tensor, truths: list[Truth | None], rng: np.random.Generator) -> float:
    """How far the squares of leading values lie above the true ones, over 4000 eps; and how far a value from any."""
    r = min(W.shape[-2:])
    k, more = int(rng.integers(1, max(r, 1) + 1)), int(rng.integers(0, 9))
    found = sosd_fast.topk_svdvals(W, k, n_oversamples=more)
    if rng.random() < 0.5:
        found = sosd_fast.topk_svdvals(W, k, n_oversamples=more, state=found.state)
    assert found.S.shape == found.residual.shape == (*W.shape[:-2], k) and found.S.dtype == wide(W.dtype)
    worst, limits = 0.0, torch.finfo(found.S.dtype)
    for s, residual, truth in zip(found.S.reshape(-1, k), found.residual.reshape(-1, k), truths, strict=True):
        if truth is None:
            assert s.isnan().all(), "no NaN"
            continue
        assert (s[:-1] >= s[1:]).all() and (s >= 0).all()
        if float(truth.S[0]) >= float(truth.near_one(limits.max)) * (1 - 1e-6):
            continue
        s, residual = truth.near_one(s), truth.near_one(residual)
        rounding = float(truth.near_one(limits.smallest_normal * limits.eps))
        allowed = 4000 * limits.eps * float(truth.S[0]) ** 2
        true = truth.S[:k]
        limit = allowed / ((true.square() + allowed).sqrt() + true) + truth.slack + rounding
        worst = max(worst, over((s - true).clamp(min=0), limit))
        near = residual + allowed / (s + (s.square() + allowed).sqrt()) + rounding
        worst = max(worst, over((s[:, None] - truth.S).abs().amin(1), near))
    return worst


def of_distribution(W: Tensor, _: list[Truth | None], rng: np.random.Generator) -> float:
    """The errors of the variation over 1e-15, and of the rest over 1e-13 of itself, in more than float64."""
    dtype = wide(W.dtype)
    S = W.to(dtype).abs()  # rows of any numbers will do as spectra
    previous = S.flip(-1) if rng.random() < 0.5 else (S * float(rng.uniform(0.5, 2))).nan_to_num(0, 0, 0)
    reference = torch.rand_like(S)
    given = [t.clone() for t in (S, previous, reference)]
    d = sosd_fast.singular_distribution(S, previous, reference)
    for before, after in zip(given, (S, previous, reference), strict=True):
        assert torch.equal(bits(before), bits(after)), "changed its input"
    x, q, z = (t.double().numpy().astype(np.longdouble) for t in given)
    with np.errstate(all="ignore"):
        p, q = x / x.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        difference = p - q
        cosine = (p * z).sum(-1) / np.sqrt((p**2).sum(-1) * (z**2).sum(-1))
        expected = {
            "variation_l2": np.sqrt((difference**2).sum(-1)), "variation_linf": np.abs(difference).max(-1),
            "variation_l1": np.abs(difference).sum(-1), "cosine": cosine, "nuclear_norm": x.sum(-1),
            "frobenius_norm": np.sqrt((x**2).sum(-1)), "sigma_max": x.max(-1), "sigma_min": x.min(-1),
            "stable_rank": (p**2).sum(-1) / p.max(-1) ** 2,
            "participation_ratio": (p**2).sum(-1) ** 2 / (p**4).sum(-1),
            "spectral_entropy": -(p * np.log(np.where(p > 0, p, 1))).sum(-1),
        }  # fmt: skip
    worst, finite, some = 0.0, np.isfinite(x).all(-1), x.max(-1) > 0
    for f, value in expected.items():
        got = getattr(d, f).numpy()
        assert np.isnan(got[~finite]).all(), f"{f} of NaN"
        if f not in ("nuclear_norm", "frobenius_norm", "sigma_max", "sigma_min"):
            assert np.isnan(got[finite & ~some]).all(), f"{f} of zeros"
        holds = finite & some & (np.abs(value) < np.finfo(np.float64).max)
        error = np.abs(got[holds] - value[holds]).astype(np.float64)
        absolute = 1e-15 if f.startswith("variation_l2") or f.endswith("inf") else 1e-15 * x.shape[-1]
        size = np.abs(value[holds]).astype(np.float64)
        bound = absolute if f.startswith("variation") else np.maximum(1e-13 * size, 5e-324 if "norm" in f else 1e-15)
        worst = max(worst, over(torch.from_numpy(error), torch.as_tensor(bound)))
    return worst


def of_newton_schulz(W: Tensor, truths: list[Truth | None], rng: np.random.Generator) -> float:
    """The error of `newton_schulz` over what it states; in half precision, how far values leave its polynomial's range.

    Half precision has no bound on the error: where the polynomial is steep, rounding moves values within its range.
    """
    name, steps = ("muon", "polar_express")[rng.integers(2)], int(rng.integers(1, 7))
    method = ("auto", "plain", "gram")[rng.integers(3)]
    X = sosd_fast.newton_schulz(W, steps=steps, coefficients=name, method=method)
    assert X.shape == W.shape and X.dtype == W.dtype
    if not X.numel():
        return 0.0
    worst, tolerance = 0.0, POLAR[W.dtype]
    triples, half = triples_of(steps, name, 1e-7), W.dtype in HALF
    for found, truth in zip(X.flatten(0, -3) if X.ndim > 2 else [X], truths, strict=True):
        if truth is None:
            assert found.isnan().all(), "no NaN"
            continue
        eps = float(truth.near_one(1e-7))
        near = min(eps, 1e300)  # beyond it the smallest matrices are, on which the iteration is linear
        T, found = newton_schulz_ref(truth.X, triples, near) * (near / eps), found.double()
        if half:
            error, bound = torch.linalg.matrix_norm(found, 2), largest_value(triples) * (1 + tolerance)
        else:
            error, bound = (found - T).norm(), tolerance * T.norm() + torch.finfo(W.dtype).tiny
        worst = max(worst, over(error, bound))
    return worst


@functools.cache
def largest_value(triples: tuple[tuple[float, float, float], ...]) -> float:
    """The largest value that the iteration takes on [0, 1]."""
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for a, b, c in triples:
        x = x * (a + x.square() * (b + c * x.square()))
    return float(x.abs().max())


FUNCTIONS = {
    "svdvals": of_svdvals, "topk_svdvals": of_topk, "singular_distribution": of_distribution,
    "newton_schulz": of_newton_schulz,
}  # fmt: skip


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Takes torch's operations instead of the C++ kernels, as where no compiler was there."""
    compiled, kernels._C = kernels._C, None
    try:
        yield
    finally:
        kernels._C = compiled


def check(seed: int) -> tuple[Input, dict[str, float | str]]:
    """Draws an input and calls all functions; returns it, and of each the worst error over its bound, or what failed.

    An empty matrix has no spectrum: the functions that say so must refuse it in a sentence.
    """
    given = draw(seed)
    W, result = given.W, {}
    matrices = list(W.flatten(0, -3)) if W.ndim > 2 else [W]
    truths = [Truth.of(A) if bool(A.isfinite().all()) else None for A in matrices if A.numel()]
    before = bits(given.memory).clone()
    for i, (name, function) in enumerate(FUNCTIONS.items()):
        no_spectrum = {"newton_schulz": False, "singular_distribution": not W.shape[-1]}.get(name, 0 in W.shape[-2:])
        with by_torch() if seed % 10 == 0 else contextlib.nullcontext():
            try:
                result[name] = function(W, truths, np.random.default_rng([seed, i]))
                if no_spectrum:
                    result[name] = "took an empty matrix"
            except Exception as error:
                refused = no_spectrum and type(error) is ValueError and str(error).startswith(f"{name}: expected ")
                result[name] = "refused" if refused else f"{type(error).__name__}: {error}"
        if not torch.equal(before, bits(given.memory)):
            result[name] = "changed its input"
            bits(given.memory).copy_(before)
    return given, result


def checked(seed: int) -> tuple[int, dict[str, str | int], dict[str, float | str]]:
    """`check`, and what was drawn in words."""
    given, result = check(seed)
    words = {"layout": given.layout, "special": given.special, "dtype": str(given.W.dtype)[6:], "input": str(given)}
    return math.prod(given.W.shape[:-2]), words, result


def alone():
    """Prepares a process: matrices are small, and a tenth of the inputs does without the C++ kernels, on purpose."""
    torch.set_num_threads(1)
    kernels.log.setLevel("ERROR")


def main():
    """Table, JSON; fails where an input raised, changed or is beyond a bound."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--matrices", type=int, default=50_000, help="Draws at least so many, %(default)s by default.")
    p.add_argument("--seed", type=int, default=0, help="The seed of the first input, %(default)s by default.")
    p.add_argument("--jobs", type=int, default=2, help="The number of processes, %(default)s by default.")
    args = p.parse_args()
    print("  ".join(f"{k} {v}" for k, v in card().items() if v), flush=True)
    rows = {name: Counter() for name in FUNCTIONS}
    worst = {name: {str(dtype)[6:]: 0.0 for dtype in DTYPES} for name in FUNCTIONS}
    drawn, failures, inputs, matrices, began = Counter(), [], 0, 0, time.perf_counter()
    with multiprocessing.get_context("forkserver").Pool(args.jobs, alone) as pool:
        rounds = (range(first, first + ROUND) for first in itertools.count(args.seed, ROUND))
        for count, words, result in itertools.chain.from_iterable(pool.imap(checked, seeds, 16) for seeds in rounds):
            drawn.update(f"{what} {words[what]}" for what in ("layout", "special", "dtype"))
            for name, found in result.items():
                if isinstance(found, float):
                    kind = "within" if found <= 1 else "beyond"
                    worst[name][words["dtype"]] = max(worst[name][words["dtype"]], found)
                else:
                    kind = found if found in ("refused", "changed its input") else "raised"
                rows[name][kind] += 1
                if kind not in ("within", "refused"):
                    failures.append([args.seed + inputs, name, words["input"], found])
                    print("failed:", *failures[-1], flush=True)
            inputs, matrices = inputs + 1, matrices + count
            if matrices >= args.matrices:
                break
    kinds = ["within", "refused", "raised", "changed its input", "beyond"]
    table = {name: {kind: n[kind] for kind in kinds} | worst[name] for name, n in rows.items()}
    shown = [[name, *(f"{v:.2f}" if isinstance(v, float) else v for v in row.values())] for name, row in table.items()]
    show("inputs, and the worst error over its bound by dtype", ["function", *kinds, *worst["svdvals"]], shown)
    print(f"{len(failures)} failures in {inputs:,} inputs of {matrices:,} matrices")
    finish(
        {
            "benchmark": "robustness",
            "settings": vars(args),
            "gate": not failures,
            "seconds": round(time.perf_counter() - began),
            "inputs": inputs,
            "matrices": matrices,
            "drawn": dict(sorted(drawn.items())),
            "rows": table,
            "failures": failures[:100],
        },
        args.json,
    )
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
