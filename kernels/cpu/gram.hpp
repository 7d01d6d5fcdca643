// G = W W^T on the short side, one triangle, in tiles.
#pragma once

#include "rounding.hpp"

namespace sosd_fast {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// W seen along its short side: element (i, k) is data[i * stride_i + k * stride_k], i < r.
struct Source {
    const void* data;
    DType dtype;
    int64_t r, K, stride_i, stride_k;
    double scale;  // a power of two; the stages see scale * W
};

// The lower triangle is kept in tiles of 16 rows x 8 columns, each contiguous with its columns one after the other,
// the tiles of 8 columns one after the other from the diagonal downwards. A matrix-vector product then reads memory
// in one forward stream whatever r is (no 4 KB aliasing at r = 1024), and diagonal 16 x 16 blocks hold both halves.
constexpr int kTileRows = 16, kTileCols = 8, kTile = kTileRows * kTileCols;

struct Tiles {
    int64_t tile_rows;  // of 16 rows each
    // offset of the tiles of columns 8 J .. 8 J + 7, which start at tile row J / 2
    int64_t columns(int64_t J) const { return (J * tile_rows - (J > 0 ? (J - 1) * (J - 1) / 4 : 0)) * kTile; }
    int64_t tile(int64_t I, int64_t J) const { return columns(J) + (I - J / 2) * kTile; }
    int64_t at(int64_t i, int64_t j) const {
        return tile(i / kTileRows, j / kTileCols) + j % kTileCols * kTileRows + i % kTileRows;
    }
    int64_t size() const { return columns(2 * tile_rows); }
    // G's elements (i, j) and, where the tiles hold both halves, (j, i) <- x, j <= i
    template <class T> void put(T* G, int64_t i, int64_t j, T x) const {
        G[at(i, j)] = x;
        if (i / kTileRows == j / kTileRows) G[at(j, i)] = x;
    }
};

constexpr int64_t kPaddedTo = 32;  // a multiple of every panel height below and of the tile rows
inline Tiles tiles_of(int64_t r) { return Tiles{round_up(r, kPaddedTo) / kTileRows}; }

// The short side from which two stages do not lose where all threads have one (Xeon, AVX-512): two of 1024 in float32
// take 25.6 ms for 25.9, alone 16.6 for 20; 12.4 for 13.9 at 768 in float64. Threads and neighbours have no say in it.
template <class T> constexpr int64_t kBandFrom = sizeof(T) == 4 ? 1024 : 768;

// Whether the reduction of a symmetric matrix to tridiagonal form has one stage; band_from: its short side, 0 as measured.
template <class T> constexpr bool in_one_stage(int64_t r, int64_t band_from) {
    return r < (band_from ? band_from : kBandFrom<T>);
}

// The longest chain of sums in registers. Where products are equal, as those of signs or ternary weights are, rounding
// does not average out: n equal terms drift by up to n / 3 ulps of their sum, so chains are kept short.
constexpr int64_t kChain = 64;
constexpr double kMostDrift = 0x1p-18;  // of elements beside the diagonal, relative

// Of a matrix G as `gram` leaves it: (1 + drift) W W^T + noise.
struct GramSums {
    double trace;  // of W W^T
    double drift;
};

namespace SOSD_ISA {

// Height of the row panels in which W, and the panel of reflectors, are packed: [panel][k][kPanel rows]. One packed
// copy serves as both operands; the micro-kernel holds kPanel x 8 (or x 4 with 16 registers) sums.
constexpr int kPanelVectors = 2;
template <class T> constexpr int kPanel = kPanelVectors * Simd<T>::L;
template <class T> constexpr int kColumns = kRegisters == 32 && kPanel<T> >= 8 ? 8 : 4;

// acc[c][v] = sum over k of A[k][v] * B[k][c]; Swap takes B's neighbouring k in exchanged order (v w^T + w v^T).
template <class T, bool Swap>
inline void micro_chain(const T* A, const T* B, int64_t K, typename Simd<T>::V (&acc)[kColumns<T>][kPanelVectors]) {
    using S = Simd<T>;
    constexpr int P = kPanel<T>;
    for (int c = 0; c < kColumns<T>; ++c)
        for (int v = 0; v < kPanelVectors; ++v) acc[c][v] = typename S::V{};
    for (int64_t k = 0; k < K; k += 2) {
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
            const T* a = A + (k + u) * P;
            const T* b = B + (Swap ? k + (u ^ 1) : k + u) * P;
            const typename S::V a0 = S::at(a), a1 = S::at(a + S::L);
#pragma GCC unroll 8
            for (int c = 0; c < kColumns<T>; ++c) {
                acc[c][0] += a0 * b[c];
                acc[c][1] += a1 * b[c];
            }
        }
    }
}

// The same for any K, in chains.
template <class T, bool Swap>
inline void micro_kernel(const T* A, const T* B, int64_t K, typename Simd<T>::V (&acc)[kColumns<T>][kPanelVectors]) {
    constexpr int P = kPanel<T>;
    micro_chain<T, Swap>(A, B, min_of(kChain, K), acc);
    for (int64_t k = kChain; k < K; k += kChain) {
        typename Simd<T>::V more[kColumns<T>][kPanelVectors];
        micro_chain<T, Swap>(A + k * P, B + k * P, min_of(kChain, K - k), more);
        for (int c = 0; c < kColumns<T>; ++c)
            for (int v = 0; v < kPanelVectors; ++v) acc[c][v] += more[c][v];
    }
}

enum class Store { set, add, subtract, compensate };

// The tile-rows of one panel x 8 columns of G: G (=, +=, -=) A B^T. compensate adds the rounding errors of G += A B^T to
// `lost`, an array like G (Knuth's two-sum).
template <class T, Store How, bool Swap>
inline void update_block(const Tiles& tiles, T* G, int64_t panel, int64_t J, const T* A, const T* packed_columns,
                         int64_t panel_stride, int64_t K, T* lost = nullptr) {
    using S = Simd<T>;
    constexpr int P = kPanel<T>;
    for (int half = 0; half < kTileCols / kColumns<T>; ++half) {
        const int64_t j = J * kTileCols + half * kColumns<T>;
        typename S::V acc[kColumns<T>][kPanelVectors];
        micro_kernel<T, Swap>(A, packed_columns + j / P * panel_stride + j % P, K, acc);
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) {
            const int64_t i = panel * P + v * S::L;
            if (i / kTileRows < J / 2) continue;
            const int64_t at = tiles.tile(i / kTileRows, J) + half * kColumns<T> * kTileRows + i % kTileRows;
            T* g = G + at;
#pragma GCC unroll 8
            for (int c = 0; c < kColumns<T>; ++c) {
                typename S::V& out = S::at(g + c * kTileRows);
                if constexpr (How == Store::compensate) {
                    const typename S::V before = out, x = acc[c][v];
                    out = before + x;
                    const typename S::V added = out - before;
                    S::at(lost + at + c * kTileRows) += (before - (out - added)) + (x - added);
                    continue;
                }
                out = How == Store::set ? acc[c][v] : How == Store::add ? out + acc[c][v] : out - acc[c][v];
            }
        }
    }
}

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T, class From> T as(const From& x) {
    T y;
    static_assert(sizeof(T) == sizeof(From), "");
    __builtin_memcpy(&y, &x, sizeof(T));
    return y;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return as<float>(uint32_t(x.bits) << 16); }
// Finite values only: the exponent is moved by a product, which also normalises subnormals.
inline float widen(f16 x) {
    const float magnitude = as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
    return as<float>(as<uint32_t>(magnitude) | uint32_t(x.bits & 0x8000) << 16);
}

// max |W| as bits of its own format: NaN and Inf compare above every finite number.
template <class U> inline U max_bits(const U* p, int64_t outer, int64_t inner, int64_t s_outer, int64_t s_inner) {
    constexpr U mask = U(~U(0)) >> 1;
    U m = 0;
    for (int64_t o = 0; o < outer; ++o) {
        const U* q = p + o * s_outer;
        if (s_inner == 1) {
#pragma omp simd reduction(max : m)
            for (int64_t i = 0; i < inner; ++i) m = max_of<U>(m, q[i] & mask);
        } else {
            for (int64_t i = 0; i < inner; ++i) m = max_of<U>(m, q[i * s_inner] & mask);
        }
    }
    return m;
}

// max |W|, or a NaN or infinity when W holds one.
inline double max_abs(const Source& w) {
    const bool i_inner = w.stride_i == 1 || (w.stride_k != 1 && w.stride_i < w.stride_k);
    int64_t outer = i_inner ? w.K : w.r, inner = i_inner ? w.r : w.K;
    const int64_t so = i_inner ? w.stride_k : w.stride_i, si = i_inner ? w.stride_i : w.stride_k;
    if (so == inner * si) inner *= outer, outer = 1;  // in one run: 8 x 8 takes 5 ns, not 85
    switch (w.dtype) {
        case DType::f32: return as<float>(max_bits(static_cast<const uint32_t*>(w.data), outer, inner, so, si));
        case DType::f64: return as<double>(max_bits(static_cast<const uint64_t*>(w.data), outer, inner, so, si));
        default: break;
    }
    const uint16_t m = max_bits(static_cast<const uint16_t*>(w.data), outer, inner, so, si);
    if (w.dtype == DType::bf16) return widen(bf16{m});
    return m >= 0x7c00 ? double(as<float>(0x7fc00000u)) : widen(f16{m});
}

// One panel of W, columns k0 .. k0 + K: out[k][row], rows past r are zero, a K that is odd gets one more zero column.
template <class T, class From>
inline void pack_panel(const From* w, int64_t si, int64_t sk, int64_t rows, int64_t K, double scale, T* out) {
    constexpr int P = kPanel<T>;
    using Wide = decltype(widen(From{}));
    const Wide s = Wide(scale);
    if (rows < P || K % 2)
        for (int64_t k = 0; k < round_up(K, 2) * P; ++k) out[k] = 0;
    if (si == 1 && rows == P) {
        for (int64_t k = 0; k < K; ++k)
#pragma omp simd
            for (int i = 0; i < P; ++i) out[k * P + i] = T(widen(w[k * sk + i]) * s);
    } else if (sk == 1 && rows == P) {
        // A cache line of each row at a time: rows 12 KB apart share one L1 set and would not stay for a second visit
        // (768 x 3072 fp32: 0.54 ns an element with half lines). The writes stay in L1.
        using V = Simd<T>;
        constexpr int64_t line = max_of<int64_t>(64 / sizeof(From), V::L);
        int64_t k = 0;
        for (; k + line <= K; k += line)
            for (int v = 0; v < kPanelVectors; ++v)
                for (int64_t u = 0; u < line; u += V::L) {
                    typename V::V x[V::L];
#pragma GCC unroll 16
                    for (int i = 0; i < V::L; ++i) {
                        const From* row = w + (v * V::L + i) * si + k + u;
                        T wide[V::L];
#pragma omp simd
                        for (int q = 0; q < V::L; ++q) wide[q] = T(widen(row[q]) * s);
                        __builtin_memcpy(&x[i], wide, sizeof(x[i]));
                    }
                    transpose<T>(x);
#pragma GCC unroll 16
                    for (int i = 0; i < V::L; ++i) V::at(out + (k + u + i) * P + v * V::L) = x[i];
                }
        for (; k < K; ++k)
            for (int i = 0; i < P; ++i) out[k * P + i] = T(widen(w[i * si + k]) * s);
    } else {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < K; ++k) out[k * P + i] = T(widen(w[i * si + k * sk]) * s);
    }
}

template <class T> inline void pack_panel(const Source& w, int64_t i, int64_t k, int64_t rows, int64_t K, T* out) {
    const int64_t at = i * w.stride_i + k * w.stride_k, si = w.stride_i, sk = w.stride_k;
    switch (w.dtype) {
        case DType::f32: return pack_panel(static_cast<const float*>(w.data) + at, si, sk, rows, K, w.scale, out);
        case DType::f64: return pack_panel(static_cast<const double*>(w.data) + at, si, sk, rows, K, w.scale, out);
        case DType::bf16: return pack_panel(static_cast<const bf16*>(w.data) + at, si, sk, rows, K, w.scale, out);
        case DType::f16: return pack_panel(static_cast<const f16*>(w.data) + at, si, sk, rows, K, w.scale, out);
    }
}

constexpr int64_t kDepth = 256;     // columns of W summed in registers before G is touched
constexpr int64_t kBlockRows = 256; // rows of packed W that stay in L2 while all columns pass
constexpr int64_t kBlockCols = 128; // columns of G in one task

constexpr int64_t kSlabs = 4;       // depths packed at once when other threads help
constexpr int64_t kCompensated = 16 * kDepth;  // a longer sum keeps what rounding loses: its terms may all drift one way

// Puts right what equal products do to G, see rounding.hpp: the drift of its elements beside the diagonal is found by
// regression on some, and the diagonal set to (1 + drift) times its precise value, which goes to `diagonal` as well, if
// that is not null.
template <class T>
inline GramSums correct_gram(const Tiles& tiles, T* G, int64_t r, int64_t K, const ExactProducts& exact,
                             double* diagonal) {
    constexpr int P = kPanel<T>;
    double trace = 0, products = 0, squares = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < r; ++i) {
        trace += exact.squares[i];
        if (diagonal) diagonal[i] = exact.squares[i];
        if (i % P + kApart >= P || i + kApart >= r) continue;
        const double g = exact.cross[i];
        products += (G[tiles.at(i + kApart, i)] - g) * g;
        squares += g * g;
        ++count;
    }
    // Where rows are nearly orthogonal the elements say little; those of random signs are mean / sqrt(K).
    const double mean = trace / double(r), least = double(count) * mean * mean / (16 * double(K));
    double drift = squares + least > 0 ? products / (squares + least) : 0;
    drift = max_of(-kMostDrift, min_of(kMostDrift, drift));
    for (int64_t i = 0; i < r; ++i) G[tiles.at(i, i)] = T(exact.squares[i] * (1 + drift));
    return {trace, drift};
}

// G <- W W^T (scaled), squares, if not null, its diagonal. Every element of G is summed in the same order always.
template <class T> GramSums gram(const Source& w, T* G, double* squares, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    constexpr int P = kPanel<T>;
    const Tiles tiles = tiles_of(w.r);
    const int64_t rows = tiles.tile_rows * kTileRows, panels = rows / P;
    const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows, col_blocks = (rows + kBlockCols - 1) / kBlockCols;
    constexpr int64_t ratio = kBlockRows / kBlockCols;
    const bool shared = parallel.helpers(parallel.self);
    const int64_t slab = min_of(shared ? kSlabs * kDepth : kDepth, round_up(w.K, 2)), panel_stride = slab * P;
    T* packed = take<T>(arena, rows * slab);
    T* lost = w.K > kCompensated ? take<T>(arena, tiles.size()) : nullptr;
    if (lost)
        for (int64_t i = 0; i < tiles.size(); ++i) lost[i] = 0;
    const ExactProducts exact{take<double>(arena, rows), take<double>(arena, rows)};
    for (int64_t i = 0; i < rows; ++i) exact.squares[i] = exact.cross[i] = 0;
    for (int64_t k0 = 0; k0 < w.K; k0 += slab) {
        const int64_t K = min_of(slab, w.K - k0);
        const auto pack = [&](int64_t p) {
            const int64_t valid = max_of<int64_t>(0, min_of<int64_t>(P, w.r - p * P));
            pack_panel(w, p * P, k0, valid, K, packed + p * panel_stride);
            for (int64_t k = 0; k < K; k += kDepth)  // while the panel is near
                add_products<P>(packed + p * panel_stride + k * P, min_of(kDepth, K - k),
                                {exact.squares + p * P, exact.cross + p * P});
        };
        const auto multiply = [&](int64_t task) {
            const int64_t row_block = task / col_blocks, col_block = task % col_blocks;
            if (col_block >= (row_block + 1) * ratio) return;
            const int64_t p_end = min_of(panels, (row_block + 1) * kBlockRows / P);
            for (int64_t k = 0; k < K; k += kDepth) {
                const int64_t depth = round_up(min_of(kDepth, K - k), 2);
                const T* from = packed + k * P;
                const int64_t J_end = min_of(rows, (col_block + 1) * kBlockCols) / kTileCols;
                for (int64_t J = col_block * kBlockCols / kTileCols; J < J_end; ++J) {
                    const int64_t p_first = max_of(row_block * kBlockRows, J / 2 * kTileRows) / P;
                    for (int64_t p = p_first; p < p_end; ++p) {
                        const T* A = from + p * panel_stride;
                        if (k0 + k == 0)
                            update_block<T, Store::set, false>(tiles, G, p, J, A, from, panel_stride, depth);
                        else if (lost)
                            update_block<T, Store::compensate, false>(tiles, G, p, J, A, from, panel_stride, depth, lost);
                        else
                            update_block<T, Store::add, false>(tiles, G, p, J, A, from, panel_stride, depth);
                    }
                }
            }
        };
        parallel_for(parallel, panels, pack);
        parallel_for(parallel, row_blocks * col_blocks, multiply);
    }
    if (lost)
        for (int64_t i = 0; i < tiles.size(); ++i) G[i] += lost[i];
    return correct_gram(tiles, G, w.r, w.K, exact, squares);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
