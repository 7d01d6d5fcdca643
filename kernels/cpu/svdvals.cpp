#include "svdvals.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "scaled.hpp"
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

// Bidiagonalisation in float32 takes 0.53 (256 x 256) to 0.6 times (768 x 768) as long as a Gram matrix in float64, a quarter
// longer than wide 0.65 to 0.8 (LOG.md#bidiag32-four). One matrix has one thread: a 768 x 768 that is alone takes 0.93, with two.
constexpr int64_t kBidiag32Side = 768;

bool takes_bidiag32(int64_t r, int64_t K) { return r > kLanesSide && r <= kBidiag32Side && 4 * K <= 5 * r; }

Method next(Method method, int64_t r, int64_t K) {
    if (method == Method::gram32 && takes_bidiag32(r, K)) return Method::bidiag32;
    return method < Method::gram64 ? Method::gram64 : Method::bidiag64;
}

constexpr double kDriftLeft = 0.5;  // of what `correct_gram` takes out; less was seen

// Takes the drift out of eigenvalues; returns how far rounding moved them together, relative to their mean.
double settle(double* ascending, int64_t r, const GramSums& sums) {
    const double factor = 1 / (1 + sums.drift);
    for (int64_t i = 0; i < r; ++i) ascending[i] *= factor;
    const double shift = std::accumulate(ascending, ascending + r, -sums.trace) / sums.trace, left = kDriftLeft * sums.drift;
    return std::sqrt(shift * shift + left * left);
}

bool fits_lanes(const SvdvalsTask& t) {
    const int64_t r = std::min(t.m, t.n), K = std::max(t.m, t.n);
    return r > 0 && r <= kLanesSide && K <= kLanesEntries / r;
}

// Of small Gaussian matrices whose sides differ by less than this, 55 (32 x 32) to 100 % (4 x 4) climb to float64, and
// float64 takes 1.2 to 1.5 times as long; of 16 x 18 14 % do.
constexpr int64_t kNearlySquare = 2;

// Beyond lanes 16 (256 x 256) to 48 % (48 x 48) climb, and without a Gram matrix float32 takes 0.6 (40 x 40) to 1.3 times as long
// as with it: up to this side it is tried at once (LOG.md#ql-lanes).
constexpr int64_t kDirectAtOnce = 192;

// How near to an eigenvalue bisection of float32's comes, relative to the largest; LOG.md#reduction-noise.
constexpr double kBisected = 0x1p-28;

bool fits_together(const SvdvalsTask& t, Method method);

// What `reduction_noise` will be for a Gram matrix in float32 whose singular values are S, as far as these tell.
double expected_noise(const SvdvalsTask& t, const double* S) {
    const int64_t r = std::min(t.m, t.n);
    if (fits_lanes(t) || !in_one_stage<float>(r, t.band_from)) return kUnknown;
    const double bisected = fits_together(t, Method::gram32) ? 0 : kBisected * S[0] * S[0];
    return std::hypot(reduction_noise(row_noise(S, r, *t.model), r, *t.model), bisected);
}

// The method that a task starts with.
Method first_method(const SvdvalsTask& t) {
    if (!t.automatic) return t.method;
    Method method = t.dtype == DType::f64 ? Method::gram64 : Method::gram32;  // what comes in double is expected in double
    const int64_t r = std::min(t.m, t.n);
    if (!t.previous || !(t.previous[0] > 0)) {
        if (std::max(t.m, t.n) >= r + kNearlySquare) return method;
        if (fits_lanes(t)) return Method::gram64;
        return method == Method::gram32 && r <= kDirectAtOnce ? next(method, r, std::max(t.m, t.n)) : method;
    }
    const double factor = scale_of(t.previous[0]);
    std::vector<double> previous(t.previous, t.previous + r);
    for (double& value : previous) value *= factor;
    const int64_t K = std::max(t.m, t.n);
    const double noise = expected_noise(t, previous.data());
    while (method != Method::bidiag64 && sd_error(previous.data(), r, K, method, 0, noise, *t.model) > t.model->tolerance)
        method = next(method, r, K);
    return method;
}

// What may be known of a spectrum beside its values, as of `sd_error`.
struct Noted {
    double drift = 0, noise = kUnknown;
};

// `reduction_noise` of a Gram matrix in float32 that was reduced to d and e, if that took one stage.
template <class T> double noise_of(const SvdvalsTask& t, const T* d, const T* e) {
    const int64_t r = std::min(t.m, t.n);
    return in_one_stage<float>(r, t.band_from) ? reduction_noise(d, e, r, *t.model) : kUnknown;
}

// S and sd_error of the scaled matrix. Returns whether the method stands.
bool accept(SvdvalsTask& t, const Scaled& from, const double* ascending, const Noted& noted) {
    const int64_t r = from.w.r;
    for (int64_t i = 0; i < r; ++i) {
        const double value = ascending[r - 1 - i];
        t.S[i] = squares(t.method) ? std::sqrt(value) : value;
    }
    const double tolerance = t.model->tolerance;
    if (!t.wants_error && t.automatic && surely_within(t.S, r, t.method, noted.drift, tolerance, *t.model)) return true;
    t.sd_error = sd_error(t.S, r, from.w.K, t.method, noted.drift, noted.noise, *t.model);
    return !t.automatic || t.method == Method::bidiag64 || !(t.sd_error > tolerance);
}

// The bounds, and both of the matrix as it came.
void finish(SvdvalsTask& t, const Scaled& from) {
    const ErrorModel& model = *t.model;
    const int64_t r = from.w.r;
    if (t.bound) {
        const double s1 = t.S[0], eps = eps_of(t.method), rd = double(r), inner = std::sqrt(double(from.w.K));
        if (!squares(t.method)) {
            // sqrt(K): one rounding per merged row block; 22 eps measured at 16 x 20000, entries in [0, 1]
            std::fill_n(t.bound, r, (model.value_base + 8 * std::sqrt(rd) + inner) * eps * s1);
        } else {
            const double once = model.value_base + std::max(model.value_root * std::sqrt(rd), model.value_linear * rd) +
                                model.value_inner * inner;
            const double units = once * (t.method == Method::gram64 ? model.value_float64 : 1);
            for (int64_t i = 0; i < r; ++i) t.bound[i] = root_error(t.S[i], units * eps * s1 * s1);
        }
        constexpr double least = std::numeric_limits<double>::denorm_min();  // the rounding of values that small
        const double back = std::ldexp(1.0, -from.exponent);
        for (int64_t i = 0; i < r; ++i) t.bound[i] = t.bound[i] * back + least;
    }
    const double back = std::ldexp(1.0, -from.exponent);
    for (int64_t i = 0; i < r; ++i) t.S[i] *= back;
}

// ascending <- the eigenvalues of W W^T. False: as above.
template <class T>
bool gram_values(const Stages<T>& stages, SvdvalsTask& t, Scaled& from, double* ascending, Noted& noted, Arena& arena,
                 const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t r = from.w.r;
    T *G = take<T>(arena, tiles_of(r).size()), *d = take<T>(arena, r), *e = take<T>(arena, r - 1);
    GramSums sums{};
    if (!scaled_gram(stages, t, from, G, sums, arena, parallel)) return false;
    stages.tridiagonal(G, r, t.band_from, d, e, arena, parallel);
    stages.sturm(d, e, r, sizeof(T) == 4 ? kBisected : 0x1p-54, ascending, arena, parallel);
    noted.drift = settle(ascending, r, sums);
    if (sizeof(T) == 4) noted.noise = std::hypot(noise_of(t, d, e), kBisected * ascending[r - 1]);
    return true;
}

// The rest of the ladder, from t.method.
void climb(SvdvalsTask& t, Scaled& from, Arena& arena, const Parallel& parallel) {
    const Kernels& k = kernels();
    std::vector<double> ascending(from.w.r);
    for (;; t.method = next(t.method, from.w.r, from.w.K)) {
        Noted noted;
        switch (t.method) {
            case Method::gram32:
                if (!gram_values(k.f32, t, from, ascending.data(), noted, arena, parallel)) return;
                break;
            case Method::gram64:
                if (!gram_values(k.f64, t, from, ascending.data(), noted, arena, parallel)) return;
                break;
            case Method::bidiag32: k.f32.svdvals_bidiagonal(from.w, ascending.data(), arena, parallel); break;
            case Method::bidiag64: k.f64.svdvals_bidiagonal(from.w, ascending.data(), arena, parallel); break;
        }
        if (accept(t, from, ascending.data(), noted)) break;
    }
    finish(t, from);
}

struct Ready {
    SvdvalsTask* task;
    Scaled from;
};

// Solves matrices of one shape by one Gram method; those whose method does not stand go to `left`, each with its next one.
template <class T>
void solve_lanes(const Stages<T>& stages, std::vector<Ready>& ready, std::vector<Ready>& left, Arena& arena, const Parallel& parallel) {
    if (ready.empty()) return;
    const int64_t r = ready[0].from.w.r;
    const int64_t together = kernels().together;
    std::vector<Lane> lanes(together);
    std::vector<double> ascending(r * together);
    for (size_t at = 0; at < ready.size();) {
        int64_t count = 0;
        for (; count < together && at + count < ready.size(); ++count)
            lanes[count] = {ready[at + count].from.w, {}};
        stages.eigenvalues_lanes(lanes.data(), count, ascending.data(), arena, parallel);
        for (int64_t i = 0; i < count; ++i, ++at) {
            SvdvalsTask& t = *ready[at].task;
            double* found = ascending.data() + i * r;
            if (accept(t, ready[at].from, found, {settle(found, r, lanes[i].sums)}))
                finish(t, ready[at].from);
            else
                t.method = next(t.method, r, ready[at].from.w.K), left.push_back(std::move(ready[at]));
        }
    }
}

// Matrices with short sides of at most this, which do not fit lanes, are reduced one by one in float32; then the eigenvalues of
// several are found together (LOG.md#ql-lanes). us a matrix, one thread: 8 of 128 x 128 209 -> 135, of 256 x 256 861 -> 735, of
// 512 x 512 no gain; alone a 64 x 64 loses 20, a 256 x 256 100.
constexpr int64_t kTogetherSide = 256;

// In float64 bisection errs by 1 unit where this algorithm errs by 17 at r = 64, and a matrix of deficient rank would show that.
bool fits_together(const SvdvalsTask& t, Method method) {
    return !fits_lanes(t) && std::min(t.m, t.n) <= kTogetherSide && method < Method::gram64;
}

struct Reduced {
    Ready of;
    std::vector<double> d, e, ascending;
    double tolerance = 0;
    GramSums sums{};
    bool done = false;
};

// To the tridiagonal matrix of its method, if that is for several together, else to its end.
void reduce(Reduced& m, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const Kernels& k = kernels();
    const int64_t r = m.of.from.w.r;
    const Method method = m.of.task->method;
    m.done = !fits_together(*m.of.task, method);
    if (m.done) return climb(*m.of.task, m.of.from, arena, parallel);
    m.d.resize(r), m.e.resize(r - 1), m.ascending.resize(r);
    m.tolerance = squares(method) ? kNegligibleBeside<float> : kNegligibleBeside<double>;
    if (!squares(method)) return k.tridiagonal_direct(m.of.from.w, m.d.data(), m.e.data(), arena);
    float *G = take<float>(arena, tiles_of(r).size()), *d = take<float>(arena, r), *e = take<float>(arena, r - 1);
    m.done = !scaled_gram(k.f32, *m.of.task, m.of.from, G, m.sums, arena, parallel);
    if (m.done) return;
    k.f32.tridiagonal(G, r, m.of.task->band_from, d, e, arena, parallel);
    std::copy_n(d, r, m.d.begin()), std::copy_n(e, r - 1, m.e.begin());
}

// The eigenvalues of matrices of one order; those whose method does not stand get their next one.
void solve_together(Reduced* const* of, int64_t count, Arena& arena, const Parallel& parallel) {
    std::vector<Tridiagonal> each;
    const int64_t r = of[0]->of.from.w.r;
    for (Reduced* const* m = of; m < of + count; ++m)
        each.push_back({(*m)->d.data(), (*m)->e.data(), 1, (*m)->tolerance, (*m)->ascending.data()});
    kernels().eigenvalues_together(each.data(), count, r, kSweeps * r, arena, parallel);
    for (Reduced* const* m = of; m < of + count; ++m) {
        SvdvalsTask& t = *(*m)->of.task;
        double* found = (*m)->ascending.data();
        Noted noted;
        if (squares(t.method))
            noted = {settle(found, r, (*m)->sums), noise_of(t, (*m)->d.data(), (*m)->e.data())};
        else
            std::transform(found, found + r, found, [](double x) { return std::sqrt(x); });
        (*m)->done = accept(t, (*m)->of.from, found, noted);
        if ((*m)->done)
            finish(t, (*m)->of.from);
        else
            t.method = next(t.method, r, (*m)->of.from.w.K);
    }
}

// One matrix, or some of one shape whose lanes go through the stages together.
using Work = std::vector<SvdvalsTask*>;

// To the end, or, into `open`, to a tridiagonal matrix.
void solve(const Work& work, std::unique_ptr<Reduced>& open, Arena& arena, const Parallel& parallel) {
    std::vector<Ready> of[4];  // by method
    for (SvdvalsTask* t : work) {
        const Method start = first_method(*t);
        Scaled from;
        if (!(squares(start) && !fits_lanes(*t) ? prepare_by_sample(*t, from) : prepare(*t, from))) continue;
        t->method = start;
        if (fits_together(*t, start)) {
            open = std::make_unique<Reduced>(Reduced{{t, std::move(from)}, {}, {}, {}});
            return reduce(*open, arena, parallel);
        }
        std::vector<Ready>& ready = of[int(start)];
        if (ready.empty()) ready.reserve(work.size());
        ready.push_back({t, std::move(from)});
    }
    if (fits_lanes(*work[0])) {
        std::vector<Ready>&gram32 = of[int(Method::gram32)], &gram64 = of[int(Method::gram64)];
        solve_lanes(kernels().f32, gram32, gram64, arena, parallel);
        solve_lanes(kernels().f64, gram64, of[int(Method::bidiag64)], arena, parallel);
        gram32.clear(), gram64.clear();
    }
    for (std::vector<Ready>& each : of)
        for (Ready& one : each) climb(*one.task, one.from, arena, parallel);
}

// In operations of large matrices, 2e6 in 18 us (AVX-512): 0.7, 1.5 and 4.7 us in lanes of 8 x 8, 16 x 16 and 32 x 32; alone
// 5 us however small.
double cost(const SvdvalsTask& t) {
    const double r = double(std::min(t.m, t.n)), K = double(std::max(t.m, t.n));
    return fits_lanes(t) ? r * (6e3 + 200 * r + 4 * r * K) : r * r * (K + 2 * r + 100) + 5e5;
}

// Ends what `solve` left open.
void finish_together(std::vector<std::unique_ptr<Reduced>>& open, int n_threads) {
    for (;;) {
        std::map<int64_t, std::vector<Reduced*>> of_order;
        for (const auto& m : open)
            if (m && !m->done) of_order[m->of.from.w.r].push_back(m.get());
        if (of_order.empty()) return;
        struct Group {
            Reduced* const* of;
            int64_t count;
        };
        std::vector<Group> groups;
        std::vector<double> costs;
        for (const auto& [r, all] : of_order) {
            const int64_t n = int64_t(all.size()), size = std::min(kernels().together, (n + n_threads - 1) / n_threads);
            for (int64_t at = 0; at < n; at += size) {
                groups.push_back({all.data() + at, std::min(size, n - at)});
                costs.push_back(1000.0 * double(r) * double(r));
            }
        }
        for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
            solve_together(groups[i].of, groups[i].count, arena, parallel);
        });
        std::vector<Reduced*> left;
        costs.clear();
        for (const auto& m : open)
            if (m && !m->done) left.push_back(m.get()), costs.push_back(cost(*m->of.task));
        for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) { reduce(*left[i], arena, parallel); });
    }
}

constexpr int64_t kLanesTogether = 4;  // vectors: matrices that climb to float64 fill vectors of their own

// The units of work: matrices that go alone, and groups of at most a few vectors of lanes, for each thread some.
std::vector<Work> share_out(SvdvalsTask* tasks, int64_t count, int n_threads) {
    std::vector<Work> works;
    std::map<std::pair<int64_t, int64_t>, Work> small;  // by shape
    for (SvdvalsTask* t = tasks; t < tasks + count; ++t) {
        if (fits_lanes(*t))
            small[{std::min(t->m, t->n), std::max(t->m, t->n)}].push_back(t);
        else
            works.push_back({t});
    }
    const int64_t lanes = kernels().together;
    for (const auto& [shape, all] : small) {
        const int64_t share = round_up(int64_t(all.size()) / (2 * std::max(n_threads, 1)) + 1, lanes);
        const int64_t most = std::min(share, kLanesTogether * lanes);
        for (auto at = all.begin(); at < all.end(); at += std::min<int64_t>(most, all.end() - at))
            works.emplace_back(at, at + std::min<int64_t>(most, all.end() - at));
    }
    return works;
}

}  // namespace

void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads) {
    const std::vector<Work> works = share_out(tasks, count, n_threads);
    std::vector<double> costs;
    for (const Work& work : works) {
        double sum = 0;
        for (const SvdvalsTask* t : work) sum += cost(*t);
        costs.push_back(sum);
    }
    std::vector<std::unique_ptr<Reduced>> open(works.size());
    for_each(costs, n_threads, [&](int64_t i, Arena& arena, const Parallel& parallel) {
        solve(works[i], open[i], arena, parallel);
    });
    finish_together(open, std::max(1, n_threads));
}

}  // namespace sosd_fast
