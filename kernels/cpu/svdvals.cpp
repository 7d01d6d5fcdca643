#include "svdvals.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "team.hpp"

namespace sosd_fast {

#if defined(SOSD_DISPATCH)  // x86-64, by CMake
namespace baseline { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }

static const Kernels& choose() {
    const char* asked = std::getenv("SOSD_ISA");
    const auto wanted = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
    if (wanted("avx512") && __builtin_cpu_supports("x86-64-v4")) return avx512::table;
    if ((wanted("avx2") || wanted("avx512")) && __builtin_cpu_supports("x86-64-v3")) return avx2::table;
    return baseline::table;
}
#else
namespace baseline { extern const Kernels table; }
static const Kernels& choose() { return baseline::table; }
#endif

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

namespace {

constexpr double eps_of(Precision p) { return p == Precision::f32 ? 0x1p-24 : 0x1p-53; }

// ||error of S / sum(S)||_2 to be expected of a Gram matrix. Its small eigenvalues, the ones that matter, err by
// 6 / sqrt(r) eps max(S[0]^2, 4 mean(S^2)) in root mean square or less in fp32 (13 spectra, r = 4 .. 768, and flat ones).
// Weights in bf16 and f16 err by up to 2.7 times as much as f32 ones in fp32 (r = 256 .. 768), whose products are exact.
// In fp64 they were seen to err by 3 eps S[0]^2 on trained 256 x 256 matrices, 8 times as much, and its diagonal may drift
// by 2/3 kChain eps mean(S^2), which nothing measures; `shift` is what the fp32 Gram matrix was seen to drift by.
double predicted_error(const double* S, int64_t r, Precision precision, DType dtype, double shift) {
    const bool half = dtype == DType::bf16 || dtype == DType::f16, twice = precision == Precision::f64;
    const double mean = std::inner_product(S, S + r, S, 0.0) / double(r), eps = eps_of(precision);
    const double units = std::max(6 / std::sqrt(double(r)), 0.15) * (twice ? 8 : half ? 3 : 1);
    const double drift = twice ? 2 * kChain / 3.0 * eps * mean : shift;
    const double dl = std::hypot(units * eps * std::max(S[0] * S[0], 4 * mean), drift);
    double sum = 0, squares = 0, ds_squares = 0, ds_upwards = 0;
    for (int64_t i = 0; i < r; ++i) {
        const double s2 = S[i] * S[i];
        const double up = dl / (std::sqrt(s2 + dl) + S[i]);
        const double down = std::min(s2, dl) / (S[i] + std::sqrt(std::max(s2 - dl, 0.0)) + 1e-300);
        const double ds = std::max(up, down);
        sum += S[i];
        squares += s2;
        ds_squares += ds * ds;
        if (s2 < 4 * dl) ds_upwards += ds;
    }
    return (std::sqrt(ds_squares) + std::sqrt(squares) / sum * ds_upwards) / sum;
}

constexpr double kAllowedSdError = 3e-7;
constexpr double kDriftLeft = 0.5;  // of what `correct_gram` takes out; less was seen

// Eigenvalues of W W^T; returns how far rounding moved them together.
template <class T>
double gram_values(const Stages<T>& stages, const Source& w, double* ascending, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t r = w.r;
    T *G = take<T>(arena, tiles_of(r).size()), *d = take<T>(arena, r), *e = take<T>(arena, r - 1);
    const GramSums sums = stages.gram(w, G, arena, parallel);
    stages.tridiagonal(G, r, d, e, arena);
    stages.sturm(d, e, r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, ascending, arena, parallel);
    for (int64_t i = 0; i < r; ++i) ascending[i] /= 1 + sums.drift;
    const double shift = std::accumulate(ascending, ascending + r, -sums.trace) / double(r);
    return std::hypot(shift, kDriftLeft * sums.drift * sums.trace / double(r));
}

void solve(SvdvalsTask& t, Arena& arena, const Parallel& parallel) {
    const bool wide = t.m <= t.n;
    const int64_t r = wide ? t.m : t.n, K = wide ? t.n : t.m;
    if (r <= 0) return;
    Source w{t.data, t.dtype, r, K, wide ? t.row_stride : t.col_stride, wide ? t.col_stride : t.row_stride, 1};
    const Kernels& k = kernels();
    const double largest = k.max_abs(w);
    t.finite = std::isfinite(largest);
    t.predicted_sd_error = 0;
    t.used = t.precision;
    if (t.precision == Precision::automatic)  // what comes in double is expected in double
        t.used = t.dtype == DType::f64 ? Precision::f64 : Precision::f32;
    if (!t.finite || largest == 0) {
        const double value = t.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
        std::fill_n(t.S, r, value);
        if (t.bound) std::fill_n(t.bound, r, value);
        if (!t.finite) t.predicted_sd_error = value;
        return;
    }
    const int limit = t.dtype == DType::f64 ? 1000 : 120;
    const int exponent = std::clamp(-std::ilogb(largest), -limit, limit);
    w.scale = std::ldexp(1.0, exponent);

    std::vector<double> ascending(r);
    if (t.precision == Precision::automatic && t.previous && t.previous[0] > 0) {
        const double unit = std::ldexp(1.0, -std::ilogb(t.previous[0]));  // whose squares stay in range
        std::vector<double> previous(t.previous, t.previous + r);
        for (double& value : previous) value *= unit;
        while (t.used != Precision::bidiagonal && predicted_error(previous.data(), r, t.used, t.dtype, 0) >= kAllowedSdError)
            t.used = t.used == Precision::f32 ? Precision::f64 : Precision::bidiagonal;
    }
    double shift = 0;
    for (;;) {
        if (t.used == Precision::bidiagonal) {
            k.svdvals_bidiagonal(w, ascending.data(), arena, parallel);
            for (int64_t i = 0; i < r; ++i) t.S[i] = ascending[r - 1 - i];
            t.predicted_sd_error = eps_of(t.used) * std::sqrt(double(r));
            break;
        }
        if (t.used == Precision::f32)
            shift = gram_values(k.f32, w, ascending.data(), arena, parallel);
        else
            gram_values(k.f64, w, ascending.data(), arena, parallel);
        for (int64_t i = 0; i < r; ++i) t.S[i] = std::sqrt(ascending[r - 1 - i]);
        t.predicted_sd_error = t.S[0] > 0 ? predicted_error(t.S, r, t.used, t.dtype, shift) : 0;
        if (t.precision != Precision::automatic || t.predicted_sd_error < kAllowedSdError) break;
        t.used = t.used == Precision::f32 ? Precision::f64 : Precision::bidiagonal;
    }
    if (t.bound) {
        const double s1 = t.S[0], eps = eps_of(t.used);
        if (t.used == Precision::bidiagonal) {
            // sqrt(K): one rounding per merged row block; 22 eps measured at 16 x 20000, entries in [0, 1]
            std::fill_n(t.bound, r, (8 * std::sqrt(double(r)) + std::sqrt(double(K))) * eps * s1);
        } else {
            const double dl = gram_error_coefficient(r, K) * eps * s1 * s1;
            for (int64_t i = 0; i < r; ++i) {
                const double s2 = t.S[i] * t.S[i];
                const double up = dl / (std::sqrt(s2 + dl) + t.S[i]);
                const double down = s2 > 0 ? std::min(s2, dl) / (t.S[i] + std::sqrt(std::max(s2 - dl, 0.0))) : 0;
                t.bound[i] = std::max(up, down);
            }
        }
        constexpr double least = std::numeric_limits<double>::denorm_min();  // the rounding of values that small
        for (int64_t i = 0; i < r; ++i) t.bound[i] = std::ldexp(t.bound[i], -exponent) + least;
    }
    for (int64_t i = 0; i < r; ++i) t.S[i] = std::ldexp(t.S[i], -exponent);
}

double cost(const SvdvalsTask& t) {
    const double r = double(std::min(t.m, t.n)), K = double(std::max(t.m, t.n));
    return r * r * (K + 2 * r + 100);
}

}  // namespace

// Measured maxima over 13 spectra in fp32: 11 at r = 4, 18 at 16, 24 at 64, 26 at 256, 38 at 768 x 3072 (LOG.md,
// gram-error). Constant matrices, whose sums drift in the reduction too: 18 at 256, 41 at 1536, 103 at 2048; a chain of
// r / 8 equal terms drifts by r / 12 at most.
double gram_error_coefficient(int64_t r, int64_t K) {
    return 32 + std::max(2 * std::sqrt(double(r)), double(r) / 12) + std::sqrt(double(K)) / 8;
}

void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads) {
    std::vector<double> costs(count);
    std::transform(tasks, tasks + count, costs.begin(), cost);
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        solve(tasks[i], arena, parallel);
    });
}

void advance_subspaces(SubspaceTask* tasks, int64_t count, int64_t b, float pace, int n_threads) {
    std::vector<double> costs(count);
    std::transform(tasks, tasks + count, costs.begin(), [&](const SubspaceTask& t) { return 6.0 * b * t.m * t.n; });
    const Kernels& k = kernels();
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        SubspaceTask& t = tasks[i];
        k.advance_subspace(t, b, pace, arena, parallel);
    });
}

}  // namespace sosd_fast
