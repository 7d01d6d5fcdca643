#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <vector>

#include "distribution.hpp"
#include "svdvals.hpp"

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

// layouts: of each matrix its address, rows, columns, row stride and column stride, in elements. S and bound hold the
// values of all matrices end to end, as does previous. Returns (precision used, predicted SD error) of each.
std::vector<std::pair<int, double>> svdvals(const std::vector<std::array<int64_t, 5>>& layouts, int dtype, int precision,
                                            const std::optional<Array<double>>& previous, Array<double>& S,
                                            Array<double>& bound, int threads) {
    if (dtype < 0 || dtype > 3 || precision < 0 || precision > 3)
        throw std::invalid_argument("svdvals: expected dtype and precision in 0..3");
    std::vector<sosd_fast::SvdvalsTask> tasks(layouts.size());
    int64_t total = 0;
    double *values = S.mutable_data(), *bounds = bound.mutable_data();
    const double* before = previous ? previous->data() : nullptr;
    for (size_t i = 0; i < layouts.size(); ++i) {
        const auto& [address, m, n, row_stride, col_stride] = layouts[i];
        sosd_fast::SvdvalsTask& t = tasks[i];
        t.data = reinterpret_cast<const void*>(address);
        t.dtype = static_cast<sosd_fast::DType>(dtype);
        t.m = m, t.n = n, t.row_stride = row_stride, t.col_stride = col_stride;
        t.precision = static_cast<sosd_fast::Precision>(precision);
        t.S = values + total;
        t.bound = bounds + total;
        t.previous = before ? before + total : nullptr;
        total += std::min(m, n);
    }
    if (S.size() != total || bound.size() != total || (previous && previous->size() != total))
        throw std::invalid_argument("svdvals: outputs or previous have the wrong size");
    {
        py::gil_scoped_release release;
        sosd_fast::svdvals(tasks.data(), static_cast<int64_t>(tasks.size()), threads);
    }
    std::vector<std::pair<int, double>> used;
    for (const auto& t : tasks) used.emplace_back(static_cast<int>(t.used), t.predicted_sd_error);
    return used;
}

// layouts as above, upright (rows >= columns); V, P, next_V and next_P (B, b, n), squares and residual (B, b). Returns
// whether every matrix is ordinary, see SubspaceTask; where not, the outputs are not to be used.
bool advance_subspaces(const std::vector<std::array<int64_t, 5>>& layouts, float pace, const Array<float>& V,
                       const std::optional<Array<float>>& P, Array<float>& next_V, Array<float>& next_P,
                       Array<float>& squares, Array<float>& residual, int threads) {
    const int64_t count = int64_t(layouts.size());
    if (V.ndim() != 3 || V.shape(0) != count || (P && P->size() != V.size()))
        throw std::invalid_argument("advance_subspaces: expected V and P of shape (B, b, n)");
    const int64_t b = V.shape(1), n = V.shape(2);
    if (b >= n || next_V.size() != V.size() || next_P.size() != V.size() || squares.size() != count * b ||
        residual.size() != count * b)
        throw std::invalid_argument("advance_subspaces: expected b < n and outputs of the right size");
    std::vector<sosd_fast::SubspaceTask> tasks;
    for (int64_t i = 0; i < count; ++i) {
        const auto& [address, rows, columns, row_stride, col_stride] = layouts[i];
        if (columns != n || rows < n || (row_stride != 1 && col_stride != 1))
            throw std::invalid_argument("advance_subspaces: expected upright matrices with a stride of 1");
        const int64_t at = i * b * n;
        tasks.push_back({reinterpret_cast<const float*>(address), rows, n, row_stride, col_stride, V.data() + at,
                         P ? P->data() + at : nullptr, next_V.mutable_data() + at, next_P.mutable_data() + at,
                         squares.mutable_data() + i * b, residual.mutable_data() + i * b, false});
    }
    {
        py::gil_scoped_release release;
        sosd_fast::advance_subspaces(tasks.data(), count, b, pace, threads);
    }
    return std::all_of(tasks.begin(), tasks.end(), [](const auto& t) { return t.ordinary; });
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
    m.def("isa", [] { return sosd_fast::kernels().isa; });
    m.def("svdvals", &svdvals, py::arg("layouts"), py::arg("dtype"), py::arg("precision"),
          py::arg("previous").noconvert(), py::arg("S").noconvert(), py::arg("bound").noconvert(), py::arg("threads"));
    m.def("advance_subspaces", &advance_subspaces, py::arg("layouts"), py::arg("pace"), py::arg("V").noconvert(),
          py::arg("P").noconvert(), py::arg("next_V").noconvert(), py::arg("next_P").noconvert(),
          py::arg("squares").noconvert(), py::arg("residual").noconvert(), py::arg("threads"));
    define<float>(m);
    define<double>(m);
}
