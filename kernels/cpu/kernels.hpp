// The stages as compiled for one instruction set, and the choice among them at run time.
#pragma once

#include "lanes.hpp"
#include "subspace.hpp"

namespace sosd_fast {

template <class T> struct Stages {
    GramSums (*gram)(const Source&, T* G, double* squares, Arena&, const Parallel&);
    void (*tridiagonal)(T* G, int64_t r, int64_t band_from, T* d, T* e, Arena&, const Parallel&);
    void (*sturm)(const T* d, const T* e, int64_t n, double tolerance, double* values, Arena&, const Parallel&);
    void (*eigenvalues_lanes)(Lane*, int64_t count, double* ascending, Arena&);
    void (*svdvals_bidiagonal)(const Source&, double* S, Arena&, const Parallel&);
    int64_t lanes;  // that take as long as one
};

struct Kernels {
    const char* isa;
    double (*max_abs)(const Source&);
    Stages<float> f32;
    Stages<double> f64;
    void (*advance_subspace)(SubspaceTask&, int64_t b, float pace, Arena&, const Parallel&);
};

// SOSD_ISA in the environment (baseline, avx2, avx512) overrides the choice, for tests of the slower paths.
const Kernels& kernels();

}  // namespace sosd_fast
