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

constexpr double eps_of(Method method) { return method == Method::gram32 ? 0x1p-24 : 0x1p-53; }

// How far s may be off where s^2 may be off by dl.
double root_error(double s, double dl) {
    const double s2 = s * s;
    const double up = dl > 0 ? dl / (std::sqrt(s2 + dl) + s) : 0;
    const double down = s2 > 0 ? std::min(s2, dl) / (s + std::sqrt(std::max(s2 - dl, 0.0))) : 0;
    return std::max(up, down);
}

Method next(Method method) { return method == Method::gram32 ? Method::gram64 : Method::bidiag64; }

constexpr double kDriftLeft = 0.5;  // of what `correct_gram` takes out; less was seen

// Eigenvalues of W W^T; returns how far rounding moved them together, relative to their mean.
template <class T>
double gram_values(const Stages<T>& stages, const Source& w, double* ascending, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t r = w.r;
    T *G = take<T>(arena, tiles_of(r).size()), *d = take<T>(arena, r), *e = take<T>(arena, r - 1);
    const GramSums sums = stages.gram(w, G, nullptr, arena, parallel);
    stages.tridiagonal(G, r, d, e, arena);
    stages.sturm(d, e, r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, ascending, arena, parallel);
    for (int64_t i = 0; i < r; ++i) ascending[i] /= 1 + sums.drift;
    const double shift = std::accumulate(ascending, ascending + r, -sums.trace) / sums.trace;
    return std::hypot(shift, kDriftLeft * sums.drift);
}

void solve(SvdvalsTask& t, Arena& arena, const Parallel& parallel) {
    const bool wide = t.m <= t.n;
    const int64_t r = wide ? t.m : t.n, K = wide ? t.n : t.m;
    if (r <= 0) return;
    Source w{t.data, t.dtype, r, K, wide ? t.row_stride : t.col_stride, wide ? t.col_stride : t.row_stride, 1};
    const Kernels& k = kernels();
    const double largest = k.max_abs(w);
    t.finite = std::isfinite(largest);
    if (t.automatic)  // what comes in double is expected in double
        t.method = t.dtype == DType::f64 ? Method::gram64 : Method::gram32;
    if (!t.finite || largest == 0) {
        const double value = t.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
        std::fill_n(t.S, r, value);
        if (t.bound) std::fill_n(t.bound, r, value);
        t.sd_error = std::numeric_limits<double>::quiet_NaN();
        return;
    }
    const int limit = t.dtype == DType::f64 ? 1000 : 120;
    const int exponent = std::clamp(-std::ilogb(largest), -limit, limit);
    w.scale = std::ldexp(1.0, exponent);

    std::vector<double> ascending(r);
    const ErrorModel& model = *t.model;
    if (t.automatic && t.previous && t.previous[0] > 0) {
        const double unit = std::ldexp(1.0, -std::ilogb(t.previous[0]));  // whose squares stay in range
        std::vector<double> previous(t.previous, t.previous + r);
        for (double& value : previous) value *= unit;
        while (t.method != Method::bidiag64 && sd_error(previous.data(), r, K, t.method, 0, model) > model.tolerance)
            t.method = next(t.method);
    }
    for (;; t.method = next(t.method)) {
        double drift = 0;
        if (t.method == Method::bidiag64)
            k.svdvals_bidiagonal(w, ascending.data(), arena, parallel);
        else
            drift = t.method == Method::gram32 ? gram_values(k.f32, w, ascending.data(), arena, parallel)
                                               : gram_values(k.f64, w, ascending.data(), arena, parallel);
        for (int64_t i = 0; i < r; ++i) {
            const double value = ascending[r - 1 - i];
            t.S[i] = t.method == Method::bidiag64 ? value : std::sqrt(value);
        }
        t.sd_error = sd_error(t.S, r, K, t.method, drift, model);
        if (!t.automatic || t.method == Method::bidiag64 || !(t.sd_error > model.tolerance)) break;
    }
    if (t.bound) {
        const double s1 = t.S[0], eps = eps_of(t.method), rd = double(r), inner = std::sqrt(double(K));
        if (t.method == Method::bidiag64) {
            // sqrt(K): one rounding per merged row block; 22 eps measured at 16 x 20000, entries in [0, 1]
            std::fill_n(t.bound, r, (model.value_base + 8 * std::sqrt(rd) + inner) * eps * s1);
        } else {
            const double once = model.value_base + std::max(model.value_root * std::sqrt(rd), model.value_linear * rd) +
                                model.value_inner * inner;
            const double units = once * (t.method == Method::gram64 ? model.value_float64 : 1);
            for (int64_t i = 0; i < r; ++i) t.bound[i] = root_error(t.S[i], units * eps * s1 * s1);
        }
        constexpr double least = std::numeric_limits<double>::denorm_min();  // the rounding of values that small
        for (int64_t i = 0; i < r; ++i) t.bound[i] = std::ldexp(t.bound[i], -exponent) + least;
    }
    for (int64_t i = 0; i < r; ++i) t.S[i] = std::ldexp(t.S[i], -exponent);
}

// f(i, count, offset of G(i, j) in the tiles) for the runs of column j of the lower triangle: what lies together of it.
template <class F> void each_run(const Tiles& tiles, int64_t r, int64_t j, F f) {
    for (int64_t i = j; i < r;) {
        const int64_t count = std::min(r - i, kTileRows - i % kTileRows);
        f(i, count, tiles.at(i, j));
        i += count;
    }
}

template <class T> void solve(const Stages<T>& stages, PartTask& t, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const Tiles tiles = tiles_of(t.r);
    T *G = take<T>(arena, tiles.size()), *to = static_cast<T*>(t.triangle);
    const Source a{t.data, t.dtype, t.r, t.K, t.stride_i, t.stride_k, t.scale};
    t.drift = stages.gram(a, G, t.squares, arena, parallel).drift;
    const double without = 1 / (1 + t.drift);  // in double, so that all of G is not rounded alike
    for (int64_t j = 0; j < t.r; ++j)
        each_run(tiles, t.r, j, [&](int64_t, int64_t count, int64_t at) {
            for (int64_t q = 0; q < count; ++q) to[q] = T(double(G[at + q]) * without);
            to += count;
        });
}

template <class T>
void solve(const Stages<T>& stages, const GramTask& t, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const Tiles tiles = tiles_of(t.r);
    T *G = take<T>(arena, tiles.size()), *d = take<T>(arena, t.r), *e = take<T>(arena, t.r - 1);
    const T* given = static_cast<const T*>(t.triangle);
    std::fill_n(G, tiles.size(), T(0));
    T infinite = 0;  // NaN where an entry is NaN or infinite
    for (int64_t j = 0; j < t.r; ++j)
        each_run(tiles, t.r, j, [&](int64_t i, int64_t count, int64_t at) {
            for (int64_t q = 0; q < count; ++q) {
                infinite += given[q] - given[q];
                G[at + q] = given[q];
                if (i / kTileRows == j / kTileRows) G[tiles.at(j, i + q)] = given[q];  // those tiles hold both halves
            }
            given += count;
        });
    if (infinite != 0) {
        std::fill_n(t.values, t.r, std::numeric_limits<double>::quiet_NaN());
        return;
    }
    stages.tridiagonal(G, t.r, d, e, arena);
    stages.sturm(d, e, t.r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, t.values, arena, parallel);
}

double cost(const SvdvalsTask& t) {
    const double r = double(std::min(t.m, t.n)), K = double(std::max(t.m, t.n));
    return r * r * (K + 2 * r + 100);
}

}  // namespace

double sd_error(const double* S, int64_t r, int64_t K, Method method, double drift, const ErrorModel& model) {
    const double eps = eps_of(method), rd = double(r), root = std::sqrt(rd);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < r; ++i) sum += S[i], squares += S[i] * S[i];
    const double mean = squares / rd, sd_norm = std::sqrt(squares) / sum;
    double dl = std::max(model.spread / root, model.spread_least) * eps * std::max(S[0] * S[0], 16 * mean * mean / (S[0] * S[0]));
    if (method == Method::gram64) dl *= model.spread_float64;
    dl = std::hypot(dl, drift * mean);
    const double direct = (1 + model.direct_root * root + model.direct_inner * std::sqrt(double(K))) * eps * S[0];
    double ds_squares = 0, lost = 0;
    for (int64_t i = 0; i < r; ++i) {
        const bool gram = method != Method::bidiag64;
        const double ds = gram ? root_error(S[i], dl) : direct;
        ds_squares += ds * ds;
        if (gram ? S[i] * S[i] < 4 * dl : S[i] < 4 * direct) lost += ds;
    }
    const double predicted = (std::sqrt(ds_squares) + sd_norm * lost) / sum;
    return model.safety * predicted + (model.common + model.common_root * root) * eps * sd_norm;
}

void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads) {
    std::vector<double> costs(count);
    std::transform(tasks, tasks + count, costs.begin(), [](const SvdvalsTask& t) { return cost(t); });
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        solve(tasks[i], arena, parallel);
    });
}

void gram_triangles(PartTask* tasks, int64_t count, int n_threads) {
    std::vector<double> costs(count);
    std::transform(tasks, tasks + count, costs.begin(), [](const PartTask& t) {
        const double r = double(t.r);
        return r * r * (double(t.K) + 100);
    });
    const Kernels& k = kernels();
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        PartTask& t = tasks[i];
        t.precision == DType::f64 ? solve(k.f64, t, arena, parallel) : solve(k.f32, t, arena, parallel);
    });
}

void gram_eigenvalues(GramTask* tasks, int64_t count, int n_threads) {
    std::vector<double> costs(count);
    std::transform(tasks, tasks + count, costs.begin(), [](const GramTask& t) {
        const double r = double(t.r);
        return r * r * (2 * r + 100);
    });
    const Kernels& k = kernels();
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        const GramTask& t = tasks[i];
        t.precision == DType::f64 ? solve(k.f64, t, arena, parallel) : solve(k.f32, t, arena, parallel);
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
