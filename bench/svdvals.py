"""All singular values on this machine: our kernels against the libraries, interleaved, error beside time."""

import importlib.util

import torch

from bench.harness import (
    attempted_cuda,
    bar,
    finish,
    interleaved,
    interleaved_cuda,
    parser,
    show,
    show_card,
    true_svdvals,
    upright,
)
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.syrk import syrk
from sosd_fast.kernels.tridiagonal import tridiagonal
from sosd_fast.spectra.svdvals import spectra
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
        import scipy.linalg

        runs["SciPy svdvals"] = lambda: [scipy.linalg.svdvals(upright(W).float().numpy()) for W in Ws]
    return runs


def best_driver(W):
    """The fastest of cuSOLVER's drivers for torch.linalg.svdvals, and its ms for one matrix."""
    runs = {d: lambda d=d: torch.linalg.svdvals(upright(W), driver=d) for d in ("gesvd", "gesvdj", "gesvda")}
    times = {}
    for driver, run in runs.items():
        try:
            times[driver] = interleaved_cuda({driver: run}, 2, 1)[driver]["ms"]
        except RuntimeError as error:
            print(f"svdvals with {driver}: {error}")
    return min(times.items(), key=lambda item: item[1])


def body(model: str) -> list[torch.Tensor]:
    """A model's matrices, on the GPU, by shape."""
    torch.manual_seed(0)
    return [torch.randn(m, n, device="cuda") for (m, n), count in SETS[model] for _ in range(count)]


def on_cuda(model: str, repeats: int) -> dict:
    """A model's body at once: the whole, its stages, and the libraries on the same Gram matrices."""
    groups = SETS[model]
    Ws = body(model)
    truth = {i: true_svdvals(Ws[i]) for i in {W.shape: i for i, W in enumerate(Ws)}.values()}
    variants = {
        "sosd_fast, float32": lambda: spectra(Ws, "gram32"),
        "sosd_fast, float64": lambda: spectra(Ws, "gram64"),
    }
    errors = {}
    for name, run in variants.items():
        found = run()
        sd_errors = {i: sd_distance(found.S[i].cpu(), S) for i, S in truth.items()}
        errors[name] = max(sd_errors.values())
        if errors[name] > 1e-6 or any(error > found.sd_error[i] for i, error in sd_errors.items()):
            raise SystemExit(f"gate: {model}, {name}: SD errors {sd_errors}")

    def gram():
        return torch.cat([syrk(torch.stack([W for W in Ws if W.shape == shape])) for shape, _ in groups])

    def by_cupy():
        import cupy

        return cupy.linalg.eigvalsh(cupy.from_dlpack(G))

    G = gram()
    d, e = tridiagonal(G)
    stages = {
        "gram": gram,
        "tridiagonal": lambda: tridiagonal(G),
        "sturm": lambda: sturm(d, e),
        "copy of the Gram matrices": lambda: G.clone(),  # a part of the time of tridiagonal
    }
    for programs in (1, 2, 3, 4):
        if programs * len(G) <= 2 * torch.cuda.get_device_properties(0).multi_processor_count:
            stages[f"tridiagonal, {programs} to a matrix"] = lambda n=programs: tridiagonal(G, programs=n)
    times = interleaved_cuda(variants | stages, repeats)
    ours = times["sosd_fast, float32"]["ms"]
    # before what may take too long
    print(", ".join(f"{name} {t['ms']:.2f} ms" for name, t in times.items()), flush=True)
    libraries = {}
    if torch.__version__ >= (2, 12):
        libraries["torch eigvalsh of the Gram"] = lambda: torch.linalg.eigvalsh(G)
    if importlib.util.find_spec("cupy"):
        libraries["CuPy eigvalsh of the Gram"] = by_cupy
    found = attempted_cuda(libraries)
    times |= found
    if "CuPy eigvalsh of the Gram" in found:
        S = torch.from_dlpack(by_cupy()).flip(-1).clamp(min=0).sqrt()
        errors["CuPy eigvalsh of the Gram"] = max(sd_distance(S[i].cpu(), truth[i]) for i in truth)
    best = {shape: best_driver(next(W for W in Ws if W.shape == shape)) for shape, _ in groups}
    looped = f"torch svdvals, one by one, {'/'.join(driver for driver, _ in best.values())}"
    times[looped] = {"ms": sum(best[shape][1] * count for shape, count in groups)}
    floor = 1e3 * 4 * sum(min(W.shape) ** 3 for W in Ws) / 6 / 4.3e12
    rows = [
        [
            name,
            f"{t['ms']:.2f}",
            f"{t['low']:.2f}..{t['high']:.2f}" if "low" in t else "",
            f"{t['ms'] / ours:.1f}",
            f"{errors[name]:.1e}" if name in errors else "",
        ]
        for name, t in times.items()
    ]
    title = f"{model}, {len(Ws)} matrices; to read a triangle of each once a column takes {floor:.1f} ms at 4.3 TB/s"
    show(title, ["", "ms", "20..80 %", "x float32", "SD error"], rows)
    bar(f"{model}: all values, ms", ours, 10)
    if found:
        fastest = min(found, key=lambda name: times[name]["ms"])
        bar(f"{model}: times faster than {fastest}", times[fastest]["ms"] / ours, 3, at_least=True)
    bar(f"{model}: times faster than {looped}", times[looped]["ms"] / ours, 100, at_least=True)
    bar(f"{model}: SD error", errors["sosd_fast, float32"], 1e-6)
    return {k: t | ({"sd_error": errors[k]} if k in errors else {}) for k, t in times.items()} | {"floor_ms": floor}


def main():
    """Gate, table, JSON."""
    p = parser(__doc__, repeats=5)
    p.add_argument(
        "--largest",
        type=int,
        default=1024,
        help="The longest short side of a shape that is measured, in rows or columns, %(default)s by default.",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="The dtype of the weights, %(default)s by default.",
    )
    p.add_argument("--sets", action="store_true", help="Measures the bodies of whole models, too; off by default.")
    args = p.parse_args()
    dtype = getattr(torch, args.dtype)
    show_card()

    if torch.cuda.is_available():
        sets = {model: on_cuda(model, args.repeats) for model in (SETS if args.sets else ["gpt2-small"])}
        finish({"benchmark": "svdvals", "settings": vars(args), "gate": True, "sets": sets}, args.json)
        return
    A = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / (interleaved({"mm": lambda: A @ A}, 10)["mm"]["ms"] * 1e-3)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s in float32, torch.mm of 1024 x 1024")
    rows, results = [], {}
    shapes = [shape for shape in SHAPES if min(shape) <= args.largest]
    for m, n in shapes:
        Ws = [matrix("gaussian", m, n, seed=i, dtype=dtype) for i in range(BATCH)]
        found = spectra(Ws)
        errors = [sd_distance(S, true_svdvals(W)) for S, W in zip(found.S, Ws, strict=True)]
        error = max(errors)
        if error > 1e-6 or any(e > limit for e, limit in zip(errors, found.sd_error.tolist(), strict=True)):
            raise SystemExit(f"gate: {m}x{n}: SD errors {errors} against bounds {found.sd_error.tolist()}")
        times = {k: v["ms"] / BATCH for k, v in interleaved(variants(Ws, min(m, n) <= 256), args.repeats, 1).items()}
        r, k = min(m, n), max(m, n)
        floor = 1e3 * (r * r * k + 4 / 3 * r**3) / rate
        ours = times["sosd_fast"]
        results[f"{m}x{n}"] = times | {"at_mm_rate_ms": floor, "sd_error": error, "methods": sorted(set(found.methods))}
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
    columns = ["shape", "ms each", "x svdvals", "x eigvalsh(G)", "x SciPy", "at mm rate/time", "SD error", "precision"]
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
