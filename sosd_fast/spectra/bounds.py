"""What theory allows a singular distribution to move by."""

from typing import Any


def theory_bound(update_norm: Any, nuclear_norm: Any, min_mn: int) -> Any:
    """Bounds one step of SD variation by the size of the update, elementwise.

        |SD(W') - SD(W)|_2 <= (1 + sqrt(r)) |W' - W|_F / max(|W|_*, |W'|_*),   r = min(m, n)

    Args:
        update_norm: Frobenius norm of W' - W; for gradient descent the learning rate times the gradient's norm.
        nuclear_norm: that of W or of W', the larger where both are known; the bound holds with either.
        min_mn: the smaller dimension.

    Returns:
        The bound, in the type of the arguments. It is never exceeded, up to the rounding of what it is compared with.

    Source: singular values are 1-Lipschitz in the Frobenius norm (Mirsky); a/|a|_1 - b/|b|_1 = (a - b)/|a|_1 +
    b (1/|a|_1 - 1/|b|_1) with |b|_2 <= |b|_1 and ||a|_1 - |b|_1| <= sqrt(r) |a - b|_2.
    """
    return (1 + min_mn**0.5) * update_norm / nuclear_norm
