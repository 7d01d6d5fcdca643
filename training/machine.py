"""What a result was made with: the machine card of benchmarks and of the reproduction."""

import importlib.util
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch


def card() -> dict:
    """Names the machine, the versions and the commit, as of `commit`."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The commit of this checkout, -dirty where files but results differ from it, or "unknown" outside of one."""
    folder = Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always"], cwd=folder, capture_output=True, text=True)
        changed = ["git", "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results"]
        differs = subprocess.run(changed, cwd=folder, capture_output=True).returncode == 1
    except OSError:  # git is not installed
        return "unknown"
    return said.stdout.strip() + "-dirty" * differs if said.stdout.strip() else "unknown"
