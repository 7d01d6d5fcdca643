#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
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

// Normalises each of `rows` spectra of length r to sum 1 and summarises it, all sums in double. `previous` and
// `reference` may be null; they need not be normalised. A spectrum that sums to zero or holds NaN gives NaN.
template <class T>
void singular_distribution(const T* S, const T* previous, const T* reference, int64_t rows, int64_t r, T* sd,
                           double* statistics) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0, sum_previous = 0, dot = 0, square_reference = 0, sigma_max = 0, sigma_min = S[0];
        for (int64_t i = 0; i < r; ++i) {
            const double s = S[i];
            sum += s;
            sigma_max = std::max(sigma_max, s);
            sigma_min = std::min(sigma_min, s);
        }
        if (previous)
            for (int64_t i = 0; i < r; ++i) sum_previous += previous[i];
        if (std::isnan(sum)) sigma_max = sigma_min = nan;

        // Everything below is taken from p = S / sum, which neither overflows nor underflows in its powers.
        const double inverse = sum == 0 ? nan : 1 / sum;
        const double inverse_previous = previous && sum_previous != 0 ? 1 / sum_previous : nan;
        double l1 = 0, l2 = 0, linf = 0, entropy = 0, square = 0, fourth = 0;
        for (int64_t i = 0; i < r; ++i) {
            const double p = S[i] * inverse;
            sd[i] = static_cast<T>(p);
            square += p * p;
            fourth += p * p * p * p;
            entropy -= p > 0 ? p * std::log(p) : p * 0;
            if (previous) {
                const double d = std::abs(p - previous[i] * inverse_previous);
                l1 += d;
                l2 += d * d;
                linf = std::max(linf, d);
            }
            if (reference) {
                const double q = reference[i];
                dot += p * q;
                square_reference += q * q;
            }
        }
        const double p_max = sigma_max * inverse;
        statistics[kVariationL2] = previous ? std::sqrt(l2) : nan;
        statistics[kVariationL1] = previous ? l1 : nan;
        statistics[kVariationLinf] = previous ? (std::isnan(l2) ? nan : linf) : nan;
        statistics[kCosine] = reference ? dot / std::sqrt(square * square_reference) : nan;
        statistics[kNuclearNorm] = sum;
        statistics[kFrobeniusNorm] = sum == 0 ? 0 : sum * std::sqrt(square);
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
