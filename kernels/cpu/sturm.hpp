// All eigenvalues of a symmetric tridiagonal matrix by bisection on Sturm counts, vectorised over eigenvalues.
#pragma once

#include "arena.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// Characteristic polynomials p_i = (d_i - x) p_{i-1} - e_{i-1}^2 p_{i-2} instead of LAPACK stebz's quotients: a sign
// change per eigenvalue below x, no division, and a zero needs no pivot guard (the next p has the sign opposite to the
// previous one). Each rounding is a relative change of d_i - x or e_i^2, so the count is exact for a nearby matrix.
// Overflow: d, e are scaled to at most 1 and the pair is rescaled by a power of two every kRescale steps; underflow:
// e^2 >= kFloor bounds what kRescale steps can lose (an absolute error of sqrt(kFloor), far below eps).
template <class T> struct SturmLimits;
template <> struct SturmLimits<float> {
    static constexpr int kRescale = 4, kMantissa = 23, kTarget = 127 + 100, kBias = 127;
    static constexpr float kFloor = 1e-18f;
    static constexpr bool kClamp = true;  // 2^100 may shrink below 2^-27 in four steps, and the factor exceed the range
};
template <> struct SturmLimits<double> {
    static constexpr int kRescale = 8, kMantissa = 52, kTarget = 1023 + 900, kBias = 1023;
    static constexpr double kFloor = 1e-36;
    static constexpr bool kClamp = false;
};
constexpr int kRescaleMost = 8;

// Independent vectors in flight, to hide the latency of p.
// At r = 768 in fp32: AVX2 2 chains 2.1 ms, 3 1.6, 4 1.3; AVX-512 4 0.7, 6 1.0.
constexpr int kChains = 4;
template <class T> constexpr int64_t kSturmBlock = kChains * Simd<T>::L;

// The characteristic polynomial at x up to a factor that is the same for all x: value * 2^exponent.
template <class T> struct Value {
    typename Simd<T>::V value;
    typename Simd<T>::VI exponent;
};

// counts[u] <- number of eigenvalues below x[u], u < N, and the polynomial there. With Lanes each lane has a matrix of its
// own, d and e2 hold vectors. n is padded to kRescale.
template <class T, int N, bool Lanes>
inline void count_below(const T* d, const T* e2, int64_t n, const typename Simd<T>::V* x, typename Simd<T>::VU* counts,
                        Value<T>* values) {
    using S = Simd<T>;
    using V = typename S::V;
    using VI = typename S::VI;
    using VU = typename S::VU;
    using Lim = SturmLimits<T>;
    using U = typename S::U;
    constexpr int sign = sizeof(T) * 8 - 1;
    const auto at = [](const T* p, int64_t i) { return Lanes ? S::at(p + i * S::L) : S::splat(p[i]); };
    V before[N], now[N];
    VU count[N], factors[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
        before[u] = V{};
        now[u] = V(S::splat_word(U(Lim::kTarget) << Lim::kMantissa));
        count[u] = factors[u] = VU{};
    }
    for (int64_t i = 0; i < n; i += Lim::kRescale) {
#pragma GCC unroll 8
        for (int k = 0; k < Lim::kRescale; ++k) {
            const V di = at(d, i + k), ei = at(e2, i + k);
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) {
                const V next = (di - x[u]) * now[u] - before[u] * ei;
                count[u] += (VU(next) ^ VU(now[u])) >> sign;
                before[u] = now[u];
                now[u] = next;
            }
        }
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
            const VU magnitude = S::splat_word(~(U(1) << sign));
            const V p = V(VU(now[u]) & magnitude), q = V(VU(before[u]) & magnitude);
            const VU exponent = VU(p > q ? p : q) >> Lim::kMantissa;
            VU factor = (Lim::kTarget + Lim::kBias) - exponent;
            if constexpr (Lim::kClamp) factor = factor < 2 * Lim::kBias ? factor : S::splat_word(2 * Lim::kBias);
            const V scale = V(factor << Lim::kMantissa);
            now[u] *= scale;
            before[u] *= scale;
            factors[u] += factor;
        }
    }
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) counts[u] = count[u], values[u] = {now[u], -VI(factors[u])};
}

// counts[l] = number of eigenvalues below x[l], kSturmBlock values at once.
template <class T> inline void sturm_count(const T* d, const T* e2, int64_t n, const T* x, T* counts) {
    using S = Simd<T>;
    typename S::V at[kChains];
    typename S::VU count[kChains];
    Value<T> unused[kChains];
    for (int u = 0; u < kChains; ++u) at[u] = S::at(x + u * S::L);
    count_below<T, kChains, false>(d, e2, n, at, count, unused);
    for (int u = 0; u < kChains; ++u) S::at(counts + u * S::L) = __builtin_convertvector(count[u], typename S::V);
}

// values[0 .. n) <- the eigenvalues of tridiag(d, e), ascending, those below zero as zero: T comes from a Gram matrix.
// tolerance: final half-width relative to the norm. d and e are not modified.
// The brackets do not come from an earlier spectrum: that saved 1 to 3 % of the whole, and made the last bits depend on
// history, so that a frozen matrix seemed to move.
template <class T>
void sturm(const T* d, const T* e, int64_t n, double tolerance, double* values, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    using Lim = SturmLimits<T>;
    constexpr int64_t B = kSturmBlock<T>;
    const int64_t padded = round_up(n, kRescaleMost), blocks = (n + B - 1) / B, probes = round_up(2 * n, B);
    T *ds = take<T>(arena, padded), *es = take<T>(arena, padded);
    T *x = take<T>(arena, probes), *counts = take<T>(arena, probes);
    T *lo = take<T>(arena, blocks * B), *hi = take<T>(arena, blocks * B);

    double norm = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double left = i > 0 ? double(e[i - 1]) : 0, right = i + 1 < n ? double(e[i]) : 0;
        norm = max_of(norm, __builtin_fabs(double(d[i])) + __builtin_fabs(left) + __builtin_fabs(right));
    }
    if (norm == 0) {
        for (int64_t i = 0; i < n; ++i) values[i] = 0;
        return;
    }
    int exponent;
    __builtin_frexp(norm, &exponent);
    const double to_unit = __builtin_ldexp(1.0, -exponent);
    for (int64_t i = 0; i < padded; ++i) {
        ds[i] = i < n ? T(d[i] * to_unit) : T(2);
        const T off = i > 0 && i < n ? T(e[i - 1] * to_unit) : T(0);
        es[i] = i > 0 ? max_of(off * off, Lim::kFloor) : T(0);
    }
    const T top = T(norm * to_unit * (1 + 1e-6)), half = T(tolerance);

    for (int64_t i = 0; i < probes; ++i) x[i] = top * T(double(i) / double(probes - 1));
    parallel_for(parallel, probes / B, [&](int64_t block) {
        sturm_count(ds, es, padded, x + block * B, counts + block * B);
    });
    // counts rise with x up to rounding; the running maximum makes the brackets consistent
    int64_t k = 0;
    T seen = 0;
    for (int64_t i = 0; i < blocks * B; ++i) {
        while (k < probes && max_of(seen, counts[k]) <= T(i)) seen = max_of(seen, counts[k++]);
        lo[i] = i < n && k > 0 ? x[k - 1] : 0;
        hi[i] = i < n ? (k < probes ? x[k] : top) : 0;
    }
    parallel_for(parallel, blocks, [&](int64_t block) {
        T *low = lo + block * B, *high = hi + block * B;
        alignas(kVectorBytes) T mid[B], below[B];
        for (int step = 0; step < 64; ++step) {
            T widest = 0;
            for (int64_t l = 0; l < B; ++l) {
                mid[l] = (low[l] + high[l]) / 2;
                const bool open = mid[l] > low[l] && mid[l] < high[l];  // false: no number lies between
                widest = max_of(widest, open ? high[l] - low[l] : T(0));
            }
            if (widest <= 2 * half) break;
            sturm_count(ds, es, padded, mid, below);
            for (int64_t l = 0; l < B; ++l) {
                const bool left = below[l] <= T(block * B + l);
                low[l] = left ? mid[l] : low[l];
                high[l] = left ? high[l] : mid[l];
            }
        }
    });
    double last = 0;
    for (int64_t i = 0; i < n; ++i) {
        last = max_of(last, (double(lo[i]) + double(hi[i])) / (2 * to_unit));
        values[i] = last;
    }
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
