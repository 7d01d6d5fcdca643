// All eigenvalues of many small symmetric tridiagonal matrices by Sturm counts: a lane of a vector holds a matrix.
#pragma once

#include "sturm.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// eigenvalues[l * n .. + n) <- the eigenvalues of lane l's tridiag(d, e), l < count, as `sturm` finds those of one. d and e are not
// modified.
template <class T>
void sturm_lanes(const T* d, const T* e, int64_t n, double tolerance, double* eigenvalues, int64_t count, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    using VI = typename S::VI;
    using VU = typename S::VU;
    using Lim = SturmLimits<T>;
    using I = typename S::I;
    constexpr int L = S::L, N = kChains;
    // Few matrices share the lanes: matrix m has the lanes l % matrices = m, a copy of it and some eigenvalues in each.
    int64_t copies = L, shift = 0;
    while (L / copies < count) copies /= 2;
    while (1 << shift < copies) ++shift;
    const int64_t matrices = L / copies, padded = round_up(n, Lim::kRescale);
    // Probes and brackets p of a matrix: slot p / copies, in the lane of its copy p % copies.
    const int64_t probes = 2 * n, probe_slots = round_up((probes + copies - 1) / copies, N);
    const int64_t slots = round_up((n + copies - 1) / copies, N);
    T *ds = take<T>(arena, padded * L), *es = take<T>(arena, padded * L);
    V* x = take<V>(arena, probe_slots);
    VU* counts = take<VU>(arena, probe_slots);
    Value<T>* values = take<Value<T>>(arena, probe_slots);
    Bracket<T>* brackets = take<Bracket<T>>(arena, slots);
    const auto absolute = [](V a) { return a < 0 ? -a : a; };
    V norm = V{};
    for (int64_t i = 0; i < n; ++i) {
        const V left = i > 0 ? S::at(e + (i - 1) * L) : V{}, right = i + 1 < n ? S::at(e + i * L) : V{};
        const V sum = absolute(S::at(d + i * L)) + absolute(left) + absolute(right);
        norm = sum > norm ? sum : norm;
    }
    alignas(kVectorBytes) T to_unit[L];
    VI matrix, copy;
    for (int l = 0; l < L; ++l) {
        int exponent;
        __builtin_frexp(double(norm[l]), &exponent);
        to_unit[l] = T(__builtin_ldexp(1.0, -exponent));
        matrix[l] = I(l % matrices), copy[l] = I(l / matrices);
    }
    const V unit = S::at(to_unit), top = __builtin_shuffle(norm * unit, matrix) * T(1 + 1e-6);
    for (int64_t i = 0; i < padded; ++i) {
        S::at(ds + i * L) = i < n ? __builtin_shuffle(S::at(d + i * L) * unit, matrix) : S::splat(2);
        const V off = i > 0 && i < n ? __builtin_shuffle(S::at(e + (i - 1) * L) * unit, matrix) : V{}, squared = off * off;
        S::at(es + i * L) = i > 0 ? (squared > Lim::kFloor ? squared : S::splat(Lim::kFloor)) : V{};
    }
    // The square roots of eigenvalues of a Gram matrix lie more evenly than these do.
    for (int64_t s = 0; s < probe_slots; ++s) {
        const V part = __builtin_convertvector(copy + I(s * copies), V) / T(probes - 1);
        x[s] = part < 1 ? top * (part * part) : top;
    }
    for (int64_t s = 0; s < probe_slots; s += N) count_below<T, N, true>(ds, es, padded, x + s, counts + s, values + s);
    // Each bracket lies between the last probe with at most as many eigenvalues below it as its index, and the next one.
    // Counts rise with x up to rounding; the running maximum makes the brackets consistent.
    for (int64_t s = 0; s < slots; ++s)
        brackets[s] = {V{}, top, values[0], values[0], copy + I(s * copies), VI{}};
    VI seen = VI{};
    for (int64_t p = 0; p < probes; ++p) {
        const int64_t slot = p >> shift;
        const VI lane = matrix + I((p & (copies - 1)) * matrices), before = seen, count = VI(__builtin_shuffle(counts[slot], lane));
        const V at = __builtin_shuffle(x[slot], lane);
        const Value<T> value{__builtin_shuffle(values[slot].value, lane), __builtin_shuffle(values[slot].exponent, lane)};
        seen = count > seen ? count : seen;
        for (int64_t s = 0; s < slots; ++s) {
            Bracket<T>& b = brackets[s];
            set_end(b.low, b.at_low, seen <= b.index, at, value);
            set_end(b.high, b.at_high, (before <= b.index) & (seen > b.index), at, value);
        }
    }
    for (int64_t s = 0; s < slots; ++s) brackets[s].high = brackets[s].index < I(n) ? brackets[s].high : brackets[s].low;
    const T wide = T(2 * tolerance);
    for (int64_t s = 0; s < slots; s += N) find<T, true>(ds, es, padded, brackets + s, wide);
    for (int64_t m = 0; m < count; ++m) {
        double last = 0;
        const double back = 1 / (2 * double(to_unit[m]));
        for (int64_t i = 0; i < n; ++i) {
            const Bracket<T>& b = brackets[i >> shift];
            const int64_t at = m + (i & (copies - 1)) * matrices;
            last = max_of(last, (double(b.low[at]) + double(b.high[at])) * back);
            eigenvalues[m * n + i] = last;
        }
    }
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
