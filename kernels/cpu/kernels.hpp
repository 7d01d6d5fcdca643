// The stages as compiled for one instruction set, and the choice among them at run time.
#pragma once

#include "subspace.hpp"

namespace sosd_fast {

template <class T> struct Stages {
    void (*gram)(const Source&, T* G, T* work, const Parallel&);
    int64_t (*gram_work_size)(int64_t r);
    void (*tridiagonal)(T* G, int64_t r, T* d, T* e, T* work);
    int64_t (*tridiagonal_work_size)(int64_t r);
    void (*sturm)(const T* d, const T* e, int64_t n, double tolerance, double* values, T* work, const Parallel&);
    int64_t (*sturm_work_size)(int64_t n);
};

struct Kernels {
    const char* isa;
    double (*max_abs)(const Source&);
    Stages<float> f32;
    Stages<double> f64;
    void (*svdvals_one_sided)(const Source&, double* S, double* work, const Parallel&);
    int64_t (*one_sided_work_size)(int64_t r);
    void (*advance_subspace)(SubspaceTask&, int64_t b, float pace, float* work, const Parallel&);
    int64_t (*subspace_work_size)(int64_t m, int64_t n, int64_t b);
};

// SOSD_ISA in the environment (baseline, avx2, avx512) overrides the choice, for tests of the slower paths.
const Kernels& kernels();

}  // namespace sosd_fast
