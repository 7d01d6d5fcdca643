"""Eigenvalues of Gram matrices that others have summed, by the C++ kernels."""

import pytest
import torch

from sosd_fast import kernels
from sosd_fast.spectra.svdvals import gram_eigenvalues

pytestmark = pytest.mark.skipif(kernels._C is None, reason="the C++ kernels are not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [1, 2, 7, 16, 17, 33, 96, 130])
def test_eigenvalues(dtype, r):
    W = torch.randn(3, r, r + 5, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
    G = (W @ W.mT).to(dtype)
    G = (G + G.mT) / 2
    truth, eps = torch.linalg.eigvalsh(G.double()), torch.finfo(dtype).eps
    kept = G.clone()
    for given in (G, G.mT, torch.stack([G, G], -1)[..., 1]):
        error = (gram_eigenvalues(given) - truth).abs().amax(-1) / truth[:, -1]
        assert (error <= (8 + r**0.5) * eps).all()
    assert torch.equal(G, kept)


def test_what_is_not_finite_is_nan_and_alone():
    G = torch.eye(20).expand(4, 20, 20).clone()
    G[1, 9, 3], G[2, 19, 19] = torch.nan, torch.inf
    values = gram_eigenvalues(G)
    assert values[1:3].isnan().all()
    torch.testing.assert_close(values[[0, 3]], torch.ones(2, 20, dtype=torch.float64), rtol=1e-7, atol=0)


def test_it_does_not_depend_on_threads_or_neighbours():
    W = torch.randn(5, 300, 320, generator=torch.Generator().manual_seed(0))
    G, threads = W @ W.mT, torch.get_num_threads()
    together = gram_eigenvalues(G)
    try:
        torch.set_num_threads(1)
        alone = torch.cat([gram_eigenvalues(each[None]) for each in G])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("G", "values"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.float64)),
        (torch.zeros(3, 3), torch.zeros(3, dtype=torch.float64)),
        (torch.zeros(2, 0, 0), torch.zeros(2, 0, dtype=torch.float64)),
        (torch.zeros(2, 3, 3).half(), torch.zeros(2, 3, dtype=torch.float64)),
        (torch.zeros(2, 3, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3, 3), torch.zeros(3, 3, dtype=torch.float64)),
    ],
)  # fmt: skip
def test_others_are_refused(G, values):
    with pytest.raises(ValueError, match="expected"):
        kernels._C.gram_eigenvalues(G=G, values=values, threads=1)
