"""Quotients and square roots for Triton kernels, rounded to nearest: in float32 Triton's own are approximations."""

from sosd_fast.kernels import tl, triton

if triton is not None:

    @triton.jit
    def sqrt(x):
        """Approximations would leave H = I - tau v v^T less than orthogonal."""
        return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)

    @triton.jit
    def divide(x, y):
        """The quotient x / y."""
        return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y

    @triton.jit
    def inverse_sqrt(x):
        """The inverse root of a normal float32 to rounding, or nearly, of an approximation and a step of Newton's."""
        y = tl.rsqrt(x)
        return y + 0.5 * y * tl.fma(-x * y, y, 1.0)
