"""What the reduction to tridiagonal form compiles to, without a GPU: registers, spills, waits, its dearest loops."""

import json
import os

import pytest
from every import EVERY
from prepared import run

pytest.importorskip("triton")

TARGETS = [target for target in os.environ.get("SOSD_TARGETS", "90").split() if target.isdigit()]
MAIN = """
import inspect, json, re, sys, triton
for name in [name for name in sys.modules if name.split(".")[0] in ("sosd_fast", "kernels", "training", "bench")]:
    del sys.modules[name]  # those were imported without Triton, and have no kernels
from bench.compile_report import resources
from sass import innermost_loop
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import sosd_fast
tridiagonal = sys.modules["sosd_fast.kernels.tridiagonal"]
kernel = tridiagonal._tridiagonal_kernel
source, first = inspect.getsourcelines(kernel.fn)
LOOPS = {  # a line of each
    "product": "sums += tile * v[:, None, :]",
    "update": "tile += v_k[:, None] * w_i[None, :]",
    "panel": "products += v * tl.load(row_ptr",
}
lines = {name: first + next(i for i, row in enumerate(source) if text in row) for name, text in LOOPS.items()}
rows = []
triton.knobs.cache.dir = sys.argv[1]
for target in map(int, sys.argv[3:]):
    for dtype, config in tridiagonal.CONFIGS.items():
        for cooperative in json.loads(sys.argv[2]):
            # as the JIT does: all pointers and sizes are multiples of 16, as `tridiagonal` pads matrices
            constants = {n: v for n, v in config.items() if n in kernel.arg_names}
            options = {n: v for n, v in config.items() if n not in constants} | {"launch_cooperative_grid": cooperative}
            constants |= {"PANEL": tridiagonal.PANEL, "ALIGNED": tridiagonal.ALIGNED, "COOPERATIVE": cooperative}
            constants["first_event"] = 1
            pointer = "*fp32" if dtype == torch.float32 else "*fp64"
            types = {n: pointer if n.endswith("_ptr") else "i32" for n in kernel.arg_names} | {"counter_ptr": "*i32"}
            types |= dict.fromkeys(constants, "constexpr")
            divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types)
                         if n.endswith("_ptr") or n in ("r", "pitch")}
            binary = triton.compile(ASTSource(kernel, types, constants, divisible),
                                    target=GPUTarget("cuda", target, 32), options=options)
            cubin = binary.asm["cubin"]
            rows.append(resources(cubin) | {
                "target": target, "dtype": pointer, "cooperative": cooperative, "most": config["maxnreg"],
                "per_sm": tridiagonal.PER_SM[dtype], "threads": 32 * config["num_warps"],
                "waits": re.findall(r"(?:atom|ld)\\.global\\.gpu\\.(\\w+)", binary.asm["ptx"]),
                "loops": {name: (loop.count(), loop.count("LDG"), loop.count("LDG", ".128"), loop.count("STG"))
                          for name, line in lines.items() for loop in [innermost_loop(cubin, line)]},
            })
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_code(target, tmp_path):
    # a process of its own: in this one the kernels are the interpreter's
    kinds = [False, True] if EVERY else [True]  # alone it has the same loops, and no waits
    done = run(MAIN, str(tmp_path), json.dumps(kinds), target, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2 * len(kinds)
    for row in rows:
        assert row["spill"] == 0 and row["registers"] <= row["most"]
        assert row["per_sm"] * row["threads"] * (-(-row["most"] // 8) * 8) <= 65536
        # one release, looks that do not empty the cache, and one acquire when the others are there
        assert row["waits"] == (["release", "relaxed", "acquire"] if row["cooperative"] else [])
        instructions, loads, wide, stores = row["loops"]["product"]
        assert instructions <= 140 and stores == 1 and loads == wide == 10  # 8 rows, v, and what was given before
        instructions, loads, wide, _ = row["loops"]["update"]
        assert instructions <= 112 and loads == wide  # a reflector, of 32 fused products a row and tile twice
        assert row["loops"]["panel"][0] <= 110
