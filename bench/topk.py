"""The leading 32 singular values, warm, against all of them by torch.linalg.svdvals, interleaved, error beside time."""

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
from bench.svdvals import body
from sosd_fast.kernels.eigh import eigh
from sosd_fast.spectra.products import Products, stacks_of
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.spectra.topk import topk_svdvals
from sosd_fast.testing import matrix

SHAPES = [(256, 256), (256, 1024), (768, 768), (768, 3072)]
BATCH = 4  # matrices a call
GATE = 2e-2  # relative; Gaussian spectra, the hardest, after 20 steps of a random drift


class Drift:
    """Matrices that move a little at every call, as in training, and their leading values."""

    def __init__(self, shape, k):
        self.W = [matrix("gaussian", *shape, seed=i) for i in range(BATCH)]
        self.V = [1e-3 * matrix("gaussian", *shape, seed=i + BATCH) for i in range(BATCH)]
        self.k, self.state, self.S = k, None, None

    def move(self):
        for W, V in zip(self.W, self.V, strict=True):
            W.add_(V)

    def __call__(self):
        self.S, _, self.state = topk_svdvals(self.W, self.k, state=self.state)

    def error(self):
        truth = torch.stack([true_svdvals(W) for W in self.W])[:, : self.k]
        return float((self.S / truth - 1).abs().max())


def on_cuda(k: int, repeats: int) -> dict:
    """The leading values of GPT-2 small's body in one call, its parts, and the libraries on the same small problems."""
    W = body("gpt2-small")
    drift = [1e-3 * torch.randn_like(A) for A in W]
    found = topk_svdvals(W, k)
    for _ in range(20):
        torch._foreach_add_(W, drift)
        found = topk_svdvals(W, k, state=found.state)
    error = 0.0
    for i in {A.shape: i for i, A in enumerate(W)}.values():
        truth = true_svdvals(W[i])[:k]
        error = max(error, float((found.S[i].cpu() / truth - 1).abs().max()))
    if not error <= GATE:
        raise SystemExit(f"gate: relative error {error:.1e} of the leading values exceeds {GATE:g}")
    state, n = found.state, 2 * found.state.V.shape[1]
    H = torch.randn(len(W), n, n, device="cuda")
    H = H @ H.mT / n
    D = torch.diag_embed(H.diagonal(dim1=-2, dim2=-1)) + 1e-3 * H
    products = Products(torch, stacks_of(torch, W))
    Y = products.matmat(state.V)
    variants = {
        "leading values": lambda: topk_svdvals(W, k, state=state),
        "copies of the weights": lambda: Products(torch, stacks_of(torch, W)),
        "W V": lambda: products.matmat(state.V),
        "W^T Y": lambda: products.rmatmat(Y),
        "Cholesky factors": lambda: torch.linalg.cholesky_ex(H).L,
        "eigenproblems": lambda: eigh(H),
        "nearly diagonal eigenproblems": lambda: eigh(D),
        "all values": lambda: spectra(W, "gram32"),
    }
    times = interleaved_cuda(variants, repeats)

    def by_cupy():
        import cupy

        return cupy.linalg.eigh(cupy.from_dlpack(H))

    libraries = {"torch.linalg.eigh": lambda: torch.linalg.eigh(H)}
    if importlib.util.find_spec("cupy"):
        libraries["cupy.linalg.eigh"] = by_cupy
    times |= attempted_cuda(libraries)
    rows = [[name, f"{t['ms']:.3f}", f"{t['low']:.3f}..{t['high']:.3f}"] for name, t in times.items()]
    show(f"GPT-2 small's {len(W)} matrices, k = {k}, warm; error {error:.0e}", ["", "ms", "20..80 %"], rows)
    bar(f"leading {k} of {len(W)} matrices, warm, ms", times["leading values"]["ms"], 1)
    return times | {"relative_error": error}


def main():
    """Gate, table, JSON."""
    p = parser(__doc__, repeats=9)
    p.add_argument("--k", type=int, default=32, help="The number of leading values, %(default)s by default.")
    args = p.parse_args()
    show_card()
    if torch.cuda.is_available():
        sets = {"gpt2-small": on_cuda(args.k, args.repeats)}
        finish({"benchmark": "topk", "settings": vars(args), "gate": True, "sets": sets}, args.json)
        return
    rows, results = [], {}
    for shape in SHAPES:
        leading = Drift(shape, args.k)
        for _ in range(20):
            leading.move()
            leading()
        error = leading.error()
        if not error <= GATE:
            raise SystemExit(f"gate: {shape}: relative error {error:.1e} of the leading values exceeds {GATE:g}")
        tall = [upright(W) for W in leading.W]
        variants = {"leading": leading, "svdvals": lambda tall=tall: [torch.linalg.svdvals(W) for W in tall]}
        times = interleaved(variants, args.repeats)
        name = "x".join(map(str, shape))
        errors = {"leading": error, "svdvals": 0.0}
        results[name] = {v: {"ms": times[v]["ms"] / BATCH, "relative_error": errors[v]} for v in times}
        ratio = times["svdvals"]["ms"] / times["leading"]["ms"]
        rows.append([name, *(f"{times[v]['ms'] / BATCH:.2f}" for v in times), f"{ratio:.1f}", f"{error:.0e}"])
    columns = ["shape", "leading ms", "svdvals ms", "ratio", "error"]
    show(f"k = {args.k}, {BATCH} drifting Gaussian matrices a call, upright for svdvals", columns, rows)
    finish({"benchmark": "topk", "settings": vars(args), "gate": True, "rows": results}, args.json)


if __name__ == "__main__":
    main()
