// G = W W^T of few and long rows: dot products along the rows, which are neither transposed nor padded to a panel.
#pragma once

#include "gram.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// Rows of sums in registers at once, by as many or half as many columns.
constexpr int kThinRows = 4, kThinCols = kRegisters == 32 ? 4 : 2, kThinSums = kThinRows * kThinCols;
constexpr int64_t kMostThin = 32;        // rows; their sums, a vector each, stay in the nearest caches
constexpr int64_t kThinAspect = 8;       // shorter rows do not pay for the sums over lanes
constexpr int64_t kThinBytes = 1 << 14;  // of W at once, while as much is fetched: the nearest cache may have 32 KB
constexpr int64_t kThinChunks = 16;      // summed lane by lane; then what rounding loses is kept

// Columns k0 .. k0 + K of W by rows: out[i * stride + k]. The columns up to `stride` are zero.
template <class T, class From>
inline void pack_rows(const From* w, int64_t si, int64_t sk, int64_t r, int64_t K, int64_t left, double scale, T* out,
                      int64_t stride) {
    using Wide = decltype(widen(From{}));
    using V = Simd<Wide>;
    const Wide s = Wide(scale);
    int64_t k = 0;
    if (sk == 1) {
        for (int64_t i = 0; i < r; ++i)
#pragma omp simd
            for (int64_t j = 0; j < K; ++j) out[i * stride + j] = T(widen(w[i * si + j]) * s);
        k = K;
    } else if (si == 1) {
        // L columns at a time. A vector may reach into the next column of W where nothing lies between, but not past W.
        const int64_t rows = round_up(r, V::L);
        for (; k + V::L <= K; k += V::L) {
            if (rows > r && (sk != r || (k + V::L - 1) * sk + rows > (left - 1) * sk + r)) break;
            for (int64_t i = 0; i < r; i += V::L) {
                typename V::V x[V::L];
#pragma GCC unroll 16
                for (int u = 0; u < V::L; ++u) {
                    Wide wide[V::L];
#pragma omp simd
                    for (int q = 0; q < V::L; ++q) wide[q] = widen(w[(k + u) * sk + i + q]) * s;
                    __builtin_memcpy(&x[u], wide, sizeof(x[u]));
                }
                transpose<Wide>(x);
                for (int64_t q = 0; q < min_of<int64_t>(V::L, r - i); ++q) {
                    alignas(kVectorBytes) Wide row[V::L];
                    V::at(row) = x[q];
                    T* to = out + (i + q) * stride + k;
                    if constexpr (sizeof(T) > sizeof(Wide)) {
                        for (int h = 0; h < V::L; h += Simd<T>::L) Simd<T>::at(to + h) = widened(row + h);
                    } else {
#pragma omp simd
                        for (int h = 0; h < V::L; ++h) to[h] = T(row[h]);
                    }
                }
            }
        }
    }
    for (int64_t i = 0; i < r; ++i) {
        for (int64_t j = k; j < K; ++j) out[i * stride + j] = T(widen(w[i * si + j * sk]) * s);
        for (int64_t j = K; j < round_up(K, Simd<T>::L); ++j) out[i * stride + j] = 0;
    }
}

template <class T>
inline void pack_rows(const Source& w, int64_t k, int64_t K, T* out, int64_t stride) {
    const int64_t at = k * w.stride_k, si = w.stride_i, sk = w.stride_k, left = w.K - k;
    switch (w.dtype) {
        case DType::f32: return pack_rows(static_cast<const float*>(w.data) + at, si, sk, w.r, K, left, w.scale, out, stride);
        case DType::f64: return pack_rows(static_cast<const double*>(w.data) + at, si, sk, w.r, K, left, w.scale, out, stride);
        case DType::bf16: return pack_rows(static_cast<const bf16*>(w.data) + at, si, sk, w.r, K, left, w.scale, out, stride);
        case DType::f16: return pack_rows(static_cast<const f16*>(w.data) + at, si, sk, w.r, K, left, w.scale, out, stride);
    }
}

// What add_products does, of rows that lie `apart` elements from each other.
template <int Q, class T> inline void add_row_products(const T* row, int64_t apart, int64_t K, ExactProducts to) {
    using D = Simd<double>;
    constexpr int U = Simd<T>::L / D::L;  // sums that do not wait for each other
    std::conditional_t<sizeof(T) == 4, PlainSum, CompensatedSum> squares[Q * U], cross[Q * U];
    for (int64_t k = 0; k < K; k += Simd<T>::L) {
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            D::V before{};
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) {
                const D::V x = widened(row + q * apart + k + u * D::L);
                squares[q * U + u].add(x * x);
                if (q > 0) cross[(q - 1) * U + u].add(before * x);
                before = x;
            }
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            to.squares[q * kApart] += sum_lanes<double>(squares[q * U + u].total());
            if (q + 1 < Q) to.cross[q * kApart] += sum_lanes<double>(cross[q * U + u].total());
        }
}

template <int Q, class T> inline void add_row_products(int64_t rows, const T* row, int64_t apart, int64_t K, ExactProducts to) {
    if constexpr (Q > 1)
        if (rows < Q) return add_row_products<Q - 1>(rows, row, apart, K, to);
    add_row_products<Q>(row, apart, K, to);
}

// sums[b][v] (+)= products of rows a_i and b_j, each lane by itself. On the way what lies at `later` is fetched, K elements of T:
// a processor does not foresee 16 rows of which it is shown 1 KB each.
template <class T>
inline void add_thin_block(const T* a, const T* b, int64_t stride, int64_t K, const void* later, T* sums, bool first) {
    using S = Simd<T>;
    typename S::V acc[kThinSums];
#pragma GCC unroll 16
    for (int s = 0; s < kThinSums; ++s) acc[s] = typename S::V{};
    for (int64_t k = 0; k < K; k += S::L) {
        typename S::V x[kThinRows];
        __builtin_prefetch(static_cast<const T*>(later) + k);
#pragma GCC unroll 4
        for (int i = 0; i < kThinRows; ++i) {
            typename S::V row = S::at(a + i * stride + k);
            loaded(row);
            x[i] = row;
        }
#pragma GCC unroll 4
        for (int j = 0; j < kThinCols; ++j) {
            const typename S::V y = S::at(b + j * stride + k);
#pragma GCC unroll 4
            for (int i = 0; i < kThinRows; ++i) acc[j * kThinRows + i] += x[i] * y;
        }
    }
#pragma GCC unroll 16
    for (int s = 0; s < kThinSums; ++s)
        S::at(sums + s * S::L) = first ? acc[s] : S::at(sums + s * S::L) + acc[s];
}

// G <- W W^T (scaled), squares, if not null, its diagonal; r <= kMostThin.
template <class T> GramSums thin_gram(const Source& w, T* G, double* squares, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    constexpr int P = kPanel<T>;
    constexpr int64_t columns = kMostThin / kThinCols;
    const Tiles tiles = tiles_of(w.r);
    const int64_t rows = round_up(w.r, kThinRows), panels = round_up(w.r, P);
    // a line more than a power of two, so that rows do not share one set of the cache
    const int64_t most = min_of<int64_t>(kThinBytes / int64_t(sizeof(T)) / rows, kChain * S::L) / S::L * S::L;
    const int64_t chunk = min_of(most, round_up(w.K, S::L)), stride = chunk + S::L;
    T* packed = take<T>(arena, rows * stride);
    T* sums = take<T>(arena, rows / kThinRows * columns * kThinSums * S::L);
    T *total = take<T>(arena, rows * kMostThin), *lost = take<T>(arena, rows * kMostThin);
    const ExactProducts exact{take<double>(arena, panels), take<double>(arena, panels)};
    for (int64_t i = w.r * stride; i < rows * stride; ++i) packed[i] = 0;
    for (int64_t i = 0; i < rows * kMostThin; ++i) total[i] = lost[i] = 0;
    for (int64_t i = 0; i < panels; ++i) exact.squares[i] = exact.cross[i] = 0;

    const auto each_block = [&](auto f) {
        for (int64_t i = 0; i < rows; i += kThinRows)
            for (int64_t j = 0; j < i + kThinRows; j += kThinCols)
                f(i, j, sums + (i / kThinRows * columns + j / kThinCols) * kThinSums * S::L);
    };
    int64_t count = 0;
    for (int64_t k = 0; k < w.K; k += chunk, ++count) {
        const int64_t K = min_of(chunk, w.K - k), whole = round_up(K, S::L);
        pack_rows(w, k, K, packed, stride);
        for (int64_t p = 0; p < w.r; p += P)
            for (int64_t i = p; i < min_of(p + kApart, w.r); ++i) {
                const int64_t among = (min_of(p + P, w.r) - i + kApart - 1) / kApart;
                add_row_products<P / kApart>(among, packed + i * stride, kApart * stride, whole,
                                             {exact.squares + i, exact.cross + i});
            }
        const bool goes_on = w.stride_k == 1 && k + 2 * chunk <= w.K;  // by rows, with a whole chunk
        int64_t next = 0;  // row of that chunk, one to a block while there are any
        each_block([&](int64_t i, int64_t j, T* s) {
            const void* later = packed;
            if (goes_on && next < w.r)
                later = static_cast<const char*>(w.data) + (next++ * w.stride_i + k + chunk) * bytes_of(w.dtype);
            add_thin_block(packed + i * stride, packed + j * stride, stride, whole, later, s, count % kThinChunks == 0);
        });
        if ((count + 1) % kThinChunks != 0 && k + chunk < w.K) continue;
        each_block([&](int64_t i, int64_t j, T* s) {
            T x[kThinSums] = {};
            ReduceLanes<T, kThinSums>::add(&S::at(s), x);
            for (int c = 0; c < kThinSums; ++c) {
                const int64_t at = (i + c % kThinRows) * kMostThin + j + c / kThinRows;
                const T before = total[at], sum = before + x[c], added = sum - before;
                lost[at] += (before - (sum - added)) + (x[c] - added);
                total[at] = sum;
            }
        });
    }
    for (int64_t i = 0; i < tiles.size(); ++i) G[i] = 0;
    for (int64_t i = 0; i < w.r; ++i)
        for (int64_t j = 0; j <= i; ++j) tiles.put(G, i, j, total[i * kMostThin + j] + lost[i * kMostThin + j]);
    return correct_gram(tiles, G, w.r, w.K, exact, squares);
}

template <class T> GramSums any_gram(const Source& w, T* G, double* squares, Arena& arena, const Parallel& parallel) {
    return w.r <= kMostThin && w.K >= kThinAspect * w.r ? thin_gram(w, G, squares, arena)
                                                        : gram(w, G, squares, arena, parallel);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
