#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "distribution.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const T* rows_like(const std::optional<Array<T>>& spectra, int64_t rows, int64_t r) {
    if (!spectra) return nullptr;
    if (spectra->ndim() != 2 || spectra->shape(0) != rows || spectra->shape(1) != r)
        throw std::invalid_argument("singular_distribution: expected previous and reference shaped like S");
    return spectra->data();
}

template <class T>
void singular_distribution(const Array<T>& S, const std::optional<Array<T>>& previous,
                           const std::optional<Array<T>>& reference, Array<T>& sd, Array<double>& statistics) {
    if (S.ndim() != 2 || S.shape(1) < 1) throw std::invalid_argument("singular_distribution: expected S of shape (B, r)");
    const int64_t rows = S.shape(0), r = S.shape(1);
    if (sd.size() != S.size() || statistics.size() != rows * sosd_fast::kStatistics)
        throw std::invalid_argument("singular_distribution: outputs have the wrong size");
    const T* before = rows_like(previous, rows, r);
    const T* fixed = rows_like(reference, rows, r);
    const T* spectra = S.data();
    T* out = sd.mutable_data();
    double* summary = statistics.mutable_data();
    py::gil_scoped_release release;
    sosd_fast::singular_distribution(spectra, before, fixed, rows, r, out, summary);
}

template <class T>
void define(py::module_& m) {
    m.def("singular_distribution", &singular_distribution<T>, py::arg("S").noconvert(),
          py::arg("previous").noconvert(), py::arg("reference").noconvert(), py::arg("sd").noconvert(),
          py::arg("statistics").noconvert());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of sosd_fast for CPU arrays; call them through sosd_fast.kernels.";
    define<float>(m);
    define<double>(m);
}
