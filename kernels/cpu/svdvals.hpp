// All singular values, or one step towards the leading ones, of a list of matrices on the CPU.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace sosd_fast {

enum class Precision : int { f32 = 0, f64 = 1, automatic = 2, bidiagonal = 3 };

// One matrix W: element (i, j) is data[i * row_stride + j * col_stride], i < m, j < n; W is only read.
struct SvdvalsTask {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t m = 0, n = 0, row_stride = 0, col_stride = 0;
    double* S = nullptr;      // out: min(m, n) values, descending
    double* bound = nullptr;  // out, may be null: |S[i] - sigma_i| <= bound[i]
    Precision precision = Precision::automatic;
    const double* previous = nullptr;  // a recent spectrum of W, descending, or null: it tells the precision to start with
    // out: the method that produced S (f32 and f64: by the Gram matrix), and its predicted ||error of S / sum(S)||_2.
    Precision used = Precision::f32;
    double predicted_sd_error = 0;
    bool finite = true;  // false: W holds NaN or infinity, S and bound are NaN
};

// Fills S, bound, used, predicted_sd_error, finite of every task. Results do not depend on n_threads, bit for bit.
// Threads live for one call only: nothing survives into a fork, and several callers do not meet.
void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads);

// Fills the results of every task.
void advance_subspaces(SubspaceTask* tasks, int64_t count, int64_t b, float pace, int n_threads);

// The error bound for the values of a Gram matrix in precision f32 or f64 (delta lambda = c(r, K) eps S[0]^2).
double gram_error_coefficient(int64_t r, int64_t K);

}  // namespace sosd_fast
