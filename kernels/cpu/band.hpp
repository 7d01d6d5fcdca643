// T = Q^T G Q for a large G in two stages: to a band by blocks of reflectors, whose work is products of matrices over
// all threads (LAPACK sytrd_sy2sb), and from there by chasing bulges.
#pragma once

#include "chase.hpp"
#include "tridiagonal.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

constexpr int kSquare = 16;  // two tiles beside one another
static_assert(kSquare == kTileRows && kSquare == 2 * kTileCols && kBand % kSquare == 0);

// Rows of kBand elements: one or a few vectors.
template <class T> constexpr int kRowVectors = kBand / Simd<T>::L;
// Rows of sums that are held in registers together.
template <class T> constexpr int kStrip = max_of(1, min_of(kSquare, (kRegisters == 32 ? 16 : 8) / kRowVectors<T>));
template <class T> using Strip = typename Simd<T>::V[kStrip<T>][kRowVectors<T>];

// sums[q] += sum over k < K of a[q * across + k * along] * rows[k].
template <class T>
[[gnu::always_inline]] inline void add_product(Strip<T>& sums, const T* a, int64_t across, int64_t along, const T* rows,
                                               int K) {
    using S = Simd<T>;
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 16
        for (int q = 0; q < kStrip<T>; ++q)
#pragma GCC unroll 4
            for (int v = 0; v < kRowVectors<T>; ++v)
                sums[q][v] += S::at(rows + k * kBand + v * S::L) * a[q * across + k * along];
    }
}

template <class T> [[gnu::always_inline]] inline void clear(Strip<T>& sums) {
#pragma GCC unroll 16
    for (int q = 0; q < kStrip<T>; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < kRowVectors<T>; ++v) sums[q][v] = typename Simd<T>::V{};
}

template <class T> [[gnu::always_inline]] inline void add_to(T* rows, const Strip<T>& sums) {
    using S = Simd<T>;
#pragma GCC unroll 16
    for (int q = 0; q < kStrip<T>; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < kRowVectors<T>; ++v) S::at(rows + q * kBand + v * S::L) += sums[q][v];
}

// The symmetric A of squares >= first times V, added to Z, whose parts are summed by the caller: from the columns of
// squares [begin, end), and, transposed, for these rows. Rows of V and Z hold kBand elements.
constexpr int kBlock = 4;  // squares to a side; chains of sums end with a block
template <class T>
void multiply_part(const Tiles& tiles, const T* G, int64_t begin, int64_t end, const T* V, T* Z) {
    static_assert(kBlock * kSquare <= kChain);
    for (int64_t C0 = begin; C0 < end; C0 += kBlock) {
        const int64_t C1 = min_of(C0 + kBlock, end);
        for (int64_t I0 = C0; I0 < tiles.tile_rows; I0 += kBlock) {
            const int64_t I1 = min_of<int64_t>(I0 + kBlock, tiles.tile_rows);
            for (int64_t I = I0; I < I1; ++I)
                for (int q = 0; q < kSquare; q += kStrip<T>) {
                    Strip<T> sums;
                    clear<T>(sums);
                    for (int64_t J = 2 * C0; J < 2 * min_of(C1, I + 1); ++J) {
                        const T* rows = V + J * kTileCols * kBand;
                        add_product<T>(sums, G + tiles.tile(I, J) + q, 1, kTileRows, rows, kTileCols);
                    }
                    add_to<T>(Z + (I * kSquare + q) * kBand, sums);
                }
            for (int64_t C = C0; C < C1; ++C)
                for (int q = 0; q < kSquare; q += kStrip<T>) {
                    Strip<T> sums;
                    clear<T>(sums);
                    for (int64_t I = max_of(I0, C + 1); I < I1; ++I) {
                        const T* g = G + tiles.tile(I, 2 * C);
                        const int64_t next = tiles.tile(I, 2 * C + 1) - tiles.tile(I, 2 * C);
                        if constexpr (kStrip<T> <= kTileCols) {
                            add_product<T>(sums, g + q / kTileCols * next + q % kTileCols * kTileRows, kTileRows, 1,
                                           V + I * kSquare * kBand, kSquare);
                        } else {
                            for (int k = 0; k < kSquare; ++k) {
                                const auto row = Simd<T>::at(V + (I * kSquare + k) * kBand);
#pragma GCC unroll 16
                                for (int p = 0; p < kSquare; ++p)
                                    sums[p][0] += row * g[p / kTileCols * next + p % kTileCols * kTileRows + k];
                            }
                        }
                    }
                    add_to<T>(Z + (C * kSquare + q) * kBand, sums);
                }
        }
    }
}

// Columns [kBand * C ..) of G's lower triangle, rows >= first, as rows.
template <class T> inline void panel_rows(const Tiles& tiles, const T* G, int64_t column, int64_t first, T* rows) {
    using S = Simd<T>;
    for (int64_t i = first; i < tiles.tile_rows * kTileRows; i += S::L)
        for (int c = 0; c < kBand; c += S::L) {
            typename S::V x[S::L];
#pragma GCC unroll 16
            for (int q = 0; q < S::L; ++q) x[q] = S::at(G + tiles.at(i, column + c + q));
            transpose<T>(x);
#pragma GCC unroll 16
            for (int q = 0; q < S::L; ++q) S::at(rows + (i + q) * kBand + c) = x[q];
        }
}

// QR of the m rows P: its reflectors, unit lower trapezoidal, take its place; R goes to `upper` (kBand, kBand), and the
// block reflector is I - P factor P^T. One pass over P for each column: what the next column needs is summed meanwhile.
template <class T> void factor_panel(T* P, int64_t m, T negligible, T* upper, T* factor) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int B = kBand, N = kRowVectors<T>, kSums = 2;
    alignas(kVectorBytes) T dots[B], w[B], keep[B], scalars[B];
    V total[N];
    for (int i = 0; i < B * B; ++i) factor[i] = 0;
    T scale = 0;
    for (int j = -1; j < B; ++j) {  // applies reflector j, and sums up for column j + 1
        for (int v = 0; v < N; ++v) total[v] = V{};
        for (int64_t i0 = j + 1; i0 < m; i0 += kChain * kSums) {
            const int64_t i1 = min_of(i0 + kChain * kSums, m);
            V sums[kSums][N];
            for (int u = 0; u < kSums; ++u)
                for (int v = 0; v < N; ++v) sums[u][v] = V{};
            int u = 0;
            for (int64_t i = i0; i < i1; ++i, u ^= 1) {
                T* row = P + i * B;
                const T x = j >= 0 ? row[j] * scale : 0;
                if (j >= 0)
                    for (int v = 0; v < N; ++v) {
                        V& p = S::at(row + v * S::L);
                        p = p * S::at(keep + v * S::L) - S::at(w + v * S::L) * x;
                    }
                if (j + 1 < B && i > j + 1)
                    for (int v = 0; v < N; ++v) sums[u][v] += S::at(row + v * S::L) * row[j + 1];
            }
            for (int v = 0; v < N; ++v) total[v] += sums[0][v] + sums[1][v];
        }
        if (j + 1 == B) break;
        const int c = j + 1;
        T* top = P + c * B;
        for (int v = 0; v < N; ++v) S::at(dots + v * S::L) = total[v];
        const T alpha = top[c], below = dots[c];
        const auto [beta, tau, factor_below] = elimination(alpha, below, negligible);
        scale = factor_below;
        for (int k = 0; k < B; ++k) {
            scalars[k] = top[k] + scale * dots[k];  // v^T P: of earlier reflectors, and of columns still to come
            w[k] = k > c ? tau * scalars[k] : 0;
            keep[k] = k == c ? scale : 1;
            upper[c * B + k] = k < c ? 0 : k == c ? beta : top[k] - w[k];
        }
        for (int i = 0; i < c; ++i) {
            T sum = 0;
            for (int k = i; k < c; ++k) sum += factor[i * B + k] * scalars[k];
            factor[i * B + c] = -tau * sum;
        }
        factor[c * B + c] = tau;
        for (int k = c + 1; k < B; ++k) top[k] = 0;
        top[c] = tau != 0 ? 1 : 0;
    }
}

// G (destroyed) to a band. The parts of a product are cut by the size of the matrix alone, and summed in one order.
constexpr int64_t kParts = 8;
constexpr int64_t kRowsTogether = 256;
template <class T>
void reduce_to_band(T* G, int64_t r, T negligible, const BandMatrix& band, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    constexpr int B = kBand, P = kPanel<T>;
    const Tiles tiles = tiles_of(r);
    const int64_t rows = tiles.tile_rows * kTileRows, chunks = (rows + kRowsTogether - 1) / kRowsTogether;
    T *V = take<T>(arena, rows * B), *W = take<T>(arena, rows * B), *Z = take<T>(arena, kParts * rows * B);
    T *packed = take<T>(arena, rows * 2 * B), *inner = take<T>(arena, chunks * B * B);
    T *upper = take<T>(arena, B * B), *factor = take<T>(arena, B * B), *middle = take<T>(arena, B * B);
    T* half = take<T>(arena, B * B);
    int64_t k = 0;
    for (; k + B + 1 < r; k += B) {
        const int64_t first = k + B, begin = first / kSquare, end = tiles.tile_rows;
        panel_rows(tiles, G, k, first, V);
        factor_panel(V + first * B, rows - first, negligible, upper, factor);
        for (int64_t j = k; j < first; ++j) {
            for (int64_t i = j; i < first; ++i) band.put(i, j, G[tiles.at(i, j)]);
            for (int64_t i = first; i <= min_of(j + B, r - 1); ++i) band.put(i, j, upper[(i - first) * B + j - k]);
        }
        int64_t cuts[kParts + 1];  // parts of as many squares each
        cuts[0] = begin;
        for (int64_t p = 1, C = begin, seen = 0; p <= kParts; ++p) {
            for (; C < end && seen * kParts < p * (end - begin) * (end - begin + 1) / 2; ++C) seen += end - C;
            cuts[p] = C;
        }
        parallel_for(parallel, kParts, [&](int64_t p) {
            T* part = Z + p * rows * B;
            for (int64_t i = cuts[p] * kSquare * B; i < rows * B; i += S::L) S::at(part + i) = typename S::V{};
            multiply_part(tiles, G, cuts[p], cuts[p + 1], V, part);
        });
        const int64_t from = first / kRowsTogether;
        const auto rows_of = [&](int64_t chunk, auto f) {  // f(i) for its strips
            const int64_t i1 = min_of((chunk + 1) * kRowsTogether, rows);
            for (int64_t i = max_of(chunk * kRowsTogether, first); i < i1; i += kSquare) f(i);
        };
        parallel_for(parallel, chunks - from, [&](int64_t task) {  // Z, and V^T Z
            T* own = inner + (from + task) * B * B;
            for (int i = 0; i < B * B; ++i) own[i] = 0;
            rows_of(from + task, [&](int64_t i0) {
                for (int64_t p = 1; p < kParts && cuts[p] * kSquare <= i0; ++p) {
                    const T* part = Z + p * rows * B;
                    for (int64_t i = i0 * B; i < (i0 + kSquare) * B; i += S::L) S::at(Z + i) += S::at(part + i);
                }
                for (int q = 0; q < B; q += kStrip<T>) {
                    Strip<T> sums;
                    clear<T>(sums);
                    add_product<T>(sums, V + i0 * B + q, 1, B, Z + i0 * B, kSquare);
                    add_to<T>(own + q * B, sums);
                }
            });
        });
        // W = Z factor - 1/2 V factor^T (V^T Z) factor
        for (int64_t chunk = from + 1; chunk < chunks; ++chunk)
            for (int i = 0; i < B * B; i += S::L) S::at(inner + from * B * B + i) += S::at(inner + chunk * B * B + i);
        for (int i = 0; i < B * B; ++i) half[i] = middle[i] = 0;
        for (int q = 0; q < B; q += kStrip<T>) {
            Strip<T> sums;
            clear<T>(sums);
            add_product<T>(sums, inner + from * B * B + q * B, B, 1, factor, B);
            add_to<T>(half + q * B, sums);
        }
        for (int i = 0; i < B * B; ++i) half[i] *= T(-0.5);
        for (int q = 0; q < B; q += kStrip<T>) {
            Strip<T> sums;
            clear<T>(sums);
            add_product<T>(sums, factor + q, 1, B, half, B);
            add_to<T>(middle + q * B, sums);
        }
        if (first % P)  // the panel's upper rows do not count
            for (int64_t i = (first - kSquare) * B; i < first * B; ++i) V[i] = W[i] = 0;
        parallel_for(parallel, chunks - from, [&](int64_t task) {
            rows_of(from + task, [&](int64_t i0) {
                for (int64_t i = i0; i < i0 + kSquare; i += kStrip<T>) {
                    Strip<T> sums;
                    clear<T>(sums);
                    add_product<T>(sums, Z + i * B, B, 1, factor, B);
                    add_product<T>(sums, V + i * B, B, 1, middle, B);
#pragma GCC unroll 16
                    for (int q = 0; q < kStrip<T>; ++q)
#pragma GCC unroll 4
                        for (int v = 0; v < kRowVectors<T>; ++v) S::at(W + (i + q) * B + v * S::L) = sums[q][v];
                }
            });
            const int64_t i1 = min_of((from + task + 1) * kRowsTogether, rows);
            for (int64_t i = max_of((from + task) * kRowsTogether, first / P * P); i < i1; i += S::L)
                for (int which = 0; which < 2; ++which)
                    for (int c = 0; c < B; c += S::L) {
                        typename S::V x[S::L];
#pragma GCC unroll 16
                        for (int q = 0; q < S::L; ++q) x[q] = S::at((which ? W : V) + (i + q) * B + c);
                        transpose<T>(x);
                        T* to = packed + (i / P * 2 * B + 2 * c + which) * P + i % P;
#pragma GCC unroll 16
                        for (int q = 0; q < S::L; ++q) S::at(to + 2 * q * P) = x[q];
                    }
        });
        constexpr int64_t columns = kBlock * kSquare;
        parallel_for(parallel, (rows - first + columns - 1) / columns, [&](int64_t task) {
            const int64_t j0 = first + task * columns, j1 = min_of(j0 + columns, rows);
            for (int64_t p = j0 / P; p < rows / P; ++p) {
                const T* A = packed + p * 2 * B * P;
                for (int64_t J = j0 / kTileCols; J < min_of(j1, round_up((p + 1) * P, kTileRows)) / kTileCols; ++J)
                    update_block<T, Store::subtract, true>(tiles, G, p, J, A, packed, 2 * B * P, 2 * B);
            }
        });
    }
    for (int64_t j = k; j < r; ++j)
        for (int64_t i = j; i < r; ++i) band.put(i, j, G[tiles.at(i, j)]);
}

// d[0 .. r), e[0 .. r - 1) <- the tridiagonal matrix similar to G (destroyed), as `tridiagonal` finds it.
template <class T> void band_tridiagonal(T* G, int64_t r, T* d, T* e, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const T negligible = negligible_squares(tiles_of(r), G, r);
    constexpr int B = kBand;
    const int64_t size = (r + B) * 3 * B;
    const BandMatrix band{take<double>(arena, size)};
    for (int64_t i = 0; i < size; ++i) band.data[i] = 0;
    reduce_to_band(G, r, negligible, band, arena, parallel);
    chase(band, r, negligible, arena, parallel);
    for (int64_t i = 0; i < r; ++i) d[i] = T(*band.at(i, i));
    for (int64_t i = 0; i + 1 < r; ++i) e[i] = T(*band.at(i + 1, i));
}

// The same by the one way or the other; band_from = 0: as measured.
template <class T>
void any_tridiagonal(T* G, int64_t r, int64_t band_from, T* d, T* e, Arena& arena, const Parallel& parallel) {
    if (!in_one_stage<T>(r, band_from)) return band_tridiagonal(G, r, d, e, arena, parallel);
    tridiagonal(G, r, d, e, arena);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
