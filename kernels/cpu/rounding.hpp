// What rounding does to a Gram matrix, measured on some of its elements: of float in double, of double by compensated sums.
//
// The sums behind G = W W^T err at random for most matrices, but not for those of few distinct values (signs, ternary or
// quantised weights), where equal products round alike: the diagonal, a sum of terms of one sign, drifts by up to
// kChain / 3 ulps, and the other elements by a common factor.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own header
#include <immintrin.h>
#endif

#include <type_traits>

#include "arena.hpp"

namespace sosd_fast {
namespace SOSD_ISA {

// A vector of doubles from as many aligned floats. GCC 12 takes __builtin_convertvector to twice the size apart.
inline Simd<double>::V widened(const float* p) {
#if defined(__AVX512F__)
    return Simd<double>::V(_mm512_cvtps_pd(_mm256_load_ps(p)));
#elif defined(__AVX2__)
    return Simd<double>::V(_mm256_cvtps_pd(_mm_load_ps(p)));
#else
    typedef float Half __attribute__((vector_size(kVectorBytes / 2), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Half*>(p), Simd<double>::V);
#endif
}

// Elements of W W^T, more precise than a Gram matrix in T has them, for each row i of packed panels of P rows: (i, i), and
// (i, i + kApart) where both rows are in one panel, else zero.
constexpr int kApart = Simd<double>::L;
struct ExactProducts {
    double *squares, *cross;
};

// A sum of doubles whose terms round but whose additions do not (Knuth's two-sum).
struct CompensatedSum {
    Simd<double>::V sum{}, lost{};
    void add(Simd<double>::V x) {
        const Simd<double>::V before = sum;
        sum = before + x;
        const Simd<double>::V added = sum - before;
        lost += (before - (sum - added)) + (x - added);
    }
    Simd<double>::V total() const { return sum + lost; }
};

struct PlainSum {
    Simd<double>::V sum{};
    void add(Simd<double>::V x) { sum += x; }
    Simd<double>::V total() const { return sum; }
};

inline Simd<double>::V widened(const double* p) { return Simd<double>::at(p); }

// Adds K columns of a panel, [k][P rows]; squares and cross belong to its first row.
template <int P, class T> inline void add_products(const T* panel, int64_t K, ExactProducts to) {
    using D = Simd<double>;
    constexpr int Q = P / D::L;
    std::conditional_t<sizeof(T) == 4, PlainSum, CompensatedSum> squares[Q], cross[Q];
    for (int64_t k = 0; k < K; ++k) {
        D::V w[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
            w[q] = widened(panel + k * P + q * D::L);
            squares[q].add(w[q] * w[q]);
            if (q > 0) cross[q - 1].add(w[q - 1] * w[q]);
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
        D::at(to.squares + q * D::L) += squares[q].total();
        D::at(to.cross + q * D::L) += cross[q].total();
    }
}

}  // namespace SOSD_ISA
}  // namespace sosd_fast

#if defined(__x86_64__)
#pragma GCC diagnostic pop
#endif
