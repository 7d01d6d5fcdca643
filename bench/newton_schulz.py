"""Newton-Schulz, 5 steps: the Gram form and the plain one, against torch.optim.Muon's iteration, interleaved."""

import torch

from bench.harness import card, finish, interleaved, parser, show
from sosd_fast.kernels.newton_schulz import newton_schulz
from sosd_fast.testing import matrix

SHAPES = [(256, 256), (256, 1024), (768, 768), (768, 1536), (768, 3072), (1024, 4096)]
GATE = 2e-4  # relative in the Frobenius norm, float32 against float64, Gaussian


def torch_muon(G):
    """The iteration of torch.optim.Muon, which runs in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    return _zeropower_via_newtonschulz(G, (3.4445, -4.7750, 2.0315), 5, 1e-7)


def main():
    """Gate, table, JSON."""
    p = parser(__doc__)
    p.add_argument("--repeats", type=int, default=7, help="interleaved repetitions")
    args = p.parse_args()
    print("  ".join(f"{k} {v}" for k, v in card().items() if v))
    rows, results = [], {}
    for shape in SHAPES:
        G = matrix("gaussian", *shape)
        truth = newton_schulz(G.double(), method="plain")
        variants = {
            "auto": lambda G=G: newton_schulz(G),
            "gram": lambda G=G: newton_schulz(G, method="gram"),
            "plain": lambda G=G: newton_schulz(G, method="plain"),
        }
        if hasattr(torch.optim, "Muon"):
            variants["torch.optim.Muon"] = lambda G=G: torch_muon(G)
        errors = {name: float((run().double() - truth).norm() / truth.norm()) for name, run in variants.items()}
        if max(errors["auto"], errors["gram"], errors["plain"]) > GATE:
            raise SystemExit(f"gate: {shape}: relative errors {errors} exceed {GATE:g}")
        times = interleaved(variants, args.repeats)
        ours = times["auto"]["ms"]
        results["x".join(map(str, shape))] = {name: times[name] | {"relative_error": errors[name]} for name in variants}
        rows.append(
            [
                "x".join(map(str, shape)),
                *(f"{times[name]['ms']:.2f}" for name in variants),
                f"{times['plain']['ms'] / ours:.2f}",
                f"{errors['auto']:.0e}",
            ]
        )
    columns = ["shape", *(f"{name} ms" for name in variants), "plain / auto", "error"]
    show("5 steps, float32 (torch.optim.Muon: bfloat16)", columns, rows)
    finish({"benchmark": "newton_schulz", "settings": vars(args), "gate": True, "rows": results}, args.json)


if __name__ == "__main__":
    main()
