"""Errors of `svdvals` against its bounds, over many random matrices of few distinct values and ordinary ones.

Truth is `torch.linalg.svdvals` in float64, and for matrices that seem to be beyond a bound one-sided Jacobi in extended
precision: LAPACK's values of a constant 1873 x 40 err by 600 units, five times what ours may. Matrices are drawn from
seeds: one beyond its bound can be drawn again.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bench.harness import card, finish, parser, show
from sosd_fast.spectra.svdvals import Spectra, spectra
from sosd_fast.testing import matrix

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDINARY = ("gaussian", "uniform", "power", "log4", "spikes", "half_zeros")
SIZES = ((48, 64), (200, 20), (640, 6))  # short side at most, long side over short at most
SHARES = (0.94, 0.055, 0.005)
LARGE = (256, 1024, 1.5)  # short side from, to; long side over short at most
BATCH = 16  # of one shape and dtype, of different kinds


def few_values(m: int, n: int, g: torch.Generator) -> dict[str, Tensor]:
    """Matrices (m, n) of few distinct values, by kind: equal products round alike, and nothing averages out."""

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def uniform(*shape):
        return torch.rand(*shape, generator=g)

    def integers(low, high):
        return torch.randint(low, high, (m, n), generator=g).float()

    c = float(uniform(1) + 0.5) * 10.0 ** int(torch.randint(-3, 3, (1,), generator=g))
    signs = torch.where(uniform(m, n) < 0.5, -1.0, 1.0)
    return {
        "signs": c * signs,
        "ternary": c * signs * (uniform(m, n) < 0.6),
        "sparse signs": c * signs * (uniform(m, n) < 0.1),
        "int4": c * integers(-8, 8),
        "int4 by rows": (uniform(m, 1) + 0.1) * integers(-7, 8),
        "int4 by columns": (uniform(1, n) + 0.1) * integers(-7, 8),
        "int8": c * integers(-127, 128),
        "mask": c * (uniform(m, n) < 0.5),
        "two values": c + c * float(uniform(1)) * (uniform(m, n) < 0.3),
        "constant": torch.full((m, n), c),
        "constant column": torch.cat([normal(m, n - 1), torch.full((m, 1), c)], 1),
        "constant row": torch.cat([normal(m - 1, n), torch.full((1, n), c)]),
        "blocks of signs": c * signs * torch.where(uniform(m, 1) < 0.5, 1.0, 0.37),
        "pattern and noise": c * torch.where(torch.arange(m)[:, None] & torch.arange(n) & 5 > 0, 1.0, -1.0)
        + 0.01 * c * normal(m, n),
        "repeated rows": normal((m + 2) // 3, n).repeat(3, 1)[:m],
        "16 levels": torch.bucketize(normal(m, n), torch.linspace(-2, 2, 15)).float() * c - 7.3 * c,
    }


def batches(
    count: int, ordinary: bool, seed: int, large: bool = False
) -> Iterator[tuple[int, torch.dtype, list[str], list[Tensor]]]:
    """Yields (seed, dtype, kinds, matrices of one shape and dtype) until `count` matrices were drawn."""
    drawn = 0
    while drawn < count:
        g = torch.Generator().manual_seed(seed)
        largest, ratio = SIZES[int(torch.multinomial(torch.tensor(SHARES), 1, generator=g))]
        least, largest, ratio = LARGE if large else (1, largest, ratio)
        r = round(least * math.exp(float(torch.rand(1, generator=g)) * math.log(largest / least)))
        K = round(r * math.exp(float(torch.rand(1, generator=g)) * math.log(ratio)))
        m, n = (r, K) if torch.rand(1, generator=g) < 0.5 else (K, r)
        dtype = DTYPES[int(torch.randint(len(DTYPES), (1,), generator=g))]
        if ordinary:
            kinds = {f"{name} {i}": matrix(name, m, n, seed=8 * seed + i) for name in ORDINARY for i in range(2)}
        else:
            kinds = few_values(m, n, g)
        names = list(kinds)[: count - drawn]
        yield seed, dtype, names, [kinds[name].to(dtype) for name in names]
        drawn += len(names)
        seed += 1


def jacobi(W: Tensor) -> Tensor:
    """Singular values of a matrix, descending, float64, by one-sided Jacobi in long double, r / 2 pairs at once.

    Raises:
        ArithmeticError: columns are not orthogonal after 60 sweeps; 2 to 4 are usual.

    Source: Hestenes 1958; Brent & Luk 1985 for the order.
    """
    A = W.double().numpy().astype(np.longdouble)
    A = A if A.shape[0] >= A.shape[1] else A.T  # (K, r)
    r, unit = A.shape[1], np.finfo(np.longdouble).eps
    V = np.linalg.svd(A.astype(np.float64), full_matrices=False)[2].T.astype(np.longdouble)
    A = A @ (1.5 * V - 0.5 * V @ (V.T @ V))  # orthogonal to `unit`: columns nearly so, which saves most sweeps
    A = np.concatenate([A, np.zeros((len(A), r % 2), A.dtype)], axis=1)  # an even number of columns
    order, square = np.arange(A.shape[1]), np.square(A).sum()
    for _ in range(60):
        rotated = False
        for _ in range(A.shape[1] - 1):
            p, q = order[: len(order) // 2], order[len(order) // 2 :][::-1]
            a, b = A[:, p], A[:, q]
            aa, bb, ab = (a * a).sum(0), (b * b).sum(0), (a * b).sum(0)
            # Columns of rounding errors alone would never become orthogonal.
            apart = (np.abs(ab) > 16 * unit * np.sqrt(aa * bb)) & (np.minimum(aa, bb) > (16 * unit) ** 2 * square)
            rotated |= bool(apart.any())
            zeta = (bb - aa) / np.where(apart, 2 * ab, 1)
            t = np.where(apart, np.where(zeta < 0, -1, 1) / (np.abs(zeta) + np.sqrt(1 + zeta * zeta)), 0)
            c = 1 / np.sqrt(1 + t * t)
            A[:, p], A[:, q] = c * (a - t * b), c * (b + t * a)
            order[1:] = np.roll(order[1:], 1)
        if not rotated:
            return torch.from_numpy(np.sort(np.sqrt((A * A).sum(0)))[::-1][:r].astype(np.float64))
    raise ArithmeticError(
        f"jacobi: expected a matrix of finite values, got W of shape {tuple(W.shape)} that turns for ever."
    )


def compare(found: Spectra, i: int, truth: Tensor, own: float) -> tuple[float, float, float]:
    """Returns (SD error, the same over its bound, the worst value's error over its bound) of one matrix.

    Args:
        found: what is judged.
        i: the place of the matrix in it.
        truth: (r,), whose error is `own`, relative to the largest value.
        own: see `truth`.
    """
    S, top = found.S[i], float(truth[0])
    if top == 0:
        return 0.0, 0.0, math.inf if S.abs().max() > 0 else 0.0
    error = float((S / S.sum() - truth / truth.sum()).norm())
    value = ((S - truth).abs() / (found.bound[i] + own * top)).max()
    return error, error / (float(found.sd_error[i]) + own), float(value)


def check(matrices: list[Tensor], method: str = "auto") -> list[tuple[str, float, float, float]]:
    """Returns (method, SD error, SD error over its bound, the worst value's error over its bound) of each matrix."""
    found = spectra(matrices, method)
    W = torch.stack(matrices).double()
    truth = torch.linalg.svdvals(W if W.shape[1] >= W.shape[2] else W.mT)
    unit = 2.0**-53
    rows = []
    for i, method in enumerate(found.methods):
        row = compare(found, i, truth[i], 4 * unit * math.sqrt(W.shape[1] + W.shape[2]))
        if max(row[1:]) > 1:
            row = compare(found, i, jacobi(matrices[i]), unit)
        rows.append((method, *row))
    return rows


def main():
    """Table, JSON; fails where a matrix is beyond a bound."""
    p = parser(__doc__.splitlines()[0])
    p.add_argument(
        "--few",
        type=int,
        default=300_000,
        help="The number of matrices of few distinct values to draw, %(default)s by default.",
    )
    p.add_argument(
        "--ordinary", type=int, default=100_000, help="The number of ordinary matrices to draw, %(default)s by default."
    )
    p.add_argument(
        "--large",
        type=int,
        default=0,
        help="The number of ordinary matrices of 256 to 1024 rows to draw, seconds each, %(default)s by default.",
    )
    p.add_argument(
        "--method",
        default="auto",
        choices=("auto", "gram32", "gram64"),
        help="How spectra are computed, %(default)s by default; only that one is to be within 1e-6.",
    )
    p.add_argument("--seed", type=int, default=0, help="The seed of the first batch, %(default)s by default.")
    args = p.parse_args()
    print("  ".join(f"{k} {v}" for k, v in card().items() if v))
    torch.set_num_threads(1)  # small matrices
    worst: dict[str, list] = defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0, 0])
    beyond, largest, began = [], 0.0, time.perf_counter()
    most = 1e-6 if args.method == "auto" else math.inf
    for ordinary, count, large in ((False, args.few, False), (True, args.ordinary, False), (True, args.large, True)):
        for seed, dtype, kinds, matrices in batches(count, ordinary, args.seed, large):
            for kind, W, (method, error, sd, value) in zip(kinds, matrices, check(matrices, args.method), strict=True):
                row = worst[kind.rstrip(" 01")]
                row[0] += 1
                row[1], row[2], row[3] = max(row[1], error), max(row[2], sd), max(row[3], value)
                row[4] += method == "gram32"
                largest = max(largest, error)
                if sd > 1 or value > 1 or error > most:
                    row[5] += 1
                    beyond.append([seed, kind, list(W.shape), str(dtype)[6:], method, error, sd, value])
    columns = ["kind", "matrices", "SD error", "over its bound", "a value's", "in float32", "beyond"]
    table = [
        [kind, n, f"{e:.1e}", f"{sd:.2f}", f"{value:.2f}", f"{quick / n:.0%}", out]
        for kind, (n, e, sd, value, quick, out) in worst.items()
    ]
    show("worst of each kind", columns, table)
    for row in beyond[:20]:
        print("beyond:", *row)
    total = args.few + args.ordinary + args.large
    print(f"{len(beyond)} of {total} beyond a bound or, by auto, 1e-6; largest SD error {largest:.1e}")
    finish(
        {
            "benchmark": "bounds",
            "settings": vars(args),
            "gate": not beyond,
            "seconds": round(time.perf_counter() - began),
            "rows": {kind: dict(zip(columns[1:], row, strict=True)) for kind, row in worst.items()},
            "beyond": beyond,
        },
        args.json,
    )
    if beyond:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
