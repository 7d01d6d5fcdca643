"""The leading 32 singular values, warm, against all of them by torch.linalg.svdvals, interleaved, error beside time."""

import torch

from bench.harness import card, finish, interleaved, parser, show
from sosd_fast.testing import matrix
from sosd_fast.topk import VARIANTS, topk_svdvals

SHAPES = [(256, 256), (256, 1024), (768, 768), (768, 3072)]
BATCH = 4  # matrices a call
GATE = 2e-2  # relative; Gaussian spectra, the hardest, after 20 steps of a random drift


class Drift:
    """Matrices that move a little at every call, as in training, and their leading values."""

    def __init__(self, shape, k, variant):
        self.W = [matrix("gaussian", *shape, seed=i) for i in range(BATCH)]
        self.V = [1e-3 * matrix("gaussian", *shape, seed=i + BATCH) for i in range(BATCH)]
        self.k, self.variant, self.state, self.S = k, variant, None, None

    def move(self):
        for W, V in zip(self.W, self.V, strict=True):
            W.add_(V)

    def __call__(self):
        self.S, _, self.state = topk_svdvals(self.W, self.k, state=self.state, variant=self.variant)

    def error(self):
        truth = torch.stack([torch.linalg.svdvals(W.double()) for W in self.W])[:, : self.k]
        return float((self.S / truth - 1).abs().max())


def main():
    """Gate, table, JSON."""
    p = parser(__doc__)
    p.add_argument("--k", type=int, default=32, help="leading values")
    p.add_argument("--repeats", type=int, default=9, help="interleaved repetitions")
    args = p.parse_args()
    print("  ".join(f"{k} {v}" for k, v in card().items() if v))
    rows, results = [], {}
    for shape in SHAPES:
        runs = {variant: Drift(shape, args.k, variant) for variant in VARIANTS}
        for _ in range(20):
            for run in runs.values():
                run.move()
                run()
        errors = {variant: run.error() for variant, run in runs.items()}
        if errors["m"] > GATE:
            raise SystemExit(f"gate: {shape}: relative error {errors['m']:.1e} of the leading values exceeds {GATE:g}")
        tall = [W if W.shape[0] >= W.shape[1] else W.mT for W in runs["m"].W]
        times = interleaved(
            {**runs, "svdvals": lambda tall=tall: [torch.linalg.svdvals(W) for W in tall]}, args.repeats
        )
        name = "x".join(map(str, shape))
        results[name] = {v: {"ms": times[v]["ms"] / BATCH, "relative_error": errors.get(v, 0.0)} for v in times}
        cells = [f"{times['svdvals']['ms'] / times[v]['ms']:.1f}  {errors[v]:.0e}" for v in VARIANTS]
        rows.append([name, f"{times['svdvals']['ms'] / BATCH:.1f}", f"{times['m']['ms'] / BATCH:.2f}", *cells])
    columns = ["shape", "svdvals ms", "m ms", *(f"{v}: x, error" for v in VARIANTS)]
    show(f"k = {args.k}, {BATCH} drifting Gaussian matrices a call; x over svdvals, upright", columns, rows)
    finish({"benchmark": "topk", "settings": vars(args), "gate": True, "rows": results}, args.json)


if __name__ == "__main__":
    main()
