"""Operations on symmetric matrices refuse what is none, each by its own name."""

import pytest
import torch

from sosd_fast.kernels.eigh import eigh
from sosd_fast.kernels.tridiagonal import tridiagonal


@pytest.mark.parametrize("operation", [eigh, tridiagonal])
@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.ones(3, 4), r"got A=\(3, 4\)"),
        (torch.ones(3, 3, dtype=torch.float16), "torch.float16"),
        ([1.0], "got A=list"),
    ],
)
def test_bad_input(operation, A, message):
    with pytest.raises(ValueError, match=f"{operation.__name__}: .*{message}"):
        operation(A)
