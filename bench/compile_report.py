"""Compiles every Triton kernel in its shipped configurations and prints registers, shared memory and spills.

Needs no GPU: Triton brings its own assembler. A spill, or a tensor-core instruction missing where one is meant, is an
error.
"""

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness import finish, parser, show
from sosd_fast.kernels import distribution, eigh, sturm, syrk, tridiagonal

TARGETS = (80, 90, 100)
UNIT_STRIDES = ("stride_ak", "stride_bk", "stride_cn", "step_S", "step_previous", "step_reference", "step_d", "step_e")
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
MMA = re.compile(r"\b(wgmma|tcgen05|mma)\.")  # in PTX


@dataclass
class Case:
    """A kernel in one configuration."""

    name: str
    kernel: object
    types: dict[str, str]  # of the arguments; those not named are int32
    constexprs: dict
    options: dict = field(default_factory=dict)
    mma: bool = False
    wide: bool = False  # 16-byte loads are meant
    most_registers: int = 255


def cases() -> list[Case]:
    """Every shipped configuration."""
    found = []
    for dtype in ("fp32", "fp64"):
        types = {f"{name}_ptr": f"*{dtype}" for name in ("S", "previous", "reference", "sd")}
        found.append(
            Case(
                f"distribution {dtype}",
                distribution._singular_distribution_kernel,
                types | {"statistics_ptr": "*fp64"},
                {"HAS_PREVIOUS": True, "HAS_REFERENCE": True, "BLOCK": distribution.BLOCK},
                {"num_warps": 4},
            )
        )
    factors = {name: "fp32" for name in ("alpha", "beta", "shift")}
    for dtype, config in syrk.CONFIGS.items():
        t = NAMES[dtype]
        options = {k: v for k, v in config.items() if k.startswith("num_")}
        blocks = {k: v for k, v in config.items() if k not in options} | {"PRECISION": "tf32x3"}
        pointers = {name: f"*{t}" for name in ("A_ptr", "B_ptr", "C_ptr")}
        gram = pointers | {"scale_ptr": "*fp64", "out_ptr": "*fp32"}
        found.append(
            Case(f"gram {t}", syrk._syrk_kernel, gram | factors,
                 blocks | {"HAS_C": False, "HAS_SCALE": True, "ROUND": True}, options, mma=True)
        )  # fmt: skip
        if t != "fp32":
            update = pointers | {"scale_ptr": f"*{t}", "out_ptr": f"*{t}"}
            found.append(
                Case(f"symmetric update {t}", syrk._syrk_kernel, update | factors,
                     blocks | {"HAS_C": True, "HAS_SCALE": False, "ROUND": False}, options, mma=True)
            )  # fmt: skip
    for dtype, config in tridiagonal.CONFIGS.items():
        t = NAMES[dtype]
        types = {f"{name}_ptr": f"*{t}" for name in ("A", "out", "panel", "y", "t")} | {"counter_ptr": "*i32"}
        blocks = {"ROWS": config["ROWS"], "COLUMNS": config["COLUMNS"]}
        blocks |= {"PANEL": tridiagonal.PANEL, "ALIGNED": tridiagonal.ALIGNED}
        for cooperative in (False, True):
            found.append(
                Case(
                    f"tridiagonal {t}{' cooperative' if cooperative else ''}",
                    tridiagonal._tridiagonal_kernel,
                    types,
                    blocks | {"COOPERATIVE": cooperative},
                    {k: v for k, v in config.items() if k not in blocks} | {"launch_cooperative_grid": cooperative},
                    wide=True,
                    most_registers=65536 // (32 * config["num_warps"] * tridiagonal.PER_SM),
                )
            )
    for t, rescale in (("fp32", 4), ("fp64", 8)):
        types = {f"{name}_ptr": f"*{t}" for name in ("d", "e", "scaled", "limits", "values")}
        found.append(Case(f"scale {t}", sturm._scale_kernel, types, {"BLOCK": sturm.SCALE_BLOCK}, {"num_warps": 4}))
        blocks = {"RESCALE": rescale, "BLOCK": sturm.BLOCK}
        found.append(Case(f"sturm {t}", sturm._sturm_kernel, types, blocks, {"num_warps": 1}))
        pointers = ("A", "X", "unsorted", "values", "vectors")
        types = {f"{name}_ptr": f"*{t}" for name in pointers} | {"tolerance": "fp32"}
        blocks = {name: getattr(eigh, name) for name in ("BLOCK", "PAIRS", "ROWS", "SHIFT")}
        for columns in (96, 192) if t == "fp32" else (96,):  # k = 32 makes 80 rows, k = 88 192
            found.append(
                Case(
                    f"eigh {t} {columns}",
                    eigh._eigh_kernel,
                    types,
                    blocks | {"COLUMNS": columns},
                    {"num_warps": eigh.WARPS},
                    wide=True,
                    most_registers=65536 // (32 * eigh.WARPS),
                )
            )
    return found


def build(case: Case, target: int) -> dict:
    """Compiles a case and reads the assembler's resource report."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constexprs else case.types.get(n, "i32") for n in names}
    # as the launcher specializes them: aligned pointers, sizes and strides that are multiples of 16, unit strides
    unit = {n: 1 for n in names if n in UNIT_STRIDES}
    signature |= dict.fromkeys(unit, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith(("*", "i32"))}
    source = ASTSource(case.kernel, signature, case.constexprs | unit, attributes)
    began = time.perf_counter()
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)
    seconds = time.perf_counter() - began
    return resources(binary.asm["cubin"]) | {
        "shared": binary.metadata.shared,
        "mma": sorted(set(MMA.findall(binary.asm["ptx"]))),
        "async": "cp.async" in binary.asm["ptx"],
        "wide": len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)", binary.asm["ptx"])),
        "seconds": seconds,
    }


def resources(cubin: bytes) -> dict:
    """Registers, stack and local bytes, by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(values["REG"]), "spill": int(values["STACK"]) + int(values["LOCAL"])}


def faults(case: Case, row: dict) -> list[str]:
    """What must not be."""
    found = []
    if row["spill"]:
        found.append(f"{row['spill']} bytes of stack")
    if case.mma and not row["mma"]:
        found.append("no tensor-core instruction")
    if case.wide and not row["wide"]:
        found.append("no 16-byte loads")
    if row["registers"] > case.most_registers:
        found.append(f"more than {case.most_registers} registers")
    return found


def main():
    """Table, JSON; exit status 1 on a fault."""
    p = parser(__doc__.split("\n")[0])
    p.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="Compiles only the cases whose name contains one of these texts; by default all.",
    )
    p.add_argument(
        "--targets",
        type=int,
        nargs="+",
        default=TARGETS,
        help="The compute capabilities to compile for, times ten; by default 80, 90 and 100.",
    )
    args = p.parse_args()
    rows, table, wrong = [], [], 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for case in cases():
            for target in args.targets if any(text in case.name for text in args.only) else ():
                row = build(case, target)
                row["faults"] = faults(case, row)
                wrong += bool(row["faults"])
                rows.append({"kernel": case.name, "target": target} | row)
                table.append(
                    [case.name, f"sm_{target}", row["registers"], row["shared"], row["spill"], "+".join(row["mma"]),
                     "yes" if row["async"] else "", row["wide"] or "", f"{row['seconds']:.1f}",
                     ", ".join(row["faults"])]
                )  # fmt: skip
    columns = [
        "kernel",
        "target",
        "registers",
        "shared",
        "spill",
        "tensor cores",
        "async copies",
        "16 B loads",
        "s",
        "faults",
    ]
    show(f"Triton {triton.__version__}", columns, table)
    finish({"benchmark": "compile_report", "triton": triton.__version__, "rows": rows}, args.json)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
