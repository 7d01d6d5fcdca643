// Eigenvalues of W W^T of matrices of one shape with a short side of at most kLanesSide: a lane of a vector holds a matrix.
//
// Stages as of gram.hpp, tridiagonal.hpp and sturm.hpp, with their precision. No operation crosses lanes and no step depends
// on another lane's values, so that a matrix gets the same bits whatever its neighbours are.
#pragma once

#include "gram.hpp"
#include "sturm.hpp"

namespace sosd_fast {

// Matrices of at most this side and so many entries go into lanes, a lone one too: its bits must not depend on how many
// others come with it. us a matrix, here and by the other stages (AVX-512, float32, thread CPU time, 5 of them the call's
// own): LONE_TABLE
constexpr int64_t kLanesSide = 32, kLanesEntries = 1024;

// One lane: W, finite and scaled to entries of at most 2, r >= 1.
struct Lane {
    Source w;
    double* ascending;  // out: r eigenvalues
    GramSums sums;      // out
};

namespace SOSD_ISA {

// Symmetric matrices are kept as their lower triangle in blocks of kRows rows, each block one column after the other;
// diagonal blocks hold both halves.
constexpr int kRows = 4;
constexpr int64_t block_of(int64_t I) { return kRows * kRows * I * (I + 1) / 2; }
constexpr int64_t at_lanes(int64_t i, int64_t j) { return block_of(i / kRows) + j * kRows + i % kRows; }

constexpr int64_t kChunkBytes = 1 << 15;  // of interleaved columns: more would not stay in a first-level cache of 48 KB

// X[k * rows + i] <- W(i, k0 + k) of one lane, k < h. Scattered, for all it costs AA us of BB at 16 x 16.
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

template <class T> inline typename Simd<T>::V root(typename Simd<T>::V x) {
    alignas(kVectorBytes) T out[Simd<T>::L];
    Simd<T>::at(out) = x;
    for (T& each : out) each = sizeof(T) == 4 ? T(__builtin_sqrtf(float(each))) : T(__builtin_sqrt(each));
    return Simd<T>::at(out);
}

// Whether any lane of a comparison is true.
template <class T> inline bool any(typename Simd<T>::VI x) {
    alignas(kVectorBytes) typename Simd<T>::I each[Simd<T>::L], out = 0;
    __builtin_memcpy(each, &x, sizeof(x));
    for (int l = 0; l < Simd<T>::L; ++l) out |= each[l];
    return out != 0;
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

// The characteristic polynomial at x up to a factor that is the same for all x: value * 2^exponent.
template <class T> struct Value {
    typename Simd<T>::V value;
    typename Simd<T>::VI exponent;
};

// `sturm_count` at N points, where each lane has a matrix of its own; and the polynomial there.
template <class T, int N>
inline void count_lanes(const T* d, const T* e2, int64_t n, const typename Simd<T>::V* x, typename Simd<T>::VI* counts,
                        Value<T>* values) {
    using S = Simd<T>;
    using V = typename S::V;
    using VI = typename S::VI;
    using VU = typename S::VU;
    using Lim = SturmLimits<T>;
    using U = typename S::U;
    constexpr int sign = sizeof(T) * 8 - 1;
    V at[N], before[N], now[N];
    VU count[N], factors[N];
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) {
        at[u] = x[u];
        before[u] = V{};
        now[u] = V(S::splat_word(U(Lim::kTarget) << Lim::kMantissa));
        count[u] = factors[u] = VU{};
    }
    for (int64_t i = 0; i < n; i += Lim::kRescale) {
#pragma GCC unroll 8
        for (int k = 0; k < Lim::kRescale; ++k) {
            const V di = S::at(d + (i + k) * S::L), ei = S::at(e2 + (i + k) * S::L);
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) {
                const V next = (di - at[u]) * now[u] - before[u] * ei;
                count[u] += (VU(next) ^ VU(now[u])) >> sign;
                before[u] = now[u];
                now[u] = next;
            }
        }
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) {
            const VU magnitude = S::splat_word(~(U(1) << sign));
            const V p = V(VU(now[u]) & magnitude), q = V(VU(before[u]) & magnitude);
            const VU exponent = VU(p > q ? p : q) >> Lim::kMantissa;
            VU factor = (Lim::kTarget + Lim::kBias) - exponent;
            if constexpr (Lim::kClamp) factor = factor < 2 * Lim::kBias ? factor : S::splat_word(2 * Lim::kBias);
            const V scale = V(factor << Lim::kMantissa);
            now[u] *= scale;
            before[u] *= scale;
            factors[u] += factor;
        }
    }
#pragma GCC unroll 4
    for (int u = 0; u < N; ++u) counts[u] = VI(count[u]), values[u] = {now[u], -VI(factors[u])};
}

// An eigenvalue's bracket: as many eigenvalues as its index are below low, more are below high.
template <class T> struct Bracket {
    typename Simd<T>::V low, high;
    Value<T> at_low, at_high;
    typename Simd<T>::VI index, kept;  // kept: 1 where the last step kept low, -1 where high, else 0
};

// In float64 secants take 17 steps where halves take 48 (Gaussian), in float32 19 where halves take 22, and each costs half
// as much again to twice as much. So many steps apart, the bracket is halved whatever the polynomial looks like: of 2, 3 and
// 8, none was faster.
constexpr int kHalvedEvery = 5;
template <class T> constexpr bool kSecants = sizeof(T) == 8;

// The next point to count at: where the polynomial's secant is zero (regula falsi), if `secants` and one of its zeros is
// known to lie between; else the middle. Returns which lanes are not yet narrow enough; the others stay as they are, however
// many steps their neighbours need.
template <class T>
inline typename Simd<T>::VI next_point(const Bracket<T>& b, T wide, bool secants, typename Simd<T>::V& x) {
    using V = typename Simd<T>::V;
    using VI = typename Simd<T>::VI;
    using Lim = SturmLimits<T>;
    const V width = b.high - b.low, middle = b.low + width / 2;
    x = middle;
    if (secants) {
        constexpr typename Simd<T>::I most = 60;  // of exponents, so that products stay in range
        VI apart = b.at_high.exponent - b.at_low.exponent;
        apart = apart > most ? VI{} + most : apart < -most ? VI{} - most : apart;
        const V high = b.at_high.value * V((apart + Lim::kBias) << Lim::kMantissa);
        const V step = width * (b.at_low.value / (b.at_low.value - high));
        // A step of half the tolerance at least: the other end then comes near, too.
        const V least = V{} + wide * T(0.75), limit = width - least;
        const V secant = b.low + (step < least ? least : step > limit ? limit : step);
        const VI crosses = (VI(b.at_low.value) ^ VI(b.at_high.value)) < 0;
        x = crosses & (secant > b.low) & (secant < b.high) ? secant : middle;
    }
    return (middle > b.low) & (middle < b.high) & (width > wide);
}

template <class T>
inline void set_end(typename Simd<T>::V& end, Value<T>& at_end, typename Simd<T>::VI where, typename Simd<T>::V x,
                    const Value<T>& at_x) {
    end = where ? x : end;
    if constexpr (kSecants<T>) {
        at_end.value = where ? at_x.value : at_end.value;
        at_end.exponent = where ? at_x.exponent : at_end.exponent;
    }
}

template <class T>
inline void narrow(Bracket<T>& b, typename Simd<T>::VI open, typename Simd<T>::V x, typename Simd<T>::VI count,
                   const Value<T>& at_x) {
    using VI = typename Simd<T>::VI;
    const VI raise = open & (count <= b.index), lower = open & (count > b.index);
    if constexpr (kSecants<T>) {  // Illinois: an end kept twice counts half
        b.at_high.exponent -= raise & (b.kept < 0) & 1;
        b.at_low.exponent -= lower & (b.kept > 0) & 1;
        b.kept = raise ? VI{} - 1 : lower ? VI{} + 1 : b.kept;
    }
    set_end(b.low, b.at_low, raise, x, at_x);
    set_end(b.high, b.at_high, lower, x, at_x);
}

// The eigenvalues of the first `count` lanes' tridiag(d, e), as `sturm` finds those of one. d and e are not modified.
template <class T>
void sturm_lanes(const T* d, const T* e, int64_t n, double tolerance, Lane* lanes, int64_t count, Arena& arena) {
    const ArenaScope scope(arena);
    using S = Simd<T>;
    using V = typename S::V;
    using VI = typename S::VI;
    using Lim = SturmLimits<T>;
    using I = typename S::I;
    constexpr int L = S::L, N = kChains;
    // Few matrices share the lanes: matrix m has the lanes l % matrices = m, a copy of it and some eigenvalues in each.
    int64_t copies = L, shift = 0;
    while (L / copies < count) copies /= 2;
    while (1 << shift < copies) ++shift;
    const int64_t matrices = L / copies, padded = round_up(n, Lim::kRescale);
    // Probes and brackets p of a matrix: slot p / copies, in the lane of its copy p % copies.
    const int64_t probes = 2 * n, probe_slots = round_up((probes + copies - 1) / copies, N);
    const int64_t slots = round_up((n + copies - 1) / copies, N);
    T *ds = take<T>(arena, padded * L), *es = take<T>(arena, padded * L);
    V* x = take<V>(arena, probe_slots);
    VI* counts = take<VI>(arena, probe_slots);
    Value<T>* values = take<Value<T>>(arena, probe_slots);
    Bracket<T>* brackets = take<Bracket<T>>(arena, slots);
    const auto absolute = [](V a) { return a < 0 ? -a : a; };
    V norm = V{};
    for (int64_t i = 0; i < n; ++i) {
        const V left = i > 0 ? S::at(e + (i - 1) * L) : V{}, right = i + 1 < n ? S::at(e + i * L) : V{};
        const V sum = absolute(S::at(d + i * L)) + absolute(left) + absolute(right);
        norm = sum > norm ? sum : norm;
    }
    alignas(kVectorBytes) T to_unit[L];
    VI matrix, copy;
    for (int l = 0; l < L; ++l) {
        int exponent;
        __builtin_frexp(double(norm[l]), &exponent);
        to_unit[l] = T(__builtin_ldexp(1.0, -exponent));
        matrix[l] = I(l % matrices), copy[l] = I(l / matrices);
    }
    const V unit = S::at(to_unit), top = __builtin_shuffle(norm * unit, matrix) * T(1 + 1e-6);
    for (int64_t i = 0; i < padded; ++i) {
        S::at(ds + i * L) = i < n ? __builtin_shuffle(S::at(d + i * L) * unit, matrix) : S::splat(2);
        const V off = i > 0 && i < n ? __builtin_shuffle(S::at(e + (i - 1) * L) * unit, matrix) : V{}, squared = off * off;
        S::at(es + i * L) = i > 0 ? (squared > Lim::kFloor ? squared : S::splat(Lim::kFloor)) : V{};
    }
    // The square roots of eigenvalues of a Gram matrix lie more evenly than these do.
    for (int64_t s = 0; s < probe_slots; ++s) {
        const V part = __builtin_convertvector(copy + I(s * copies), V) / T(probes - 1);
        x[s] = part < 1 ? top * (part * part) : top;
    }
    for (int64_t s = 0; s < probe_slots; s += N) count_lanes<T, N>(ds, es, padded, x + s, counts + s, values + s);
    // Each bracket lies between the last probe with at most as many eigenvalues below it as its index, and the next one.
    // Counts rise with x up to rounding; the running maximum makes the brackets consistent.
    for (int64_t s = 0; s < slots; ++s)
        brackets[s] = {V{}, top, values[0], values[0], copy + I(s * copies), VI{}};
    VI seen = VI{};
    for (int64_t p = 0; p < probes; ++p) {
        const int64_t slot = p >> shift;
        const VI lane = matrix + I((p & (copies - 1)) * matrices), before = seen, count = __builtin_shuffle(counts[slot], lane);
        const V at = __builtin_shuffle(x[slot], lane);
        const Value<T> value{__builtin_shuffle(values[slot].value, lane), __builtin_shuffle(values[slot].exponent, lane)};
        seen = count > seen ? count : seen;
        for (int64_t s = 0; s < slots; ++s) {
            Bracket<T>& b = brackets[s];
            set_end(b.low, b.at_low, seen <= b.index, at, value);
            set_end(b.high, b.at_high, (before <= b.index) & (seen > b.index), at, value);
        }
    }
    for (int64_t s = 0; s < slots; ++s) brackets[s].high = brackets[s].index < I(n) ? brackets[s].high : brackets[s].low;
    const T wide = T(2 * tolerance);
    for (int64_t s = 0; s < slots; s += N) {
        Bracket<T>* b = brackets + s;
        for (int step = 1; step < 64 * kHalvedEvery; ++step) {
            const bool secants = kSecants<T> && step % kHalvedEvery != 0;
            V at[N];
            VI open[N], below[N], more = {};
            Value<T> found[N];
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) more |= open[u] = next_point(b[u], wide, secants, at[u]);
            if (!any<T>(more)) break;
            count_lanes<T, N>(ds, es, padded, at, below, found);
#pragma GCC unroll 4
            for (int u = 0; u < N; ++u) narrow(b[u], open[u], at[u], below[u], found[u]);
        }
    }
    for (int64_t m = 0; m < count; ++m) {
        double last = 0;
        const double back = 1 / (2 * double(to_unit[m]));
        for (int64_t i = 0; i < n; ++i) {
            const Bracket<T>& b = brackets[i >> shift];
            const int64_t at = m + (i & (copies - 1)) * matrices;
            last = max_of(last, (double(b.low[at]) + double(b.high[at])) * back);
            lanes[m].ascending[i] = last;
        }
    }
}

template <class T> constexpr int64_t kLanes = Simd<T>::L;

// Fills ascending and sums of 1 <= count <= kLanes<T> lanes of one r and K.
template <class T> void eigenvalues_lanes(Lane* lanes, int64_t count, Arena& arena) {
    const ArenaScope scope(arena);
    constexpr int L = Simd<T>::L;
    const int64_t r = lanes[0].w.r;
    T* G = take<T>(arena, block_of(round_up(r, kRows) / kRows) * L);
    T *d = take<T>(arena, r * L), *e = take<T>(arena, (r - 1) * L);
    gram_lanes(lanes, count, G, arena);
    tridiagonal_lanes(G, r, d, e, arena);
    sturm_lanes(d, e, r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, lanes, count, arena);
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast
