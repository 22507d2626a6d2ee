// What Python passes: a PyTorch tensor as address, dtype, sizes and strides, and a list that bindings join.
//
// PyTorch is not needed to build: a tensor is read through its Python attributes, which takes a third of a microsecond.
#pragma once

#include <cstdint>
#include <initializer_list>

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "vector.hpp"

namespace nb = nanobind;
using namespace nb::literals;  // "name"_a, and "name"_a.none() for a tensor that may be absent

namespace seqmix {

enum class Dtype { none, float32, bfloat16, int64, int32, int8, uint8 };

constexpr int MOST_AXES = 5;

// A tensor, or nothing (`dtype` is none) where None was passed. One without entries has no address and is a tensor.
struct Tensor {
    void* data = nullptr;
    Dtype dtype = Dtype::none;
    int axes = 0;
    int64_t sizes[MOST_AXES] = {};
    int64_t strides[MOST_AXES] = {};  // in elements

    explicit operator bool() const { return dtype != Dtype::none; }
    template <class T>
    T* as() const { return static_cast<T*>(data); }
    int64_t size(int axis) const { return sizes[axis]; }
    int64_t stride(int axis) const { return strides[axis]; }
};

// Raises ValueError in Python. Users' mistakes are caught there, with better words; this guards the memory.
inline void require(bool holds, const char* message) {
    if (!holds) throw nb::value_error(message);
}

inline void require_shape(const Tensor& tensor, const char* message, std::initializer_list<int64_t> sizes) {
    require(tensor.axes == int(sizes.size()), message);
    int axis = 0;
    for (int64_t size : sizes) require(tensor.sizes[axis++] == size, message);
}

Tensor read_tensor(nb::handle tensor);

// Bindings that every source file adds to the module: SEQMIX_BINDINGS(module) { module.def(...); }
struct Bindings {
    void (*add)(nb::module_&);
    Bindings* next;
    static Bindings*& first() {
        static Bindings* list = nullptr;
        return list;
    }
    explicit Bindings(void (*add)(nb::module_&)) : add(add), next(first()) { first() = this; }
};

#define SEQMIX_BINDINGS(module)                        \
    static void add_bindings(nanobind::module_& module); \
    static seqmix::Bindings bindings(add_bindings);    \
    static void add_bindings(nanobind::module_& module)

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

}  // namespace seqmix

namespace nanobind::detail {

template <>
struct type_caster<seqmix::Tensor> {
    NB_TYPE_CASTER(seqmix::Tensor, const_name("torch.Tensor | None"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        try {
            value = seqmix::read_tensor(source);
            return true;
        } catch (...) {
            PyErr_Clear();
            return false;
        }
    }
    static handle from_cpp(const seqmix::Tensor&, rv_policy, cleanup_list*) noexcept { return {}; }
};

}  // namespace nanobind::detail
