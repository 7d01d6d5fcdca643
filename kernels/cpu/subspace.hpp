// One step of a subspace carried towards the leading singular vectors: block Krylov with momentum, Rayleigh-Ritz.
#pragma once

#include "eigh.hpp"
#include "gram.hpp"

namespace sosd_fast {

// W upright, m >= n; V and P hold b directions as rows. With Z = W^T W V, R = Z - V (V^T Z), rho the Rayleigh quotients:
//     D = (pace R / rho + P) / |.| less its part along V;  p = min(b, n - b) of them,
// and Rayleigh-Ritz of W^T W on [V, D] gives the next V, and P, its part along D.
struct SubspaceTask {
    const float* data;
    int64_t m, n, row_stride, col_stride;  // one of the strides is 1
    const float *V, *P;                    // (b, n)
    float *next_V, *next_P;                // out: (b, n)
    float *squares, *residual;             // out: b Ritz values of W^T W, nearly descending; |W^T u - s v| of V, or s
    bool ordinary;  // out; false: not finite, far from 1, V not orthonormal, or dependent directions: no result
};

namespace SOSD_ISA {

using F = Simd<float>;
typedef float Anywhere __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));  // rows of W start anywhere
inline F::V load(const float* p) { return *reinterpret_cast<const Anywhere*>(p); }
inline void store(float* p, F::V x) { *reinterpret_cast<Anywhere*>(p) = x; }
// Rows x rows of sums for products along contiguous elements, rows x vectors for sums of rows: 24 of 32 registers.
constexpr int kDotRows = kRegisters == 32 ? 4 : 2, kDotCols = kRegisters == 32 ? 6 : 4;
constexpr int kSumRows = kRegisters == 32 ? 8 : 4, kSumVectors = 3;
constexpr int64_t kDotDepth = 1024, kSumDepth = 64;

inline F::V load(const float* p, int64_t count) {
    if (count >= F::L) return load(p);
    F::V x = {};
    for (int64_t i = 0; i < count; ++i) x[i] = p[i];
    return x;
}

struct Rows {
    const float* data;
    int64_t stride, count;
    const float* operator[](int64_t i) const { return data + min_of(i, count - 1) * stride; }
};

// out[i][j] = x_i . a_j over K elements.
inline void dot_rows(Rows x, Rows a, int64_t K, float* out, int64_t out_stride, const Parallel& parallel) {
    parallel_for(parallel, (a.count + kDotCols - 1) / kDotCols, [&](int64_t block) {
        const int64_t j = block * kDotCols;
        for (int64_t k0 = 0; k0 < K; k0 += kDotDepth) {
            const int64_t depth = min_of(kDotDepth, K - k0), whole = depth / F::L * F::L;
            const float* q[kDotCols];
            for (int c = 0; c < kDotCols; ++c) q[c] = a[j + c] + k0;
            for (int64_t i = 0; i < x.count; i += kDotRows) {
                const float* p[kDotRows];
                for (int r = 0; r < kDotRows; ++r) p[r] = x[i + r] + k0;
                F::V acc[kDotCols * kDotRows];
                for (int s = 0; s < kDotCols * kDotRows; ++s) acc[s] = F::V{};
                for (int64_t k = 0; k < whole; k += F::L) {
                    F::V u[kDotRows];
#pragma GCC unroll 8
                    for (int r = 0; r < kDotRows; ++r) u[r] = load(p[r] + k);
#pragma GCC unroll 8
                    for (int c = 0; c < kDotCols; ++c) {
                        const F::V v = load(q[c] + k);
#pragma GCC unroll 8
                        for (int r = 0; r < kDotRows; ++r) acc[c * kDotRows + r] += u[r] * v;
                    }
                }
                if (whole < depth)
                    for (int c = 0; c < kDotCols; ++c)
                        for (int r = 0; r < kDotRows; ++r)
                            acc[c * kDotRows + r] += load(p[r] + whole, depth - whole) * load(q[c] + whole, depth - whole);
                float sums[kDotCols * kDotRows] = {};
                ReduceLanes<float, kDotCols * kDotRows>::add(acc, sums);
                for (int r = 0; r < kDotRows && i + r < x.count; ++r)
                    for (int c = 0; c < kDotCols && j + c < a.count; ++c) {
                        float& o = out[(i + r) * out_stride + j + c];
                        o = k0 ? o + sums[c * kDotRows + r] : sums[c * kDotRows + r];
                    }
            }
        }
    });
}

// N <= kSumVectors vectors of kSumRows rows of out += coefficients times rows of a. width: elements, when not whole.
template <int N>
inline void sum_block(const float* const* c, const float* a, int64_t a_stride, int64_t depth, float* const* out, int rows,
                      int64_t width, bool first) {
    F::V acc[kSumRows * N];
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) acc[r * N + v] = first ? F::V{} : load(out[r] + v * F::L, width - v * F::L);
    for (int64_t k = 0; k < depth; ++k) {
        F::V x[N];
#pragma GCC unroll 3
        for (int v = 0; v < N; ++v) x[v] = load(a + k * a_stride + v * F::L, width - v * F::L);
#pragma GCC unroll 8
        for (int r = 0; r < kSumRows; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < N; ++v) acc[r * N + v] += x[v] * c[r][k];
    }
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < N; ++v) {
            float* o = out[r] + v * F::L;
            if (width - v * F::L >= F::L)
                store(o, acc[r * N + v]);
            else
                for (int64_t i = 0; i < width - v * F::L; ++i) o[i] = acc[r * N + v][i];
        }
}

// out_i = (out_i +) sum over k of c_ik a_k, rows of N elements.
inline void sum_rows(Rows c, Rows a, int64_t N, float* out, int64_t out_stride, bool add, const Parallel& parallel) {
    constexpr int64_t wide = kSumVectors * F::L;
    parallel_for(parallel, (N + wide - 1) / wide, [&](int64_t block) {
        const int64_t n0 = block * wide, n_end = min_of(N, n0 + wide);
        for (int64_t k = 0; k < a.count; k += kSumDepth) {
            const int64_t depth = min_of(kSumDepth, a.count - k);
            for (int64_t i = 0; i < c.count; i += kSumRows) {
                const int rows = int(min_of<int64_t>(kSumRows, c.count - i));
                const float* p[kSumRows];
                float* o[kSumRows];
                for (int r = 0; r < kSumRows; ++r) {
                    p[r] = c[i + r] + k;
                    o[r] = out + min_of(i + r, c.count - 1) * out_stride + n0;
                }
                const bool first = k == 0 && !add;
                if (n_end - n0 == wide) {
                    sum_block<kSumVectors>(p, a.data + k * a.stride + n0, a.stride, depth, o, rows, wide, first);
                    continue;
                }
                for (int64_t n = n0; n < n_end; n += F::L) {
                    const int64_t width = min_of<int64_t>(F::L, n_end - n);
                    sum_block<1>(p, a.data + k * a.stride + n, a.stride, depth, o, rows, width, first);
                    for (int r = 0; r < kSumRows; ++r) o[r] += F::L;
                }
            }
        }
    });
}

inline float dot(const float* x, const float* y, int64_t n) {
    F::V sum = {};
    int64_t i = 0;
    for (; i + F::L <= n; i += F::L) sum += load(x + i) * load(y + i);
    float out = sum_lanes<float>(sum);
    for (; i < n; ++i) out += x[i] * y[i];
    return out;
}

// For products too small to share.
struct Alone {
    Parallel parallel{nullptr,
                      [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
                          for (int64_t i = 0; i < count; ++i) task(context, i);
                      },
                      [](void*) { return false; }, [] {}};
};

// Leading b Ritz pairs: H c = value M c, M and H of order q, rows `stride` apart, both destroyed. rows of C are the
// coefficients. The shift is divided out to first order; false: dependent directions, which need topk.py's slower way.
inline bool rayleigh_ritz(float* M, float* H, int64_t q, int64_t stride, int64_t b, float* squares, float* C, Arena& arena,
                          const Parallel& alone) {
    const ArenaScope scope(arena);
    float *inverse = take<float>(arena, q * stride), *T = take<float>(arena, q * stride), *norm = take<float>(arena, q);
    double* values = take<double>(arena, q);
    const float shift = 4 * q * 0x1p-23f;
    for (int64_t i = 0; i < q; ++i) norm[i] = M[i * stride + i] > 0 ? __builtin_sqrtf(M[i * stride + i]) : 1;
    for (int64_t i = 0; i < q; ++i) {
        for (int64_t j = 0; j < q; ++j) {
            const float scale = 1 / (norm[i] * norm[j]);
            M[i * stride + j] *= scale;
            H[i * stride + j] *= scale;
        }
        M[i * stride + i] += shift;
    }
    // M = L L^T, its rows overwritten by those of L^T; inverse = L^-1
    for (int64_t k = 0; k < q; ++k) {
        float* row = M + k * stride;
        if (!(row[k] > 100 * shift)) return false;
        const float scale = 1 / __builtin_sqrtf(row[k]);
        const int64_t first = k / 16 * 16;
        for (int64_t j = k; j < q; ++j) row[j] *= scale;
        for (int64_t i = k + 1; i < q; ++i) axpy(-row[i], row + first, M + i * stride + first, stride - first);
        float* out = inverse + k * stride;
        for (int64_t j = 0; j < stride; ++j) out[j] = j == k;
        for (int64_t i = 0; i < k; ++i) axpy(-M[i * stride + k], inverse + i * stride, out, round_up(i + 1, 16));
        for (int64_t j = 0; j <= k; ++j) out[j] *= scale;
    }
    sum_rows(Rows{inverse, stride, q}, Rows{H, stride, q}, q, T, stride, false, alone);
    dot_rows(Rows{T, stride, q}, Rows{inverse, stride, q}, q, H, stride, alone);
    for (int64_t i = 0; i < q; ++i) {
        for (int64_t j = q; j < stride; ++j) H[i * stride + j] = 0;
        for (int64_t j = 0; j < i; ++j) H[i * stride + j] = H[j * stride + i] = (H[i * stride + j] + H[j * stride + i]) / 2;
    }
    if (!eigh(H, q, stride, values, T, arena)) return false;
    float* U = H;  // eigenvectors of the b largest, sorted
    for (int64_t i = 0; i < b; ++i) {
        int64_t largest = 0;
        for (int64_t j = 1; j < q; ++j)
            if (values[j] > values[largest]) largest = j;
        squares[i] = float(values[largest]);
        values[largest] = -__builtin_inf();
        for (int64_t j = 0; j < stride; ++j) U[i * stride + j] = T[largest * stride + j];
    }
    sum_rows(Rows{U, stride, b}, Rows{inverse, stride, q}, q, C, stride, false, alone);
    for (int64_t i = 0; i < b; ++i) {
        const float length = 1 - shift * dot(C + i * stride, C + i * stride, q), scale = 1 / __builtin_sqrtf(length);
        squares[i] /= length;
        for (int64_t j = 0; j < q; ++j) C[i * stride + j] *= scale / norm[j];
    }
    return true;
}

inline void advance_subspace(SubspaceTask& t, int64_t b, float pace, Arena& arena, const Parallel& parallel) {
    const ArenaScope scope(arena);
    const int64_t m = t.m, n = t.n, p = min_of(b, n - b), q = b + p, stride = round_up(q, 16);
    float *M = take<float>(arena, q * stride), *H = take<float>(arena, q * stride), *C = take<float>(arena, q * stride);
    float *Y = take<float>(arena, b * m), *WD = take<float>(arena, p * m), *X = C;
    float *Z = take<float>(arena, b * n), *R = take<float>(arena, b * n), *D = take<float>(arena, p * n);
    const bool upright = t.col_stride == 1;
    const Rows W{t.data, upright ? t.row_stride : t.col_stride, upright ? m : n};
    const Rows V{t.V, n, b}, Zs{Z, n, b}, Ds{D, n, p}, WDs{WD, m, p};
    const auto mul = [&](Rows x, float* out) {  // (W x^T)^T
        if (upright)
            dot_rows(x, W, n, out, m, parallel);
        else
            sum_rows(x, W, m, out, m, false, parallel);
    };
    mul(V, Y);
    const float largest = as<float>(max_bits(reinterpret_cast<const uint32_t*>(Y), 1, b * m, 0, 1));
    t.ordinary = largest < 0x1p30f && largest > 0x1p-30f;
    if (!t.ordinary) return;
    if (upright)
        sum_rows(Rows{Y, m, b}, W, n, Z, n, false, parallel);
    else
        dot_rows(Rows{Y, m, b}, W, m, Z, n, parallel);
    for (int64_t i = 0; i < q * stride; ++i) M[i] = H[i] = 0;
    dot_rows(V, V, n, M, stride, parallel);
    for (int64_t i = 0; i < b; ++i)
        for (int64_t k = 0; k < b; ++k) t.ordinary &= __builtin_fabsf(M[i * stride + k] - (i == k)) < 0.01f;
    if (!t.ordinary) return;
    dot_rows(Zs, V, n, H, stride, parallel);
    float rounding = 0;  // of the quotients
    for (int64_t i = 0; i < b; ++i)
        if (H[i * stride + i] * 0x1p-46f > rounding) rounding = H[i * stride + i] * 0x1p-46f;
    for (int64_t i = 0; i < b; ++i) {
        const float rho = H[i * stride + i];
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t k = 0; k < n; ++k) {
            const float d = Z[i * n + k] - rho * t.V[i * n + k];
            squares += d * d;
        }
        t.residual[i] = rho > rounding ? __builtin_sqrtf(squares / rho) : -1;
        for (int64_t k = 0; k < n; ++k) R[i * n + k] = Z[i * n + k];
        for (int64_t k = 0; k < b; ++k) X[i * stride + k] = -H[i * stride + k];
    }
    sum_rows(Rows{X, stride, p}, V, n, R, n, true, parallel);
    for (int64_t i = 0; i < p; ++i) {
        const float rho = H[i * stride + i] > 0 ? H[i * stride + i] : 1;
        float* d = D + i * n;
        for (int64_t k = 0; k < n; ++k) d[k] = pace / rho * R[i * n + k] + t.P[i * n + k];
        const float squares = dot(d, d, n), scale = squares > 0 ? 1 / __builtin_sqrtf(squares) : 1;
        for (int64_t k = 0; k < n; ++k) d[k] *= scale;
    }
    dot_rows(Ds, V, n, X, stride, parallel);
    for (int64_t i = 0; i < p; ++i)
        for (int64_t k = 0; k < b; ++k) X[i * stride + k] = -X[i * stride + k];
    sum_rows(Rows{X, stride, p}, V, n, D, n, true, parallel);
    mul(Ds, WD);
    dot_rows(Ds, V, n, M + b * stride, stride, parallel);
    dot_rows(Ds, Ds, n, M + b * stride + b, stride, parallel);
    dot_rows(Ds, Zs, n, H + b * stride, stride, parallel);
    dot_rows(WDs, WDs, m, H + b * stride + b, stride, parallel);
    for (int64_t i = 0; i < p; ++i)
        for (int64_t k = 0; k < b; ++k) {
            M[k * stride + b + i] = M[(b + i) * stride + k];
            H[k * stride + b + i] = H[(b + i) * stride + k];
        }
    t.ordinary = rayleigh_ritz(M, H, q, stride, b, t.squares, C, arena, Alone().parallel);
    if (!t.ordinary) return;
    for (int64_t i = 0; i < b; ++i) {
        // W does not see these directions, so their residual says nothing of the value that is found now.
        if (t.residual[i] < 0) t.residual[i] = __builtin_sqrtf(t.squares[i] > 0 ? t.squares[i] : 0);
        // It can overflow where the subspace does not: W far beyond W V.
        t.ordinary &= __builtin_fabsf(t.squares[i]) < __builtin_inff() && t.residual[i] < __builtin_inff();
    }
    if (!t.ordinary) return;
    sum_rows(Rows{C + b, stride, b}, Ds, n, t.next_P, n, false, parallel);
    for (int64_t i = 0; i < b * n; ++i) t.next_V[i] = t.next_P[i];
    sum_rows(Rows{C, stride, b}, V, n, t.next_V, n, true, parallel);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
