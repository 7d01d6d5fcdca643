// Singular values without squaring the matrix, fp64: for the matrices whose small values a Gram matrix cannot hold.
#pragma once

#include "gram.hpp"
#include "sturm.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// Householder vector of (alpha, x): v = (1, x * scale), beta = +- norm with the sign of alpha, not LAPACK's opposite one:
// a few rows merged into a large R then change it by little (tau near 0, not 2), and of a million equal rows the
// roundings do not add up. alpha - beta is taken without cancellation (Parlett 1971; Golub & Van Loan 5.1.3).
struct Reflector {
    double beta, tau, scale;
};

inline Reflector reflector(double alpha, double squares, double negligible) {
    if (squares <= negligible) return {alpha, 0, 0};
    const double norm = __builtin_sqrt(alpha * alpha + squares), beta = alpha < 0 ? -norm : norm;
    const double difference = squares / (alpha + beta);  // beta - alpha
    return {beta, difference / beta, -1 / difference};
}

constexpr int kRowsAtOnce = 4;   // in sums, which keeps chains of equal terms short
constexpr int kRowsMerged = 32;  // rows of W^T merged into R at a time: with r = 768 they stay in L2

// S[0 .. r) <- singular values of scale * W, ascending. QR of W^T row block by row block (LAPACK tpqrt's update), then
// gebrd without blocks, then bisection on the Golub-Kahan matrix of order 2 r, whose eigenvalues are +-S.
inline void svdvals_bidiagonal(const Source& w, double* S_out, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t r = w.r, ld = round_up(r, 8);  // whole cache lines
    double *R = take<double>(arena, r * ld), *B = take<double>(arena, kRowsMerged * ld);
    double *y = take<double>(arena, r), *u = take<double>(arena, r), *z = take<double>(arena, r);
    for (int64_t i = 0; i < r * ld; ++i) R[i] = 0;
    // entries are at most 2 in the scaled matrix; smaller squares than this would lose their bits
    const double negligible = 0x1p-960;
    double v[kRowsMerged];
    for (int64_t k0 = 0; k0 < w.K; k0 += kRowsMerged) {
        const int64_t h = min_of<int64_t>(kRowsMerged, w.K - k0);
        constexpr int P = kPanel<double>;
        alignas(kVectorBytes) double packed[P * kRowsMerged];
        for (int64_t i = 0; i < r; i += P) {
            const int64_t valid = min_of<int64_t>(P, r - i);
            pack_panel(w, i, k0, valid, h, packed);
            for (int64_t k = 0; k < h; ++k)
                for (int64_t q = 0; q < valid; ++q) B[k * ld + i + q] = packed[k * P + q];
        }
        for (int64_t i = h; i < round_up(h, kRowsAtOnce); ++i) {
            v[i] = 0;
            for (int64_t c = 0; c < r; ++c) B[i * ld + c] = 0;
        }
        for (int64_t j = 0; j < r; ++j) {
            double squares = 0;
            for (int64_t i = 0; i < h; ++i) squares += B[i * ld + j] * B[i * ld + j];
            const Reflector H = reflector(R[j * ld + j], squares, negligible);
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

    double *off = take<double>(arena, 2 * r - 1), *zero = take<double>(arena, 2 * r), *values = take<double>(arena, 2 * r);
    for (int64_t k = 0; k < r; ++k) {
        double squares = 0;
        for (int64_t i = k + 1; i < r; ++i) squares += R[i * ld + k] * R[i * ld + k];
        const Reflector H = reflector(R[k * ld + k], squares, negligible);
        double* top = R + k * ld;
        off[2 * k] = H.beta;
#pragma omp simd
        for (int64_t c = k + 1; c < r; ++c) y[c] = H.tau == 0 ? 0 : top[c];
        for (int64_t i = k + 1; i < r && H.tau != 0; ++i) {
            const double* row = R + i * ld;
            const double vi = z[i] = row[k] * H.scale;
#pragma omp simd
            for (int64_t c = k + 1; c < r; ++c) y[c] += vi * row[c];
        }
        if (k + 1 == r) break;
        squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = k + 1; c < r; ++c) {
            top[c] -= H.tau * y[c];
            squares += c > k + 1 ? top[c] * top[c] : 0.0;
        }
        const Reflector U = reflector(top[k + 1], squares, negligible);
        off[2 * k + 1] = U.beta;
        if (H.tau == 0 && U.tau == 0) continue;
        for (int64_t c = k + 2; c < r; ++c) u[c] = top[c] * U.scale;
        u[k + 1] = 1;
        for (int64_t i = k + 1; i < r; ++i) {
            double* row = R + i * ld;
            const double f = H.tau == 0 ? 0 : H.tau * z[i];
            double dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t c = k + 1; c < r; ++c) {
                row[c] -= f * y[c];
                dot += row[c] * u[c];
            }
            dot *= U.tau;
#pragma omp simd
            for (int64_t c = k + 1; c < r; ++c) row[c] -= dot * u[c];
        }
    }
    for (int64_t i = 0; i < 2 * r; ++i) zero[i] = 0;
    sturm<double>(zero, off, 2 * r, 0x1p-54, values, arena, parallel);
    for (int64_t i = 0; i < r; ++i) S_out[i] = values[r + i];
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
