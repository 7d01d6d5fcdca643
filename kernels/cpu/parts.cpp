// Gram matrices of parts of matrices, eigenvalues of their sums, and steps towards leading singular values.
#include <algorithm>
#include <limits>
#include <vector>

#include "svdvals.hpp"
#include "team.hpp"

namespace sosd_fast {
namespace {

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
    stages.tridiagonal(G, t.r, t.band_from, d, e, arena, parallel);
    stages.sturm(d, e, t.r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, t.values, arena, parallel);
}

}  // namespace

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
