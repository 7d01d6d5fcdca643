// Shapes, strides, dtypes, threads and concurrent callers of the kernels, for builds with the sanitizers (make sanitize).
// Truth: the bidiagonal method.
//
//     sanitize               the checks, then whether planted faults are found
//     sanitize fuzz N SEED   N calls with random matrices, and some with sides above 2048
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <cstdlib>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if __has_include(<sys/wait.h>)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "distribution.hpp"
#include "svdvals.hpp"

using namespace sosd_fast;

static int failures = 0;
#define CHECK(x)                                                   \
    do {                                                           \
        if (!(x)) ++failures, std::printf("line %d: %s\n", __LINE__, #x); \
    } while (0)

struct Case {
    std::vector<uint8_t> data;  // exactly the bytes of W, so that a read past the end is seen
    SvdvalsTask task;
    std::vector<double> S, bound;
};

static uint16_t to_bf16(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return uint16_t(b >> 16);
}

static Case make(int64_t m, int64_t n, DType dtype, bool transposed, int64_t step, unsigned seed) {
    Case c;
    c.task.m = m, c.task.n = n, c.task.dtype = dtype;
    c.task.row_stride = transposed ? step : n * step;
    c.task.col_stride = transposed ? m * step : step;
    const int64_t count = m && n ? (m - 1) * c.task.row_stride + (n - 1) * c.task.col_stride + 1 : 0;
    const int size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    c.data.resize(count * size);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
        const float x = normal(random);
        const double y = x;
        const uint16_t b = dtype == DType::bf16 ? to_bf16(x) : uint16_t(0x3800 | (random() & 0x87ff));
        const void* from = &b;
        if (dtype == DType::f64) from = &y;
        if (dtype == DType::f32) from = &x;
        std::memcpy(c.data.data() + i * size, from, size);
    }
    c.S.assign(std::min(m, n), -1), c.bound.assign(std::min(m, n), -1);
    return c;
}

// As sosd_fast/spectra/precision.py has it, which a test sees to.
static const ErrorModel model = [] {
    ErrorModel m{};
    m.value_root = 2, m.value_base = 32, m.value_linear = 1 / 12.0, m.value_inner = 0.125, m.value_float64 = 4;
    m.spread = 6, m.spread_least = 0.2, m.spread_float64 = 4;
    m.reduced = 3, m.reduced_small = 32, m.reduced_first = 16, m.near = 4, m.nearest = 0.25;
    m.direct_root = 0.25, m.direct_inner = 0.125, m.direct_bidiag32 = 0.2;
    m.safety = 3, m.common = 5, m.common_root = 0.1, m.tolerance = 1e-6;
    return m;
}();
constexpr std::optional<Method> automatic;

static void solve(std::vector<Case>& cases, std::optional<Method> method, int threads) {
    std::vector<SvdvalsTask> tasks;
    for (Case& c : cases) {
        c.task.data = c.data.data(), c.task.S = c.S.data(), c.task.bound = c.bound.data();
        c.task.wants_error = c.task.m % 2;
        c.task.automatic = !method, c.task.method = method.value_or(Method::gram32), c.task.model = &model;
        tasks.push_back(c.task);
    }
    svdvals(tasks.data(), int64_t(tasks.size()), threads);
    for (size_t i = 0; i < cases.size(); ++i) cases[i].task = tasks[i];
}

static std::vector<Case> batch() {
    const int64_t shapes[][2] = {{1, 1},     {1, 9},    {9, 1},   {2, 3}, {16, 16},  {17, 40},
                                 {127, 509}, {300, 17}, {96, 96}, {0, 5}, {33, 1030}};
    std::vector<Case> cases;
    unsigned seed = 0;
    for (const auto& s : shapes)
        for (int dtype = 0; dtype < 4; ++dtype)
            for (int layout = 0; layout < 3; ++layout)
                cases.push_back(make(s[0], s[1], DType(dtype), layout == 1, layout == 2 ? 3 : 1, ++seed));
    return cases;
}

static void check() {
    std::vector<Case> truth = batch();
    solve(truth, Method::bidiag64, 1);
    for (std::optional<Method> p :
         {std::optional(Method::gram32), std::optional(Method::bidiag32), std::optional(Method::gram64), automatic}) {
        std::vector<Case> first = batch();
        solve(first, p, 1);
        for (size_t i = 0; i < first.size(); ++i) {
            const Case &a = first[i], &b = truth[i];
            CHECK(a.data == batch()[i].data);
            for (size_t k = 0; k < a.S.size(); ++k) {
                CHECK(std::fabs(a.S[k] - b.S[k]) <= a.bound[k] + b.bound[k]);
                CHECK(k == 0 || a.S[k] <= a.S[k - 1]);
            }
        }
        for (int threads : {2, 3, 5}) {
            std::vector<Case> again = batch();
            solve(again, p, threads);
            for (size_t i = 0; i < first.size(); ++i)
                CHECK(again[i].S == first[i].S && again[i].bound == first[i].bound);
        }
        std::vector<std::thread> callers;
        std::vector<std::vector<Case>> results(3);
        for (auto& r : results)
            callers.emplace_back([&r, p] {
                r = batch();
                solve(r, p, 2);
            });
        for (std::thread& t : callers) t.join();
        for (auto& r : results)
            for (size_t i = 0; i < first.size(); ++i) CHECK(r[i].S == first[i].S);
    }
    {   // one matrix and helpers inside it
        std::vector<Case> one, two;
        one.push_back(make(500, 1100, DType::f32, false, 1, 7)), two = one;
        solve(one, automatic, 1), solve(two, automatic, 4);
        CHECK(one[0].S == two[0].S);
    }
    for (Method p : {Method::gram32, Method::gram64})  // reduced in two stages, on any number of threads
        for (int64_t r : {17, 63, 129, 333}) {
            std::vector<Case> direct;
            direct.push_back(make(r, r + 40, DType::f32, false, 1, unsigned(r)));
            std::vector<Case> banded = direct, shared = direct;
            banded[0].task.band_from = shared[0].task.band_from = 1;
            solve(direct, Method::bidiag64, 1), solve(banded, p, 1), solve(shared, p, 3);
            CHECK(banded[0].S == shared[0].S);
            for (int64_t k = 0; k < r; ++k)
                CHECK(std::fabs(banded[0].S[k] - direct[0].S[k]) <= banded[0].bound[k] + direct[0].bound[k]);
        }
    {   // an earlier spectrum, right or absurd, changes at most the precision
        std::vector<Case> cold, warm, absurd;
        cold.push_back(make(90, 200, DType::f32, false, 1, 7)), warm = absurd = cold;
        solve(cold, automatic, 1);
        std::vector<double> wrong(90, 1e-3);
        wrong[0] = 1e3;
        warm[0].task.previous = cold[0].S.data(), absurd[0].task.previous = wrong.data();
        solve(warm, automatic, 1), solve(absurd, automatic, 1);
        CHECK(warm[0].S == cold[0].S && absurd[0].task.method != Method::gram32);
        for (int k = 0; k < 90; ++k)
            CHECK(std::fabs(cold[0].S[k] - absurd[0].S[k]) <= cold[0].bound[k] + absurd[0].bound[k]);
    }
    {   // special matrices among ordinary ones of one short side: each result is that of the matrix alone
        std::vector<Case> all;
        for (unsigned s = 0; s < 45; ++s) {
            const int64_t K = 11 + s % 3 * 40;
            all.push_back(make(s % 2 ? 11 : K, s % 2 ? K : 11, DType(s / 3 % 2 ? s % 4 : 0), s % 5 == 0, 1, s));
            Case& c = all.back();
            if (c.task.dtype != DType::f32 || s % 4) continue;
            float* w = reinterpret_cast<float*>(c.data.data());
            for (size_t i = 0; i < c.data.size() / 4; ++i)
                w[i] *= s % 16 == 0 ? 0 : s % 16 == 4 ? 1e30f : s % 16 == 8 ? 1e-36f : i == 5 ? NAN : 1;
        }
        std::vector<Case> together = all;
        solve(together, automatic, 2);
        for (size_t i = 0; i < all.size(); ++i) {
            std::vector<Case> alone{all[i]};
            solve(alone, automatic, 1);
            CHECK(alone[0].task.method == together[i].task.method && alone[0].task.finite == together[i].task.finite);
            for (size_t k = 0; k < 11; ++k) {
                CHECK(std::memcmp(&alone[0].S[k], &together[i].S[k], sizeof(double)) == 0);
                CHECK(std::memcmp(&alone[0].bound[k], &together[i].bound[k], sizeof(double)) == 0);
            }
        }
    }
    {   // NaN in one of three
        std::vector<Case> three;
        for (unsigned s = 0; s < 3; ++s) three.push_back(make(40, 50, DType::f32, false, 1, s));
        std::vector<Case> clean = three;
        const float nan = NAN;
        std::memcpy(three[1].data.data() + 4 * 777, &nan, 4);
        solve(three, automatic, 2), solve(clean, automatic, 2);
        CHECK(!three[1].task.finite && std::isnan(three[1].S[0]) && std::isnan(three[1].bound[39]));
        CHECK(three[0].S == clean[0].S && three[2].S == clean[2].S && three[0].task.finite);
    }
    for (bool transposed : {false, true}) {  // one step towards the leading values, alone and with helpers
        for (const auto& [m, n, b] : {std::array<int64_t, 3>{700, 130, 20}, {96, 96, 40}, {41, 41, 33}, {5, 3, 1}}) {
            Case c = make(m, n, DType::f32, transposed, 1, 3);
            std::vector<float> V(b * n), P(b * n), V1(b * n), P1(b * n), V2(b * n), P2(b * n), squares(2 * b), residual(b);
            for (int64_t i = 0; i < b; ++i) V[i * n + i] = 1;
            SubspaceTask one{reinterpret_cast<float*>(c.data.data()), m, n, c.task.row_stride, c.task.col_stride,
                             V.data(), P.data(), V1.data(), P1.data(), squares.data(), residual.data(), false};
            advance_subspaces(&one, 1, b, 4, 1);
            SubspaceTask two[2] = {one, one};
            two[1].next_V = V2.data(), two[1].next_P = P2.data(), two[1].squares = squares.data() + b;
            std::vector<float> spare(b);
            two[0].residual = spare.data();
            advance_subspaces(two, 2, b, 4, 5);
            CHECK(one.ordinary && two[1].ordinary && V1 == V2 && P1 == P2);
            CHECK(std::is_permutation(squares.begin(), squares.begin() + b, squares.begin() + b));
            for (float x : squares) CHECK(x > 0);
        }
    }
    svdvals(nullptr, 0, 2);
}

#if defined(__SANITIZE_ADDRESS__)
// One matrix through every method and one step of a subspace, on this thread alone.
static void one_of_everything() {
    for (const auto& [m, n] : {std::array<int64_t, 2>{70, 130}, {9, 2100}, {13, 70}}) {
        for (Method p : {Method::gram32, Method::bidiag32, Method::gram64, Method::bidiag64}) {
            std::vector<Case> one;
            one.push_back(make(m, n, DType::f32, false, 1, 5));
            solve(one, p, 1);
            one[0].task.band_from = 1;
            if (m > 60) solve(one, p, 1);
        }
    }
    Case c = make(130, 67, DType::f32, false, 1, 3);
    const int64_t n = 67, b = 20;
    std::vector<float> V(b * n), P(b * n), next_V(b * n), next_P(b * n), squares(b), residual(b);
    for (int64_t i = 0; i < b; ++i) V[i * n + i] = 1;
    SubspaceTask t{reinterpret_cast<float*>(c.data.data()), 130, n, n, 1, V.data(), P.data(), next_V.data(), next_P.data(),
                   squares.data(), residual.data(), false};
    advance_subspaces(&t, 1, b, 4, 1);
}

// Makes each piece of scratch memory in turn one element too short, in a process of its own: AddressSanitizer has to end it.
static void plant() {
    shorten_piece(0);
    one_of_everything();
    const int64_t pieces = pieces_taken();
    int64_t found = 0, planted = 0;
    for (int64_t i = 1; i <= pieces; ++i) {
        if (piece_size(i) == 0) continue;
        ++planted;
        std::fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            if (!std::freopen("/dev/null", "w", stderr)) std::_Exit(2);
            shorten_piece(i);
            one_of_everything();
            std::_Exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (status != 0)
            ++found;
        else
            std::printf("piece %d of %d bytes, one element short, was not noticed\n", int(i), int(piece_size(i)));
    }
    // The others end in padding that these shapes do not touch.
    std::printf("%d of %d planted off-by-ones found\n", int(found), int(planted));
    CHECK(planted > 100 && found * 10 >= planted * 8);
}
#else
static void plant() {}
#endif

// Makes an m x n matrix of low rank, or of few distinct values, of one made at random.
static void degrade(Case& c, unsigned kind, unsigned seed) {
    const int64_t count = int64_t(c.data.size()) / 4;
    if (c.task.dtype != DType::f32 || kind == 0) return;
    std::mt19937 random(seed);
    float* w = reinterpret_cast<float*>(c.data.data());
    for (int64_t i = 0; i < count; ++i)
        w[i] = kind == 1 ? 0.37f : kind == 2 ? (random() & 1 ? 0.1f : -0.1f) : (i * 2654435761u) % 97 ? 0 : w[i];
}

static void fuzz(int calls, unsigned seed) {
    std::mt19937 random(seed);
    const auto below = [&](int n) { return int(random() % unsigned(n)); };
    const auto side = [&](double most) { return int64_t(std::exp(std::log(most) * (random() % 1024) / 1023.0)); };
    for (int call = 0; call < calls; ++call) {
        const double most = below(200) == 0 ? 400 : below(10) == 0 ? 100 : 40;
        std::vector<Case> cases;
        for (int i = 0, count = 1 + below(3); i < count; ++i) {
            const int64_t r = side(most), K = below(4) ? side(4 * most) : r;
            const bool wide = below(2);
            cases.push_back(make(wide ? r : K, wide ? K : r, DType(below(4)), below(2), below(8) ? 1 : 1 + below(3), random()));
            degrade(cases.back(), unsigned(below(8)), random());
        }
        if (below(2))
            for (Case& c : cases) c.task.band_from = 1;
        const int method = below(5);
        const std::optional<Method> asked = method == 4 ? automatic : std::optional(Method(method));
        const int64_t short_side = 1 + below(32), long_side = short_side + below(2) * below(40);
        for (int i = 0, count = below(4) ? 0 : below(40); i < count; ++i) {  // that share vectors
            const bool wide = below(2);
            cases.push_back(make(wide ? short_side : long_side, wide ? long_side : short_side, DType(below(4)), below(2),
                                 below(8) ? 1 : 2, random()));
            degrade(cases.back(), unsigned(below(8)), random());
        }
        solve(cases, asked, 1 + below(3));
        std::vector<Case> alone{cases[size_t(below(int(cases.size())))]};
        const std::vector<double> S = alone[0].S, bound = alone[0].bound;
        solve(alone, asked, 1);
        CHECK(alone[0].S == S && alone[0].bound == bound);
        for (const Case& c : cases)
            for (size_t k = 0; k < c.S.size(); ++k) CHECK(c.S[k] >= 0 && c.bound[k] >= 0 && (k == 0 || c.S[k] <= c.S[k - 1]));
        if (below(4)) continue;
        // Parts of a matrix of any shapes, whose triangles are summed.
        const int64_t r = side(most), size = r * (r + 1) / 2, parts = 1 + below(3);
        const DType precision = below(2) ? DType::f32 : DType::f64;
        std::vector<Case> blocks;
        std::vector<double> triangles(size_t(parts * size)), diagonal(size_t(parts * r)), eigenvalues(size_t(parts * r));
        std::vector<PartTask> sums;
        std::vector<GramTask> grams;
        for (int64_t i = 0; i < parts; ++i) {
            blocks.push_back(make(r, side(most), DType(below(4)), below(2), 1 + below(2), random()));
            degrade(blocks.back(), unsigned(below(8)), random());
            const SvdvalsTask& t = blocks.back().task;
            sums.push_back({blocks.back().data.data(), t.dtype, r, t.n, t.row_stride, t.col_stride, 1, precision,
                            triangles.data() + i * size, diagonal.data() + i * r, 0});
            grams.push_back({sums.back().triangle, precision, r, eigenvalues.data() + i * r, below(2)});
        }
        gram_triangles(sums.data(), parts, 1 + below(3));
        gram_eigenvalues(grams.data(), parts, 1 + below(3));
        for (int64_t i = 0; i < parts * r; ++i)
            CHECK(diagonal[i] >= 0 && (i % r == 0 || eigenvalues[i] >= eigenvalues[i - 1]));
        std::vector<double> distributions(parts * r), statistics(parts * kStatistics);
        const double *before = below(2) ? eigenvalues.data() : nullptr, *fixed = below(2) ? diagonal.data() : nullptr;
        singular_distribution(diagonal.data(), before, fixed, parts, r, below(2) ? distributions.data() : nullptr,
                              statistics.data(), below(int(r) + 2));
        for (const double* of = statistics.data(); of < statistics.data() + parts * kStatistics; of += kStatistics)
            CHECK(!(of[kVariationTopk] > of[kVariationL2] * (1 + 1e-9)));
        const int64_t n = 2 + side(60), m = n + side(60), b = 1 + below(int(n) - 1), count = 1 + below(2);
        Case c = make(m, n, DType::f32, below(2), 1, random());
        degrade(c, unsigned(below(8)), random());
        std::vector<float> V(count * b * n), P(V), next_V(V), next_P(V), squares(count * b), residual(count * b);
        const bool orthonormal = below(8);  // others are declined
        for (float& x : V) x = orthonormal ? 0 : float(random() % 2001) / 1000 - 1;
        for (int64_t i = 0; orthonormal && i < count * b; ++i) V[i * n + (i % b + call) % n] = 1;
        if (below(2))
            for (float& x : P) x = float(random() % 2001) / 1e5f - 0.01f;
        std::vector<SubspaceTask> tasks;
        for (int64_t i = 0; i < count; ++i)
            tasks.push_back({reinterpret_cast<float*>(c.data.data()), m, n, c.task.row_stride, c.task.col_stride,
                             V.data() + i * b * n, P.data() + i * b * n, next_V.data() + i * b * n,
                             next_P.data() + i * b * n, squares.data() + i * b, residual.data() + i * b, false});
        advance_subspaces(tasks.data(), count, b, 4, 1 + below(3));
    }
    // Sides at which a workspace was once too small. Cheap ones: constant, of signs, or with a short side that is short.
    struct Large {
        int64_t m, n;
        unsigned kind;
        std::optional<Method> method;
    };
#if defined(__SANITIZE_THREAD__)  // ten times slower than AddressSanitizer; threads meet in these as in the others
    const std::vector<Large> large{{2112, 2112, 1, Method::bidiag64}, {2050, 2049, 2, Method::gram32}};
#else
    const std::vector<Large> large{
        {2112, 2112, 1, Method::bidiag64}, {3000, 3000, 1, automatic}, {4300, 4300, 1, Method::bidiag64},
        {2050, 2049, 2, Method::gram32},        {2300, 2900, 0, automatic}, {2200, 2200, 0, Method::bidiag64},
        {4300, 60, 0, automatic},    {33, 4300, 3, Method::bidiag64}};
#endif
    for (const Large& l : large) {
        std::vector<Case> one;
        one.push_back(make(l.m, l.n, DType::f32, false, 1, seed));
        degrade(one[0], l.kind, seed);
        solve(one, l.method, 2);
        if (l.kind == 1) CHECK(std::fabs(one[0].S[0] - 0.37f * std::sqrt(double(l.m) * l.n)) <= one[0].bound[0]);
        if (l.kind == 1) CHECK(one[0].S[1] <= one[0].bound[1]);
    }
    std::printf("%d calls\n", calls);
}

int main(int argc, char** argv) {
    std::printf("%s\n", kernels().isa);
    if (argc > 3 && std::string(argv[1]) == "fuzz") {
        fuzz(std::atoi(argv[2]), unsigned(std::atoi(argv[3])));
    } else {
        check();
        plant();
    }
    std::printf(failures ? "%d FAILED\n" : "ok\n", failures);
    return failures != 0;
}
