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

// Independent vectors in flight, to hide the latency of p.
// At r = 768 in fp32: AVX2 2 chains 2.1 ms, 3 1.6, 4 1.3; AVX-512 4 0.7, 6 1.0.
constexpr int kChains = 4;

// The characteristic polynomial at x up to a factor that is the same for all x: value * 2^exponent.
template <class T> struct Value {
    typename Simd<T>::V value;
    typename Simd<T>::VI exponent;
};

// counts[u] <- number of eigenvalues below x[u], u < N, and the polynomial there. n is padded to kRescale.
template <class T, int N>
inline void count_below(const T* d, const T* e2, int64_t n, const typename Simd<T>::V* x, typename Simd<T>::VU* counts,
                        Value<T>* values) {
    using S = Simd<T>;
    using V = typename S::V;
    using VI = typename S::VI;
    using VU = typename S::VU;
    using Lim = SturmLimits<T>;
    using U = typename S::U;
    constexpr int sign = sizeof(T) * 8 - 1;
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
            const V di = S::splat(d[i + k]), ei = S::splat(e2[i + k]);
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

// Whether any lane of a comparison is true.
template <class T, int Bytes = kVectorBytes> inline bool any(typename Simd<T, Bytes>::VI x) {
    using S = Simd<T, Bytes>;
    alignas(Bytes) typename S::I each[S::L], out = 0;
    __builtin_memcpy(each, &x, sizeof(x));
    for (int l = 0; l < S::L; ++l) out |= each[l];
    return out != 0;
}

// An eigenvalue's bracket: as many eigenvalues as its index are below low, more are below high.
template <class T> struct Bracket {
    typename Simd<T>::V low, high;
    Value<T> at_low, at_high;
    typename Simd<T>::VI index, kept;  // kept: 1 where the last step kept low, -1 where high, else 0
};

// In float64 secants take 16 steps at 16 x 16 (Gaussian) where halves would take 48; in float32 18 where halves take 21,
// and were no faster. Every so many steps the bracket is halved whatever the polynomial looks like, which bounds their number:
// every 2 or 3 made 22 and 24 steps of those 16, and 32 and 38 of the 45 of values over four decades.
constexpr int kHalvedEvery = 5;
template <class T> constexpr bool kSecants = sizeof(T) == 8;

// The next point to count at: where the polynomial's secant is zero (regula falsi), if `secants` and one of its zeros is
// known to lie between; else the middle. Returns which lanes are not yet narrow enough; the others stay as they are, however
// many steps their neighbours need.
template <class T>
inline typename Simd<T>::VI next_point(const Bracket<T>& b, T wide, bool secants, typename Simd<T>::V& x) {
    using V = typename Simd<T>::V;
    using VI = typename Simd<T>::VI;
    using Lim = SturmLimits<T>;
    const V width = b.high - b.low, middle = b.low + width / 2;
    x = middle;
    if (secants) {
        constexpr typename Simd<T>::I most = 60;  // of exponents, so that products stay in range
        VI apart = b.at_high.exponent - b.at_low.exponent;
        apart = apart > most ? VI{} + most : apart < -most ? VI{} - most : apart;
        const V high = b.at_high.value * V((apart + Lim::kBias) << Lim::kMantissa);
        const V step = width * (b.at_low.value / (b.at_low.value - high));
        // A step of half the tolerance at least: the other end then comes near, too.
        const V least = V{} + wide * T(0.75), limit = width - least;
        const V secant = b.low + (step < least ? least : step > limit ? limit : step);
        const VI crosses = (VI(b.at_low.value) ^ VI(b.at_high.value)) < 0;
        x = crosses & (secant > b.low) & (secant < b.high) ? secant : middle;
    }
    return (middle > b.low) & (middle < b.high) & (width > wide);
}

template <class T>
inline void set_end(typename Simd<T>::V& end, Value<T>& at_end, typename Simd<T>::VI where, typename Simd<T>::V x,
                    const Value<T>& at_x) {
    end = where ? x : end;
    if constexpr (kSecants<T>) {
        at_end.value = where ? at_x.value : at_end.value;
        at_end.exponent = where ? at_x.exponent : at_end.exponent;
    }
}

template <class T>
inline void narrow(Bracket<T>& b, typename Simd<T>::VI open, typename Simd<T>::V x, typename Simd<T>::VI count,
                   const Value<T>& at_x) {
    using VI = typename Simd<T>::VI;
    const VI raise = open & (count <= b.index), lower = open & (count > b.index);
    if constexpr (kSecants<T>) {  // Illinois: an end kept twice counts half
        b.at_high.exponent -= raise & (b.kept < 0) & 1;
        b.at_low.exponent -= lower & (b.kept > 0) & 1;
        b.kept = raise ? VI{} - 1 : lower ? VI{} + 1 : b.kept;
    }
    set_end(b.low, b.at_low, raise, x, at_x);
    set_end(b.high, b.at_high, lower, x, at_x);
}

// Narrows kChains vectors of brackets until each is at most `wide`.
template <class T>
inline void find(const T* d, const T* e2, int64_t n, Bracket<T>* b, T wide) {
    constexpr int N = kChains;
    for (int step = 1; step < 64 * kHalvedEvery; ++step) {
        const bool secants = kSecants<T> && step % kHalvedEvery != 0;
        typename Simd<T>::V at[N];
        typename Simd<T>::VI open[N], more = {};
        typename Simd<T>::VU below[N];
        Value<T> found[N];
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) more |= open[u] = next_point(b[u], wide, secants, at[u]);
        if (!any<T>(more)) break;
        count_below<T, N>(d, e2, n, at, below, found);
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) narrow(b[u], open[u], at[u], typename Simd<T>::VI(below[u]), found[u]);
    }
}

// values[0 .. n) <- the eigenvalues of tridiag(d, e), ascending, those below zero as zero: T comes from a Gram matrix.
// tolerance: final half-width relative to the norm. d and e are not modified.
// The brackets do not come from an earlier spectrum: that saved 1 to 3 % of the whole, and made the last bits depend on
// history, so that a frozen matrix seemed to move.
template <class T>
void sturm(const T* d, const T* e, int64_t n, double tolerance, double* values, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    using VU = typename S::VU;
    using Lim = SturmLimits<T>;
    constexpr int L = S::L, N = kChains;
    const int64_t padded = round_up(n, Lim::kRescale), slots = round_up(n, N * L) / L, probe_slots = round_up(2 * n, N * L) / L;
    const int64_t probes = probe_slots * L;
    T *ds = take<T>(arena, padded), *es = take<T>(arena, padded);
    V* x = take<V>(arena, probe_slots);
    VU* counts = take<VU>(arena, probe_slots);
    Value<T>* at = take<Value<T>>(arena, probe_slots);
    Bracket<T>* brackets = take<Bracket<T>>(arena, slots);

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
    const T top = T(norm * to_unit * (1 + 1e-6)), wide = T(2 * tolerance);

    for (int64_t i = 0; i < probes; ++i) x[i / L][i % L] = top * T(double(i) / double(probes - 1));
    parallel_for(parallel, probe_slots / N, [&](int64_t block) {
        count_below<T, N>(ds, es, padded, x + block * N, counts + block * N, at + block * N);
    });
    // counts rise with x up to rounding; the running maximum makes the brackets consistent
    int64_t k = 0, seen = 0;
    for (int64_t i = 0; i < slots * L; ++i) {
        const auto count = [&](int64_t p) { return int64_t(counts[p / L][p % L]); };
        while (k < probes && max_of(seen, count(k)) <= i) seen = max_of(seen, count(k++));
        const int64_t below = max_of<int64_t>(k - 1, 0), above = i < n ? min_of(k, probes - 1) : below;
        Bracket<T>& b = brackets[i / L];
        const int l = int(i % L);
        b.low[l] = x[below / L][below % L], b.high[l] = x[above / L][above % L];
        b.at_low.value[l] = at[below / L].value[below % L], b.at_high.value[l] = at[above / L].value[above % L];
        b.at_low.exponent[l] = at[below / L].exponent[below % L], b.at_high.exponent[l] = at[above / L].exponent[above % L];
        b.index[l] = typename S::I(i), b.kept[l] = 0;
    }
    parallel_for(parallel, slots / N, [&](int64_t block) {
        find<T>(ds, es, padded, brackets + block * N, wide);
    });
    double last = 0;
    for (int64_t i = 0; i < n; ++i) {
        const Bracket<T>& b = brackets[i / L];
        last = max_of(last, (double(b.low[i % L]) + double(b.high[i % L])) / (2 * to_unit));
        values[i] = last;
    }
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
