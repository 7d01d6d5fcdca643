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
        reduced, reduced_small, reduced_first, direct_root, direct_inner, direct_bidiag32, safety, common, common_root, tolerance;
};

constexpr double eps_of(Method method) { return method < Method::gram64 ? 0x1p-24 : 0x1p-53; }

// How far s may be off where s^2 may be off by dl.
inline double root_error(double s, double dl) {
    const double s2 = s * s;
    const double up = dl > 0 ? dl / (std::sqrt(s2 + dl) + s) : 0;
    const double down = s2 > 0 ? std::min(s2, dl) / (s + std::sqrt(std::max(s2 - dl, 0.0))) : 0;
    return std::max(up, down);
}

constexpr double kUnknown = std::numeric_limits<double>::infinity();

// The root mean square error of a small eigenvalue of a Gram matrix in float32: `all` sums the squared norms of what each step of
// its reduction leaves, `whole` is the squared norm of the Gram matrix (LOG.md#reduction-noise).
inline double reduction_noise(double all, double whole, int64_t r, const ErrorModel& model) {
    return eps_of(Method::gram32) * (model.reduced + model.reduced_small / double(r)) *
           std::sqrt(model.reduced_first * whole + all) / double(r);
}

// That error, from the tridiagonal matrix of a reduction in one stage: what a step leaves has the norm of what follows it there.
template <class T> double reduction_noise(const T* d, const T* e, int64_t r, const ErrorModel& model) {
    double left = 0, all = 0;
    for (int64_t i = r - 1; i >= 0; --i) {
        const double across = d[i], beside = i + 1 < r ? double(e[i]) : 0;
        left += across * across + 2 * beside * beside;
        all += left;
    }
    return reduction_noise(all, left, r, model);
}

// That error, as far as values tell, descending: steps take the largest eigenvalues out first, one in three steps. 1.1 to 1.4
// times what the tridiagonal matrix says, for 22 kinds of matrices.
inline double reduction_noise(const double* S, int64_t r, const ErrorModel& model) {
    double all = 0, whole = 0;
    for (int64_t i = 0; i < r; ++i) {
        const double square = S[i] * S[i] * S[i] * S[i];
        whole += square;
        all += square * double(std::min(r, 3 * i + 11));
    }
    return reduction_noise(all, whole, r, model);
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
    const auto bound = [&](auto error_of, auto lost) {
        double squares = 0, sums = 0;
        for (int64_t i = 0; i < r; ++i) {
            const double ds = error_of(i);
            squares += ds * ds;
            if (lost(i)) sums += ds;
        }
        return model.safety * (std::sqrt(squares) + sd_norm * sums) / sum + common;
    };
    if (!squares(method)) {
        double direct = (1 + model.direct_root * root + model.direct_inner * std::sqrt(double(K))) * eps * S[0];
        if (method == Method::bidiag32) direct *= model.direct_bidiag32;
        return bound([&](int64_t) { return direct; }, [&](int64_t i) { return S[i] < 4 * direct; });
    }
    double dl = std::max(model.spread / root, model.spread_least) * eps * std::max(S[0] * S[0], 16 * mean * mean / (S[0] * S[0]));
    if (method == Method::gram64) dl *= model.spread_float64;
    if (method == Method::gram32 && noise < dl) {
        // n eigenvalues that lie closer together than the noise could move them are moved as those of a random matrix, by sqrt(n) of it.
        double of = 0;
        int64_t above = 0, below = 0;
        const auto error_of = [&](int64_t i) {
            const double here = S[i] * S[i], near = noise * root;
            while (S[above] * S[above] > here + near) ++above;
            while (below < r && S[below] * S[below] >= here - near) ++below;
            of = std::hypot(std::min(dl, noise * std::sqrt(double(below - above))), drift * mean);
            return root_error(S[i], of);
        };
        const double narrow = bound(error_of, [&](int64_t i) { return S[i] * S[i] < 4 * of; });
        if (narrow <= model.tolerance) return narrow;
    }
    dl = std::hypot(dl, drift * mean);
    return bound([&](int64_t i) { return root_error(S[i], dl); }, [&](int64_t i) { return S[i] * S[i] < 4 * dl; });
}

}  // namespace sosd_fast
