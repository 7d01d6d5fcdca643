#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "distribution.hpp"
#include "svdvals.hpp"
#include "tensor.hpp"

namespace py = pybind11;
using sosd_fast::bytes_of;
using sosd_fast::DType;
using sosd_fast::ErrorModel;
using sosd_fast::Method;
using sosd_fast::Tensor;

namespace {

constexpr int64_t kLongestShortSide = int64_t(1) << 20;  // its Gram matrix would have 10^12 elements

[[noreturn]] void refuse(const std::string& message) { throw py::value_error("sosd_fast._C." + message); }

void expect_short_side(const char* function, int64_t m, int64_t n) {
    if (std::min(m, n) > kLongestShortSide)
        refuse(std::string(function) + ": expected a short side of at most 2^20, got shape " + sosd_fast::to_string({m, n}) + ".");
}

// The matrices of one call as one tensor (B, m, n).
std::vector<Tensor> open_stack(const char* function, const py::object& given) {
    std::vector<Tensor> stack;
    stack.emplace_back(given, "matrices");
    if (stack[0].dims() != 3)
        refuse(std::string(function) + ": expected a list of matrices or one tensor (B, m, n), got shape " +
               sosd_fast::to_string(stack[0].size) + ".");
    expect_short_side(function, stack[0].size[1], stack[0].size[2]);
    return stack;
}

// The matrices of one call: of one dtype, and of one shape, or at least of one short side.
std::vector<Tensor> open_matrices(const char* function, const py::sequence& given, bool of_one_shape) {
    const auto alike = [&](const Tensor& a, const Tensor& b) {
        return a.dtype == b.dtype && a.dims() == 2 &&
               (of_one_shape ? a.size == b.size : std::min(a.size[0], a.size[1]) == std::min(b.size[0], b.size[1]));
    };
    const std::string expected = of_one_shape ? "shape" : "short side";
    std::vector<Tensor> matrices;
    matrices.reserve(given.size());
    for (const py::handle& each : given) {
        matrices.emplace_back(each, "matrices");
        const Tensor& W = matrices.back();
        if (!alike(W, matrices[0]))
            refuse(std::string(function) + ": expected matrices of one " + expected + " and dtype, got shape " +
                   sosd_fast::to_string(W.size) + " after " + sosd_fast::to_string(matrices[0].size) +
                   ". Call it once for each " + expected + " and dtype.");
    }
    if (!matrices.empty()) expect_short_side(function, matrices[0].size[0], matrices[0].size[1]);
    return matrices;
}

// Opens what may be None.
std::vector<Tensor> open_optional(const py::object& given, const char* name) {
    std::vector<Tensor> out;
    if (!given.is_none()) out.emplace_back(given, name);
    return out;
}

template <class T>
void singular_distribution(const Tensor& S, const std::vector<Tensor>& previous, const std::vector<Tensor>& reference,
                           const std::vector<Tensor>& sd, const Tensor& statistics, int64_t k) {
    const int64_t rows = S.size[0], r = S.size[1];
    const T* before = previous.empty() ? nullptr : previous[0].as<T>();
    const T* fixed = reference.empty() ? nullptr : reference[0].as<T>();
    T* out = sd.empty() ? nullptr : sd[0].as<T>();
    py::gil_scoped_release release;
    sosd_fast::singular_distribution(S.as<T>(), before, fixed, rows, r, out, statistics.as<double>(), k);
}

// S, previous, reference and sd are (B, r) of one dtype, contiguous, the last three or None; statistics is (B, kStatistics)
// float64.
void any_distribution(const py::object& S, const py::object& previous, const py::object& reference, const py::object& sd,
                      const py::object& statistics, int64_t k) {
    const Tensor spectra(S, "S"), summary(statistics, "statistics");
    const std::vector<Tensor> before = open_optional(previous, "previous"), fixed = open_optional(reference, "reference");
    const std::vector<Tensor> out = open_optional(sd, "sd");
    if (spectra.dims() != 2 || spectra.size[1] < 1 || (spectra.dtype != DType::f32 && spectra.dtype != DType::f64))
        refuse("singular_distribution: expected S of shape (B, r) in float32 or float64, got shape " +
               sosd_fast::to_string(spectra.size) + ".");
    spectra.expect("S", spectra.dtype, spectra.size);
    for (const Tensor& t : out) t.expect("sd", spectra.dtype, spectra.size);
    for (const Tensor& t : before) t.expect("previous", spectra.dtype, spectra.size);
    for (const Tensor& t : fixed) t.expect("reference", spectra.dtype, spectra.size);
    summary.expect("statistics", DType::f64, {spectra.size[0], int64_t(sosd_fast::kStatistics)});
    if (spectra.dtype == DType::f32)
        singular_distribution<float>(spectra, before, fixed, out, summary, k);
    else
        singular_distribution<double>(spectra, before, fixed, out, summary, k);
}

constexpr std::array<std::pair<const char*, Method>, 4> kMethods{{{"gram32", Method::gram32},
                                                                {"bidiag32", Method::bidiag32},
                                                                {"gram64", Method::gram64},
                                                                {"bidiag64", Method::bidiag64}}};

Method to_method(const char* function, const std::string& name) {
    for (const auto& [known, method] : kMethods)
        if (name == known) return method;
    refuse(std::string(function) + ": expected method auto, gram32, bidiag32, gram64 or bidiag64, got " + name + ".");
}

// The constants of an `ErrorModel` of sosd_fast/spectra/precision.py, by name. Those of the last tuple are kept: reading them takes
// longer than a small matrix. The GIL is held.
ErrorModel to_model(const py::object& given) {
    static PyObject* last = nullptr;
    static ErrorModel kept;
    if (given.ptr() == last) return kept;
    ErrorModel m{};
    const std::pair<const char*, double*> fields[] = {
        {"value_root", &m.value_root},         {"value_base", &m.value_base},
        {"value_linear", &m.value_linear},     {"value_inner", &m.value_inner},
        {"value_float64", &m.value_float64},   {"spread", &m.spread},
        {"spread_least", &m.spread_least},
        {"spread_float64", &m.spread_float64},
        {"reduced", &m.reduced},               {"reduced_small", &m.reduced_small},
        {"reduced_first", &m.reduced_first},   {"near", &m.near},
        {"nearest", &m.nearest},
        {"direct_root", &m.direct_root},       {"direct_inner", &m.direct_inner},
        {"direct_bidiag32", &m.direct_bidiag32},
        {"safety", &m.safety},                 {"common", &m.common},
        {"common_root", &m.common_root},       {"tolerance", &m.tolerance}};
    for (const auto& [name, to] : fields) *to = given.attr(name).cast<double>();
    if (PyTuple_Check(given.ptr())) {  // which does not change
        kept = m;
        Py_INCREF(given.ptr());
        Py_XSETREF(last, given.ptr());
    }
    return m;
}

// The bounds that decide, on any spectra S (B, r) float64, contiguous. noise is of the values as they are.
std::vector<double> sd_error(const py::object& S, const std::string& method, int64_t inner, double drift, double noise,
                             const py::object& model) {
    const Tensor values(S, "S");
    if (values.dims() != 2 || values.size[1] < 1) refuse("sd_error: expected S of shape (B, r).");
    values.expect("S", DType::f64, values.size);
    const Method asked = to_method("sd_error", method);
    const ErrorModel constants = to_model(model);
    const int64_t r = values.size[1];
    std::vector<double> found(static_cast<size_t>(values.size[0])), scaled(static_cast<size_t>(r));
    const py::gil_scoped_release release;
    for (size_t i = 0; i < found.size(); ++i) {
        const double* const row = values.as<double>() + int64_t(i) * r;
        const double factor = sosd_fast::scale_of(row[0]);
        for (size_t j = 0; j < scaled.size(); ++j) scaled[j] = row[j] * factor;
        found[i] = sosd_fast::sd_error(scaled.data(), r, inner, asked, drift, noise * factor * factor, constants);
    }
    return found;
}

// matrices: B tensors (m, n) of one dtype and one short side r, any strides, or one (B, m, n): to open tensors takes longer
// than the spectra of small matrices do. S, bound and previous: (B, r) float64, contiguous; sd_error: (B,). S, bound and
// sd_error are written; the last two may be None, and S float32, to which values are rounded. methods: what stands for each of
// kMethods; returns it for each matrix, as the method that stood. band_from, for tests: see SvdvalsTask.
py::tuple svdvals(const py::object& matrices, const std::string& method, const py::object& previous, const py::object& S,
                  const py::object& bound, const py::object& sd_error, const py::tuple& methods, int threads,
                  const py::object& model, int64_t band_from) {
    const bool automatic = method == "auto";
    const Method asked = automatic ? Method::gram32 : to_method("svdvals", method);
    const ErrorModel constants = to_model(model);
    const bool separate = PyList_Check(matrices.ptr()) || PyTuple_Check(matrices.ptr());
    const std::vector<Tensor> opened = separate ? open_matrices("svdvals", matrices, false) : open_stack("svdvals", matrices);
    const int64_t count = separate ? int64_t(opened.size()) : opened[0].size[0];
    if (methods.size() != kMethods.size()) refuse("svdvals: expected four methods, got " + std::to_string(methods.size()) + ".");
    if (count == 0) return py::tuple();
    const int first = separate ? 0 : 1;  // the dimension of a tensor that counts a matrix's rows
    const int64_t r = std::min(opened[0].size[first], opened[0].size[first + 1]);
    const Tensor values(S, "S");
    const std::vector<Tensor> bounds = open_optional(bound, "bound"), errors = open_optional(sd_error, "sd_error");
    const std::vector<Tensor> before = open_optional(previous, "previous");
    values.expect("S", values.dtype == DType::f32 ? DType::f32 : DType::f64, {count, r});
    for (const Tensor& t : bounds) t.expect("bound", DType::f64, {count, r});
    for (const Tensor& t : errors) t.expect("sd_error", DType::f64, {count});
    for (const Tensor& t : before) t.expect("previous", DType::f64, {count, r});
    std::vector<double> wide(values.dtype == DType::f32 ? size_t(count * r) : 0);
    double* const found = wide.empty() ? values.as<double>() : wide.data();
    std::vector<sosd_fast::SvdvalsTask> tasks(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        const Tensor& W = opened[separate ? size_t(i) : 0];
        sosd_fast::SvdvalsTask& t = tasks[size_t(i)];
        t.dtype = W.dtype;
        t.data = separate || !W.data ? W.data : W.data + i * W.stride[0] * bytes_of(W.dtype);  // none where W is empty
        t.m = W.size[first], t.n = W.size[first + 1], t.row_stride = W.stride[first], t.col_stride = W.stride[first + 1];
        t.automatic = automatic;
        t.wants_error = !errors.empty();
        t.method = asked;
        t.model = &constants;
        t.band_from = band_from;
        t.S = found + i * r;
        t.bound = bounds.empty() ? nullptr : bounds[0].as<double>() + i * r;
        t.previous = before.empty() ? nullptr : before[0].as<double>() + i * r;
    }
    {
        py::gil_scoped_release release;
        sosd_fast::svdvals(tasks.data(), count, threads);
        for (size_t i = 0; i < wide.size(); ++i) values.as<float>()[i] = float(wide[i]);
    }
    const py::object of[] = {methods[0], methods[1], methods[2], methods[3]};
    py::tuple stood(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        PyTuple_SET_ITEM(stood.ptr(), i, py::object(of[size_t(tasks[size_t(i)].method)]).release().ptr());
        if (!errors.empty()) errors[0].as<double>()[i] = tasks[size_t(i)].sd_error;
    }
    return stood;
}

// Checks triangles (B, r (r + 1) / 2) in float32 or float64, contiguous.
void expect_triangles(const char* function, const Tensor& triangles, int64_t count, int64_t r) {
    if ((triangles.dtype == DType::f32 || triangles.dtype == DType::f64) && triangles.contiguous() && r > 0 &&
        r <= kLongestShortSide && triangles.size == std::vector<int64_t>{count, r * (r + 1) / 2})
        return;
    refuse(std::string(function) + ": expected triangles contiguous of shape (B, r (r + 1) / 2) in float32 or float64, for B = " +
           std::to_string(count) + " and r = " + std::to_string(r) + ", got shape " + sosd_fast::to_string(triangles.size) + ".");
}

// parts: B tensors (K_i, r) of one dtype, any strides, none empty. scale (B,) float64: powers of two. Written are
// triangles (B, r (r + 1) / 2), whose dtype is the precision, squares (B, r) float64 and drift (B,) float64.
void gram_triangles(const py::sequence& parts, const py::object& scale, const py::object& triangles,
                    const py::object& squares, const py::object& drift, int threads) {
    const Tensor scales(scale, "scale"), to(triangles, "triangles"), diagonals(squares, "squares"), drifts(drift, "drift");
    const int64_t count = int64_t(parts.size()), r = diagonals.dims() == 2 ? diagonals.size[1] : 0;
    expect_triangles("gram_triangles", to, count, r);
    diagonals.expect("squares", DType::f64, {count, r});
    scales.expect("scale", DType::f64, {count});
    drifts.expect("drift", DType::f64, {count});
    std::vector<Tensor> opened;
    std::vector<sosd_fast::PartTask> tasks;
    for (int64_t i = 0; i < count; ++i) {
        opened.emplace_back(parts[size_t(i)], "parts");
        const Tensor& A = opened.back();
        if (A.dims() != 2 || A.size[0] < 1 || A.size[1] != r)
            refuse("gram_triangles: expected parts of shape (K, " + std::to_string(r) + "), got shape " +
                   sosd_fast::to_string(A.size) + ".");
        tasks.push_back({A.data, A.dtype, r, A.size[0], A.stride[1], A.stride[0], scales.as<double>()[i], to.dtype,
                         to.data + i * to.size[1] * bytes_of(to.dtype), diagonals.as<double>() + i * r, 0});
    }
    {
        py::gil_scoped_release release;
        sosd_fast::gram_triangles(tasks.data(), count, threads);
    }
    for (int64_t i = 0; i < count; ++i) drifts.as<double>()[i] = tasks[size_t(i)].drift;
}

// triangles: (B, r (r + 1) / 2), float32 or float64, contiguous. values: (B, r) float64, contiguous, is written.
// band_from, for tests: see SvdvalsTask.
void gram_eigenvalues(const py::object& triangles, const py::object& values, int threads, int64_t band_from) {
    const Tensor given(triangles, "triangles"), to(values, "values");
    const int64_t count = given.dims() ? given.size[0] : 0, r = to.dims() == 2 ? to.size[1] : 0;
    expect_triangles("gram_eigenvalues", given, count, r);
    to.expect("values", DType::f64, {count, r});
    std::vector<sosd_fast::GramTask> tasks;
    for (int64_t i = 0; i < count; ++i)
        tasks.push_back({given.data + i * given.size[1] * bytes_of(given.dtype), given.dtype, r,
                         to.as<double>() + i * r, band_from});
    py::gil_scoped_release release;
    sosd_fast::gram_eigenvalues(tasks.data(), count, threads);
}

// For tests: the eigenvalues of matrices that share the lanes of vectors. d, e and values: (B, n) float64, contiguous; the
// last column of e is not read; values are written, those below zero as zero.
void tridiagonal_eigenvalues(const py::object& d, const py::object& e, const py::object& values, double tolerance, int64_t sweeps) {
    const Tensor diagonal(d, "d"), beside(e, "e"), to(values, "values");
    if (diagonal.dims() != 2 || diagonal.size[1] < 1) refuse("tridiagonal_eigenvalues: expected d of shape (B, n).");
    for (const auto* t : {&diagonal, &beside, &to}) t->expect("d, e and values", DType::f64, diagonal.size);
    const int64_t n = diagonal.size[1], most = sosd_fast::kernels().together;
    const sosd_fast::Parallel alone{nullptr,
                                    [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
                                        for (int64_t i = 0; i < count; ++i) task(context, i);
                                    },
                                    [](void*) { return false; }, [] {}};
    sosd_fast::Arena arena;
    for (int64_t at = 0; at < diagonal.size[0]; at += most) {
        std::vector<sosd_fast::Tridiagonal> each;
        for (int64_t i = at; i < std::min(at + most, diagonal.size[0]); ++i)
            each.push_back({diagonal.as<double>() + i * n, beside.as<double>() + i * n, 1, tolerance, to.as<double>() + i * n});
        sosd_fast::kernels().eigenvalues_together(each.data(), int64_t(each.size()), n, sweeps, arena, alone);
    }
}

// matrices: B float32 tensors (m, n), m >= n, one of the strides 1. V, P, next_V and next_P are (B, b, n), squares and
// residual (B, b), all float32 and contiguous; b < n. Returns of each matrix whether it is ordinary, see SubspaceTask;
// where it is not, its outputs are not to be used.
std::vector<bool> advance_subspaces(const py::sequence& matrices, float pace, const py::object& V, const py::object& P,
                                    const py::object& next_V, const py::object& next_P, const py::object& squares,
                                    const py::object& residual, int threads) {
    const std::vector<Tensor> opened = open_matrices("advance_subspaces", matrices, true);
    if (opened.empty()) return {};
    const int64_t count = int64_t(opened.size()), m = opened[0].size[0], n = opened[0].size[1];
    const Tensor basis(V, "V"), change(P, "P"), to_V(next_V, "next_V"), to_P(next_P, "next_P"), values(squares, "squares"),
        residuals(residual, "residual");
    if (opened[0].dtype != DType::f32 || m < n || basis.dims() != 3 || basis.size[1] < 1 || basis.size[1] >= n)
        refuse("advance_subspaces: expected upright float32 matrices and b < n directions, got shapes " +
               sosd_fast::to_string(opened[0].size) + " and " + sosd_fast::to_string(basis.size) + ".");
    const int64_t b = basis.size[1];
    for (const auto* t : {&basis, &change, &to_V, &to_P})
        t->expect("V, P, next_V and next_P", DType::f32, {count, b, n});
    for (const auto* t : {&values, &residuals}) t->expect("squares and residual", DType::f32, {count, b});
    std::vector<sosd_fast::SubspaceTask> tasks;
    for (int64_t i = 0; i < count; ++i) {
        const Tensor& W = opened[size_t(i)];
        if (W.stride[0] != 1 && W.stride[1] != 1)
            refuse("advance_subspaces: expected a stride of 1, got strides " + sosd_fast::to_string(W.stride) + ".");
        const int64_t at = i * b * n;
        tasks.push_back({W.as<float>(), m, n, W.stride[0], W.stride[1], basis.as<float>() + at,
                         change.as<float>() + at, to_V.as<float>() + at, to_P.as<float>() + at, values.as<float>() + i * b, residuals.as<float>() + i * b, false});
    }
    {
        py::gil_scoped_release release;
        sosd_fast::advance_subspaces(tasks.data(), count, b, pace, threads);
    }
    std::vector<bool> ordinary;
    for (const auto& t : tasks) ordinary.push_back(t.ordinary);
    return ordinary;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of sosd_fast for CPU tensors; call them through sosd_fast.kernels.";
    m.def("isa", [] { return sosd_fast::kernels().isa; });
    m.def("svdvals", &svdvals, py::arg("matrices"), py::arg("method"), py::arg("previous"), py::arg("S"),
          py::arg("bound"), py::arg("sd_error"), py::arg("methods"), py::arg("threads"), py::arg("model"),
          py::arg("band_from") = 0);
    m.def("sd_error", &sd_error, py::arg("S"), py::arg("method"), py::arg("inner"), py::arg("drift"), py::arg("noise"),
          py::arg("model"));
    m.def("gram_triangles", &gram_triangles, py::arg("parts"), py::arg("scale"), py::arg("triangles"),
          py::arg("squares"), py::arg("drift"), py::arg("threads"));
    m.def("gram_eigenvalues", &gram_eigenvalues, py::arg("triangles"), py::arg("values"), py::arg("threads"),
          py::arg("band_from") = 0);
    m.def("tridiagonal_eigenvalues", &tridiagonal_eigenvalues, py::arg("d"), py::arg("e"), py::arg("values"),
          py::arg("tolerance"), py::arg("sweeps"));
    m.def("advance_subspaces", &advance_subspaces, py::arg("matrices"), py::arg("pace"), py::arg("V"), py::arg("P"),
          py::arg("next_V"), py::arg("next_P"), py::arg("squares"), py::arg("residual"), py::arg("threads"));
    m.def("singular_distribution", &any_distribution, py::arg("S"), py::arg("previous"), py::arg("reference"),
          py::arg("sd"), py::arg("statistics"), py::arg("k"));
}
