"""Each field of a record comes from its own source: none is forgotten, none stands under another's name."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.kernels.distribution import Distribution, singular_distribution_ref
from sosd_fast.probe.measurement import FullValues, LeadingValues, Measurement
from sosd_fast.runs.records import Record

K = 5
FIELDS = set(Record.__dataclass_fields__)


def filled(kind, first):
    """Values of a kind with another number in each field."""
    numbers = itertools.count(first)
    own = {}
    for field in dataclasses.fields(kind):
        number = next(numbers)
        whole = {"method": f"m{number}", "interval": number, "topk": (number,), "residual": (number,)}
        own[field.name] = whole.get(
            field.name, np.array([number + 0.5]) if "ndarray" in str(field.type) else number / 8
        )
    return kind(**own)


def found(full=None, leading=None):
    return Measurement(3, 0, "weight", (4, 6), full=full, leading=leading, audit_error=0.125)


def given(record):
    """What a record holds, but for what every measurement knows of its matrix."""
    assert (record.step, record.name, record.shape) == (3, "weight", (4, 6))
    values = {name: getattr(record, name) for name in FIELDS - {"step", "name", "shape"}}
    return {name: value for name, value in values.items() if value is not None}


def test_the_record_of_all_values_has_every_field_of_them():
    full = filled(FullValues, 1)
    names = {field.name for field in dataclasses.fields(FullValues)}
    expected = {name: getattr(full, name) for name in names}
    expected |= {"sd_variation_floor": full.sd_variation_topk, "audit_error": 0.125}
    assert given(found(full).record()) == expected
    assert FIELDS - set(expected) == {"step", "name", "shape", "sd_variation_carried", "residual", "lr"}


def test_the_record_of_leading_values_has_every_field_of_them():
    leading = filled(LeadingValues, 101)
    names = {field.name for field in dataclasses.fields(LeadingValues)} - {"S", "rest"}
    expected = {name: getattr(leading, name) for name in names} | {"method": "topk", "topk": tuple(leading.S)}
    assert given(found(leading=leading).record()) == expected


@pytest.mark.parametrize("consecutive", [True, False])
def test_the_record_of_both_prefers_all_values(consecutive):
    full, leading = filled(FullValues, 1), filled(LeadingValues, 101)
    if not consecutive:
        full.interval = full.sd_variation = full.sd_variation_topk = full.theory_bound = None
    expected = given(found(full).record()) | {"sd_variation_carried": leading.sd_variation_carried}
    if not consecutive:
        since = ("interval", "sd_variation_topk", "sd_variation_floor")
        expected |= {name: getattr(leading, name) for name in since}
    assert given(found(full, leading).record()) == expected


def test_what_cannot_be_measured_is_nan_in_every_field():
    full, leading = FullValues.unmeasured((4, 6), 2, "gram32"), LeadingValues.unmeasured((4, 6), 2)
    for values, names in ((full, {"spectrum", "topk", *Distribution._fields}), (leading, {"S", "topk", "residual"})):
        for field in dataclasses.fields(values):
            if field.type is float or field.name in names:
                value = getattr(values, field.name)
                assert value is None if field.name == "cosine" else np.isnan(value).all(), field.name
    assert full.spectrum.shape == (4,) and len(full.topk) == 2 and full.method == "gram32"


def test_each_field_of_a_full_measurement_is_measured():
    """Against float64; a field that is not expected here is one that nobody has looked at."""
    torch.manual_seed(0)
    net = nn.Linear(48, 40, bias=False)
    start = net.weight.detach().double()
    probe = sosd_fast.track(net, method="full", k=K, every=2, theory_bound=True)
    weights = [start]
    for scale in (0.003, 0.01, 0.004, 0.02):
        net.weight.data += scale * torch.randn(40, 48)
        probe.step()
        weights.append(net.weight.detach().double())
    record = probe.latest()["weight"]
    W, before = weights[4], weights[2]  # every second step is measured
    S, S_before, S_first = map(torch.linalg.svdvals, (W, before, start))
    truth = singular_distribution_ref(S, S_before, S_first)
    p, q = S / S.sum(), S_before / S_before.sum()
    expected = {name: float(getattr(truth, name)) for name in FIELDS & set(Distribution._fields)}
    expected |= {
        "sd_variation": float((p - q).norm()),
        "sd_variation_topk": float((p - q)[:K].norm()),
        "sd_variation_floor": float((p - q)[:K].norm()),
        "theory_bound": (1 + math.sqrt(40)) * float((W - before).norm()) / max(float(S.sum()), float(S_before.sum())),
    }
    apart = sorted(value for name, value in expected.items() if name != "sd_variation_floor")  # of k values the same
    assert all(a < 0.99 * b for a, b in itertools.pairwise(apart)), "values alike would not tell swapped ones"
    for name, value in expected.items():
        assert getattr(record, name) == pytest.approx(value, rel=1e-4), name
    assert (record.step, record.name, record.shape, record.interval) == (4, "weight", (40, 48), 2)
    assert record.method == "gram32" and record.spectrum == pytest.approx(S.numpy(), rel=1e-4)
    assert record.topk == tuple(record.spectrum[:K].tolist())
    error = float((torch.as_tensor(record.spectrum) / record.spectrum.sum() - p).norm())
    assert error <= record.sd_error < 1e-6 < min(expected.values())
    known = {"step", "name", "shape", "interval", "method", "spectrum", "topk", "sd_error"} | set(expected)
    assert FIELDS - known == {"sd_variation_carried", "residual", "audit_error", "lr"}  # of other ways
