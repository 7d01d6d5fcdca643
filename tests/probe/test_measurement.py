"""Each field of a record comes from its own source: none is forgotten, none stands under another's name."""

import dataclasses
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import sosd_fast
from sosd_fast.distributed.share import share
from sosd_fast.kernels.distribution import Distribution, singular_distribution_ref
from sosd_fast.matrices import find_matrices
from sosd_fast.probe.followed import FollowedMatrices, Found
from sosd_fast.probe.full import FullGroup, _together
from sosd_fast.probe.measurement import FullValues, LeadingValues, Measurement
from sosd_fast.probe.measurer import Measurer
from sosd_fast.probe.planner import Plan
from sosd_fast.probe.state import Row
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


def test_last_spectra_are_taken_as_they_lie():
    whole, device = torch.rand(4, 6, dtype=torch.float64), torch.device("cpu")
    rows = [Row(whole, i) for i in range(4)]
    assert _together(rows, device).data_ptr() == whole.data_ptr()
    other = Row(torch.rand(4, 6, dtype=torch.float64), 3)
    for others in (rows[::-1], rows[1:], rows[:3], [*rows[:3], other], [rows[0], *rows[:3]], [*rows, other]):
        found = _together(others, device)
        assert torch.equal(found, torch.stack([row.whole[row.at] for row in others]))
        assert found.data_ptr() != whole.data_ptr()
    assert _together([*rows[:3], None], device) is None


def groups_of(net, **options):
    """The names in each group of matrices that one step measures together, in full."""
    seen, launch = [], FullGroup.launch.__func__

    def recorded(cls, states, *others):
        seen.append(sorted(t.name.removesuffix(".weight") for t in states))
        return launch(cls, states, *others)

    probe = sosd_fast.track(net, optimizers=[], audit=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FullGroup, "launch", classmethod(recorded))
        probe.step()
    return sorted(seen)


def layers(*shapes):
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))


def test_matrices_of_one_short_side_are_measured_together():
    net = layers((40, 40), (40, 160), (160, 40), (48, 40), (40, 40), (48, 60))
    assert groups_of(net, method="full") == [["0", "1", "2", "3", "4"], ["5"]]
    net[4].bfloat16()
    assert groups_of(net, method="full") == [["0", "1", "2", "3"], ["4"], ["5"]], "of one dtype"
    assert groups_of(net, method="exact") == [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]], "LAPACK takes one shape"


def test_without_our_kernels_matrices_of_one_shape_are_measured_together(monkeypatch):
    monkeypatch.setattr("sosd_fast.kernels._C", None)
    assert groups_of(layers((40, 40), (40, 160), (40, 40)), method="full") == [["0", "2"], ["1"]]


def test_what_a_matrix_takes_is_its_part_of_the_groups_work():
    """A matrix 16 times as long as another takes more of the budget, though both are measured in one call."""
    net = layers((64, 64), (64, 1024), (64, 64))
    matrices = FollowedMatrices(weakref.ref(net), lambda: Found(share(net, find_matrices(net))))
    pending = Measurer(matrices, every=1, k=8).launch(Plan([0, 1, 2], []), step=1)
    pending.result()
    (cost,), seconds = pending.costs, pending.seconds
    assert sum(seconds.values()) == pytest.approx(cost.seconds) and seconds[0] == seconds[2]
    assert seconds[1] / seconds[0] == pytest.approx((1024 + 2 * 64) / (64 + 2 * 64))
