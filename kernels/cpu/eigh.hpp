// All eigenvalues and vectors of a small symmetric matrix: Householder tridiagonalisation and implicit QR.
#pragma once

#include "arena.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// y += alpha x; stride-1 rows, n padded to whole vectors and both aligned.
inline void axpy(float alpha, const float* x, float* y, int64_t n) {
    for (int64_t k = 0; k < n; k += Simd<float>::L) Simd<float>::at(y + k) += Simd<float>::at(x + k) * alpha;
}

// Rows k .. k + count of X times the rotations (c_i, s_i), each of rows i and i + 1. A row passes through registers
// once for both rotations that touch it.
template <int N>
inline void rotate_columns(float* X, int64_t stride, const float* c, const float* s, int64_t count) {
    using S = Simd<float>;
    S::V held[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) held[v] = S::at(X + v * S::L);
    for (int64_t i = 0; i < count; ++i) {
        float *row = X + i * stride, *next = row + stride;
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
            const S::V x = S::at(next + v * S::L);
            S::at(row + v * S::L) = held[v] * c[i] + x * s[i];
            held[v] = x * c[i] - held[v] * s[i];
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::at(X + count * stride + v * S::L) = held[v];
}

// A (n, n), rows `stride` apart, symmetric, destroyed; stride is a multiple of 16 and the padding is zero. values[i], in no
// order, belongs to row i of X (n, n). Returns whether it converged. The rotations' angles are in double: the chain of one
// sweep is as long as the matrix. Source: Golub & Van Loan, Matrix Computations, 8.3.
inline bool eigh(float* A, int64_t n, int64_t stride, double* values, float* X, Arena& arena) {
    const ArenaScope scope(arena);
    const int64_t padded = round_up(n, 16);
    float *v = take<float>(arena, padded), *w = take<float>(arena, padded);
    float *c = take<float>(arena, n), *s = take<float>(arena, n);
    double *d = values, *e = take<double>(arena, n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < stride; ++k) X[i * stride + k] = 0;
        X[i * stride + i] = 1;
    }
    for (int64_t k = 0; k < n; ++k) {
        const float* a = A + k * stride;
        d[k] = a[k];
        if (k + 1 == n) break;
        double squares = 0;
        for (int64_t i = k + 1; i < n; ++i) squares += double(a[i]) * a[i];
        const double alpha = a[k + 1], beta = alpha > 0 ? -__builtin_sqrt(squares) : __builtin_sqrt(squares);
        e[k] = beta;
        if (k + 2 == n) e[k] = alpha;
        if (k + 2 >= n || squares - alpha * alpha <= 1e-30 * squares) {
            if (k + 2 < n) e[k] = alpha;
            continue;
        }
        const float tau = float((beta - alpha) / beta), scale = float(1 / (alpha - beta));
        const int64_t first = (k + 1) / 16 * 16, length = padded - first;
        for (int64_t i = first; i < padded; ++i) v[i] = i > k ? a[i] * scale : 0, w[i] = 0;
        v[k + 1] = 1;
        for (int64_t i = k + 1; i < n; ++i) axpy(v[i], A + i * stride + first, w + first, length);
        float vw = 0;
        for (int64_t i = k + 1; i < n; ++i) vw += v[i] * w[i];
        for (int64_t i = first; i < padded; ++i) w[i] = i > k ? tau * (w[i] - tau * vw / 2 * v[i]) : 0;
        for (int64_t i = k + 1; i < n; ++i) {
            axpy(-v[i], w + first, A + i * stride + first, length);
            axpy(-w[i], v + first, A + i * stride + first, length);
        }
        for (int64_t i = 0; i < padded; ++i) w[i] = 0;
        for (int64_t i = k + 1; i < n; ++i) axpy(v[i], X + i * stride, w, padded);
        for (int64_t i = k + 1; i < n; ++i) axpy(-tau * v[i], w, X + i * stride, padded);
    }
    int64_t end = n - 1;
    for (int64_t sweep = 0; end > 0; ++sweep) {
        if (sweep > 30 * n) return false;
        const auto negligible = [&](int64_t i) {
            return __builtin_fabs(e[i]) <= 0x1p-27 * (__builtin_fabs(d[i]) + __builtin_fabs(d[i + 1]));
        };
        if (negligible(end - 1)) {
            e[--end] = 0;
            continue;
        }
        int64_t start = end - 1;
        while (start > 0 && !negligible(start - 1)) --start;
        const double half = (d[end - 1] - d[end]) / 2, last = e[end - 1];
        const double root = __builtin_sqrt(half * half + last * last);
        double x = d[start] - (d[end] - last * last / (half + (half < 0 ? -root : root))), z = e[start];
        for (int64_t k = start; k < end; ++k) {
            const double r = __builtin_sqrt(x * x + z * z), inverse = r > 0 ? 1 / r : 0;
            const double cos = r > 0 ? x * inverse : 1, sin = z * inverse;
            if (k > start) e[k - 1] = r;
            const double mixed = 2 * cos * sin * e[k], d1 = d[k], d2 = d[k + 1];
            e[k] = cos * sin * (d2 - d1) + (cos * cos - sin * sin) * e[k];
            d[k] = cos * cos * d1 + mixed + sin * sin * d2;
            d[k + 1] = sin * sin * d1 - mixed + cos * cos * d2;
            if (k + 1 < end) x = e[k], z = sin * e[k + 1], e[k + 1] *= cos;
            c[k] = float(cos), s[k] = float(sin);
        }
        float* rows = X + start * stride;
        int64_t at = 0;
        constexpr int64_t L = Simd<float>::L;
        for (; at + 4 * L <= padded; at += 4 * L) rotate_columns<4>(rows + at, stride, c + start, s + start, end - start);
        for (; at < padded; at += L) rotate_columns<1>(rows + at, stride, c + start, s + start, end - start);
    }
    return true;
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
