// Shapes, strides, dtypes, threads and concurrent callers of svdvals, for builds with the sanitizers (make sanitize).
// Truth: bidiagonalisation in float64.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <vector>

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

// in the order of svdvals.hpp
static const ErrorModel model{2, 32, 1 / 12.0, 0.125, 4, 6, 0.2, 8, 128 / 3.0, 0.25, 0.125, 3, 5, 0.1, 1e-6};
constexpr std::optional<Method> automatic;

static void solve(std::vector<Case>& cases, std::optional<Method> method, int threads) {
    std::vector<SvdvalsTask> tasks;
    for (Case& c : cases) {
        c.task.data = c.data.data(), c.task.S = c.S.data(), c.task.bound = c.bound.data();
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

int main() {
    std::printf("%s\n", kernels().isa);
    std::vector<Case> truth = batch();
    solve(truth, Method::bidiag64, 1);
    for (std::optional<Method> p : {std::optional(Method::gram32), std::optional(Method::gram64), automatic}) {
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
            std::vector<float> V(b * n), V1(b * n), P1(b * n), V2(b * n), P2(b * n), squares(2 * b), residual(b);
            for (int64_t i = 0; i < b; ++i) V[i * n + i] = 1;
            const float* P = nullptr;
            SubspaceTask one{reinterpret_cast<float*>(c.data.data()), m, n, c.task.row_stride, c.task.col_stride,
                             V.data(), P, V1.data(), P1.data(), squares.data(), residual.data(), false};
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
    std::printf(failures ? "%d FAILED\n" : "ok\n", failures);
    return failures != 0;
}
