// Vectors of the instruction set this translation unit is compiled for, through GCC/Clang vector extensions.
//
// kernels.cpp is compiled once per instruction set with its own SOSD_ISA; everything that depends on the
// compiler flags lives in that namespace, and no header of the standard library with inline code is used
// inside it, so that the linker cannot merge AVX-512 code into the baseline path.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef SOSD_ISA
#define SOSD_ISA baseline
#endif

namespace sosd_fast {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

namespace SOSD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <class T> struct Bits;
template <> struct Bits<float> { using type = int32_t; using word = uint32_t; };
template <> struct Bits<double> { using type = int64_t; using word = uint64_t; };

template <class T, int Bytes = kVectorBytes> struct Simd {
    using I = typename Bits<T>::type;
    typedef T V __attribute__((vector_size(Bytes), may_alias));
    using U = typename Bits<T>::word;
    typedef I VI __attribute__((vector_size(Bytes), may_alias));
    typedef U VU __attribute__((vector_size(Bytes), may_alias));
    static constexpr int L = Bytes / sizeof(T);

    static V splat(T x) { return x - V{}; }
    static VU splat_word(U x) { return x - VU{}; }
    static V& at(T* p) { return *reinterpret_cast<V*>(p); }
    static const V& at(const T* p) { return *reinterpret_cast<const V*>(p); }
};

// Has x loaded once: a compiler for 16 registers would read it from memory again in each product, and loads bound loops.
template <class V> inline void loaded([[maybe_unused]] V& x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#endif
}

// Lane o of one step of a transposing reduction: x and y hold sums spread over groups of G lanes; the result holds
// x's sums, then y's, over groups of G / 2.
constexpr int reduce_lane(int o, int L, int G, bool high) {
    const int half = G / 2, from_y = o >= L / 2, p = from_y ? o - L / 2 : o;
    return from_y * L + p / half * G + p % half + (high ? half : 0);
}

template <class T, int G> inline typename Simd<T>::V reduce_pair(typename Simd<T>::V x, typename Simd<T>::V y) {
    using S = Simd<T>;
    typename S::VI lo = {}, hi = {};
#pragma GCC unroll 16
    for (int o = 0; o < S::L; ++o) {
        lo[o] = reduce_lane(o, S::L, G, false);
        hi[o] = reduce_lane(o, S::L, G, true);
    }
    return __builtin_shuffle(x, y, lo) + __builtin_shuffle(x, y, hi);
}

// out[k] += sum of the lanes of acc[k], k < N. Eight sums take 24 shuffles and adds in AVX-512, separately 64.
template <class T, int N, int G = Simd<T>::L> struct ReduceLanes {
    static void add(typename Simd<T>::V* acc, T* out) {
        if constexpr (G == 1) {
            constexpr int L = Simd<T>::L;
            if constexpr (N % L == 0) {
                typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
                for (int k = 0; k < N; k += L) *reinterpret_cast<Loose*>(out + k) += acc[k / L];
                return;
            }
#pragma GCC unroll 16
            for (int k = 0; k < N; ++k) out[k] += acc[k / L][k % L];
        } else {
            constexpr int per_vector = Simd<T>::L / G;
            constexpr int vectors = N / per_vector > 0 ? N / per_vector : 1;
            constexpr int next = (vectors + 1) / 2;
            typename Simd<T>::V half[next];
#pragma GCC unroll 16
            for (int k = 0; k < next; ++k)
                half[k] = reduce_pair<T, G>(acc[2 * k], acc[2 * k + 1 < vectors ? 2 * k + 1 : 2 * k]);
            ReduceLanes<T, N, G / 2>::add(half, out);
        }
    }
};

// The sum of the lanes, in every lane.
template <class T, int H = Simd<T>::L / 2> inline typename Simd<T>::V sum_everywhere(typename Simd<T>::V x) {
    if constexpr (H > 0) {
        typename Simd<T>::VI other = {};
#pragma GCC unroll 16
        for (int o = 0; o < Simd<T>::L; ++o) other[o] = o ^ H;
        return sum_everywhere<T, H / 2>(x + __builtin_shuffle(x, other));
    }
    return x;
}

// x <- its transpose, L vectors of L lanes, exchanging blocks of H, H / 2, .. 1 lanes.
template <class T, int H = Simd<T>::L / 2> inline void transpose(typename Simd<T>::V* x) {
    if constexpr (H > 0) {
        using S = Simd<T>;
        typename S::VI upper = {}, lower = {};
#pragma GCC unroll 16
        for (int o = 0; o < S::L; ++o) {
            upper[o] = o & H ? S::L + o - H : o;
            lower[o] = o & H ? S::L + o : o + H;
        }
#pragma GCC unroll 16
        for (int i = 0; i < S::L; ++i) {
            if (i & H) continue;
            const typename S::V a = x[i], b = x[i + H];
            x[i] = __builtin_shuffle(a, b, upper);
            x[i + H] = __builtin_shuffle(a, b, lower);
        }
        transpose<T, H / 2>(x);
    }
}

template <class T> inline T sum_lanes(typename Simd<T>::V x) {
    T out = 0;
    ReduceLanes<T, 1>::add(&x, &out);
    return out;
}

template <class T, int Bytes = kVectorBytes> inline typename Simd<T, Bytes>::V root(typename Simd<T, Bytes>::V x) {
    using S = Simd<T, Bytes>;
    alignas(Bytes) T out[S::L];
    S::at(out) = x;
    for (T& each : out) each = sizeof(T) == 4 ? T(__builtin_sqrtf(float(each))) : T(__builtin_sqrt(each));
    return S::at(out);
}

template <class T> constexpr T min_of(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max_of(T a, T b) { return a < b ? b : a; }

}  // namespace SOSD_ISA

// Runs task(context, 0) .. task(context, count - 1), begun in this order and perhaps on several threads: one may wait,
// by pause, for those before it.
// helpers tells whether another thread is idle now; a stage may choose larger steps then, never other arithmetic.
struct Parallel {
    void* self;
    void (*run)(void* self, int64_t count, void (*task)(void*, int64_t), void* context);
    bool (*helpers)(void* self);
    void (*pause)();
};

namespace SOSD_ISA {
template <class F> inline void parallel_for(const Parallel& parallel, int64_t count, F f) {
    parallel.run(parallel.self, count, [](void* c, int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}
}  // namespace SOSD_ISA
}  // namespace sosd_fast
