"""Products of float32 tiles for Triton kernels, by three products of TF32 where the GPU has tensor cores for these."""

from sosd_fast.kernels import tl, triton

if triton is not None:

    @triton.jit
    def _nearest(x):
        """The nearest number of TF32's 11 binary digits."""
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)

    @triton.jit
    def dot(x, y, PRECISION: tl.constexpr, SHORT: tl.constexpr = False):
        """The product of two tiles, the second of entries that TF32 has if SHORT; an addition that follows rounds.

        Triton's own "tf32x3" is the same, but looks at each factor and sum for Inf and NaN (LOG.md#topk-cuda-faster).
        """
        if PRECISION == "tf32x3" and x.dtype == tl.float32:
            high_x = _nearest(x)
            if SHORT:
                total = tl.dot(x - high_x, y, input_precision="tf32")
                return tl.dot(high_x, y, total, input_precision="tf32")
            else:
                high_y = _nearest(y)
                total = tl.dot(x - high_x, high_y, input_precision="tf32")
                total = tl.dot(high_x, y - high_y, total, input_precision="tf32")
                return tl.dot(high_x, high_y, total, input_precision="tf32")
        else:
            return tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=32)
