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

// Entries are at most 2 in the scaled matrix; smaller squares than this would lose their bits.
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

// kRowsReduced rows in a step of the bidiagonalisation: A -= f y^T, then A -= g u^T for g = tau (A u).
template <class T> struct Begun {
    typename Simd<T>::V f[kRowsReduced], dot[kRowsReduced];
};

// Finishes these rows and adds A^T lead to the sums, where lead is the column that the next step removes; at the same time
// prepares the kRowsReduced rows after them, whose loads from L2 then cost nothing. Columns from `from`, a multiple of
// the lanes, to ld; y and u are zero where the columns are done with. The first `done` rows are left as they are, and
// the next one, which comes on top, is not summed.
template <class T, bool Finish, bool Prepare>
inline void bidiagonal_rows(T* A, int64_t ld, int64_t from, int64_t k, int64_t done, T scale, T tau, const T* y, const T* u,
                            T* sums, Begun<T>& rows) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int N = kRowsReduced;
    V f[N], g[N], lead[N], f_next[N], dot[N];
    T* next = Finish ? A + N * ld : A;
    if constexpr (Finish) {
        const V taus = S::splat(tau), y_lead = S::splat(y[k + 1]);
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) {
            f[q] = rows.f[q];
            const V before = S::splat(A[q * ld + k + 1]) - f[q] * y_lead;
            const typename S::VI summed = typename S::VI{} - typename S::I(q > done);
            g[q] = taus * sum_everywhere<T>(rows.dot[q]);
            lead[q] = V(typename S::VI(before - g[q]) & summed);
        }
    }
    if constexpr (Prepare) {
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q)
            f_next[q] = S::splat(!Finish && q < done ? T(0) : next[q * ld + k] * scale), dot[q] = V{};
    }
    for (int64_t c = from; c < ld; c += S::L) {
        const V yc = S::at(y + c), uc = S::at(u + c);
        if constexpr (Finish) {
            V a[N];
#pragma GCC unroll 4
            for (int q = 0; q < N; ++q) {
                a[q] = S::at(A + q * ld + c) - f[q] * yc - g[q] * uc;
                S::at(A + q * ld + c) = a[q];
            }
            V sum = lead[0] * a[0] + lead[1] * a[1];
            if constexpr (N == 4) sum += lead[2] * a[2] + lead[3] * a[3];
            S::at(sums + c) += sum;
        }
        if constexpr (Prepare) {
#pragma GCC unroll 4
            for (int q = 0; q < N; ++q) dot[q] += (S::at(next + q * ld + c) - f_next[q] * yc) * uc;
        }
    }
    if constexpr (Prepare) {
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) rows.f[q] = f_next[q], rows.dot[q] = !Finish && q < done ? V{} : dot[q];
    }
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
        const int64_t first = (k + 1) / N * N;
        int64_t done = k + 1 - first;
        Begun<T> open;
        T* at = A + first * ld;
        bidiagonal_rows<T, false, true>(at, ld, from, k, done, H.scale, U.tau, y, u, sums, open);
        for (; at < A + (rows - N) * ld; at += N * ld, done = -1)
            bidiagonal_rows<T, true, true>(at, ld, from, k, done, H.scale, U.tau, y, u, sums, open);
        bidiagonal_rows<T, true, false>(at, ld, from, k, done, H.scale, U.tau, y, u, sums, open);
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
