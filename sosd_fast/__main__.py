"""Command line: python -m sosd_fast doctor."""

import argparse
import importlib
import platform
from importlib import metadata

import torch

from sosd_fast import kernels


def main():
    """Runs a command."""
    parser = argparse.ArgumentParser(prog="python -m sosd_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="show what is installed and which path each operation takes on this machine")
    parser.parse_args()
    print("\n".join(doctor()))


def doctor() -> list[str]:
    """Lists versions, and the path of each operation."""
    has = {name: _version(name) for name in ("numpy", "triton", "cupy", "matplotlib", "rich")}
    lines = [f"python      {platform.python_version()} on {platform.machine()}", f"torch       {torch.__version__}"]
    lines += [f"{name:<11} {version or 'missing'}" for name, version in has.items()]
    cuda = torch.cuda.is_available()
    compiled = kernels._C is not None
    on_cuda = "torch" if cuda else "-"
    lines += [
        f"CUDA GPU    {torch.cuda.get_device_name() if cuda else 'none'}",
        f"extension   {'built' if compiled else 'not built: install a C++17 compiler, then pip install -e .'}",
        "",
        f"{'operation':<22} {'CPU tensors':<14} CUDA tensors",
        f"{'svdvals':<22} {f'C++ ({kernels._C.isa()})' if compiled else 'torch':<14} {on_cuda}",
        f"{'topk_svdvals':<22} {'torch':<14} {'CuPy arrays: CuPy, ' if has['cupy'] else ''}{on_cuda}",
        f"{'singular_distribution':<22} {'C++' if compiled else 'torch':<14} {on_cuda}",
        f"{'newton_schulz':<22} {'torch':<14} {on_cuda}",
    ]
    return lines


def _version(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return getattr(module, "__version__", None) or metadata.version(name)


if __name__ == "__main__":
    main()
