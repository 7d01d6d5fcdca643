"""What a long run's records take: memory, disk, time to write and to read; simulated, no training.

python -m bench.records --steps 100000 --matrices 20
"""

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np

import sosd_fast
from bench.harness import finish, parser, resident_mb, show
from sosd_fast.runs.records import Record, RunWriter

FIELDS = (  # of a matrix that is measured in full
    "sd_variation", "sd_variation_topk", "cosine", "nuclear_norm", "frobenius_norm", "sigma_max", "sigma_min",
    "stable_rank", "effective_rank", "spectral_entropy", "participation_ratio", "sd_error",
)  # fmt: skip


def simulate(run_dir: Path, steps: int, matrices: int, r: int = 64) -> list[float]:
    """Writes a run whose matrices are all measured in full at each step; returns the memory at each tenth, in MB."""
    names = [f"transformer.h.{i}.attn.c_proj.weight" for i in range(matrices)]
    rng, memory = np.random.default_rng(0), []
    writer = RunWriter(run_dir, {"matrices": names})
    for step in range(steps):
        S = np.sort(rng.random((matrices, r)), axis=1)[:, ::-1]
        x = rng.random((matrices, len(FIELDS))).tolist()
        writer.append(
            [
                Record(
                    step, name, (r, r), "gram32", 1, topk=tuple(S[i, :32].tolist()), spectrum=S[i],
                    **dict(zip(FIELDS, x[i], strict=True)),
                )
                for i, name in enumerate(names)
            ]
        )  # fmt: skip
        if (step + 1) % max(steps // 10, 1) == 0:
            memory.append(resident_mb())
    writer.close()
    return memory


def main():
    """Writes, reads, prints."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--steps", type=int, default=10_000, help="The number of steps of the simulated run, %(default)s by default."
    )
    options.add_argument(
        "--matrices", type=int, default=20, help="The number of matrices measured at each step, %(default)s by default."
    )
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        memory = simulate(Path(folder) / "run", args.steps, args.matrices)
        write_s = time.perf_counter() - began
        run = sosd_fast.load(Path(folder) / "run")
        began = time.perf_counter()
        steps = run.columns("step")["step"]
        columns_s = time.perf_counter() - began
        count = len(steps)
        assert count == args.steps * args.matrices
        began = time.perf_counter()
        pandas_s = None  # without pandas
        if importlib.util.find_spec("pandas"):
            assert len(run.to_pandas()) == count
            pandas_s = time.perf_counter() - began
        began = time.perf_counter()
        kept, _ = run.spectra(run.names[0])
        spectra_s = time.perf_counter() - began
        sizes = {
            kind: sum(path.stat().st_size for path in run.run_dir.glob(pattern)) / 1e6
            for kind, pattern in (("scalars", "records*"), ("spectra", "spectra-*"))
        }
    result = {
        "steps": args.steps, "matrices": args.matrices, "memory_MB": memory,
        "write_us_per_record": 1e6 * write_s / count, "columns_s": columns_s, "to_pandas_s": pandas_s,
        "spectra_s": spectra_s, "kept_spectra": len(kept),
        "scalars_MB": sizes["scalars"], "spectra_MB": sizes["spectra"],
    }  # fmt: skip
    show(
        f"{args.steps} steps x {args.matrices} matrices",
        ["", "value"],
        [[key, value] for key, value in result.items() if key not in ("steps", "matrices")],
    )
    finish(result, args.json)


if __name__ == "__main__":
    main()
