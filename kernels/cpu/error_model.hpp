// What rounding does to singular values: the error model of sosd_fast/spectra/precision.py, and what the C++ kernels know beyond it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sosd_fast {

// From the cheapest to the most accurate: the Gram matrix in float32, none in float32, and the same in float64.
enum class Method { gram32, bidiag32, gram64, bidiag64 };

constexpr bool squares(Method method) { return method == Method::gram32 || method == Method::gram64; }

// The constants of sosd_fast/spectra/precision.py, which says what they mean and hands them over.
struct ErrorModel {
    double value_root, value_base, value_linear, value_inner, value_float64, spread, spread_least, spread_float64,
        reduced, reduced_small, reduced_first, near, nearest, direct_root, direct_inner, direct_bidiag32, safety, common,
        common_root, tolerance;
};

constexpr double eps_of(Method method) { return method < Method::gram64 ? 0x1p-24 : 0x1p-53; }

// How far s may be off where s^2 may be off by dl: most downwards, unless it may be all of it.
inline double root_error(double s, double dl) {
    const double s2 = s * s;
    if (s2 >= dl) return s2 > 0 ? dl / (s + std::sqrt(s2 - dl)) : 0;
    return std::max(s, dl / (std::sqrt(s2 + dl) + s));
}

constexpr double kUnknown = std::numeric_limits<double>::infinity();

// How large what rounding adds to a matrix is while it is reduced, by a row of it and a unit of rounding: `all` sums the squared
// norms of what each step leaves, `whole` is the squared norm of the Gram matrix (LOG.md#reduction-noise).
inline double row_noise(double all, double whole, int64_t r, const ErrorModel& model) {
    return std::sqrt(model.reduced_first * whole + all) / double(r);
}

// That, as far as values tell, descending: steps take the largest eigenvalues out first, one in three steps. 1.1 to 1.4 times what
// the tridiagonal matrix says, for 22 kinds of matrices.
inline double row_noise(const double* S, int64_t r, const ErrorModel& model) {
    double all = 0, whole = 0;
    for (int64_t i = 0; i < r; ++i) {
        const double square = S[i] * S[i] * S[i] * S[i];
        whole += square;
        all += square * double(std::min(r, 3 * i + 11));
    }
    return row_noise(all, whole, r, model);
}

// The root mean square error of a small eigenvalue of a Gram matrix in float32, at most, from its noise.
inline double reduction_noise(double row, int64_t r, const ErrorModel& model) {
    return eps_of(Method::gram32) * (model.reduced + model.reduced_small / double(r)) * row;
}

// That error, from the tridiagonal matrix of a reduction in one stage: what a step leaves has the norm of what follows it there.
template <class T> double reduction_noise(const T* d, const T* e, int64_t r, const ErrorModel& model) {
    double left = 0, all = 0;
    for (int64_t i = r - 1; i >= 0; --i) {
        const double across = d[i], beside = i + 1 < r ? double(e[i]) : 0;
        left += across * across + 2 * beside * beside;
        all += left;
    }
    return reduction_noise(row_noise(all, left, r, model), r, model);
}

// A power of two, times which values that are at most `largest` have squares in range; 1 where it is not finite.
inline double scale_of(double largest) {
    return std::isfinite(largest) && largest > 0 ? std::ldexp(1.0, -std::clamp(std::ilogb(largest), -900, 1022)) : 1;
}

// The root mean square error of eigenvalues of a Gram matrix, as products and sums make it; `mean` is that of S[i]^2.
inline double spread_of(const double* S, int64_t r, Method method, double mean, const ErrorModel& model) {
    const double own = std::max(model.spread / std::sqrt(double(r)), model.spread_least) * eps_of(method) *
                       std::max(S[0] * S[0], 16 * mean * mean / (S[0] * S[0]));
    return method == Method::gram64 ? own * model.spread_float64 : own;
}

// The bound on ||error of S / sum(S)||_2 of r values, descending: `sd_error` of precision.py. K is the long side; drift is by how
// much the eigenvalues moved together, relative to their mean; noise is their root mean square error, as of `reduction_noise`, if that
// is known. It counts where the bound that follows is within the tolerance: others are lost to squaring, and need none so narrow.
inline double sd_error(const double* S, int64_t r, int64_t K, Method method, double drift, double noise, const ErrorModel& model) {
    const double eps = eps_of(method), rd = double(r), root = std::sqrt(rd);
    double sum = 0, square = 0;
    for (int64_t i = 0; i < r; ++i) sum += S[i], square += S[i] * S[i];
    const double mean = square / rd, sd_norm = std::sqrt(square) / sum;
    const double common = (model.common + model.common_root * root) * eps * sd_norm;
    const auto total = [&](double errors, double lost) { return (std::sqrt(errors) + sd_norm * lost) / sum + common; };
    if (!squares(method)) {
        double direct = (1 + model.direct_root * root + model.direct_inner * std::sqrt(double(K))) * eps * S[0];
        if (method == Method::bidiag32) direct *= model.direct_bidiag32;
        int64_t lost = 0;
        for (int64_t i = 0; i < r; ++i) lost += S[i] < 4 * direct;
        direct *= model.safety;
        return total(rd * direct * direct, double(lost) * direct);
    }
    // Eigenvalues err by `apart` in root mean square; n neighbours nearer than noise moves them, as those of a random matrix.
    const auto bound = [&](double apart, double noise) {
        const double near = std::max(model.near * noise, model.nearest * eps * S[0] * S[0]);
        const double together = drift * mean * drift * mean;
        const auto error_of = [&](double own) { return std::sqrt(own * own + together); };  // far from the ends of the range
        const double alone = error_of(std::max(apart, noise));
        double errors = 0, lost = 0;
        for (int64_t first = 0, end; first < r; first = end) {
            for (end = first + 1; end < r && S[end - 1] * S[end - 1] - S[end] * S[end] <= near;) ++end;
            const int64_t n = end - first;
            const double dl = n == 1 ? alone : error_of(std::max(apart, noise * std::sqrt(double(n))));
            for (int64_t i = first; i < end; ++i) {
                double error = root_error(S[i], model.safety * dl);
                if (S[i] * S[i] < 4 * dl) {  // beyond, the other one is smaller
                    error = std::max(error, model.safety * root_error(S[i], dl));
                    lost += error;
                }
                errors += error * error;
            }
        }
        return total(errors, lost);
    };
    const double apart = spread_of(S, r, method, mean, model);
    if (method == Method::gram32 && noise < apart) {
        const double narrow = bound(0, noise);
        if (narrow <= model.tolerance) return narrow;
    }
    return bound(apart, eps * row_noise(S, r, model));
}

// True only where `sd_error` is at most `limit`, whatever it knows of the noise: where no value is lost to squaring, told by
// counting each with the error that the smallest may have.
inline bool surely_within(const double* S, int64_t r, Method method, double drift, double limit, const ErrorModel& model) {
    if (!squares(method) || r < 1) return false;
    const double rd = double(r), least = S[r - 1];
    double sum = 0, square = 0;
    for (int64_t i = 0; i < r; ++i) sum += S[i], square += S[i] * S[i];
    const double mean = square / rd, together = drift * mean;
    const double noise = eps_of(method) * std::sqrt((model.reduced_first + rd) / rd) * square;  // row_noise of n = r, at most
    const double apart = std::max(spread_of(S, r, method, mean, model), noise);
    const double dl = model.safety * std::sqrt(apart * apart + together * together);
    if (!(least * least >= 4 * dl)) return false;
    const double common = (model.common + model.common_root * std::sqrt(rd)) * eps_of(method) * std::sqrt(square);
    return (std::sqrt(rd) * dl / least + common) <= limit * sum;
}

}  // namespace sosd_fast
