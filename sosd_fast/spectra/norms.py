"""Frobenius norms of matrices of any range."""

import torch
from torch import Tensor

from sosd_fast.kernels import largest_entry, power_of_two


def frobenius_norms(matrices: list[Tensor]) -> Tensor:
    """Returns Frobenius norms (B,), float64, on the device of the matrices; NaN where one is not finite."""
    matrices = [W.detach() for W in matrices]
    on_host = matrices[0].device.type == "cpu"
    # In float64 no square of float32 leaves the range. The host computes in float64 only where that is needed, for
    # it takes longer there.
    dtype = torch.float32 if on_host and matrices[0].dtype != torch.float64 else torch.float64
    norms = torch.stack(torch._foreach_norm(matrices, 2, dtype)).double()
    if on_host or matrices[0].dtype == torch.float64:  # on a device float64 is always scaled: to look would wait for it
        for j, W in enumerate(matrices):
            if not on_host or not 1e-15 < float(norms[j]) < 1e18:
                power = power_of_two(largest_entry(W).double())
                scaled = torch.linalg.vector_norm(W.double() / power)
                norms[j] = torch.where(scaled.isfinite(), scaled * power[0, 0], torch.nan)
    return norms
