// Eigenvalues of W W^T of matrices of one shape with a short side of at most kLanesSide: a lane of a vector holds a matrix.
//
// Stages as of gram.hpp and tridiagonal.hpp, with their precision, and of ql.hpp. No operation crosses lanes and no step depends
// on another lane's values, so that a matrix gets the same bits whatever its neighbours are.
#pragma once

#include "gram.hpp"
#include "ql.hpp"

namespace sosd_fast {

// Matrices of at most this side and so many entries go into lanes, a lone one too: its bits must not depend on how many
// others come with it. us a matrix by the other stages and in lanes, both with bisection (AVX-512, float32, thread CPU time; 5 us
// are the call):
//             16 of them          alone
//   8 x 8      6.1   0.9       11.3    8.9
//   16 x 64    8.9   2.2       14.6   15.9
//   32 x 32   13.8   5.2       21.0   30.4
//   32 x 128  15.1   7.4       20.8   54.1
//   64 x 64   29.5  18.6       35.5  137.2
// The last two are beyond, and were measured in a form a tenth slower. A lone matrix leaves the other lanes empty in the first
// two stages: a batch of 32 x 32 is worth those 9 us, one of 64 x 64 not those 100.
constexpr int64_t kLanesSide = 32, kLanesEntries = 1024;

// One lane: W, finite and scaled to entries whose squares stay in range, r >= 1.
struct Lane {
    Source w;
    GramSums sums;  // out
};

namespace SOSD_ISA {

// Symmetric matrices are kept as their lower triangle in blocks of kRows rows, each block one column after the other;
// diagonal blocks hold both halves.
constexpr int kRows = 4;
constexpr int64_t block_of(int64_t I) { return kRows * kRows * I * (I + 1) / 2; }
constexpr int64_t at_lanes(int64_t i, int64_t j) { return block_of(i / kRows) + j * kRows + i % kRows; }

constexpr int64_t kChunkBytes = 1 << 15;  // of interleaved columns: more would not stay in a first-level cache of 48 KB

// X[k * rows + i] <- W(i, k0 + k) of one lane, k < h. Scattered: reading rows and
// transposing them took as long, all in all, at 16 x 16 (1.7 and 1.6 us a matrix) and 80 lines more.
template <class T, class From>
inline void scatter(const From* w, const Source& of, int64_t h, T* X, int64_t rows) {
    using Wide = decltype(widen(From{}));
    const Wide s = Wide(of.scale);
    for (int64_t i = 0; i < of.r; ++i)
        for (int64_t k = 0; k < h; ++k)
            X[(k * rows + i) * Simd<T>::L] = T(widen(w[i * of.stride_i + k * of.stride_k]) * s);
}

template <class T> inline void scatter(const Source& w, int64_t k0, int64_t h, T* X, int64_t rows) {
    const int64_t at = k0 * w.stride_k;
    switch (w.dtype) {
        case DType::f32: return scatter(static_cast<const float*>(w.data) + at, w, h, X, rows);
        case DType::f64: return scatter(static_cast<const double*>(w.data) + at, w, h, X, rows);
        case DType::bf16: return scatter(static_cast<const bf16*>(w.data) + at, w, h, X, rows);
        case DType::f16: return scatter(static_cast<const f16*>(w.data) + at, w, h, X, rows);
    }
}

// G += X X^T of one chunk.
template <class T> inline void add_chunk(const T* X, int64_t rows, int64_t h, T* G) {
    using S = Simd<T>;
    constexpr int C = kRegisters == 32 ? kRows : kRows / 2;  // columns at once
    for (int64_t i = 0; i < rows; i += kRows)
        for (int64_t j = 0; j < i + kRows; j += C) {
            typename S::V acc[C][kRows];
            for (int c = 0; c < C; ++c)
                for (int u = 0; u < kRows; ++u) acc[c][u] = typename S::V{};
            for (int64_t k = 0; k < h; ++k) {
                const T* x = X + k * rows * S::L;
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
                    for (int u = 0; u < kRows; ++u) acc[c][u] += S::at(x + (i + u) * S::L) * S::at(x + (j + c) * S::L);
            }
            T* out = G + (block_of(i / kRows) + j * kRows) * S::L;
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
                for (int u = 0; u < kRows; ++u) S::at(out + (c * kRows + u) * S::L) += acc[c][u];
        }
}

// squares += X_i X_i, cross += X_i X_(i + apart), more precisely than in T; squares and cross have `rows` rows.
template <class T>
inline void add_exact(const T* X, int64_t rows, int64_t apart, int64_t h, double* squares, double* cross) {
    using D = Simd<double>;
    constexpr int L = Simd<T>::L;
    using Sum = std::conditional_t<sizeof(T) == 4, PlainSum, CompensatedSum>;
    for (int64_t i = 0; i < rows; i += kRows)
        for (int q = 0; q < L; q += D::L) {
            const bool pairs = i + apart < rows;
            const T *x = X + i * L + q, *y = x + (pairs ? apart * L : 0);
            Sum s[kRows], c[kRows];
            for (int64_t k = 0; k < h; ++k) {
#pragma GCC unroll 4
                for (int u = 0; u < kRows; ++u) {
                    const D::V xu = widened(x + (k * rows + u) * L);
                    s[u].add(xu * xu);
                    if (pairs) c[u].add(xu * widened(y + (k * rows + u) * L));
                }
            }
#pragma GCC unroll 4
            for (int u = 0; u < kRows; ++u) {
                D::at(squares + (i + u) * L + q) += s[u].total();
                if (pairs) D::at(cross + (i + u) * L + q) += c[u].total();
            }
        }
}

// `correct_gram` of every lane.
template <class T>
inline void correct_lanes(Lane* lanes, int64_t count, int64_t apart, T* G, const double* squares, const double* cross) {
    constexpr int L = Simd<T>::L;
    const int64_t r = lanes[0].w.r, pairs = max_of<int64_t>(0, r - apart);
    double trace[L] = {}, products[L] = {}, sum[L] = {};
    for (int64_t i = 0; i < r; ++i)
        for (int l = 0; l < L; ++l) trace[l] += squares[i * L + l];
    for (int64_t i = 0; i < pairs; ++i)
        for (int l = 0; l < L; ++l) {
            const double g = cross[i * L + l];
            products[l] += (double(G[at_lanes(i + apart, i) * L + l]) - g) * g;
            sum[l] += g * g;
        }
    double grown[L];
    for (int l = 0; l < L; ++l) {
        const double mean = trace[l] / double(r), least = double(pairs) * mean * mean / (16 * double(lanes[0].w.K));
        double drift = sum[l] + least > 0 ? products[l] / (sum[l] + least) : 0;
        drift = max_of(-kMostDrift, min_of(kMostDrift, drift));
        grown[l] = 1 + drift;
        if (l < count) lanes[l].sums = {trace[l], drift};
    }
    for (int64_t i = 0; i < r; ++i)
        for (int l = 0; l < L; ++l) G[at_lanes(i, i) * L + l] = T(squares[i * L + l] * grown[l]);
}

// G <- (1 + drift) W W^T of `count` lanes; the others are zero.
template <class T> void gram_lanes(Lane* lanes, int64_t count, T* G, Arena& arena) {
    const ArenaScope scope(arena);
    constexpr int64_t L = Simd<T>::L;
    const int64_t r = lanes[0].w.r, K = lanes[0].w.K, rows = round_up(r, kRows);
    const int64_t depth = min_of(min_of(kChain, K), kChunkBytes / int64_t(sizeof(T)) / (rows * L));
    const int64_t apart = max_of<int64_t>(1, rows / kRows / 2) * kRows;
    T* X = take<T>(arena, depth * rows * L);
    double *squares = take<double>(arena, rows * L), *cross = take<double>(arena, rows * L);
    for (int64_t i = 0; i < depth * rows * L; ++i) X[i] = 0;
    for (int64_t i = 0; i < rows * L; ++i) squares[i] = cross[i] = 0;
    for (int64_t i = 0; i < block_of(rows / kRows) * L; ++i) G[i] = 0;
    for (int64_t k = 0; k < K; k += depth) {
        const int64_t h = min_of(depth, K - k);
        for (int64_t l = 0; l < count; ++l) scatter(lanes[l].w, k, h, X + l, rows);
        add_exact(X, rows, apart, h, squares, cross);
        add_chunk(X, rows, h, G);
    }
    correct_lanes(lanes, count, apart, G, squares, cross);
}

// A <- A - v w^T - w v^T and y <- A u over rows and columns >= first; u is zero below first.
template <class T>
inline void update_multiply(T* A, int64_t rows, int64_t first, const T* v, const T* w, const T* u, T* y) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int R = kRegisters == 32 ? kRows : kRows / 2;  // rows at once
    for (int64_t i = first / kRows * kRows; i < rows; ++i) S::at(y + i * S::L) = V{};
    for (int64_t I = first / kRows; I < rows / kRows; ++I) {
        T* block = A + block_of(I) * S::L;
        for (int half = 0; half < kRows / R; ++half) {
            const int64_t i = I * kRows + half * R;
            V vi[R], wi[R], ui[R], sum[R];
#pragma GCC unroll 4
            for (int q = 0; q < R; ++q) {
                vi[q] = S::at(v + (i + q) * S::L), wi[q] = S::at(w + (i + q) * S::L);
                ui[q] = S::at(u + (i + q) * S::L), sum[q] = V{};
            }
            for (int64_t j = first; j < I * kRows; ++j) {
                T* a = block + (j * kRows + half * R) * S::L;
                const V vj = S::at(v + j * S::L), wj = S::at(w + j * S::L), uj = S::at(u + j * S::L);
                V yj = S::at(y + j * S::L);
#pragma GCC unroll 4
                for (int q = 0; q < R; ++q) {
                    const V x = S::at(a + q * S::L) - vi[q] * wj - wi[q] * vj;
                    S::at(a + q * S::L) = x;
                    sum[q] += x * uj;
                    yj += x * ui[q];
                }
                S::at(y + j * S::L) = yj;
            }
            for (int64_t j = max_of(first, I * kRows); j < (I + 1) * kRows; ++j) {
                T* a = block + (j * kRows + half * R) * S::L;
                const V vj = S::at(v + j * S::L), wj = S::at(w + j * S::L), uj = S::at(u + j * S::L);
#pragma GCC unroll 4
                for (int q = 0; q < R; ++q) {
                    const V x = S::at(a + q * S::L) - vi[q] * wj - wi[q] * vj;
                    S::at(a + q * S::L) = x;
                    sum[q] += x * uj;
                }
            }
#pragma GCC unroll 4
            for (int q = 0; q < R; ++q) S::at(y + (i + q) * S::L) += sum[q];
        }
    }
}

// d[0 .. r), e[0 .. r - 1) <- the tridiagonal matrices similar to A (destroyed), as `tridiagonal` does one.
template <class T> void tridiagonal_lanes(T* A, int64_t r, T* d, T* e, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    const int64_t rows = round_up(r, kRows);
    T *v = take<T>(arena, rows * S::L), *w = take<T>(arena, rows * S::L), *u = take<T>(arena, rows * S::L);
    T* y = take<T>(arena, rows * S::L);
    constexpr T tiny = (sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53)) * T(1e-3);
    V largest = V{};
    for (int64_t i = 0; i < r; ++i) {
        const V x = S::at(A + at_lanes(i, i) * S::L);
        largest = x > largest ? x : largest;
    }
    const V negligible = (largest * tiny) * (largest * tiny);
    for (int64_t i = 0; i < rows; ++i) S::at(v + i * S::L) = S::at(w + i * S::L) = S::at(u + i * S::L) = V{};
    for (int64_t c = 0; c < r; ++c) {
        const V vc = S::at(v + c * S::L), wc = S::at(w + c * S::L);
        S::at(d + c * S::L) = S::at(A + at_lanes(c, c) * S::L) - vc * wc - wc * vc;
        if (c + 1 == r) break;
        V squares[kRows] = {};
        S::at(u + c * S::L) = V{};
        for (int64_t i = c + 1; i < rows; ++i) {
            const V x = S::at(A + at_lanes(i, c) * S::L) - S::at(v + i * S::L) * wc - S::at(w + i * S::L) * vc;
            S::at(u + i * S::L) = x;
            squares[i % kRows] += x * x;
        }
        const V alpha = S::at(u + (c + 1) * S::L);
        if (c + 2 == r) {
            S::at(e + c * S::L) = alpha;
            // d of the last column is still to be updated by v and w
            continue;
        }
        const V total = (squares[0] + squares[1]) + (squares[2] + squares[3]), norm = root<T>(total);
        const V beta = alpha > 0 ? -norm : norm;
        const auto ordinary = total > negligible;
        S::at(e + c * S::L) = ordinary ? beta : V{};
        const V tau = ordinary ? (beta - alpha) / beta : V{}, scale = ordinary ? 1 / (alpha - beta) : V{};
        for (int64_t i = c + 2; i < rows; ++i) S::at(u + i * S::L) *= scale;
        S::at(u + (c + 1) * S::L) = ordinary ? S::splat(1) : V{};
        update_multiply(A, rows, c + 1, v, w, u, y);
        V dots[kRows] = {};
        for (int64_t i = c + 1; i < rows; ++i) dots[i % kRows] += S::at(u + i * S::L) * S::at(y + i * S::L);
        const V gamma = tau * ((dots[0] + dots[1]) + (dots[2] + dots[3])) / 2;
        for (int64_t i = c + 1; i < rows; ++i) {
            const V ui = S::at(u + i * S::L);
            S::at(v + i * S::L) = ui;
            S::at(w + i * S::L) = (S::at(y + i * S::L) - ui * gamma) * tau;
        }
        S::at(v + c * S::L) = S::at(w + c * S::L) = V{};
    }
}

// Of 1 <= count <= kTogether lanes of one r and K: their sums, and in ascending[l * r .. + r) the eigenvalues of lane l.
template <class T> void eigenvalues_lanes(Lane* lanes, int64_t count, double* ascending, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    constexpr int64_t L = Simd<T>::L;
    const int64_t r = lanes[0].w.r;
    T *G = take<T>(arena, block_of(round_up(r, kRows) / kRows) * L), *d = take<T>(arena, r * L), *e = take<T>(arena, (r - 1) * L);
    double *ds = take<double>(arena, r * kTogether), *es = take<double>(arena, (r - 1) * kTogether);
    Tridiagonal each[kTogether];
    for (int64_t at = 0; at < count; at += L) {
        gram_lanes(lanes + at, min_of(L, count - at), G, arena);
        tridiagonal_lanes(G, r, d, e, arena);
        for (int64_t i = 0; i < r; ++i)
            for (int64_t l = 0; l < L; ++l) {
                ds[i * kTogether + at + l] = d[i * L + l];
                if (i + 1 < r) es[i * kTogether + at + l] = e[i * L + l];
            }
    }
    for (int64_t l = 0; l < count; ++l) each[l] = {ds + l, es + l, kTogether, kNegligibleBeside<T>, ascending + l * r};
    eigenvalues_together(each, count, r, kSweeps * r, arena, parallel);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
