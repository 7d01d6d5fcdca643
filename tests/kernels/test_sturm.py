import sys

import pytest
import torch

from sosd_fast.kernels.sturm import sturm, sturm_ref

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def tridiagonal(name, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    d, e = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (r, max(r - 1, 0)))
    return {
        "random": (d, e),
        "toeplitz": (torch.full_like(d, 2.0), torch.full_like(e, -1.0)),
        "diagonal": (d, 0 * e),
        "zero": (0 * d, 0 * e),
        "repeated": (torch.ones_like(d), torch.where(torch.arange(len(e)) % 3 == 0, 1e-3, 0.0).double()),
        "graded": (10.0 ** -torch.arange(r).double().clamp(max=30), 0.3 * 10.0 ** -torch.arange(len(e)).clamp(max=30)),
        "wilkinson": ((torch.arange(r) - r // 2).abs().double(), torch.ones_like(e)),  # close pairs
    }[name]


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("name", ["random", "toeplitz", "diagonal", "zero", "repeated", "graded", "wilkinson"])
def test_against_lapack(device, name, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["sosd_fast.kernels.sturm"], "BLOCK", 16)  # several blocks
    for r in {"random": (1, 2, 17), "wilkinson": (17,)}.get(name, (7,)):  # the interpreter takes a step for each row
        d, e = (t.to(device, dtype) for t in tridiagonal(name, r))
        copies = d.clone(), e.clone()
        values = sturm(d, e)
        truth = sturm_ref(d.double(), e.double())
        norm = truth.abs().max()
        assert values.dtype == dtype and values.shape == d.shape
        # counts are exact for a matrix that is off by a few eps; the bracket ends at 2^-28 or 2^-53; LAPACK errs too
        units = 6 if dtype == torch.float32 else 16
        assert ((values.double() - truth).abs() <= units * EPS[dtype] * norm).all()
        assert (values[1:] >= values[:-1]).all()
        assert torch.equal(d, copies[0]) and torch.equal(e, copies[1])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scale(device, size):
    d, e = (t.to(device).float() for t in tridiagonal("random", 8))
    small = torch.tensor(size, dtype=torch.float32, device=device)
    expected = sturm_ref(d.double(), e.double())
    torch.testing.assert_close(sturm(d * small, e * small).double() / size, expected, rtol=0, atol=1e-6)


def test_batches_strides_and_nan(device):
    pairs = [tridiagonal("random", 4, seed) for seed in range(4)]
    d = torch.stack([p[0] for p in pairs]).reshape(2, 2, 4).to(device)
    e = torch.stack([p[1] for p in pairs]).reshape(2, 2, 3).to(device)
    whole = sturm(d, e)
    torch.testing.assert_close(whole, sturm_ref(d, e), rtol=0, atol=1e-13)
    wide_d, wide_e = (torch.stack([t, t], -1)[..., 0].transpose(0, 1) for t in (d, e))
    assert torch.equal(sturm(wide_d, wide_e), whole.transpose(0, 1))
    d[0, 1, 3], e[1, 0, 0] = torch.nan, torch.inf
    values = sturm(d, e)
    for i, j in ((0, 1), (1, 0)):
        assert values[i, j].isnan().all()
        values[i, j] = whole[i, j]
    assert torch.equal(values, whole)
    assert sturm(d[:0], e[:0]).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, dtype=torch.int32), torch.ones(2)), "got d=.*int32"),
        ((torch.ones(3), torch.ones(3)), r"got e=\(3,\)"),
        ((torch.ones(3), torch.ones(2).double()), "torch.float64"),
        ((torch.ones(0), torch.ones(0)), r"than d \(0,\)"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match="sturm: .*" + message):
        sturm(*arguments)
