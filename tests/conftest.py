"""Fixtures, and what is done before the first test. Nothing is imported here that imports torch."""

import importlib
import logging

import pytest


def pytest_collection(session):
    """Not where others run the tests: xdist starts them when this process has imported torch, which takes seconds."""
    if not session.config.pluginmanager.hasplugin("dsession"):
        importlib.import_module("interpreted")


def pytest_collection_modifyitems(items):
    """The slow tests first, or one of them begins when the other worker has nothing left to do."""
    items.sort(key=lambda item: "slow" not in item.keywords)


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
    from sosd_fast import kernels

    if request.param == "torch":
        monkeypatch.setattr(kernels, "_C", None)
    else:
        assert kernels._C is not None, "the C++ extension is not built"
    return request.param


@pytest.fixture
def device(monkeypatch):
    """Where the Triton kernels run: on the GPU, or in Triton's interpreter on CPU tensors."""
    import numpy as np
    import torch

    from sosd_fast import kernels

    if torch.cuda.is_available():
        yield "cuda"
        return
    if kernels.triton is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(kernels, "interpreted", True)
    with np.errstate(all="ignore"):  # NaN and Inf are values on a GPU
        yield "cpu"
