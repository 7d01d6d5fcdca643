"""Fused normalize-and-diff of a shape group's spectra, against the same in eager torch and torch.compile."""

import torch

from bench.harness import bar, finish, interleaved, interleaved_cuda, parser, show, show_card
from sosd_fast.kernels.distribution import singular_distribution, singular_distribution_ref

GROUPS = [(72, 768), (48, 768), (105, 1280), (24, 2048), (12, 256)]  # spectra, values in each


def main():
    """Gate, table, JSON."""
    p = parser(__doc__, repeats=20)
    args = p.parse_args()
    show_card()
    cuda = torch.cuda.is_available()
    compiled = torch.compile(singular_distribution_ref, dynamic=False) if cuda else None
    rows, results = [], {}
    for B, r in GROUPS[::2] if cuda else GROUPS:  # each takes torch.compile seconds
        S = [torch.rand(B, r, dtype=torch.float64, device="cuda" if cuda else "cpu") for _ in range(3)]
        variants = {
            "sosd_fast": lambda S=S: singular_distribution(*S),
            "torch": lambda S=S: singular_distribution_ref(*S),
        }
        if cuda:
            variants["torch.compile"] = lambda S=S: compiled(*S)
        expected = singular_distribution_ref(*(s.cpu() for s in S))
        for name, value in singular_distribution(*S)._asdict().items():
            if not torch.allclose(value.cpu(), getattr(expected, name), rtol=1e-10, atol=1e-15):
                raise SystemExit(f"gate: {B}x{r}: {name} differs")
        times = (interleaved_cuda if cuda else interleaved)(variants, args.repeats)
        ours = times["sosd_fast"]["ms"]
        results[f"{B}x{r}"] = times
        rows.append([f"{B}x{r}", f"{1e3 * ours:.1f}", *(f"{times[k]['ms'] / ours:.1f}" for k in list(variants)[1:])])
    show("float64 spectra, previous and reference", ["spectra", "us", *(f"x {k}" for k in list(variants)[1:])], rows)
    if cuda:
        for group, times in results.items():
            ours = times["sosd_fast"]["ms"]
            bar(f"{group}: one launch, times faster than torch", times["torch"]["ms"] / ours, 5, at_least=True)
            bar(f"{group}: than torch.compile", times["torch.compile"]["ms"] / ours, 1.5, at_least=True)
    finish({"benchmark": "distribution", "settings": vars(args), "gate": True, "rows": results}, args.json)


if __name__ == "__main__":
    main()
