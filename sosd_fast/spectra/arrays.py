"""Arrays of any library: the functions of the Python array API standard, and the few that torch has otherwise.

torch serves as its own namespace: where this package calls a function by its standard name, torch's has the same
arguments and results (it takes `axis` and `keepdims` for `dim` and `keepdim`). The namespaces of other libraries come
from array-api-compat.
"""

from typing import Any

import numpy as np
import torch

from sosd_fast import kernels
from sosd_fast.kernels.eigh import eigh


def namespace(array) -> Any:
    """The module of an array's own operations: torch, NumPy, or what array-api-compat names for others.

    Raises:
        ValueError: no array.
        ImportError: array-api-compat is needed and missing.
    """
    for kind, module in ((torch.Tensor, torch), (np.ndarray, np)):
        if isinstance(array, kind):
            return module
    if not hasattr(array, "shape"):
        raise ValueError(
            f"topk_svdvals: expected a torch, NumPy or CuPy array, got W={type(array).__name__}. "
            "Use torch.as_tensor(W)."
        )
    try:
        from array_api_compat import array_namespace
    except ImportError as error:
        raise ImportError(
            "topk_svdvals: expected the package array-api-compat for arrays other than torch's and NumPy's, got "
            f"W={type(array).__name__}. Install it with `pip install array-api-compat`."
        ) from error
    return array_namespace(array)


def is_real_floating(array) -> bool:
    """Whether an array has a dtype such as float32."""
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    if isinstance(array, np.ndarray):
        return array.dtype.kind == "f"
    return namespace(array).isdtype(array.dtype, "real floating")


def on_host(array) -> bool:
    """Whether the values of a torch tensor are in the host's memory; of arrays of other libraries it is not known."""
    return isinstance(array, torch.Tensor) and array.device.type == "cpu"


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """A torch tensor on the same memory, or on a copy where torch knows no such array."""
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    if min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(np.require(array, dtype, ["ALIGNED", "WRITEABLE"]))


def cast(xp, x, dtype):
    """An array of another dtype; the same one where it has it already."""
    return x.detach().to(dtype) if xp is torch else xp.astype(x, dtype, copy=False)


def transposed(xp, A):
    """A with its last two axes exchanged; `mT` is not there in NumPy 1.26 and CuPy 13."""
    return xp.moveaxis(A, -1, -2)


def symmetric_blocks(xp, A, B, C):
    """[[A, B^T], [B, C]]."""
    return xp.concat([xp.concat([A, transposed(xp, B)], axis=-1), xp.concat([B, C], axis=-1)], axis=-2)


def eigh_descending(xp, H):
    """The eigenvalues of symmetric matrices, descending, and their vectors as rows."""
    H = (H + transposed(xp, H)) / 2
    if xp is torch:
        return eigh(H)
    values, vectors = xp.linalg.eigh(H)
    return xp.flip(values, axis=-1), xp.flip(transposed(xp, vectors), axis=-2)


def descending(xp, S):
    """Values in descending order."""
    return xp.sort(S, descending=True).values if xp is torch else xp.sort(S, descending=True)


def largest_entry(xp, W):
    """The largest |w| of each matrix (B, m, n), (B,); NaN or Inf where one is not finite."""
    return kernels.largest_entry(W)[:, 0, 0] if xp is torch else xp.max(xp.abs(W), axis=(-2, -1))


def power_of_two(xp, x):
    """A power of two near x > 0; elsewhere than in torch up to rounding, since the standard has no ldexp."""
    return kernels.power_of_two(x) if xp is torch else 2.0 ** xp.floor(xp.log2(x))


def positive(xp, x):
    """X where it is positive and not nearly subnormal, else 1: a divisor."""
    return xp.where(x > 64 * float(xp.finfo(x.dtype).smallest_normal), x, 1.0)


def unit_rows(xp, K):
    """Rows scaled to norm 1; those whose squares are nearly subnormal become zero, for their norm is not known."""
    squares = xp.sum(K * K, axis=-1, keepdims=True)
    divisor = positive(xp, squares)
    return xp.where(divisor == squares, K, 0.0) / xp.sqrt(divisor)
