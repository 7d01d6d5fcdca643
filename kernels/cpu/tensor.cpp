#include "tensor.hpp"

#include <limits>

namespace py = pybind11;

namespace sosd_fast {

namespace {

// What of torch is compared with, and names; looked up once and never freed, for the interpreter may end first.
struct Torch {
    py::object tensor, parameter, strided;
    py::str layout{"layout"}, device{"device"}, type{"type"}, dtype{"dtype"}, shape{"shape"}, stride{"stride"};
    py::str untyped_storage{"untyped_storage"}, nbytes{"nbytes"}, storage_offset{"storage_offset"}, data_ptr{"data_ptr"};
    std::vector<py::object> dtypes;  // in the order of DType

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        tensor = torch.attr("Tensor");
        parameter = torch.attr("nn").attr("Parameter");
        strided = torch.attr("strided");
        for (const char* name : {"float32", "float64", "bfloat16", "float16"}) dtypes.push_back(torch.attr(name));
    }
};

const Torch& torch() {
    static const Torch* known = new Torch;
    return *known;
}

[[noreturn]] void refuse(const char* name, const std::string& got, const std::string& remedy) {
    throw py::value_error("sosd_fast._C: expected a plain tensor on the CPU, got " + std::string(name) + " " + got + ". " +
                          remedy);
}

py::object call(const py::handle& self, const py::str& method) {
    PyObject* result = PyObject_CallMethodNoArgs(self.ptr(), method.ptr());
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

std::vector<int64_t> integers(const py::handle& tuple) {
    std::vector<int64_t> out;
    for (const py::handle& each : py::reinterpret_borrow<py::tuple>(tuple)) out.push_back(each.cast<int64_t>());
    return out;
}

}  // namespace

std::string to_string(const std::vector<int64_t>& size) {
    std::string out = "(";
    for (size_t i = 0; i < size.size(); ++i) out += (i ? ", " : "") + std::to_string(size[i]);
    return out + ")";
}

Tensor::Tensor(py::handle tensor, const char* name) {
    const Torch& t = torch();
    const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    if (!type.is(t.tensor) && !type.is(t.parameter))
        refuse(name, "of type " + type.attr("__name__").cast<std::string>(), "Pass its dense values.");
    const py::object layout = tensor.attr(t.layout), device = tensor.attr(t.device);
    if (!layout.is(t.strided) || PyUnicode_CompareWithASCIIString(device.attr(t.type).ptr(), "cpu") != 0)
        refuse(name, "on " + py::str(device).cast<std::string>() + " of layout " + py::str(layout).cast<std::string>(),
               "Pass a dense copy on the CPU.");
    const py::object given = tensor.attr(t.dtype);
    size_t found = 0;
    while (found < t.dtypes.size() && !given.is(t.dtypes[found])) ++found;
    if (found == t.dtypes.size())
        refuse(name, "of dtype " + py::str(given).cast<std::string>(), "Convert it with .float().");
    dtype = DType(found);
    const int64_t bytes = bytes_of(dtype);
    try {
        size = integers(tensor.attr(t.shape));
        stride = integers(call(tensor, t.stride));
        storage = call(tensor, t.untyped_storage);  // raises for what torch.func wraps
        const auto held = call(storage, t.nbytes).cast<int64_t>();
        int64_t first = call(tensor, t.storage_offset).cast<int64_t>(), last = first;  // element
        bool empty = false, fits = first >= 0;
        for (size_t i = 0; i < size.size() && fits; ++i) {
            int64_t span = 0;
            empty |= size[i] == 0;
            fits = size[i] >= 0 && stride[i] >= 0 && (size[i] == 0 || !__builtin_mul_overflow(size[i] - 1, stride[i], &span)) &&
                   !__builtin_add_overflow(last, span, &last);
        }
        data = reinterpret_cast<char*>(call(storage, t.data_ptr).cast<uintptr_t>());
        if (!empty && !(fits && data && last < held / bytes))
            refuse(name, "of shape " + to_string(size) + " whose storage holds " + std::to_string(held) + " bytes",
                   "Its memory was freed or resized; gather it first.");
        data = empty ? nullptr : data + first * bytes;
    } catch (py::error_already_set& error) {
        if (!error.matches(PyExc_Exception)) throw;
        refuse(name, std::string("without memory of its own (") + py::str(error.value()).cast<std::string>() + ")",
               "Pass its dense values.");
    }
}

int64_t Tensor::count() const {
    int64_t n = 1;
    for (const int64_t each : size) n *= each;
    return n;
}

bool Tensor::contiguous() const {
    int64_t step = 1;
    for (size_t i = size.size(); i-- > 0; step *= size[i])
        if (size[i] > 1 && stride[i] != step) return false;
    return true;
}

void Tensor::expect(const char* name, DType wanted, const std::vector<int64_t>& wanted_size) const {
    if (dtype == wanted && size == wanted_size && contiguous()) return;
    throw py::value_error("sosd_fast._C: expected " + std::string(name) + " contiguous of shape " + to_string(wanted_size) +
                          ", got shape " + to_string(size) + (contiguous() ? "" : ", not contiguous") +
                          (dtype == wanted ? "" : ", of another dtype") + ". Call it through sosd_fast.kernels, and install anew after a change there.");
}

}  // namespace sosd_fast
