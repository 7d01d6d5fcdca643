"""All singular values on this machine: the C++ kernels against torch and SciPy, interleaved, error beside time."""

import scipy.linalg
import torch

from bench.harness import card, finish, interleaved, parser, show
from sosd_fast.svdvals import spectra
from sosd_fast.testing import matrix, sd_distance

SHAPES = [
    (64, 64),
    (256, 256),
    (256, 1024),
    (512, 512),
    (768, 768),
    (768, 3072),
    (1024, 1024),
    (1280, 5120),
    (2048, 2048),
]
BATCH = 4  # matrices a call, as a probe has them
SETS = {  # the body of a model: (shape, how many)
    "gpt2-small": [((768, 768), 48), ((768, 3072), 24)],
    "llama-0.5b": [((1280, 1280), 60), ((1280, 5120), 45)],
}


def upright(W):
    """The orientation that torch.linalg.svdvals is faster in."""
    return W if W.shape[0] >= W.shape[1] else W.mT


def variants(Ws, slow):
    """The contenders on a list of matrices of one shape."""
    m, n = Ws[0].shape
    G = [W.float() @ W.float().mT if m <= n else W.float().mT @ W.float() for W in Ws]
    runs = {
        "sosd_fast": lambda: spectra(Ws),
        "torch svdvals": lambda: [torch.linalg.svdvals(upright(W).float()) for W in Ws],
        "eigvalsh of the Gram": lambda: [torch.linalg.eigvalsh(g) for g in G],
    }
    if slow:
        runs["SciPy svdvals"] = lambda: [scipy.linalg.svdvals(upright(W).float().numpy()) for W in Ws]
    return runs


def main():
    """Gate, table, JSON."""
    p = parser(__doc__)
    p.add_argument("--repeats", type=int, default=5, help="interleaved repetitions")
    p.add_argument("--largest", type=int, default=1024, help="leave out shapes with a longer short side")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    p.add_argument("--sets", action="store_true", help="also one layer each of whole models, and their sum")
    args = p.parse_args()
    dtype = getattr(torch, args.dtype)
    print("  ".join(f"{k} {v}" for k, v in card().items() if v))

    A = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / (interleaved({"mm": lambda: A @ A}, 10)["mm"]["ms"] * 1e-3)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s in float32, what the floor is taken from")
    rows, results = [], {}
    shapes = [shape for shape in SHAPES if min(shape) <= args.largest]
    for m, n in shapes:
        Ws = [matrix("gaussian", m, n, seed=i, dtype=dtype) for i in range(BATCH)]
        found = spectra(Ws)
        errors = [sd_distance(S, torch.linalg.svdvals(upright(W).double())) for S, W in zip(found.S, Ws, strict=True)]
        error = max(errors)
        if error > 1e-6 or any(e > limit for e, limit in zip(errors, found.sd_error.tolist(), strict=True)):
            raise SystemExit(f"gate: {m}x{n}: SD errors {errors} against bounds {found.sd_error.tolist()}")
        times = {k: v["ms"] / BATCH for k, v in interleaved(variants(Ws, min(m, n) <= 256), args.repeats, 1).items()}
        r, k = min(m, n), max(m, n)
        floor = 1e3 * (r * r * k + 4 / 3 * r**3) / rate
        ours = times["sosd_fast"]
        results[f"{m}x{n}"] = times | {"floor_ms": floor, "sd_error": error, "methods": sorted(set(found.methods))}
        rows.append(
            [
                f"{m}x{n}",
                f"{ours:.2f}",
                *(f"{times[name] / ours:.1f}" if name in times else "" for name in list(times)[1:3]),
                f"{times['SciPy svdvals'] / ours:.1f}" if "SciPy svdvals" in times else "",
                f"{floor / ours:.2f}",
                f"{error:.1e}",
                "+".join(sorted(set(found.methods))),
            ]
        )
    columns = ["shape", "ms each", "x svdvals", "x eigvalsh(G)", "x SciPy", "floor/time", "SD error", "precision"]
    show(f"{args.dtype}, {BATCH} Gaussian matrices a call; svdvals in its faster orientation", columns, rows)

    result = {"benchmark": "svdvals", "settings": vars(args), "gate": True, "rows": results}
    if args.sets:
        rows, result["sets"] = [], {}
        for name, groups in SETS.items():
            total = {}
            for (m, n), count in groups:
                Ws = [matrix("gaussian", m, n, seed=i, dtype=dtype) for i in range(2)]
                for variant, time in interleaved(variants(Ws, False), 3, 1).items():
                    total[variant] = total.get(variant, 0) + time["ms"] / 2 * count
            result["sets"][name] = total
            rows.append([name, *(f"{ms:.0f}" for ms in total.values())])
        show("whole models, ms, from two matrices of each shape", ["model", *total], rows)
    finish(result, args.json)


if __name__ == "__main__":
    main()
