#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace sosd_fast {

// Columns of the statistics that singular_distribution writes for each spectrum; kernels/distribution.py names them in
// this order.
enum Statistic {
    kVariationL2,
    kVariationL1,
    kVariationLinf,
    kCosine,
    kNuclearNorm,
    kFrobeniusNorm,
    kSigmaMax,
    kSigmaMin,
    kStableRank,
    kEffectiveRank,
    kSpectralEntropy,
    kParticipationRatio,
    kVariationTopk,
    kStatistics
};

// The power of two at or below x >= 0, kept to where its inverse is normal; Inf for NaN and Inf, as the exponent's bits say.
inline double power_of_two(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof x);
    bits &= 0x7FF0000000000000;
    std::memcpy(&x, &bits, sizeof x);
    return std::isinf(x) ? x : std::clamp(x, 0x1p-1022, 0x1p1022);
}

template <class T>
double largest(const T* S, int64_t r) {
    double out = 0;
#pragma omp simd reduction(max : out)
    for (int64_t i = 0; i < r; ++i) out = std::max(out, double(S[i]));
    return out;
}

// Normalises each of `rows` spectra of length r to sum 1 and summarises it, all sums in double. `previous`, `reference`
// and `sd` may be null; the first two need not be normalised. A spectrum that sums to zero or holds NaN or Inf gives NaN.
// kVariationTopk is the part of the first k values in the variation, NaN without any.
template <class T>
void singular_distribution(const T* S, const T* previous, const T* reference, int64_t rows, int64_t r, T* sd,
                           double* statistics, int64_t k) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    k = std::min(k, r);
    std::vector<double> values(r);
    double* const p = values.data();
    for (int64_t row = 0; row < rows; ++row) {
        // Each spectrum is divided by a power of two, exactly, so that no sum and no square leaves the range of double.
        double sum = 0, sum_previous = 0, sigma_max = largest(S, r), sigma_min = S[0];
        const double power = power_of_two(sigma_max);
        const double unit = 1 / power, unit_previous = previous ? 1 / power_of_two(largest(previous, r)) : 1;
        const double unit_reference = reference ? 1 / power_of_two(largest(reference, r)) : 1;
#pragma omp simd reduction(+ : sum) reduction(min : sigma_min)
        for (int64_t i = 0; i < r; ++i) {
            sum += S[i] * unit;
            sigma_min = std::min(sigma_min, double(S[i]));
        }
        if (previous)
#pragma omp simd reduction(+ : sum_previous)
            for (int64_t i = 0; i < r; ++i) sum_previous += previous[i] * unit_previous;
        if (std::isnan(sum)) sigma_max = sigma_min = nan;

        const double divisor = sum == 0 ? nan : sum;
        const double divisor_previous = sum_previous == 0 ? nan : sum_previous;
        double l1 = 0, l2 = 0, linf = 0, topk = 0, entropy = 0, square = 0, fourth = 0, dot = 0, square_reference = 0;
#pragma omp simd reduction(+ : square, fourth)
        for (int64_t i = 0; i < r; ++i) {
            p[i] = S[i] * unit / divisor;
            square += p[i] * p[i];
            fourth += p[i] * p[i] * p[i] * p[i];
        }
        for (int64_t i = 0; i < r; ++i) entropy -= p[i] > 0 ? p[i] * std::log(p[i]) : p[i] * 0;
        if (sd)
            for (int64_t i = 0; i < r; ++i) sd[i] = static_cast<T>(p[i]);
        if (reference)
#pragma omp simd reduction(+ : dot, square_reference)
            for (int64_t i = 0; i < r; ++i) {
                const double q = reference[i] * unit_reference;
                dot += p[i] * q;
                square_reference += q * q;
            }
        const double p_max = sigma_max * unit / divisor;
        if (previous) {
#pragma omp simd reduction(+ : l1, l2) reduction(max : linf)
            for (int64_t i = 0; i < r; ++i) {
                p[i] = std::abs(p[i] - previous[i] * unit_previous / divisor_previous);  // how far each has moved
                l1 += p[i];
                l2 += p[i] * p[i];
                linf = std::max(linf, p[i]);
            }
            for (int64_t i = 0; i < k; ++i) topk += p[i] * p[i];
        }
        statistics[kVariationL2] = previous ? std::sqrt(l2) : nan;
        statistics[kVariationL1] = previous ? l1 : nan;
        statistics[kVariationLinf] = previous ? (std::isnan(l2) ? nan : linf) : nan;
        statistics[kCosine] = reference ? dot / std::sqrt(square * square_reference) : nan;
        statistics[kNuclearNorm] = sum * power;
        statistics[kFrobeniusNorm] = sum == 0 ? 0 : sum * std::sqrt(square) * power;
        statistics[kSigmaMax] = sigma_max;
        statistics[kSigmaMin] = sigma_min;
        statistics[kStableRank] = square / (p_max * p_max);
        statistics[kEffectiveRank] = std::exp(entropy);
        statistics[kSpectralEntropy] = entropy;
        statistics[kParticipationRatio] = square * square / fourth;
        statistics[kVariationTopk] = previous && k > 0 ? std::sqrt(topk) : nan;

        S += r;
        if (sd) sd += r;
        statistics += kStatistics;
        if (previous) previous += r;
        if (reference) reference += r;
    }
}

}  // namespace sosd_fast
