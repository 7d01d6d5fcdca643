"""The records of matrices of which only the leading values are measured, at every scale that their dtype holds."""

import math

import numpy as np
import pytest
import torch

import sosd_fast
from sosd_fast.probe.leading import leading_variation
from sosd_fast.spectra.norms import frobenius_norms

SCALES = {torch.float32: (1.0, 1e30, 1e-30, 1e37), torch.float64: (1.0, 1e200, 1e-200, 1e-300, 1e300, 1e-160)}


def records(dtype, scales):
    """Of one matrix that is scaled from step to step, its leading values from the second one on."""
    own = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(30, 20, bias=False, dtype=dtype)
    W = torch.randn(20, 30, dtype=dtype, generator=own)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1.0), []
    with torch.no_grad():
        model.weight.copy_(W)
    probe = sosd_fast.track(model, optimizer, method="topk", k=4, budget=0.9, on_record=found.append)
    for scale in scales:
        with torch.no_grad():
            model.weight.copy_(W * scale)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    probe.close()
    return [record for record in found if record.method == "topk"]


@pytest.mark.parametrize("dtype", list(SCALES), ids=str)
def test_every_scale(dtype):
    found = records(dtype, SCALES[dtype] * 2)
    assert len(found) >= len(SCALES[dtype])
    norms = []
    for record in found:
        norms.append(record.frobenius_norm / SCALES[dtype][(record.step - 1) % len(SCALES[dtype])])
        assert norms[-1] == pytest.approx(norms[0], rel=1e-5)
        assert record.stable_rank == pytest.approx(found[0].stable_rank, rel=1e-4)
        assert all(math.isfinite(value) for value in (*record.topk, *record.residual))
        for name in ("sd_variation_topk", "sd_variation_carried", "sd_variation_floor"):
            value = getattr(record, name)
            assert value is None or value < 1e-4, name  # NaN is not


@pytest.mark.parametrize("dtype", list(SCALES), ids=str)
def test_it_recovers_after_zero_and_subnormal_and_broken_ones(dtype):
    tiny = torch.finfo(dtype).tiny
    found = records(dtype, (1.0, 1.0, tiny / 8, 0.0, math.nan, 1.0, 1.0, 1.0))
    last, first = found[-1], found[0]
    assert last.step == 8 and last.topk == pytest.approx(first.topk, rel=1e-3)
    assert last.sd_variation_topk < 1e-3
    assert math.isnan(next(record for record in found if record.step == 5).frobenius_norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *SCALES], ids=str)
def test_frobenius_norms(dtype):
    W = torch.randn(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes = [0, 14, -10] if dtype == torch.float16 else [0, -120, 124] if dtype != torch.float64 else [0, -1000, 1015]
    matrices = [(W.double() * 2.0**size).to(dtype) for size in sizes]
    expected = [
        float(torch.linalg.vector_norm(A.double() * 2.0**-size)) for A, size in zip(matrices, sizes, strict=True)
    ]
    found = [math.ldexp(norm, -size) for norm, size in zip(frobenius_norms(matrices).tolist(), sizes, strict=True)]
    assert found == pytest.approx(expected, rel=1e-6)
    assert frobenius_norms([torch.full_like(W, math.nan), torch.zeros_like(W)]).isnan().tolist() == [True, False]


def test_a_variation_has_no_unit():
    own = np.random.default_rng(0)
    S, before, tail = (np.sort(own.random(size))[::-1].copy() for size in (4, 4, 10))
    values = []
    for scale in (1.0, 1e-300, 1e300):
        values.append(leading_variation(S * scale, 0.6 * scale, before * scale, 0.5 * scale, tail / 4 * scale))
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-9)
