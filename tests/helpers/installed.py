"""What an installed wheel must do, in an environment where nothing else of this project is: python installed.py."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sosd_fast
from sosd_fast import kernels


def main():
    """Follows a model, reads the run, writes the report; asserts that the compiled kernels are the ones at work."""
    said = [subprocess.run([sys.executable, "-I", "-m", "sosd_fast", "doctor"], capture_output=True, text=True).stdout]
    assert "extension   built" in said[0] and kernels._C is not None, said[0] or "no extension"
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 96))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        probe = sosd_fast.track(model, method="full", run_dir=f"{folder}/run")
        for _ in range(5):
            model(torch.randn(8, 96)).square().mean().backward()
            optimizer.step()
        probe.close()
        assert len(sosd_fast.load(f"{folder}/run").records) >= 10
        for name, record in probe.latest().items():
            truth = torch.linalg.svdvals(model.get_parameter(name).detach().double())
            assert abs(record.sigma_max / truth[0] - 1) < 1e-5 and record.sd_variation > 0
        report = [sys.executable, "-I", "-m", "sosd_fast", "report", f"{folder}/run", "-o", f"{folder}/report.html"]
        subprocess.run(report, check=True)
        assert "<svg" in Path(folder, "report.html").read_text()
    print(sosd_fast.__version__, Path(sosd_fast.__file__).parent)


if __name__ == "__main__":
    main()
