// A symmetric band to tridiagonal form by chasing bulges. Source: Haidar, Ltaief & Dongarra, SC 2011.
#pragma once

#include "arena.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

constexpr int kBand = 16;  // columns beside the diagonal; a multiple of the tile rows. 32: 40 for 20 ms at 2048

// The reflector I - tau v v^T, v = (1, scale x), that takes (alpha, x) to (beta, 0), where |x|^2 = below. The sign
// comes without a branch, which would be guessed wrongly every second time: 13.6 for 12.6 ms at 2048.
template <class T> struct Elimination {
    T beta, tau, scale;
};
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
template <class T> inline Elimination<T> elimination(T alpha, T below, T negligible) {
    if (!(below > negligible)) return {alpha, 0, 0};
    const T norm = root(alpha * alpha + below), beta = T(-__builtin_copysign(norm, alpha));
    return {beta, (beta - alpha) / beta, 1 / (alpha - beta)};
}

// A symmetric band with room for bulges: column j holds rows j - kBand .. j + 2 kBand - 1, both halves of what a square
// on the diagonal sees. In double for every G: a chase rounds each element as many times as there are columns. In
// float32 Gaussian matrices erred by four times as much as after one stage, flat ones by 1.2 times their bound.
struct BandMatrix {
    double* data;
    double* at(int64_t i, int64_t j) const { return data + i + kBand + j * (3 * kBand - 1); }
    void put(int64_t i, int64_t j, double x) const {
        *at(i, j) = x;
        if (i - j < kBand) *at(j, i) = x;
    }
};

// One step of a sweep of the chase: takes the reflector of the step before from the right to the square below, makes
// the one that clears that square's first column, takes it to the square and, from both sides, to the next diagonal.
// At step 0, where the square is a column, the reflector given is zero.
inline void chase_step(const BandMatrix& band, int64_t sweep, int64_t step, double negligible, double* reflector,
                       double& tau) {
    using T = double;
    using S = Simd<T>;
    using V = typename S::V;
    typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
    constexpr int B = kBand, N = B / S::L;
    constexpr int64_t ld = 3 * B - 1;
    const auto at = [](T* p) -> Loose& { return *reinterpret_cast<Loose*>(p); };
    const int64_t r0 = sweep + 1 + step * B, c0 = step ? r0 - B : sweep;
    T* square = band.at(r0, c0);
    V block[B][N], y[N], v[N];
    for (int m = 0; m < N; ++m) y[m] = V{};
#pragma GCC unroll 16
    for (int c = 0; c < B; ++c)
        for (int m = 0; m < N; ++m) {
            block[c][m] = at(square + c * ld + m * S::L);
            y[m] += block[c][m] * reflector[c];
        }
    for (int m = 0; m < N; ++m) {
        y[m] *= tau;
        v[m] = block[0][m] - y[m] * reflector[0];
    }
    const T alpha = v[0][0];
    v[0][0] = 0;
    V squares = V{};
    for (int m = 0; m < N; ++m) squares += v[m] * v[m];
    const T below = sum_lanes<T>(squares);
    const auto [beta, next, scale] = elimination(alpha, below, negligible);
    for (int m = 0; m < N; ++m) v[m] *= scale;
    v[0][0] = next != 0 ? 1 : 0;
    for (int m = 0; m < N; ++m) {
        V column = V{};
        if (m == 0) column[0] = beta;
        at(square + m * S::L) = column;
    }
    if (step) {
        *band.at(c0, r0) = beta;
        V products[B];
        alignas(kVectorBytes) T dots[B] = {};
        products[0] = V{};
#pragma GCC unroll 16
        for (int c = 1; c < B; ++c) {
            products[c] = V{};
            for (int m = 0; m < N; ++m) {
                block[c][m] -= y[m] * reflector[c];
                products[c] += block[c][m] * v[m];
            }
        }
        ReduceLanes<T, B>::add(products, dots);
#pragma GCC unroll 16
        for (int c = 1; c < B; ++c) {
            const T factor = next * dots[c];
            for (int m = 0; m < N; ++m) at(square + c * ld + m * S::L) = block[c][m] -= v[m] * factor;
            *band.at(c0 + c, r0) = block[c][0][0];  // seen by a square on the diagonal
        }
    }
    tau = next;
    for (int m = 0; m < N; ++m) S::at(reflector + m * S::L) = v[m];
    if (next == 0) return;
    T* diagonal = band.at(r0, r0);
    V w[N];
    for (int m = 0; m < N; ++m) w[m] = V{};
#pragma GCC unroll 16
    for (int c = 0; c < B; ++c)
        for (int m = 0; m < N; ++m) {
            block[c][m] = at(diagonal + c * ld + m * S::L);
            w[m] += block[c][m] * reflector[c];
        }
    V dot = V{};
    for (int m = 0; m < N; ++m) dot += w[m] * v[m];
    const T gamma = next * sum_lanes<T>(dot) / 2;
    alignas(kVectorBytes) T factors[B];
    for (int m = 0; m < N; ++m) S::at(factors + m * S::L) = w[m] = (w[m] - v[m] * gamma) * next;
#pragma GCC unroll 16
    for (int c = 0; c < B; ++c)
        for (int m = 0; m < N; ++m)
            at(diagonal + c * ld + m * S::L) = block[c][m] - v[m] * factors[c] - w[m] * reflector[c];
}

// The band to tridiagonal form. Sweeps go in groups, each two steps behind the one before, so that the steps of a round
// do not wait for one another; and a group follows the group before, which may be on another thread.
constexpr int64_t kSweeps = 8;
inline void chase(const BandMatrix& band, int64_t r, double negligible, Arena& arena, const Parallel& parallel) {
    constexpr int B = kBand;
    const int64_t groups = (r - 2 + kSweeps - 1) / kSweeps;
    if (groups <= 0) return;
    int64_t* finished = take<int64_t>(arena, groups);  // steps, by all sweeps of a group
    for (int64_t g = 0; g < groups; ++g) finished[g] = 0;
    parallel_for(parallel, groups, [&](int64_t g) {
        alignas(kVectorBytes) double reflectors[kSweeps][B];
        double tau[kSweeps];
        const int64_t first = g * kSweeps, count = min_of(kSweeps, r - 2 - first);
        for (int64_t q = 0; q < count; ++q) {
            tau[q] = 0;
            for (int i = 0; i < B; ++i) reflectors[q][i] = 0;
        }
        const int64_t rounds = (r - 2 - first) / B + 1 + 2 * (count - 1);
        for (int64_t round = 0; round < rounds; ++round) {
            // a step needs the next one of the sweep before
            while (g > 0 && __atomic_load_n(finished + g - 1, __ATOMIC_ACQUIRE) < round + 2) parallel.pause();
            for (int64_t q = 0; q < count && round >= 2 * q; ++q) {
                const int64_t sweep = first + q, step = round - 2 * q;
                if (sweep + 1 + step * B < r) chase_step(band, sweep, step, negligible, reflectors[q], tau[q]);
            }
            const int64_t steps = round + 1 == rounds ? INT64_MAX : round - 2 * (count - 1) + 1;
            __atomic_store_n(finished + g, steps, __ATOMIC_RELEASE);
        }
    });
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
