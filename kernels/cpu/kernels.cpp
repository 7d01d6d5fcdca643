// Compiled once per instruction set: -DSOSD_ISA=baseline, and on x86-64 avx2 (-march=x86-64-v3) and avx512 (-v4).
#include "kernels.hpp"

#include "band.hpp"
#include "bidiagonal.hpp"
#include "sturm.hpp"
#include "thin.hpp"

#define SOSD_STRING_(x) #x
#define SOSD_STRING(x) SOSD_STRING_(x)

namespace sosd_fast {
namespace SOSD_ISA {

template <class T> constexpr Stages<T> stages() {
    return {any_gram<T>, any_tridiagonal<T>, sturm<T>, eigenvalues_lanes<T>, svdvals_bidiagonal<T>};
}

extern const Kernels table;
const Kernels table = {SOSD_STRING(SOSD_ISA), max_abs, stages<float>(), stages<double>(),
                       tridiagonal_direct, eigenvalues_together, kTogether, advance_subspace};

}  // namespace SOSD_ISA
}  // namespace sosd_fast
