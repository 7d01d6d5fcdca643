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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    extension = kernels._C is not None
    lines += [
        f"CUDA GPU    {device}",
        f"sosd_fast._C {'built' if extension else 'not built: install a C++17 compiler, then pip install -e .'}",
        "",
        "operation              CPU tensors     CUDA tensors",
        f"svdvals                {f'C++ ({kernels._C.isa()})' if extension else 'torch':<15} {'torch' if torch.cuda.is_available() else '-'}",
        f"topk_svdvals           torch           {'torch' if torch.cuda.is_available() else '-'}"
        + (", CuPy arrays by CuPy" if has["cupy"] else ""),
        f"singular_distribution  {'C++' if extension else 'torch':<15} {'torch' if torch.cuda.is_available() else '-'}",
        f"newton_schulz          torch           {'torch' if torch.cuda.is_available() else '-'}",
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
