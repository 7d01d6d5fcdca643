// All eigenvalues of many symmetric tridiagonal matrices of one order by the QL algorithm: a lane of a vector holds a matrix.
//
// For matrices of up to some hundred rows, where it takes a tenth of the operations that bisection does; but a step waits
// for the one before it, so that it pays only where other matrices fill the lanes.
#pragma once

#include "sturm.hpp"

namespace sosd_fast {

// A symmetric tridiagonal matrix: d[i * stride], i < n, and e[i * stride], i < n - 1.
struct Tridiagonal {
    const double *d, *e;
    int64_t stride;
    double tolerance;     // an off-diagonal that is smaller relative to the norm counts as zero
    double* eigenvalues;  // out: n, ascending, those below zero as zero
};

// What counts as zero beside the rounding of a matrix that was reduced in T, and the sweeps an eigenvalue that nobody needs.
template <class T> constexpr double kNegligibleBeside = sizeof(T) == 4 ? 0x1p-30 : 0x1p-54;
constexpr int64_t kSweeps = 30;

namespace SOSD_ISA {

// A division of eight doubles takes 24 cycles on Intel's cores, one of four 15, and each step waits for one
// (LOG.md#no-amx).
constexpr int kQlBytes = min_of(kVectorBytes, 32);
using Ql = Simd<double, kQlBytes>;

// Matrices that take as long as one: the steps of some vectors hide one another's latency.
constexpr int64_t kTogether = 2 * Simd<double>::L;

// One QL sweep with implicit shift, without square roots (Pal, Walker & Kahan; Parlett, The Symmetric Eigenvalue Problem,
// 8.14-8.15; LAPACK's sterf), of as many matrices as a vector has lanes. d[i], e2[i]: diagonal and squared off-diagonal.
struct Sweep {
    using S = Ql;
    using V = S::V;
    V shift, gamma, p, s;

    // |gamma| is at least this, as if the shift were as much off: p = gamma^2 / c is never zero then and products stay in range.
    static constexpr double kLeast = 0x1p-120;

    static V apart(V x, V least) { return ((x < 0 ? -x : x) < least) ? least : x; }

    void begin(const double* d, V by) { shift = by, gamma = apart(S::at(d) - by, S::splat(kLeast)), p = gamma * gamma, s = V{}; }

    // From row i + 1, `next` further on, to row i. With Masked, lanes that are done keep what they have.
    template <bool Masked> void step(double* d, double* e2, int64_t next, S::VI open) {
        const V b = S::at(e2), a = S::at(d), r = p + b;
        const V inverse = 1 / (r * p), over_r = inverse * p;  // the only division, and the only one from p to p
        const V q = apart(p * (a - shift) - b * gamma, r * kLeast);
        const V to_gamma = q * over_r, d_next = gamma + (a - to_gamma), e_next = s * r;
        S::at(d + next) = Masked ? (open ? d_next : S::at(d + next)) : d_next;
        S::at(e2 + next) = Masked ? (open ? e_next : S::at(e2 + next)) : e_next;
        s = b * over_r, gamma = to_gamma, p = q * q * inverse;
    }

    // Of row i, the last one of a lane where it is open.
    void end(double* d, double* e2, S::VI open) const {
        S::at(d) = open ? gamma + shift : S::at(d);
        S::at(e2) = open ? s * p : S::at(e2);
    }
};

// N vectors of matrices of order n, lane l's entries at [i * N * L + l], of norms of at most 1: d <- the eigenvalues, in no
// order; e2, n rows, is lost. Off-diagonals whose square is at most `negligible` count as zero. found[l] <- how many there are
// of lane l after that many sweeps; with Wilkinson's shifts one takes 1.7, and 2.3 until the last of 8 lanes has its own.
template <int N>
inline void ql(double* d, double* e2, int64_t n, const double* negligible, int64_t sweeps, int64_t* found) {
    using S = Ql;
    using V = S::V;
    using VI = S::VI;
    constexpr int64_t W = N * S::L;
    VI done[N] = {};  // eigenvalues but the last, and the row that a sweep ends with
    int64_t low = 0, high = 0;  // the least and the greatest of these
    for (;; --sweeps) {
        V a[N], b[N], c[N];
        VI moved;
        do {
            moved = VI{};
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) a[u] = b[u] = c[u] = V{};
            for (int64_t i = low; i <= high && i + 1 < n; ++i)
#pragma GCC unroll 4
                for (int u = 0; u < N; ++u) {
                    const VI here = done[u] == S::I(i);
                    const double* at = d + i * W + u * S::L;
                    a[u] = here ? S::at(at) : a[u], b[u] = here ? S::at(at + W) : b[u];
                    c[u] = here ? S::at(e2 + i * W + u * S::L) : c[u];
                }
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) {
                const VI small = (c[u] <= S::at(negligible + u * S::L)) & (done[u] < S::I(n - 1));
                done[u] -= small, moved |= small;
            }
            low = n, high = 0;
            for (int u = 0; u < N; ++u)
                for (int l = 0; l < S::L; ++l) {
                    const int64_t i = done[u][l];
                    low = min_of(low, i), high = max_of(high, i);
                    found[u * S::L + l] = i + 1;
                }
        } while (any<double, kQlBytes>(moved));
        if (low + 1 >= n || sweeps == 0) return;
        Sweep sweep[N];
        VI last[N];
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
            const V half = (b[u] - a[u]) / 2, across = root<double, kQlBytes>(half * half + c[u]);
            sweep[u].begin(d + (n - 1) * W + u * S::L, a[u] - c[u] / (half + (half < 0 ? -across : across)));
            last[u] = done[u] < S::I(n - 1) ? done[u] : VI{} + S::I(n);
        }
        int64_t i = n - 2;
        for (; i >= high; --i)
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) sweep[u].template step<false>(d + i * W + u * S::L, e2 + i * W + u * S::L, W, VI{});
        if (i < n - 2)
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) {
                const int64_t at = (i + 1) * W + u * S::L;
                sweep[u].end(d + at, e2 + at, last[u] <= S::I(i + 1));
            }
        for (; i >= low; --i)
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) {
                const int64_t at = i * W + u * S::L;
                const VI open = last[u] <= S::I(i);
                sweep[u].template step<true>(d + at, e2 + at, W, open);
                sweep[u].end(d + at, e2 + at, open);
            }
    }
}

inline void order(double* values, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const double value = values[i];
        int64_t at = i;
        for (; at > 0 && values[at - 1] > value; --at) values[at] = values[at - 1];
        values[at] = value;
    }
}

// The eigenvalues of 1 <= count <= N * L matrices.
template <int N>
inline void eigenvalues_abreast(const Tridiagonal* t, int64_t count, int64_t n, int64_t sweeps, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    constexpr int64_t W = N * Ql::L;
    double *d = take<double>(arena, n * W), *e2 = take<double>(arena, n * W);
    alignas(kVectorBytes) double negligible[W];
    double back[W];
    for (int64_t l = 0; l < W; ++l) {
        const Tridiagonal& from = t[l % count];  // lanes that are left over would end sweeps at once, which costs masks
        const auto off = [&](int64_t i) { return i >= 0 && i + 1 < n ? from.e[i * from.stride] : 0; };
        double norm = 0;
        for (int64_t i = 0; i < n; ++i)
            norm = max_of(norm, __builtin_fabs(off(i - 1)) + __builtin_fabs(from.d[i * from.stride]) + __builtin_fabs(off(i)));
        int exponent;
        __builtin_frexp(norm, &exponent);
        const double unit = __builtin_ldexp(1.0, -exponent);
        for (int64_t i = 0; i < n; ++i) {
            const double beside = off(i) * unit;
            d[i * W + l] = from.d[i * from.stride] * unit, e2[i * W + l] = beside * beside;
        }
        negligible[l] = from.tolerance * from.tolerance, back[l] = 1 / unit;
    }
    int64_t found[W];
    ql<N>(d, e2, n, negligible, sweeps, found);
    for (int64_t l = 0; l < count; ++l) {
        if (found[l] < n) {
            const ArenaScope inner(arena);
            double *ds = take<double>(arena, n), *es = take<double>(arena, n - 1);
            for (int64_t i = 0; i < n; ++i) ds[i] = t[l].d[i * t[l].stride];
            for (int64_t i = 0; i + 1 < n; ++i) es[i] = t[l].e[i * t[l].stride];
            sturm<double>(ds, es, n, 0x1p-54, t[l].eigenvalues, arena, parallel);
            continue;
        }
        for (int64_t i = 0; i < n; ++i) t[l].eigenvalues[i] = max_of(d[i * W + l], 0.0) * back[l];
        order(t[l].eigenvalues, n);
    }
}

// The eigenvalues of 1 <= count <= kTogether matrices of order n, each with an error of some 2^-53 of its norm and the
// tolerance. A matrix gets the same bits whatever its neighbours are. One that has not converged after `sweeps`, which no
// matrix is known to need, goes to bisection.
inline void eigenvalues_together(const Tridiagonal* t, int64_t count, int64_t n, int64_t sweeps, Arena& arena, const Parallel& parallel) {
    constexpr int64_t L = Ql::L;
    if constexpr (kTogether > 2 * L)
        if (count > 2 * L) return eigenvalues_abreast<4>(t, count, n, sweeps, arena, parallel);
    if (count > L) return eigenvalues_abreast<2>(t, count, n, sweeps, arena, parallel);
    eigenvalues_abreast<1>(t, count, n, sweeps, arena, parallel);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
