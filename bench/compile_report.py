"""Compiles every Triton kernel as the JIT would and prints registers, shared memory and spills; needs no GPU.

The library's own functions run on a stub of a GPU, and each kernel is compiled for the keys that they launch it with.
A spill, or a tensor-core instruction missing where one is meant, is an error. --model adds the time that the compiled
code lets expect on an H100 or H200, which is a model and no measurement.
"""

import functools
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import timing_model
from bench.harness import finish, parser, show
from bench.sass import disassembled
from bench.stub_gpu import Launch, launches
from sosd_fast.kernels.chase import chase
from sosd_fast.kernels.distribution import singular_distribution
from sosd_fast.kernels.eigh import eigh
from sosd_fast.kernels.newton_schulz import newton_schulz
from sosd_fast.kernels.normalised import converted, normalised
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.symmetric import own_product, polynomial, symmetrised
from sosd_fast.kernels.tridiagonal import tridiagonal
from sosd_fast.spectra.products import State
from sosd_fast.spectra.svdvals import spectra
from sosd_fast.spectra.topk import topk_svdvals

TARGETS = ("80", "90", "100", "gfx942")
MMA = re.compile(r"\b(wgmma|tcgen05|mma|v_mfma)[._]")  # in PTX, and in the assembly of AMD's
CHAINED = re.compile(r"tt\.dot %\w+, %\w+, %(?!cst)")  # in TTGIR: a product whose sums do not begin at zero
# kernel, or kernel and type -> what is meant of it, where rows begin at multiples of 16
MEANT = {
    "syrk": "mma", "thin": "mma",
    "product fp32": "rounds", "update fp32": "rounds", "tridiagonal": "wide", "eigh": "wide", "factor": "wide",
    "elements": "wide", "squares": "wide", "divide": "wide", "convert": "wide", "symmetrise": "wide",
}  # fmt: skip
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def empty(*shape: int, dtype=FLOAT32, count: int = 1) -> list[torch.Tensor]:
    """Matrices on the stub."""
    return [torch.empty(*shape, dtype=dtype, device="cuda") for _ in range(count)]


def around_cublas(G: torch.Tensor) -> torch.Tensor:
    """What `newton_schulz` in float16 launches, whichever form is the faster one, where cuBLAS multiplies."""
    X = normalised(G, 1e-7)
    A = symmetrised(own_product(X))
    return converted(polynomial(A, 3.4445, -4.7750, 2.0315) @ X, G.dtype)


def calls() -> dict[str, Callable[[], object]]:
    """What is launched, by a name: bodies of models, sides that are no multiples of 16, and few and many matrices."""
    found: dict[str, Callable[[], object]] = {}
    for dtype, method in (
        (FLOAT32, "gram32"), (FLOAT32, "gram64"), (FLOAT64, "gram64"), (BFLOAT16, "gram32"), (FLOAT16, "gram32")
    ):  # fmt: skip
        for name, matrices in (
            ("GPT-2 small", [((768, 768), 48), ((768, 3072), 12), ((3072, 768), 12)]),
            ("embedding", [((50257, 768), 1)]),
            ("531", [((531, 531), 3), ((531, 1062), 3), ((1062, 531), 3)]),
            ("many", [((64, 64), 300)]),
        ):
            few = [W for shape, count in matrices for W in empty(*shape, dtype=dtype, count=count)]
            found[f"{name}, {str(dtype)[6:]} {method}"] = functools.partial(spectra, few, method)
    for dtype in (BFLOAT16, FLOAT16):
        for shape in ((12, 768, 3072), (12, 768, 768), (3, 531, 531)):
            G = empty(*shape, dtype=dtype)[0]
            found[f"Newton-Schulz {shape}, {str(dtype)[6:]}"] = functools.partial(newton_schulz, G, steps=2)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        for n, m in ((768, 3072), (531, 1062)):
            found[f"around cuBLAS, {n} x {m}, {str(dtype)[6:]}"] = functools.partial(
                around_cublas, *empty(12, n, m, dtype=dtype)
            )
    for dtype in (FLOAT32, BFLOAT16):
        for name, n, m in (("GPT-2 small", 768, 3072), ("531", 531, 1062)):
            few = [W for shape in ((n, n), (n, m), (m, n)) for W in empty(*shape, dtype=dtype, count=24)]
            state = State(*empty(72, 40, n, count=2))
            found[f"step, {name}, {str(dtype)[6:]}"] = functools.partial(topk_svdvals, few, 32, state=state)
    for dtype in (FLOAT32, FLOAT64):
        # leading values: k = 32 has problems of 80 rows, k = 88 of 192
        for n in (80, 192) if dtype == FLOAT32 else (80,):
            found[f"eigenproblems of {n}, {str(dtype)[6:]}"] = functools.partial(eigh, empty(72, n, n, dtype=dtype)[0])
        G = empty(72, 256, 256, dtype=dtype)[0]
        found[f"reductions of 256, {str(dtype)[6:]}"] = functools.partial(tridiagonal, G, overwrite=True)
        # chased by programs that share a matrix and, of many matrices, by one each
        for batch, r in ((16, 2048), (600, 704)):
            G = empty(batch, r, r, dtype=dtype)[0]
            found[f"bands of {batch}, {str(dtype)[6:]}"] = functools.partial(tridiagonal, G, overwrite=True)
        S = empty(72, 768, dtype=dtype)[0]
        found[f"spectra, {str(dtype)[6:]}"] = functools.partial(singular_distribution, S, S, S)
        long = empty(2, 5000, dtype=dtype)[0]
        found[f"long spectra, {str(dtype)[6:]}"] = functools.partial(singular_distribution, long, long, long)
        found[f"eigenvalues of many, {str(dtype)[6:]}"] = functools.partial(
            sturm, empty(600, 96, dtype=dtype)[0], empty(600, 95, dtype=dtype)[0]
        )
    # as few programs share a matrix beside other ranks
    found["bands by few"] = functools.partial(chase, empty(4, 2112, 64, dtype=FLOAT64)[0], 2048, 8, many=False)
    return found


def target_of(name: str) -> GPUTarget:
    """A target by the name that --targets knows it by."""
    return GPUTarget("cuda", int(name), 32) if name.isdigit() else GPUTarget("hip", name, 64)


def recorded(target: GPUTarget, only: list[str]) -> list[tuple[str, Launch]]:
    """Each kernel in each specialisation, once, by a name."""
    found: dict[str, tuple[str, Launch]] = {}
    with launches(target) as record:
        for what, call in calls().items():
            del record[:]
            call()
            for launch in record:
                dtype = next(iter(launch.signature.values())).lstrip("*")
                kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                found.setdefault(launch.key, (f"{kernel} {dtype}: {what}", launch))
    return [(name, launch) for name, launch in found.values() if any(text in name for text in only)]


_WAITING: list[tuple[str, Launch, GPUTarget]] = []  # a forked process finds them here: they cannot be sent


def build(i: int) -> dict:
    """Compiles one of `_WAITING` and reads the assembler's resource report."""
    name, launch, target = _WAITING[i]
    began = time.perf_counter()
    binary = launch.compile(target)
    seconds = time.perf_counter() - began
    if target.backend == "hip":
        code, found = binary.asm["amdgcn"], amd_resources(binary.asm["amdgcn"])
        wide = len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", code))
    else:
        code, found = binary.asm["ptx"], resources(binary.asm["cubin"])
        wide = len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ga]\.shared\.global[^;]*, 0x10", code))
    row = found | {
        "kernel": name,
        "target": str(target.arch),
        "shared": binary.metadata.shared,
        "mma": sorted(set(MMA.findall(code))),
        "async": "cp.async" in code,
        "wide": wide,
        "chained": len(CHAINED.findall(binary.asm["ttgir"])),
        "seconds": seconds,
    }
    return row | {"faults": faults(launch, row)}


def resources(cubin: bytes) -> dict:
    """Registers, stack and local bytes, by cuobjdump."""
    text = disassembled(cubin, "-res-usage")
    values = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(values["REG"]), "spill": int(values["STACK"]) + int(values["LOCAL"])}


def amd_resources(assembly: str) -> dict:
    """The same of AMD's assembler, which writes them beside the code."""
    values = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly))
    spill = int(values["vgpr_spill_count"]) * 256 + int(values["private_segment_fixed_size"])
    return {"registers": int(values["vgpr_count"]), "spill": spill}


def most_registers(launch: Launch) -> int:
    """How many registers a thread may have: all programs of a cooperative launch are on the GPU at once."""
    threads = 32 * launch.options.num_warps
    programs = 1
    if getattr(launch.options, "launch_cooperative_grid", False):
        programs = -(-launch.grid[0] * launch.grid[1] // 132)
    return min(255, 65536 // (threads * programs) // 8 * 8) if launch.options.backend_name == "cuda" else 512


def faults(launch: Launch, row: dict) -> list[str]:
    """What must not be."""
    found = []
    name = row["kernel"].split(":")[0]
    meant = MEANT.get(name, MEANT.get(name.split()[0]))
    if row["spill"]:
        found.append(f"{row['spill']} bytes of stack")
    if meant == "mma" and not row["mma"]:
        found.append("no tensor-core instruction")
    cuda = launch.options.backend_name == "cuda"
    if meant == "rounds" and row["mma"] and cuda:
        found.append("tensor cores, which truncate sums")
    if name.startswith("product") and row["chained"]:
        found.append("sums that go on from tile to tile")
    aligned = launch.arguments.get("r", 16) % 16 == 0 and launch.arguments.get("GRAIN", 16) == 16
    if meant == "wide" and not row["wide"] and cuda and aligned:
        found.append("no 16-byte loads")
    if row["registers"] > most_registers(launch):
        found.append(f"more than {most_registers(launch)} registers")
    return found


def compiled(targets: list[str], only: list[str]) -> list[dict]:
    """Compiles what is asked for, on every core; a row each."""
    _WAITING[:] = [(*each, target_of(name)) for name in targets for each in recorded(target_of(name), only)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return list(pool.map(build, range(len(_WAITING))))


def main():
    """Table, JSON; exit status 1 on a fault."""
    p = parser(__doc__.split("\n")[0])
    add = p.add_argument
    # fmt: off
    add("--only", nargs="+", default=[""],
        help="Compiles only the kernels whose name contains one of these texts; by default all.")
    add("--targets", nargs="+", default=list(TARGETS),
        help="What to compile for: compute capabilities, times ten, or gfx942; by default 80, 90, 100 and gfx942.")
    add("--warm", action="store_true",
        help="Compiles for the GPU at hand, into the cache where its programs then find their kernels; off by default.")
    add("--model", action="store_true",
        help="Prints the expected times of shapes on an H100 or H200, too, from the code for 90; off by default.")
    # fmt: on
    args = p.parse_args()
    if args.warm:
        args.targets = ["{}{}".format(*torch.cuda.get_device_capability())]
    with tempfile.TemporaryDirectory() as cache:
        if not args.warm:
            triton.knobs.cache.dir = cache
        rows = compiled(args.targets, args.only)
        model = timing_model.report() if args.model else None
    table = [
        [row["kernel"], row["target"], row["registers"], row["shared"], row["spill"], "+".join(row["mma"]),
         "yes" if row["async"] else "", row["wide"] or "", f"{row['seconds']:.1f}", ", ".join(row["faults"])]
        for row in rows
    ]  # fmt: skip
    columns = ["kernel", "target", "registers", "shared", "spill", "tensor cores", "async copies", "16 B loads", "s"]
    show(f"Triton {triton.__version__}", [*columns, "faults"], table)
    result = {"benchmark": "compile_report", "triton": triton.__version__, "rows": rows}
    finish(result | ({"model": model} if model else {}), args.json)
    raise SystemExit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
