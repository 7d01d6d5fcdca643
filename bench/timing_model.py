"""What compiled code lets expect of its time: its loops, run by one warp in a model of a multiprocessor."""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget

from bench.harness import bar, interleaved_cuda, show
from bench.sass import HBM, L1, L2, Code, Loop, code_of, timed
from bench.stub_gpu import MULTIPROCESSORS, NAME, launches
from sosd_fast.kernels.sturm import sturm
from sosd_fast.kernels.syrk import syrk
from sosd_fast.kernels.thin import GRAM_PART
from sosd_fast.kernels.tridiagonal import tridiagonal
from sosd_fast.spectra.products import State
from sosd_fast.spectra.topk import topk_svdvals


def written(code: Code) -> tuple[ast.For, dict[ast.For, list[Loop]]]:
    """A kernel's loop over events, and the compiled loops of each loop in its source; if unrolled it has several."""
    source, first = inspect.getsourcelines(code.launch.kernel.fn)
    statements = [x for x in ast.walk(ast.parse(textwrap.dedent("".join(source)))) if isinstance(x, ast.For)]
    around = {
        y: x for x in statements for y in ast.walk(x) if isinstance(y, ast.For) and y is not x
    }  # the nearest last
    found: dict[ast.For, list[Loop]] = {}

    def put(loop: Loop) -> ast.For | None:
        inside = [put(x) for x in loop.inside]
        if inner := next(filter(None, inside), None):
            statement = around[inner]
        else:
            lines = [code.lines.get(i.address, 0) - first + 1 for i in loop.own]
            held = {x: sum(x.lineno <= line <= (x.end_lineno or 0) for line in lines) for x in statements}
            most = max(held.values())
            if most < len(lines) / 2:
                return None  # a wait: of another function
            statement = max((x for x in statements if held[x] >= 0.6 * most), key=lambda x: x.lineno)
        found.setdefault(statement, []).append(loop)
        return statement

    for loop in code.root.inside:
        put(loop)
    return next(x for x in statements if ast.unparse(x.target) == "event"), found


CACHE = 50e6  # bytes of the L2


def reduction(code: Code) -> tuple[float, float]:
    """Cycles and bytes from memory of `_tridiagonal_kernel`; only the first program, with the most strips, counts.

    Each loop turns as often as the source says: its `range` is evaluated for every event. Matrices that do not fit the
    cache are read from memory by the loops inside those over strips.
    """
    a = code.launch.arguments
    batch, r, _ = a["A_ptr"]
    size = 8 if "fp64" in code.launch.signature["A_ptr"] else 4
    event, compiled = written(code)
    ranges = {x: compile(ast.Expression(x.iter), "", "eval") for x in ast.walk(event) if isinstance(x, ast.For)}
    tests = {x: compile(ast.Expression(x.test), "", "eval") for x in ast.walk(event) if isinstance(x, ast.If)}
    known = {"range": range, "COOPERATIVE": a["programs"] > 1, "program": 0, "WIDTH": a.get("WARPS", 1) * a["COLUMNS"]}
    known |= {"parts": a["programs"] + 1, "first_event": 1, **a}
    waits = [x for x in code.root.all()[1:] if x.count("ATOM", "ATOMG", "BAR") and not x.inside and len(x.own) < 20]

    def took(statements: list[ast.stmt], load: int, in_strip: bool = False) -> float:
        total = 0.0
        for x in statements:
            if isinstance(x, ast.If):
                total += took(x.body if eval(tests[x], known) else x.orelse, load, in_strip)
            elif isinstance(x, ast.For) and x in compiled:
                whole, *rest = sorted(compiled[x], key=lambda y: -len(y.own))
                turns, name = eval(ranges[x], known), ast.unparse(x.target)
                factor = round(whole.count("LDG") / max(rest[-1].count("LDG"), 1)) if rest else 1
                total += len(turns) // factor * code.turn(whole, load if in_strip else L2)
                total += len(turns) % factor * code.turn(rest[-1]) if rest else 0
                if any(isinstance(y, (ast.For, ast.If)) for y in x.body):
                    for known[name] in turns:  # noqa: B020
                        total += took(x.body, load, name == "s")
        return total

    cycles = read = 0.0
    for j in range(r - 1):
        first = j % a["PANEL"] == 0
        load = HBM if batch * (r - j) ** 2 * size / 2 > CACHE else L2
        for updates in (True, False) if first and j else (False,):
            finished = a["PANEL"] if updates else j % a["PANEL"]
            known |= {"updates": updates, "j": j, "finished": finished, "q": max(finished - 1, 0), "step": 1 - updates}
            known |= {"start": j // a["ALIGNED"] * a["ALIGNED"], "event": 2}
            cycles += code.turn(compiled[event][0]) + sum(map(code.turn, waits)) + took(event.body, load)
        read += batch * (r - j) ** 2 * size / 2 * (load == HBM)
    return cycles * code.waves, read


def gram(code: Code) -> tuple[float, float]:
    """Cycles and bytes of `_syrk_kernel`: the loop over columns, and tensor cores at their full rate beside it."""
    a = code.launch.arguments
    (batch, m, k), block, step = a["A_ptr"], a["BLOCK"], a["BLOCK_K"]
    half = "fp32" not in code.launch.signature["A_ptr"]
    flops = 2 * block * block * step * (1 if half else 3)
    tensor = flops / (4096 if half else 2048)  # cycles, at the dense rates of an H100: 990 and 495 TFLOP/s
    loop = code.most("HGMMA", "HMMA")
    turn = max(code.turn(loop, L1) + tensor, code.together * tensor)
    tall = code.root.cycles()
    return code.waves * (math.ceil(k / step) * turn + tall), batch * m * k * (2 if half else 4)


def counting(code: Code) -> tuple[float, float]:
    """Cycles of `_sturm_kernel`: its loop takes RESCALE rows a turn, from the L1."""
    a = code.launch.arguments
    loop = code.most("FFMA", "DFMA", "MUFU")
    rows = max(loop.count("LDG") // 2, 1)
    return code.waves * a["iterations"] * math.ceil(a["r"] / rows) * code.turn(loop, L1), 0.0


def rotations(code: Code) -> tuple[float, float]:
    """Cycles of `_eigh_kernel`: a sweep of 7, as those of warm subspaces take, has a round for each row, in the L1.

    Each round writes all rows through to the L2. The other loops are over blocks of rows and, inside, of columns.
    """
    a = code.launch.arguments
    n = a["n"]
    sweep = max((x for x in code.root.all() if x.inside), key=lambda x: sum(y.count("LDG", "STG") for y in x.all()))
    turn = max(sweep.all(), key=lambda x: x.count("STG") * bool(x.count("MUFU")))
    (around,) = (x for x in sweep.all() if turn in x.inside)
    strips = math.ceil(math.ceil(n / 2) / a["PAIRS"])
    size = 8 if "fp64" in code.launch.signature["A_ptr"] else 4
    written = n * a["COLUMNS"] * size / 64  # a multiprocessor sends 64 bytes a cycle
    each = max(code.turn(around, L1) + strips * code.turn(turn, L1), written)
    widths = [math.ceil(n / a["ROWS"]), math.ceil(n / a["WIDE"]), math.ceil(n / a["STEP"])]

    def took(loop: Loop, depth: int) -> float:
        tensor = 2 * a["ROWS"] * a["WIDE"] * a["STEP"] * 3 / 2048 * bool(loop.count("HGMMA", "HMMA"))
        return widths[depth] * (code.turn(loop) + tensor + sum(took(x, depth + 1) for x in loop.inside))

    others = sum(took(x, 0) for x in code.root.inside if turn not in x.all())
    whole = 7 * ((n - 1) * each + code.turn(sweep)) + others + timed(code.root.own, L2)
    return code.waves * whole, 0.0


def small(code: Code) -> tuple[float, float]:
    """Cycles of a kernel of a step (small.py, leading.py): loops over columns, inner products, parts or pivots."""
    a, name = code.launch.arguments, code.launch.kernel.__name__
    columns = math.ceil(min(a.get("span", 0), a.get("n", 0)) / a.get("BLOCK", 1))
    if name == "_thin_gram_kernel":
        columns = GRAM_PART // a["BLOCK_K"]
    steps = math.ceil(a["b"] / a["STEP"]) if "STEP" in a else 1
    tensor = 2 * a["WIDTH"] ** 2 * a.get("STEP", a.get("BLOCK", a.get("BLOCK_K", 1))) * 3 / 2048 if "WIDTH" in a else 0

    def took(loop: Loop, turns: int) -> float:
        product = bool(loop.count("HGMMA", "HMMA"))
        turn = max(code.turn(loop) + product * tensor, code.together * product * tensor)
        return turns * (turn + sum(took(x, steps) for x in loop.inside))

    def turns(loop: Loop) -> int:
        if name == "_cholesky_kernel" and not loop.count("HGMMA", "HMMA"):
            return a["b"]
        if columns and name != "_total_kernel":
            return columns
        return steps if loop.count("HGMMA", "HMMA") else math.ceil(a["parts"] / 4) if "parts" in a else 1

    root = max(timed(code.root.own, L2), code.warps * len(code.root.own))
    # subspaces that are read and written; of some that is from the L2
    wide = {"_inner_kernel": 2, "_mend_kernel": 4, "_directions_kernel": 4, "_advance_kernel": 5}.get(name, 0)
    wide *= 4 * math.prod(code.launch.grid[1:]) * a["b"] * a.get("n", 0) if wide else 0
    return code.waves * (root + sum(took(x, turns(x)) for x in code.root.inside)), wide


def step(codes: list[Code]) -> list[tuple[float, float]]:
    """Cycles and bytes of each launch of a step towards leading values; one more reads a matrix for its norm."""
    parts, forth, weights = [], {}, 0.0
    for code in codes:
        a, name = code.launch.arguments, code.launch.kernel.__name__
        if name != "_thin_kernel":
            parts.append(
                (rotations if name == "_eigh_kernel" else small)(code) if name != "_sum_kernel" else (2000.0, 0)
            )
            continue
        kind = a["UNIT"], a["EVEN"]
        programs = math.prod(code.launch.grid)
        if not a["BACK"]:
            forth[kind] = programs * a["n"] / a["BLOCK_K"]  # turns of all programs; back it takes as many
        loop = code.most("HGMMA", "HMMA")
        # by mma.sync, at 62 % of wgmma's rate
        tensor = 2 * a["BLOCK"] * (a["WIDTH"] + a["MORE"]) * a["BLOCK_K"] * 3 / (0.62 * 2048)
        turn = max(code.turn(loop, L1) + tensor, code.together * tensor)
        size = 4 if "fp32" in code.launch.signature["W_ptr"] else 2
        cycles = forth[kind] / min(programs, MULTIPROCESSORS * code.together) * turn + timed(code.root.own, L2)
        parts.append((cycles, forth[kind] * a["BLOCK"] * a["BLOCK_K"] * size))
        weights += parts[-1][1] / 3
    return [*parts, (0.0, weights)]


def factoring(code: Code) -> tuple[float, float]:
    """Cycles of `band._factor_kernel`, a panel of each matrix."""
    a = code.launch.arguments
    columns, width = a["BAND"], a["WIDTH"]
    rows = a["A_ptr"][1] - (a["panel"] + 1) * columns
    if not rows:
        return 0.0, 0.0
    turns = 1 if a["ONCE"] else math.ceil(rows / width)
    each = max(code.root.inside, key=lambda x: len(x.own) + sum(len(y.own) for y in x.all()))
    (strips,) = each.inside
    (last,) = (x for x in code.root.inside if x is not each)
    taken = sum(columns // a["ROWS"] - j // a["ROWS"] for j in range(columns))
    strip = code.turn(strips) + sum(turns * code.turn(x) for x in strips.inside)
    rest = code.turn(code.root) + math.ceil(rows / a["TILE"]) * code.turn(last)
    return code.waves * (columns * code.turn(each) + taken * strip + rest), 0.0


def _rest(code: Code) -> tuple[float, float, int, bool]:
    """What the trailing matrices make of a step of `band.banded`.

    How often a multiprocessor is filled, bytes of their triangles, their side in tiles, and whether they are in memory.
    """
    a = code.launch.arguments
    batch, r, columns = a["V_ptr"]
    size = 8 if "fp64" in code.launch.signature["V_ptr"] else 4
    triangle = batch * (r - (a["panel"] + 1) * columns) ** 2 * size / 2
    fill = max(1.0, math.prod(code.launch.grid) / (MULTIPROCESSORS * code.together))
    return fill, triangle, code.launch.grid[0], triangle > CACHE


def multiplying(code: Code) -> tuple[float, float]:
    """Cycles and bytes of `band._product_kernel`: its copies are on their way while it computes."""
    a = code.launch.arguments
    fill, triangle, tiles, far = _rest(code)
    tensor = 2 * a["TILE"] ** 2 * a["BAND"] * 3 / 2048
    turn = max(*(max(code.turn(x, L1) + tensor, code.together * tensor) for x in code.root.inside))
    return fill * (tiles * turn + code.turn(code.root, HBM if far else L2)), 2 * triangle * far


def summing(code: Code) -> tuple[float, float]:
    """Cycles of `band._triangle_kernel`: sums over tiles, and then a turn a column."""
    a = code.launch.arguments
    tiles = a["inner_ptr"][1] - (a["panel"] + 1) * a["BAND"] // a["TILE"]
    sums, columns = sorted(code.root.inside, key=lambda x: -x.count("LDG"))
    turns = a["BAND"] / max(1, columns.count("LDG") // 2)  # each loads tau, and what a thread has of a row
    took = math.ceil(tiles / a["TOGETHER"]) * code.turn(sums) + turns * code.turn(columns, L1)
    return code.waves * (code.turn(code.root) + took), 0.0


def joining(code: Code) -> tuple[float, float]:
    """Cycles of `band._other_factor_kernel`."""
    return _rest(code)[0] * code.turn(code.root), 0.0


def updating(code: Code) -> tuple[float, float]:
    """Cycles and bytes of `band._update_kernel`, a tile a program."""
    a = code.launch.arguments
    fill, triangle, _, far = _rest(code)
    tensor = code.together * 2 * 2 * a["TILE"] ** 2 * a["BAND"] * 3 / 2048
    return fill * max(code.turn(code.root, HBM if far else L2), tensor), 2 * triangle * far


def chasing(code: Code) -> tuple[float, float]:
    """Cycles of `chase._chase_kernel`: rounds of groups, each two steps a sweep behind the one before it."""
    a = code.launch.arguments
    r, programs, sweeps = a["r"], a["programs"], a["SWEEPS"]
    ends: list[int] = []
    start = 0
    for group in range(a["groups"]):
        start = max(start + 2 * sweeps if group else 0, ends[group - programs] if group >= programs else 0)
        ends.append(start + (r - 2 - group * sweeps) // a["BAND"] + 1 + 2 * (sweeps - 1))
    turn = max(code.root.all()[1:], key=lambda x: len(x.own))
    waits = [x for x in turn.inside if x.count("ATOM", "ATOMG", "LDG")]
    return code.waves * ends[-1] * (code.turn(turn) + sum(map(code.turn, waits))), 0.0


MODELS: dict[str, Callable[[Code], tuple[float, float]]] = {
    "_tridiagonal_kernel": reduction, "_syrk_kernel": gram, "_sturm_kernel": counting,
    "_factor_kernel": factoring, "_product_kernel": multiplying, "_triangle_kernel": summing,
    "_other_factor_kernel": joining, "_update_kernel": updating, "_chase_kernel": chasing,
}  # fmt: skip
GPUS = {"H100": (1.755e9, 3.35e12), "H200": (1.755e9, 4.8e12)}  # cycles a second, bytes a second
LAUNCH = 2e-6  # seconds between two kernels that are queued
ASSUMPTIONS = f"""A model and no measurement: on an H100 kernels took between what it says and 2.3 times as long
(LOG.md#first-h100). One warp issues the compiled code as its control bits say, with {L1}, {L2} and {HBM} cycles until a
load from the L1, the L2 and memory is there, 600 of an atomic operation; warps beside it cost its place only where they
fill the schedulers; tensor cores run at their full rate; 132 multiprocessors at 1.755 GHz, 3.35 TB/s (H100) or 4.8 TB/s
(H200). In a step towards leading values a launch takes {1e6 * LAUNCH:.0f} us more, so that the host, which needs longer
to queue one, must be ahead; elsewhere launches, and kernels not named, count nothing."""


def shapes() -> list[tuple[str, float | None, Callable[[], object]]]:
    """(what, the bar in ms, the call), each with what it needs on the GPU."""

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, dtype=dtype, device="cuda")

    def reduces(*shape, dtype=torch.float32, band_from=None):
        A = normal(*shape, dtype=dtype)
        return lambda: tridiagonal(A, overwrite=True, band_from=band_from)

    def multiplies(*shape):
        A = normal(*shape)
        return lambda: syrk(A if A.shape[-2] <= A.shape[-1] else A.mT)

    def counts(B, r, dtype=torch.float32):
        d, e = normal(B, r, dtype=dtype), normal(B, r - 1, dtype=dtype)
        return lambda: sturm(d, e)

    def steps(k: int):
        few = [normal(*shape) for shape, count in (((768, 768), 48), ((768, 3072), 12), ((3072, 768), 12))
               for _ in range(count)]  # fmt: skip
        norms = normal(72, dtype=torch.float64).abs()
        state = topk_svdvals(few, k, norms=norms).state if torch.cuda.get_device_name() != NAME else None
        state = state or State(normal(72, k + 8, 768), normal(72, k + 8, 768))
        return lambda: topk_svdvals(few, k, state=state, norms=norms)

    return [
        ("top 32, a warm step of GPT-2 small", 1, steps(32)),
        ("tridiagonal, 72 of 768", 13, reduces(72, 768, 768)),
        ("tridiagonal, 72 of 768, float64", None, reduces(72, 768, 768, dtype=torch.float64)),
        ("tridiagonal, 105 of 1280", None, reduces(105, 1280, 1280)),
        ("tridiagonal, 24 of 2048", None, reduces(24, 2048, 2048)),
        ("tridiagonal, 16 of 4096", 200, reduces(16, 4096, 4096)),
        ("tridiagonal, 16 of 4096, in one stage", None, reduces(16, 4096, 4096, band_from=4097)),
        ("tridiagonal, 16 of 4096, float64", None, reduces(16, 4096, 4096, dtype=torch.float64)),
        ("tridiagonal, 264 of 128", None, reduces(264, 128, 128)),
        ("Gram, 48 of 768 x 768", None, multiplies(48, 768, 768)),
        ("Gram, 24 of 768 x 3072", None, multiplies(24, 768, 3072)),
        ("Gram, embedding 50257 x 768", 0.4, multiplies(50257, 768)),
        ("Sturm, 72 of 768", None, counts(72, 768)),
        ("Sturm, 72 of 768, float64", None, counts(72, 768, torch.float64)),
    ]


def expected() -> dict[str, dict]:
    """Milliseconds of each shape on each GPU, by the model."""
    found = {}
    with launches(GPUTarget("cuda", 90, 32)) as record:
        recorded = []
        for what, limit, call in shapes():
            del record[:]
            call()
            recorded.append((what, limit, list(record)))
    for what, limit, kernels in recorded:
        steps = any(x.kernel.__name__ == "_thin_kernel" for x in kernels)
        if steps:
            parts = step([code_of(x) for x in kernels])
        else:
            parts = [MODELS[x.kernel.__name__](code_of(x)) for x in kernels if x.kernel.__name__ in MODELS]
        idle = LAUNCH * len(parts) * steps
        row = {
            gpu: 1e3 * (idle + sum(max(c / clock, b / rate) for c, b in parts)) for gpu, (clock, rate) in GPUS.items()
        }
        found[what] = row | {"bar": limit}
    return found


def report() -> dict:
    """Prints the model's table, with what was measured where there is a GPU; returns its rows."""
    rows = expected()
    if torch.cuda.is_available():
        for what, _, call in shapes():
            rows[what]["measured"] = interleaved_cuda({what: call}, 5)[what]["ms"]
    table = [
        [what, *(f"{row[gpu]:.2f}" for gpu in GPUS), row["bar"] or "",
         f"{row['measured']:.2f}" if "measured" in row else "not measured"]
        for what, row in rows.items()
    ]  # fmt: skip
    show("expected ms", ["shape", *GPUS, "bar", "measured"], table)
    print(ASSUMPTIONS)
    for what, row in rows.items():
        if row["bar"] and "measured" in row:
            bar(f"{what}, ms", row["measured"], row["bar"])
    return {"assumptions": " ".join(ASSUMPTIONS.split()), "rows": rows}
