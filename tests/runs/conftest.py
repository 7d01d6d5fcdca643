import sys

import pytest


@pytest.fixture(params=["json", "pyarrow"])
def form(request, monkeypatch):
    """Segments of as many bytes as the module says, closed as JSON lines, where pyarrow is missing, or as Parquet."""
    if request.param == "json":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    else:
        pytest.importorskip("pyarrow")
    monkeypatch.setattr("sosd_fast.runs.records.SEGMENT_BYTES", request.module.SEGMENT_BYTES)
    return request.param
