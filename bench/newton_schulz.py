"""Newton-Schulz, 5 steps: the Gram form and the plain one, against torch.optim.Muon's iteration, interleaved."""

import math

import torch

from bench.harness import bar, finish, interleaved, interleaved_cuda, parser, show, show_card
from sosd_fast.kernels import multiplies_bfloat16
from sosd_fast.kernels.newton_schulz import COEFFICIENTS, fastest_form, iterate, newton_schulz, newton_schulz_ref
from sosd_fast.testing import matrix

CUDA_SHAPES = [(768, 768), (768, 3072), (1024, 1024), (1024, 4096), (2048, 2048), (2048, 8192)]
CUDA_BATCH = 12
CUDA_GATE = 1.5e-2  # half precision against float64
SHAPES = [(256, 256), (256, 1024), (768, 768), (768, 1536), (768, 3072), (1024, 4096)]
GATE = 2e-4  # relative in the Frobenius norm, float32 against float64, Gaussian
GATE_BFLOAT16 = 6e-2


def torch_muon(G):
    """The iteration of torch.optim.Muon, which runs in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    return _zeropower_via_newtonschulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7)


def on_cuda(repeats: int) -> dict:
    """The forms in bfloat16 on a batch, over the plain iteration by cuBLAS; errors and the band of the result."""
    triples = COEFFICIENTS["muon"] * 5
    rows, results = [], {}
    for shape in CUDA_SHAPES:
        G = torch.randn(CUDA_BATCH, *shape, device="cuda").bfloat16()
        truth = newton_schulz_ref(G[:1].double(), triples)
        variants = {
            "auto": lambda G=G: newton_schulz(G),
            "plain, cuBLAS": lambda G=G: newton_schulz_ref(G, triples),
            "plain, symmetric": lambda G=G: iterate(G, triples, 1e-7, "plain", True),
            "gram, symmetric": lambda G=G: iterate(G, triples, 1e-7, "gram", True),
            "gram, cuBLAS": lambda G=G: iterate(G, triples, 1e-7, "gram", False),
        }
        X = {name: run()[:1].double() for name, run in variants.items()}
        errors = {name: float((x - truth).norm() / truth.norm()) for name, x in X.items()}
        if max(error for name, error in errors.items() if name != "plain, cuBLAS") > CUDA_GATE:
            raise SystemExit(f"gate: {shape}: relative errors {errors} exceed {CUDA_GATE:g}")
        S, S0 = (torch.linalg.eigvalsh(Y @ Y.mT).clamp(min=0).sqrt() for Y in map(_flat, (X["auto"], G[:1].double())))
        S0 /= torch.linalg.matrix_norm(G[0].double())
        # what the coefficients promise: values above 3e-3 of the norm end between 0.68 and 1.21
        inside = bool((S < 1.21).all() and (S > 0.68).sum() >= (S0 > 3e-3).sum())
        times = interleaved_cuda(variants, repeats)
        name = f"{CUDA_BATCH}x{shape[0]}x{shape[1]}"
        r, k = min(shape), max(shape)
        flops = 5 * CUDA_BATCH * (4 * r * r * k + 2 * r**3)  # of the plain iteration
        form, symmetric = fastest_form((CUDA_BATCH, r, k), G.dtype, G.device, 5, None)
        results[name] = {n: t | {"relative_error": errors[n]} for n, t in times.items()}
        results[name] |= {"chosen": [form, symmetric], "band": [float(S.min()), float(S.max())], "in_band": inside}
        plain = times["plain, cuBLAS"]["ms"]
        rows.append(
            [name, *(f"{t['ms']:.2f}" for t in times.values()), f"{plain / times['auto']['ms']:.2f}",
             f"{flops / plain * 1e-9:.0f}", f"{errors['auto']:.0e}", f"{S.min():.2f}..{S.max():.2f}"]
        )  # fmt: skip
    columns = ["shape", *(f"{n} ms" for n in times), "x plain", "plain TFLOP/s", "error", "band"]
    show("5 steps, bfloat16", columns, rows)
    for name, result in results.items():
        _, m, n = map(int, name.split("x"))
        least = 1.6 if n == 4 * m else 1.3 if m == 2048 else 1.0
        gain = result["plain, cuBLAS"]["ms"] / result["auto"]["ms"]
        bar(f"{name}: times faster than the plain cuBLAS iteration", gain, least, at_least=True)
    bar("shapes with values outside the promised band", sum(not r["in_band"] for r in results.values()), 0)
    return results


def _flat(X):
    """The one matrix of a batch, short side first."""
    return X[0] if X.shape[-2] <= X.shape[-1] else X[0].mT


def main():
    """Gate, table, JSON."""
    p = parser(__doc__, repeats=7)
    args = p.parse_args()
    show_card()
    if torch.cuda.is_available():
        finish(
            {"benchmark": "newton_schulz", "settings": vars(args), "gate": True, "rows": on_cuda(args.repeats)},
            args.json,
        )
        return
    rows, results = [], {}
    for shape in SHAPES:
        G = matrix("gaussian", *shape)
        truth = newton_schulz(G.double(), method="plain")
        variants = {
            "auto": lambda G=G: newton_schulz(G),
            "gram": lambda G=G: newton_schulz(G, method="gram"),
            "plain": lambda G=G: newton_schulz(G, method="plain"),
        }
        if multiplies_bfloat16():
            variants["bfloat16"] = lambda G=G: newton_schulz(G, dtype=torch.bfloat16)
        if hasattr(torch.optim, "Muon"):
            variants["torch.optim.Muon"] = lambda G=G: torch_muon(G)
        errors = {name: float((run().double() - truth).norm() / truth.norm()) for name, run in variants.items()}
        half = errors.get("bfloat16", 0.0)
        if max(errors["auto"], errors["gram"], errors["plain"]) > GATE or half > GATE_BFLOAT16:
            raise SystemExit(f"gate: {shape}: relative errors {errors} exceed {GATE:g}, {GATE_BFLOAT16:g} in bfloat16")
        times = interleaved(variants, args.repeats)
        muon = times.get("torch.optim.Muon", {}).get("ms", math.nan)
        gain = f"{muon / times['bfloat16']['ms']:.2f}" if "bfloat16" in times else ""
        results["x".join(map(str, shape))] = {name: times[name] | {"relative_error": errors[name]} for name in variants}
        rows.append(
            [
                "x".join(map(str, shape)),
                *(f"{times[name]['ms']:.2f}" for name in variants),
                f"{times['plain']['ms'] / times['auto']['ms']:.2f}",
                gain,
                f"{errors['auto']:.0e}",
                f"{half:.0e}" if half else "",
            ]
        )
    columns = ["shape", *(f"{name} ms" for name in variants), "plain / auto", "torch / bfloat16"]
    columns += ["error", "in bfloat16"]
    show("5 steps, float32; in bfloat16 torch.optim.Muon and, where the CPU multiplies it, our Muon", columns, rows)
    finish({"benchmark": "newton_schulz", "settings": vars(args), "gate": True, "rows": results}, args.json)


if __name__ == "__main__":
    main()
