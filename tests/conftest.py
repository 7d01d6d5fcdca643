import logging

import pytest
import torch

from sosd_fast import kernels

torch.set_num_threads(1)  # small matrices, and parallel test runs must not fight over cores


@pytest.fixture(autouse=True)
def no_silent_failure(request, caplog):
    """The probe logs its own errors and lets training go on; in tests that is a failure, unless it is expected."""
    yield
    if "expects_probe_failure" not in request.keywords:
        errors = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
        assert not errors, errors


@pytest.fixture(params=["extension", "torch"])
def path(request, monkeypatch):
    """Runs a test on the C++ kernels and again on torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_C", None)
    else:
        assert kernels._C is not None, "the C++ extension is not built"
    return request.param
