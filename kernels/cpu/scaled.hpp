// A matrix of any size of entries, scaled so that its squares stay in range.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "svdvals.hpp"

namespace sosd_fast {

// W as the stages see it: scaled by a power of two, its short side first.
struct Scaled {
    Source w;
    int exponent;
    bool sampled = false;      // by the largest entry of some columns, which may not be W's
    std::vector<double> copy;  // of a W whose power of two is beyond the range of its dtype
};

// W of subnormal entries, which no factor of its dtype scales so far that the squares of float32 stay in range.
inline void copy_scaled(Scaled& to) {
    const Source& w = to.w;
    to.copy.resize(size_t(w.r * w.K));
    for (int64_t i = 0; i < w.r; ++i)
        for (int64_t k = 0; k < w.K; ++k) {
            const int64_t at = i * w.stride_i + k * w.stride_k;
            double x = 0;
            if (w.dtype == DType::f64) x = static_cast<const double*>(w.data)[at];
            if (w.dtype == DType::f32) x = static_cast<const float*>(w.data)[at];
            if (w.dtype == DType::bf16) x = SOSD_ISA::widen(static_cast<const SOSD_ISA::bf16*>(w.data)[at]);
            to.copy[size_t(i * w.K + k)] = std::ldexp(x, to.exponent);
        }
    to.w = {to.copy.data(), DType::f64, w.r, w.K, w.K, 1, 1};
}

inline Source as_it_is(const SvdvalsTask& t) {
    if (t.m <= t.n) return {t.data, t.dtype, t.m, t.n, t.row_stride, t.col_stride, 1};
    return {t.data, t.dtype, t.n, t.m, t.col_stride, t.row_stride, 1};
}

inline void scale(Scaled& to, double largest) {
    const int limit = to.w.dtype == DType::f64 ? 1000 : 120;
    to.exponent = std::max(-std::ilogb(largest), -limit);
    to.w.scale = std::ldexp(1.0, to.exponent);
    if (to.exponent > limit) copy_scaled(to);
}

// False: W holds no values, only zeros, NaN or infinity; the results are there.
inline bool prepare(SvdvalsTask& t, Scaled& to) {
    const int64_t r = std::min(t.m, t.n);
    if (r <= 0) return false;
    to.w = as_it_is(t);
    to.sampled = false;
    const double largest = kernels().max_abs(to.w);
    t.finite = std::isfinite(largest);
    if (!t.finite || largest == 0) {
        const double value = t.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
        if (t.automatic) t.method = t.dtype == DType::f64 ? Method::gram64 : Method::gram32;
        std::fill_n(t.S, r, value);
        if (t.bound) std::fill_n(t.bound, r, value);
        t.sd_error = std::numeric_limits<double>::quiet_NaN();
        return false;
    }
    scale(to, largest);
    return true;
}

constexpr int64_t kSampled = 64;            // of so many columns one: reading all of W takes a quarter of the time of 16 x 4096
constexpr double kLargestSquares = 0x1p40;  // their sum, at least 1, in a matrix that is scaled well enough for a Gram matrix

// `prepare` for a Gram matrix, whose trace tells whether the sample was good enough; see `scaled_gram`.
inline bool prepare_by_sample(SvdvalsTask& t, Scaled& to) {
    to.w = as_it_is(t);
    Source some = to.w;
    some.K = (some.K + kSampled - 1) / kSampled;
    const double largest = kernels().max_abs(some);
    if (!std::isnormal(float(largest))) return prepare(t, to);
    scale(to, largest);
    return to.sampled = true;
}

// G <- (1 + drift) W W^T of W as it is scaled, or as it is scaled now. False: W holds no values, and the results are there.
template <class T>
bool scaled_gram(const Stages<T>& stages, SvdvalsTask& t, Scaled& from, T* G, GramSums& sums, Arena& arena, const Parallel& parallel) {
    sums = stages.gram(from.w, G, nullptr, arena, parallel);
    if (!from.sampled || sums.trace <= kLargestSquares) return true;
    if (!prepare(t, from)) return false;
    sums = stages.gram(from.w, G, nullptr, arena, parallel);
    return true;
}

}  // namespace sosd_fast
