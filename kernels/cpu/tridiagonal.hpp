// T = Q^T G Q: Householder reduction of a symmetric matrix in tiles to tridiagonal form (LAPACK sytrd/latrd).
#pragma once

#include "gram.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// Per panel, a multiple of the tile columns. Each column of a panel reads the reflectors before it: of 16's time 8 take 0.70 (r = 32),
// 0.82 (128), 0.89 (256), 0.93 (512) on AVX2 (LOG.md#eight-reflectors).
constexpr int kReflectors = 8;

// y <- A v over rows and columns >= first of the tiled symmetric A, returns v^T y; v is zero below first.
// Each tile is read once and used twice: for the rows beneath and, transposed, for its own columns.
template <class T>
inline T symv(const Tiles& tiles, const T* G, int64_t first, const T* v, T* y) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int VR = kTileRows / S::L;  // vectors in a tile's column
    const int64_t I_end = tiles.tile_rows, I_first = first / kTileRows;
    for (int64_t i = I_first * kTileRows; i < I_end * kTileRows; i += S::L) S::at(y + i) = V{};
    for (int64_t J = first / kTileCols; J < 2 * I_end; ++J) {
        const T* g = G + tiles.columns(J);
        const T* vJ = v + J * kTileCols;
        const int64_t I0 = J / 2;
        for (int r = 0; r < VR; ++r) {
            V even = V{}, odd = V{};
#pragma GCC unroll 4
            for (int c = 0; c < kTileCols; c += 2) {
                even += S::at(g + c * kTileRows + r * S::L) * vJ[c];
                odd += S::at(g + (c + 1) * kTileRows + r * S::L) * vJ[c + 1];
            }
            S::at(y + I0 * kTileRows + r * S::L) += even + odd;
        }
        V acc[kTileCols];
        for (int c = 0; c < kTileCols; ++c) acc[c] = V{};
        for (int64_t I = I0 + 1; I < I_end; ++I) {
            g += kTile;
#pragma GCC unroll 2
            for (int r = 0; r < VR; ++r) {
                const V x = S::at(v + I * kTileRows + r * S::L);
                V even = S::at(y + I * kTileRows + r * S::L), odd = V{};
#pragma GCC unroll 8
                for (int c = 0; c < kTileCols; ++c) {
                    V a = S::at(g + c * kTileRows + r * S::L);
                    loaded(a);
                    (c % 2 ? odd : even) += a * vJ[c];
                    acc[c] += a * x;
                }
                S::at(y + I * kTileRows + r * S::L) = even + odd;
            }
        }
        ReduceLanes<T, kTileCols>::add(acc, y + J * kTileCols);
    }
    V dot = V{};
    for (int64_t i = I_first * kTileRows; i < I_end * kTileRows; i += S::L) dot += S::at(v + i) * S::at(y + i);
    return sum_lanes<T>(dot);
}

template <class T> struct Panel {
    static constexpr int P = kPanel<T>, W = 2 * kReflectors;
    T* data;  // [row panel][V_0 W_0 V_1 W_1 ..][kPanel rows]
    T* block(int64_t p) const { return data + p * W * P; }
    T& at(int64_t i, int l) const { return data[(i / P * W + l) * P + i % P]; }
};

// What is needed of reflector c - 1 to finish w and to form column c.
template <class T> struct Step {
    int width;          // 2 x finished reflectors in the panel
    T tau, gamma;       // w = tau (y - P swap(t) - gamma v)
    const T* s;         // swap(t)
    const T* row;       // swapped row c of the panel
    T row_v, row_w;     // the same of the reflector being finished
};

// One pass over the panel, rows >= c: w of the reflector in hand, then column c of the updated matrix into a, with
// sum of squares and panel^T a over rows > c for the next reflector. One read of the panel instead of the three of
// latrd's separate products. Returns sum of squares; d_c gets a[c]; a and w are zero where they must not count.
template <class T, bool Column>
inline T advance(const Tiles& tiles, const T* G, const Panel<T>& panel, int64_t c, const Step<T>& step, const T* y,
                 T* a, T* sums, T& d_c) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int P = kPanel<T>;
    const int n = step.width;
    const int64_t rows = tiles.tile_rows * kTileRows;
    V squares = V{};
    for (int64_t p = c / P; p < rows / P; ++p) {
        T* block = panel.block(p);
        const bool top = p == c / P;
        V w[2][2], x[2][2];
        for (int m = 0; m < 2; ++m) w[0][m] = w[1][m] = x[0][m] = x[1][m] = V{};
        for (int l = 0; l < n; l += 2) {
#pragma GCC unroll 2
            for (int u = 0; u < 2; ++u) {
#pragma GCC unroll 2
                for (int m = 0; m < 2; ++m) {
                    const V q = S::at(block + (l + u) * P + m * S::L);
                    w[u][m] += q * step.s[l + u];
                    if (Column) x[u][m] += q * step.row[l + u];
                }
            }
        }
#pragma GCC unroll 2
        for (int m = 0; m < 2; ++m) {
            const int64_t i = p * P + m * S::L;
            const V v = S::at(block + n * P + m * S::L);
            V finished = (S::at(y + i) - (w[0][m] + w[1][m]) - v * step.gamma) * step.tau;
            S::at(block + (n + 1) * P + m * S::L) = finished;
            if (top)
                for (int64_t k = i; k < min_of<int64_t>(c, i + S::L); ++k) block[(n + 1) * P + k % P] = 0;
            if (!Column) continue;
            finished = S::at(block + (n + 1) * P + m * S::L);
            if (i / kTileRows < c / kTileRows) {
                S::at(a + i) = V{};
                continue;
            }
            const T* g = G + tiles.tile(i / kTileRows, c / kTileCols) + c % kTileCols * kTileRows + i % kTileRows;
            S::at(a + i) = S::at(g) - (x[0][m] + x[1][m]) - v * step.row_v - finished * step.row_w;
        }
        if (!Column) continue;
        if (top) {
            d_c = a[c];
            for (int64_t k = p * P; k <= c; ++k) a[k] = 0;
        }
        const V a0 = S::at(a + p * P), a1 = S::at(a + p * P + S::L);
        squares += a0 * a0 + a1 * a1;
        for (int l = 0; l < n + 2; ++l)
            S::at(sums + l * S::L) += S::at(block + l * P) * a0 + S::at(block + l * P + S::L) * a1;
    }
    return sum_lanes<T>(squares);
}

// A column whose part below the diagonal has norm < eps / 1000 times G's largest diagonal element counts as zero: its
// squares could underflow, and the reflector would not be orthogonal. Returns the square of that norm.
template <class T> inline T negligible_squares(const Tiles& tiles, const T* G, int64_t r) {
    constexpr T eps = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53);
    T largest = 0;
    for (int64_t i = 0; i < r; ++i) largest = max_of(largest, G[tiles.at(i, i)]);
    return (eps * T(1e-3) * largest) * (eps * T(1e-3) * largest);
}

// d[0 .. r), e[0 .. r - 1) <- the tridiagonal matrix similar to G (destroyed).
template <class T> void tridiagonal(T* G, int64_t r, T* d, T* e, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int P = kPanel<T>;
    const Tiles tiles = tiles_of(r);
    const int64_t rows = tiles.tile_rows * kTileRows;
    const Panel<T> panel{take<T>(arena, rows * Panel<T>::W)};
    T *v = take<T>(arena, rows), *y = take<T>(arena, rows), *a = take<T>(arena, rows);
    constexpr int64_t finished = 2 * (kReflectors - 1);  // columns of the panel, at most, when another one is formed
    T *sums = take<T>(arena, finished * S::L), *t = take<T>(arena, finished);
    T *s = take<T>(arena, finished), *row = take<T>(arena, finished);
    const T negligible = negligible_squares(tiles, G, r);

    for (int64_t k = 0; k < r; k += kReflectors) {
        const int64_t width = min_of<int64_t>(kReflectors, r - k);
        for (int64_t i = k / P * P; i < rows; ++i) a[i] = v[i] = 0;
        T squares;
        {   // the first column of a panel is up to date
            V sum = V{};
            for (int64_t I = k / kTileRows; I < tiles.tile_rows; ++I) {
                const T* g = G + tiles.tile(I, k / kTileCols) + k % kTileCols * kTileRows;
                for (int i = 0; i < kTileRows; ++i) a[I * kTileRows + i] = g[i];
            }
            d[k] = a[k];
            for (int64_t i = k / kTileRows * kTileRows; i <= k; ++i) a[i] = 0;
            for (int64_t i = k / kTileRows * kTileRows; i < rows; i += S::L) sum += S::at(a + i) * S::at(a + i);
            squares = sum_lanes<T>(sum);
        }
        for (int j = 0; j < width; ++j) {
            const int64_t c = k + j, n = 2 * j;
            if (c == r - 1) break;
            const T alpha = a[c + 1];
            T tau = 0, scale = 0, beta = 0;
            if (squares > negligible) {
                beta = alpha > 0 ? -__builtin_sqrt(squares) : __builtin_sqrt(squares);
                tau = (beta - alpha) / beta;
                scale = 1 / (alpha - beta);
            }
            e[c] = beta;
            for (int64_t p = c / P; p < rows / P; ++p)
#pragma GCC unroll 2
                for (int m = 0; m < 2; ++m) {
                    const V x = S::at(a + p * P + m * S::L) * scale;
                    S::at(v + p * P + m * S::L) = x;
                    S::at(panel.block(p) + n * P + m * S::L) = x;
                }
            if constexpr (P < kTileRows)
                for (int64_t i = (c + 1) / kTileRows * kTileRows; i <= c; ++i) v[i] = 0;
            T vy = 0;
            if (tau != 0) {
                v[c + 1] = panel.at(c + 1, n) = 1;
                for (int64_t l = 0; l < n; ++l) t[l] = scale * t[l] + panel.at(c + 1, l) * (1 - scale * alpha);
                vy = symv(tiles, G, c + 1, v, y);
            } else {
                for (int64_t l = 0; l < n; ++l) t[l] = 0;
                for (int64_t i = c / P * P; i < rows; ++i) y[i] = 0;
            }
            for (int64_t l = 0; l < n; l += 2) {
                s[l] = t[l + 1];
                s[l + 1] = t[l];
                vy -= 2 * t[l] * t[l + 1];
                row[l] = panel.at(c + 1, l + 1);
                row[l + 1] = panel.at(c + 1, l);
            }
            const T gamma = tau * vy / 2;
            T w = y[c + 1] - gamma * v[c + 1];
            for (int64_t l = 0; l < n; ++l) w -= s[l] * panel.at(c + 1, l);
            const Step<T> step{int(n), tau, gamma, s, row, w * tau, v[c + 1]};
            if (j + 1 < width) {
                for (int64_t l = 0; l < (n + 2) * S::L; ++l) sums[l] = 0;
                squares = advance<T, true>(tiles, G, panel, c + 1, step, y, a, sums, d[c + 1]);
                for (int64_t l = 0; l < n + 2; ++l) t[l] = sum_lanes<T>(S::at(sums + l * S::L));
            } else {
                advance<T, false>(tiles, G, panel, c + 1, step, y, a, sums, d[c + 1 < r ? c + 1 : c]);
            }
        }
        const int64_t done = k + width;
        if (done >= r) break;
        for (int64_t J = done / kTileCols; J < rows / kTileCols; ++J)
            for (int64_t p = max_of(J / 2 * kTileRows, done) / P; p < rows / P; ++p)  // the panel has no rows above
                update_block<T, Store::subtract, true>(tiles, G, p, J, panel.block(p), panel.data, Panel<T>::W * P,
                                                       Panel<T>::W);
    }
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
