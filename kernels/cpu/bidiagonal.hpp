// Singular values without squaring the matrix: for those whose small values a Gram matrix cannot hold.
#pragma once

#include "gram.hpp"
#include "sturm.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// Householder vector of (alpha, x): v = (1, x * scale), beta = +- norm with the sign of alpha, not LAPACK's opposite one:
// a few rows merged into a large R then change it by little (tau near 0, not 2), and of a million equal rows the
// roundings do not add up. alpha - beta is taken without cancellation (Parlett 1971; Golub & Van Loan 5.1.3).
template <class T> struct Reflector {
    T beta, tau, scale;
};

// The largest entry of the scaled matrix is at least 1, at most 2, or 2^20 where a sample told its size; smaller squares than this
// would lose their bits.
template <class T> constexpr T kNegligible = T(sizeof(T) == 4 ? 0x1p-90 : 0x1p-960);

template <class T> inline Reflector<T> reflector(T alpha, T squares) {
    if (squares <= kNegligible<T>) return {alpha, 0, 0};
    const T norm = T(__builtin_sqrt(double(alpha * alpha + squares))), beta = alpha < 0 ? -norm : norm;
    const T difference = squares / (alpha + beta);  // beta - alpha
    return {beta, difference / beta, -1 / difference};
}

constexpr int kRowsAtOnce = 4;   // in sums, which keeps chains of equal terms short
// In a step of the bidiagonalisation: five values of each row stay in registers.
constexpr int kRowsReduced = kRegisters == 32 ? 4 : 2;
constexpr int kRowsMerged = 32;  // rows of W^T merged into R at a time: with r = 768 they stay in L2

// A[k] <- row k0 + k of scale * W^T, k < h, each of ld entries, those beyond r untouched.
template <class T> inline void copy_rows(const Source& w, int64_t k0, int64_t h, T* A, int64_t ld) {
    constexpr int P = kPanel<T>;
    alignas(kVectorBytes) T packed[P * kRowsMerged];
    for (int64_t i = 0; i < w.r; i += P) {
        const int64_t valid = min_of<int64_t>(P, w.r - i);
        pack_panel(w, i, k0, valid, h, packed);
        for (int64_t k = 0; k < h; ++k)
            for (int64_t q = 0; q < valid; ++q) A[k * ld + i + q] = packed[k * P + q];
    }
}

// R (r, r) <- that of the QR of W^T, row block by row block (LAPACK tpqrt's update). R is zero before.
inline void merge_rows(const Source& w, double* R, int64_t ld, Arena& arena) {
    const ArenaScope scope(arena);
    const int64_t r = w.r;
    double *B = take<double>(arena, kRowsMerged * ld), *y = take<double>(arena, r);
    double v[kRowsMerged];
    for (int64_t k0 = 0; k0 < w.K; k0 += kRowsMerged) {
        const int64_t h = min_of<int64_t>(kRowsMerged, w.K - k0);
        copy_rows(w, k0, h, B, ld);
        for (int64_t i = h; i < round_up(h, kRowsAtOnce); ++i) {
            v[i] = 0;
            for (int64_t c = 0; c < r; ++c) B[i * ld + c] = 0;
        }
        for (int64_t j = 0; j < r; ++j) {
            double squares = 0;
            for (int64_t i = 0; i < h; ++i) squares += B[i * ld + j] * B[i * ld + j];
            const Reflector<double> H = reflector(R[j * ld + j], squares);
            if (H.tau == 0) continue;
            R[j * ld + j] = H.beta;
            double* top = R + j * ld;
#pragma omp simd
            for (int64_t c = j + 1; c < r; ++c) y[c] = top[c];
            for (int64_t i = 0; i < h; ++i) v[i] = B[i * ld + j] * H.scale;
            for (int64_t i = 0; i < h; i += kRowsAtOnce) {
                const double *b0 = B + i * ld, *b1 = b0 + ld, *b2 = b1 + ld, *b3 = b2 + ld;
                const double v0 = v[i], v1 = v[i + 1], v2 = v[i + 2], v3 = v[i + 3];
#pragma omp simd
                for (int64_t c = j + 1; c < r; ++c) y[c] += (v0 * b0[c] + v1 * b1[c]) + (v2 * b2[c] + v3 * b3[c]);
            }
#pragma omp simd
            for (int64_t c = j + 1; c < r; ++c) top[c] -= H.tau * y[c];
            for (int64_t i = 0; i < h; ++i) {
                double* row = B + i * ld;
                const double f = H.tau * v[i];
#pragma omp simd
                for (int64_t c = j + 1; c < r; ++c) row[c] -= f * y[c];
            }
        }
    }
}

// One step of the bidiagonalisation: A <- A - f y^T - g u^T over columns from `from`, a multiple of the lanes, to ld, where
// f = scale * (column k of A) and g = tau (A - f y^T) u = tau A u - taken * (column k of A). y and u are zero where the columns
// are done with.
template <class T> struct BidiagonalStep {
    int64_t ld, from, k;
    T scale, tau, taken;  // taken = tau scale y^T u
    const T *y, *u;
    T* sums;  // += A^T (column k + 1), of the new A: the sums that the next step's reflector takes
};

// Of the kRowsReduced rows in hand g, and of the rows after them A u lane by lane: its sum over lanes would be waited for.
template <class T> struct Begun {
    typename Simd<T>::V g[kRowsReduced], dot[kRowsReduced];
};

// rows.dot <- A u of the rows at A.
template <class T> inline void begin_rows(const T* A, const BidiagonalStep<T>& step, Begun<T>& rows) {
    using S = Simd<T>;
    const int64_t ld = step.ld;
    const T* u = step.u;
    for (int q = 0; q < kRowsReduced; ++q) {
        typename S::V dot{};
        for (int64_t c = step.from; c < ld; c += S::L) dot += S::at(A + q * ld + c) * S::at(u + c);
        rows.dot[q] = dot;
    }
}

// rows.g <- g of the rows at A, whose A u is in rows.dot. The first `done` rows are done with.
template <class T> inline void reflect_rows(const T* A, const BidiagonalStep<T>& step, int64_t done, Begun<T>& rows) {
    using S = Simd<T>;
#pragma GCC unroll 4
    for (int q = 0; q < kRowsReduced; ++q) {
        const typename S::V along = S::splat(step.tau) * sum_everywhere<T>(rows.dot[q]);
        rows.g[q] = q < done ? typename S::V{} : along - S::splat(A[q * step.ld + step.k] * step.taken);
    }
}

// Finishes the rows at A and begins the kRowsReduced rows two places on, if there are any (Ahead counts what follows, to 2): their
// loads from L2 then cost nothing. The first `done` rows are left as they are, and the next one, on top, is not summed.
template <class T, int Ahead>
inline void finish_rows(T* A, const BidiagonalStep<T>& step, int64_t done, Begun<T>& rows) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int N = kRowsReduced;
    const int64_t ld = step.ld, k = step.k;
    const T *y = step.y, *u = step.u, *next = A + 2 * N * ld;
    T* sums = step.sums;
    V f[N], g[N], lead[N], dot[N];
    const V y_lead = S::splat(y[k + 1]);
#pragma GCC unroll 4
    for (int q = 0; q < N; ++q) {
        f[q] = S::splat(q < done ? T(0) : A[q * ld + k] * step.scale);
        g[q] = rows.g[q];
        const V before = S::splat(A[q * ld + k + 1]) - f[q] * y_lead;
        const typename S::VI summed = typename S::VI{} - typename S::I(q > done);
        lead[q] = V(typename S::VI(before - g[q]) & summed);
        dot[q] = V{};
    }
    if constexpr (Ahead > 0) reflect_rows(A + N * ld, step, -1, rows);
    for (int64_t c = step.from; c < ld; c += S::L) {
        const V yc = S::at(y + c), uc = S::at(u + c);
        V a[N], sum = S::at(sums + c);
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) {
            a[q] = S::at(A + q * ld + c) - f[q] * yc - g[q] * uc;
            S::at(A + q * ld + c) = a[q];
        }
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) sum += lead[q] * a[q];
        S::at(sums + c) = sum;
        if constexpr (Ahead > 1) {
#pragma GCC unroll 4
            for (int q = 0; q < N; ++q) dot[q] += S::at(next + q * ld + c) * uc;
        }
    }
    for (int q = 0; q < N; ++q) rows.dot[q] = dot[q];
}

// diagonal[0 .. r), beside[0 .. r - 1) <- the bidiagonal of A (rows, r), rows of ld entries, zeros beyond r. A is lost. Each
// step reads and writes A once (Howell, Demmel, Fulton, Hammarling, Marmol 2008: BLAS 2.5): the sums that the next column's
// reflector takes come from the rows as they are written. rows is a multiple of kRowsReduced, those added to W^T zero.
template <class T>
inline void bidiagonal(T* A, int64_t rows, int64_t r, int64_t ld, T* diagonal, T* beside, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int64_t L = S::L, N = kRowsReduced;
    T *y = take<T>(arena, ld), *u = take<T>(arena, ld), *sums = take<T>(arena, ld);
    for (int64_t c = 0; c < ld; ++c) y[c] = u[c] = sums[c] = 0;
    for (int64_t i = 1; i < rows; ++i)
        for (int64_t c = 0; c < ld; ++c) sums[c] += A[i * ld] * A[i * ld + c];
    for (int64_t k = 0; k < r; ++k) {
        const int64_t from = (k + 1) / L * L;
        T* top = A + k * ld;
        const Reflector<T> H = reflector(top[k], sums[k]);
        diagonal[k] = H.beta;
        if (k + 1 == r) break;
        V squares = {};
        for (int64_t c = from; c <= k; ++c) top[c] = sums[c] = 0;
        for (int64_t c = from; c < ld; c += L) {
            S::at(y + c) = H.tau * (S::at(top + c) + H.scale * S::at(sums + c));
            S::at(top + c) -= S::at(y + c);
            S::at(sums + c) = V{};
        }
        const T next = top[k + 1];
        top[k + 1] = 0;
        for (int64_t c = from; c < ld; c += L) squares += S::at(top + c) * S::at(top + c);
        const Reflector<T> U = reflector(next, sum_lanes<T>(squares));
        beside[k] = U.beta;
        for (int64_t c = from; c < ld; c += L) S::at(u + c) = S::at(top + c) * U.scale;
        u[k + 1] = 1;
        V inner = {};
        for (int64_t c = from; c < ld; c += L) inner += S::at(y + c) * S::at(u + c);
        const BidiagonalStep<T> step{ld, from, k, H.scale, U.tau, H.scale * U.tau * sum_lanes<T>(inner), y, u, sums};
        const int64_t first = (k + 1) / N * N;
        int64_t done = k + 1 - first;
        Begun<T> begun;
        T *at = A + first * ld, *const end = A + rows * ld;
        begin_rows(at, step, begun);
        reflect_rows(at, step, done, begun);
        if (at + N * ld < end) begin_rows(at + N * ld, step, begun);
        for (; at + 2 * N * ld < end; at += N * ld, done = -1) finish_rows<T, 2>(at, step, done, begun);
        if (at + N * ld < end) finish_rows<T, 1>(at, step, done, begun), at += N * ld, done = -1;
        finish_rows<T, 0>(at, step, done, begun);
    }
}

constexpr int64_t kDirect = 2;  // times as long as wide: a longer matrix takes a QR first

// diagonal[0 .. r), beside[0 .. r - 1) <- a bidiagonal matrix with the singular values of scale * W.
template <class T> inline void reduce_direct(const Source& w, T* diagonal, T* beside, Arena& arena) {
    const ArenaScope scope(arena);
    const int64_t r = w.r, line = 64 / sizeof(T), ld = (r / line + 1 + r / line % 2) * line;  // an odd number of cache lines
    const bool merged = sizeof(T) == 8 && w.K > kDirect * r;
    const int64_t rows = round_up(merged ? r : w.K, kRowsReduced);
    T* A = take<T>(arena, rows * ld);
    for (int64_t i = 0; i < rows * ld; ++i) A[i] = 0;
    if constexpr (sizeof(T) == 8)
        if (merged) merge_rows(w, A, ld, arena);
    if (!merged)
        for (int64_t k = 0; k < w.K; k += kRowsMerged) copy_rows(w, k, min_of<int64_t>(kRowsMerged, w.K - k), A + k * ld, ld);
    bidiagonal(A, rows, r, ld, diagonal, beside, arena);
}

// d[0 .. r), e[0 .. r - 1) <- B^T B in float64 for that B in float32: the square roots of its eigenvalues err by 2^-26 at most.
inline void tridiagonal_direct(const Source& w, double* d, double* e, Arena& arena) {
    const ArenaScope scope(arena);
    float *diagonal = take<float>(arena, w.r), *beside = take<float>(arena, w.r - 1);
    reduce_direct(w, diagonal, beside, arena);
    for (int64_t i = 0; i < w.r; ++i) {
        const double across = diagonal[i], above = i > 0 ? double(beside[i - 1]) : 0;
        d[i] = across * across + above * above;
        if (i + 1 < w.r) e[i] = across * double(beside[i]);
    }
}

// S[0 .. r) <- singular values of scale * W, ascending, by bisection: of B^T B in float32, in float64 of the Golub-Kahan matrix
// of order 2 r, whose eigenvalues are +-S.
template <class T>
inline void svdvals_bidiagonal(const Source& w, double* S_out, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t r = w.r, order = sizeof(T) == 4 ? r : 2 * r;
    double *d = take<double>(arena, order), *e = take<double>(arena, order - 1), *values = take<double>(arena, order);
    if constexpr (sizeof(T) == 4) {
        tridiagonal_direct(w, d, e, arena);
    } else {
        double *diagonal = take<double>(arena, r), *beside = take<double>(arena, r - 1);
        reduce_direct(w, diagonal, beside, arena);
        for (int64_t i = 0; i < r; ++i) {
            d[2 * i] = d[2 * i + 1] = 0, e[2 * i] = diagonal[i];
            if (i + 1 < r) e[2 * i + 1] = beside[i];
        }
    }
    sturm<double>(d, e, order, 0x1p-54, values, arena, parallel);
    for (int64_t i = 0; i < r; ++i) S_out[i] = sizeof(T) == 4 ? __builtin_sqrt(values[i]) : values[r + i];
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
