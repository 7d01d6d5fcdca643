// The door between torch's tensors and the kernels: what passes can be read or written by its strides, and nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gram.hpp"

namespace sosd_fast {

// A torch tensor's memory. The extension links no libtorch, so it asks the tensor as Python does.
struct Tensor {
    char* data;
    DType dtype;
    std::vector<int64_t> size, stride;  // in elements
    pybind11::object storage;           // keeps the memory alive while the GIL is released

    // Throws ValueError unless `tensor` is a plain, strided torch.Tensor or Parameter on the CPU, of a floating-point
    // dtype, whose storage covers every element. Subclasses, fake tensors, and tensors that a transform of torch.func
    // wraps are refused, and so are tensors whose storage was freed or resized.
    Tensor(pybind11::handle tensor, const char* name);

    int64_t dims() const { return int64_t(size.size()); }
    int64_t count() const;
    bool contiguous() const;
    template <class T> T* as() const { return reinterpret_cast<T*>(data); }

    // Throws ValueError unless the tensor is contiguous, of this dtype and of this size.
    void expect(const char* name, DType wanted, const std::vector<int64_t>& wanted_size) const;
};

std::string to_string(const std::vector<int64_t>& size);

}  // namespace sosd_fast
