// All singular values, or one step towards the leading ones, of a list of matrices on the CPU.
#pragma once

#include <cstdint>

#include "error_model.hpp"
#include "kernels.hpp"

namespace sosd_fast {

// One matrix W: element (i, j) is data[i * row_stride + j * col_stride], i < m, j < n; W is only read.
struct SvdvalsTask {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t m = 0, n = 0, row_stride = 0, col_stride = 0;
    double* S = nullptr;      // out: min(m, n) values, descending
    double* bound = nullptr;  // out, may be null: |S[i] - sigma_i| <= bound[i]
    bool automatic = true;         // the cheapest method whose sd_error meets the tolerance; false: `method`
    Method method = Method::gram32;  // out, where automatic: the method that produced S
    const double* previous = nullptr;  // a recent spectrum of W, descending, or null: it tells the method to start with
    const ErrorModel* model = nullptr;
    int64_t band_from = 0;  // the short side from which Gram matrices are reduced in two stages; 0: as band.hpp has it
    bool wants_error = true;  // false: sd_error is only looked at where a method might not stand
    double sd_error = 0;  // out: ||error of S / sum(S)||_2 is at most this; NaN where there is no distribution
    bool finite = true;  // false: W holds NaN or infinity, S and bound are NaN
};

// Fills S, bound, method, sd_error, finite of every task. Results do not depend on n_threads, bit for bit.
// The threads are those of region.hpp; several callers do not meet.
void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads);

// Some of the columns of a matrix whose other columns are elsewhere, A (r, K): element (i, k) is
// data[i * stride_i + k * stride_k]. The triangles and squares of all parts add up to those of the matrix.
struct PartTask {
    const void* data = nullptr;
    DType dtype = DType::f32;
    int64_t r = 0, K = 0, stride_i = 0, stride_k = 0;
    double scale = 1;              // a power of two: scale * A has squares of ordinary size
    DType precision = DType::f32;  // of the products, or f64
    void* triangle = nullptr;      // out: A A^T without the drift, its upper triangle row by row, in that precision
    double* squares = nullptr;     // out: r, its diagonal, in f64
    double drift = 0;              // out: by how much rounding had moved all of A A^T together
};

// Fills the results of every task.
void gram_triangles(PartTask* tasks, int64_t count, int n_threads);

// A Gram matrix G (r, r).
struct GramTask {
    const void* triangle = nullptr;  // the upper one, row by row
    DType precision = DType::f32;    // its, or f64
    int64_t r = 0;
    double* values = nullptr;  // out: r eigenvalues, ascending; NaN where G holds NaN or infinity
    int64_t band_from = 0;  // as above
};

// Fills the values of every task. The entries must be of ordinary size: G is not scaled.
void gram_eigenvalues(GramTask* tasks, int64_t count, int n_threads);

// Fills the results of every task.
void advance_subspaces(SubspaceTask* tasks, int64_t count, int64_t b, float pace, int n_threads);

}  // namespace sosd_fast
