"""What is no number, or no plain weight, is told in a sentence; modes of torch change nothing."""

import math

import pytest
import torch
from torch import nn

import sosd_fast

W = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
CALLS = {
    "k": lambda value: sosd_fast.topk_svdvals(W, value),
    "n_oversamples": lambda value: sosd_fast.topk_svdvals(W, 2, n_oversamples=value),
    "rtol": lambda value: sosd_fast.topk_svdvals(W, 2, rtol=value),
    "steps": lambda value: sosd_fast.newton_schulz(W, steps=value),
    "eps": lambda value: sosd_fast.newton_schulz(W, eps=value),
    "coefficients": lambda value: sosd_fast.newton_schulz(W, coefficients=(3.4, value, 2.0)),
    "lr": lambda value: sosd_fast.Muon([nn.Parameter(W.clone())], lr=value),
    "momentum": lambda value: sosd_fast.Muon([nn.Parameter(W.clone())], momentum=value),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_boolean_is_no_number(name):
    with pytest.raises(ValueError, match=rf"\w+: expected .*{name}=.*(True|False).*\. \S.*\.$"):
        CALLS[name](name != "momentum")


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_bsr"])
def test_a_sparse_parameter_is_left_out_by_name(layout, caplog):
    net = nn.ParameterDict({"plain": nn.Parameter(W.clone())})
    with pytest.warns(UserWarning, match="Sparse") if layout != "to_sparse" else torch.no_grad():
        sizes = [(2, 2)] if layout == "to_sparse_bsr" else []
        net["sparse"] = nn.Parameter(getattr(torch.eye(6), layout)(*sizes))
    probe = sosd_fast.track(net, optimizers=[])
    probe.step()
    assert list(probe.latest()) == ["plain"] and "sparse has layout torch.sparse" in caplog.text
    with pytest.raises(ValueError, match="track: expected a model .* whose sparse has layout torch.sparse_"):
        sosd_fast.track(nn.ParameterDict({"sparse": net["sparse"]}))


@pytest.mark.parametrize("method", ["full", "exact"])
def test_bounds_of_theory_in_inference_mode(method):
    """Where the model is tracked, where it is stepped, and where its weights were made."""
    with torch.inference_mode():
        born = nn.Linear(6, 5, bias=False)
    for net, tracked, stepped in ((born, False, True), (born, True, True), (nn.Linear(6, 5, bias=False), True, False)):
        with torch.inference_mode(tracked):
            probe = sosd_fast.track(net, optimizers=[], method=method, theory_bound=True)
        for _ in range(2):
            with torch.inference_mode(stepped), torch.no_grad():
                net.weight[0] += 1
                probe.step()
        with torch.inference_mode(stepped):
            record = probe.latest()["weight"]
        assert record.step == 2 and 0 < record.sd_variation <= record.theory_bound < math.inf
        probe.close()


@pytest.mark.parametrize("exponent", [-1066, -1070, -1073])
def test_bounds_of_values_that_are_multiples_of_the_smallest_number(path, exponent):  # noqa: ARG001
    """Truth is of the matrix times 2^1000, which is exact; the values that are returned are rounded to 5e-324."""
    g = torch.Generator().manual_seed(-exponent)
    for _ in range(100):
        m, n = torch.randint(1, 9, (2,), generator=g).tolist()
        A = torch.ldexp(torch.randint(-9, 10, (m, n), generator=g).double(), torch.tensor(exponent))
        S, bound = sosd_fast.svdvals(A, return_bound=True)
        large = 2.0**1000
        true = torch.linalg.svdvals(A * large)
        slack = 4 * 2.0**-53 * math.sqrt(m + n) * true[0]
        assert ((S * large - true).abs() <= bound * large + slack).all(), (A, S, bound)
