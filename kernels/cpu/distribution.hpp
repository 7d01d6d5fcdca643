#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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
    for (int64_t i = 0; i < r; ++i) out = std::max(out, double(S[i]));
    return out;
}

// Normalises each of `rows` spectra of length r to sum 1 and summarises it, all sums in double. `previous` and
// `reference` may be null; they need not be normalised. A spectrum that sums to zero or holds NaN or Inf gives NaN.
template <class T>
void singular_distribution(const T* S, const T* previous, const T* reference, int64_t rows, int64_t r, T* sd,
                           double* statistics) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t row = 0; row < rows; ++row) {
        // Each spectrum is divided by a power of two, exactly, so that no sum and no square leaves the range of double.
        double sum = 0, sum_previous = 0, dot = 0, square_reference = 0, sigma_max = largest(S, r), sigma_min = S[0];
        const double power = power_of_two(sigma_max);
        const double unit = 1 / power, unit_previous = previous ? 1 / power_of_two(largest(previous, r)) : 1;
        const double unit_reference = reference ? 1 / power_of_two(largest(reference, r)) : 1;
        for (int64_t i = 0; i < r; ++i) {
            sum += S[i] * unit;
            sigma_min = std::min(sigma_min, double(S[i]));
        }
        if (previous)
            for (int64_t i = 0; i < r; ++i) sum_previous += previous[i] * unit_previous;
        if (std::isnan(sum)) sigma_max = sigma_min = nan;

        const double divisor = sum == 0 ? nan : sum;
        const double divisor_previous = sum_previous == 0 ? nan : sum_previous;
        double l1 = 0, l2 = 0, linf = 0, entropy = 0, square = 0, fourth = 0;
        for (int64_t i = 0; i < r; ++i) {
            const double p = S[i] * unit / divisor;
            sd[i] = static_cast<T>(p);
            square += p * p;
            fourth += p * p * p * p;
            entropy -= p > 0 ? p * std::log(p) : p * 0;
            if (previous) {
                const double d = std::abs(p - previous[i] * unit_previous / divisor_previous);
                l1 += d;
                l2 += d * d;
                linf = std::max(linf, d);
            }
            if (reference) {
                const double q = reference[i] * unit_reference;
                dot += p * q;
                square_reference += q * q;
            }
        }
        const double p_max = sigma_max * unit / divisor;
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

        S += r;
        sd += r;
        statistics += kStatistics;
        if (previous) previous += r;
        if (reference) reference += r;
    }
}

}  // namespace sosd_fast
