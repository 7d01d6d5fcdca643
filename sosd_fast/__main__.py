"""Command line: python -m sosd_fast {doctor, report, watch, analyze}."""

import argparse
import importlib
import json
import math
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from sosd_fast import kernels
from sosd_fast.runs.text import plain


def main(argv=None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sosd_fast", description=__doc__)
    parser.add_argument("--version", action="version", version=_version("sosd_fast") or "not installed")
    commands = parser.add_subparsers(dest="command", required=True)
    # fmt: off
    commands.add_parser("doctor", help="Shows what is installed and which path each operation takes on this machine.")
    report = commands.add_parser("report", help="Writes one HTML page about one or several runs.")
    report.add_argument("runs", nargs="+", metavar="RUN", help="Reads these run directories.")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE",
                        help="The file that the page is written to, %(default)s by default.")
    report.add_argument("--matrices", type=int, default=48,
                        help="The largest number of matrices of a run whose spectra are drawn, %(default)s by default.")
    watch = commands.add_parser("watch", help="Shows a run in the terminal while another process writes it, until "
                                "ctrl-C; without a terminal, once.")
    watch.add_argument("run", metavar="RUN", help="Reads this run directory.")
    watch.add_argument("--every", type=float, default=1.0, metavar="SECONDS",
                       help="Looks again after as many seconds, or later where a look takes long; %(default)s by "
                       "default.")
    watch.add_argument("--html", action="store_true",
                       help="Serves the report on localhost instead, made anew at each reload; off by default.")
    watch.add_argument("--port", type=int, default=0,
                       help="With --html, serves on this port; a free one by default.")
    analyze = commands.add_parser("analyze", help="Shows the spectra of saved weights, and their change between them.")
    analyze.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                         help="Reads these: files of safetensors, torch or GGUF, folders of them, folders of "
                         "torch.distributed.checkpoint, or folders that hold a series of checkpoints.")
    analyze.add_argument("--stack", action="append", default=[], metavar="PATTERN",
                         help="Takes weights of three or more dimensions whose names fit as stacks of matrices; may be "
                         "repeated. By default names and shapes tell.")
    analyze.add_argument("--flatten", action="append", default=[], metavar="PATTERN",
                         help="Takes those whose names fit as one matrix (out, rest), like a convolution's; may be "
                         "repeated. By default names and shapes tell.")
    analyze.add_argument("--json", action="store_true", help="Prints JSON instead of tables; off by default.")
    analyze.add_argument("--spectra", action="store_true",
                         help="With --json, prints all singular values, too; off by default.")
    analyze.add_argument("--run-dir", metavar="DIR",
                         help="Keeps the records as a run in this new folder, for report; by default nowhere.")
    # fmt: on
    args = parser.parse_args(argv)
    if args.command == "doctor":
        print("\n".join(doctor()))
        return 0
    try:
        {"report": _report, "watch": _watch, "analyze": _analyze}[args.command](args)
    except (ValueError, ImportError, OSError) as error:
        print(plain(error), file=sys.stderr)
        return 2
    return 0


def _report(args):
    from sosd_fast.runs.report import write_report

    print(write_report(args.runs, args.output, matrices=args.matrices))


def _watch(args):
    if args.html:
        from sosd_fast.runs.serve import serve

        serve([args.run], args.port)
    else:
        from sosd_fast.runs.watch import watch

        watch(args.run, args.every)


def _analyze(args):
    from sosd_fast.checkpoints.analyze import analyze, expand
    from sosd_fast.checkpoints.bar import Bar
    from sosd_fast.runs.records import RunWriter

    if args.run_dir and Path(args.run_dir).is_dir() and any(Path(args.run_dir).iterdir()):
        raise ValueError(
            f"analyze: expected a new or empty folder, got --run-dir={args.run_dir}. Choose another: the records of a "
            "run would be mixed with these."
        )
    writer, found, notes = None, [], {}
    checkpoints = expand(args.checkpoints)
    bar = Bar()
    measured = analyze(checkpoints, stack=args.stack, flatten=args.flatten, notes=notes, progress=bar.advance)
    for path, records in zip(checkpoints, bar.beside(measured), strict=True):
        if args.run_dir:
            writer = writer or RunWriter(args.run_dir, {"settings": {"checkpoints": list(map(str, checkpoints))}})
            writer.append(records)
        if args.json:
            rows = [
                {f: _plain(getattr(r, f)) for f in r.__dataclass_fields__ if f not in ("topk", "spectrum", "residual")}
                | ({"spectrum": _plain(r.spectrum.tolist())} if args.spectra and r.spectrum is not None else {})
                for r in records
            ]
            nulls = [r.name for r in records if not math.isfinite(r.frobenius_norm or 0)]
            said = [f"null stands for NaN and infinities in {name}" for name in nulls]
            found.append({"checkpoint": str(path), "notes": notes[str(path)] + said, "matrices": rows})
        else:
            _table(path, records)
    if writer:
        writer.close()
    if args.json:
        print(json.dumps(found, allow_nan=False))


def _plain(value):
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(path, records):
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        raise ImportError(
            "analyze: expected rich to be installed for tables. Run `pip install rich`, or pass --json."
        ) from None
    fields = {
        "σ max": ("sigma_max", ".4g"), "σ min": ("sigma_min", ".3g"), "‖W‖_F": ("frobenius_norm", ".4g"),
        "stable rank": ("stable_rank", ".2f"), "effective rank": ("effective_rank", ".1f"),
        "SD variation": ("sd_variation", ".2e"), "cosine to first": ("cosine", ".7f"),
        "SD error ≤": ("sd_error", ".0e"),
    }  # fmt: skip
    fields = {
        label: (f, form) for label, (f, form) in fields.items() if any(getattr(r, f) is not None for r in records)
    }
    table = Table("matrix", "shape", *fields)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for r in records:
        values = ((getattr(r, f), form) for f, form in fields.values())
        cells = ("–" if v is None else format(v, form) for v, form in values)
        table.add_row(escape(plain(r.name)), "×".join(map(str, r.shape)), *cells)
    console = Console()
    if not console.is_terminal:  # a file or pipe has no width to keep to
        console = Console(width=200)
    console.print(f"{plain(path)}, step {records[0].step}", soft_wrap=True, highlight=False, markup=False)
    console.print(table)


def doctor() -> list[str]:
    """Lists versions, and the path of each operation."""
    has = {name: _version(name) for name in ("numpy", "triton", "cupy", "matplotlib", "rich", "pyarrow", "safetensors")}
    lines = [f"python      {platform.python_version()} on {platform.machine()}", f"torch       {torch.__version__}"]
    lines += [f"{name:<11} {version or 'missing'}" for name, version in has.items()]
    cuda = torch.cuda.is_available()
    compiled = kernels._C is not None
    lines += [
        f"CUDA GPU    {torch.cuda.get_device_name() if cuda else 'none'}",
        f"extension   {'built' if compiled else 'not built: pip install -e . in the project, with a C++17 compiler'}",
        "",
        f"{'operation':<22} {'CPU tensors':<14} CUDA tensors",
    ]
    words = {"cpp": f"C++ ({kernels._C.isa()})" if compiled else "", "triton": "Triton", "torch": "torch"}
    for op in ("svdvals", "topk_svdvals", "singular_distribution", "newton_schulz"):
        host = words[kernels.backend_of(op, torch.empty(0, device="cpu"))]
        on_cuda = words[kernels.backend_of(op, torch.empty(0, device="cuda"))] if cuda else "-"
        if op == "topk_svdvals":  # torch's products, our eigensolver
            on_cuda += ", Triton" if cuda and kernels.triton else ""
            on_cuda = "CuPy arrays: CuPy, " * bool(has["cupy"]) + on_cuda
        lines.append(f"{op:<22} {host:<14} {on_cuda}")
    return lines


def _version(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
        return getattr(module, "__version__", None) or metadata.version(name)
    except ImportError:  # a bare checkout has no metadata: PackageNotFoundError is an ImportError, too
        return None


if __name__ == "__main__":
    sys.exit(main())
