// The stages as compiled for one instruction set, and the choice among them at run time.
#pragma once

#include "lanes.hpp"
#include "subspace.hpp"

namespace sosd_fast {

template <class T> struct Stages {
    GramSums (*gram)(const Source&, T* G, double* squares, Arena&, const Parallel&);
    void (*tridiagonal)(T* G, int64_t r, int64_t band_from, T* d, T* e, Arena&, const Parallel&);
    void (*sturm)(const T* d, const T* e, int64_t n, double tolerance, double* values, Arena&, const Parallel&);
    void (*eigenvalues_lanes)(Lane*, int64_t count, double* ascending, Arena&, const Parallel&);
    void (*svdvals_bidiagonal)(const Source&, double* S, Arena&, const Parallel&);
};

struct Kernels {
    const char* isa;
    double (*max_abs)(const Source&);
    Stages<float> f32;
    Stages<double> f64;
    void (*tridiagonal_direct)(const Source&, double* d, double* e, Arena&);
    void (*eigenvalues_together)(const Tridiagonal*, int64_t count, int64_t n, int64_t sweeps, Arena&, const Parallel&);
    int64_t together;  // matrices in eigenvalues_together and eigenvalues_lanes that take about as long as one
    void (*advance_subspace)(SubspaceTask&, int64_t b, float pace, Arena&, const Parallel&);
};

// SOSD_ISA in the environment (baseline, avx2, avx512) overrides the choice, for tests of the slower paths.
const Kernels& kernels();

}  // namespace sosd_fast
