// The Python module: one for each instruction set, each holding the bindings of every source file.
#include <pthread.h>

#include "parallel.hpp"
#include "tensor.hpp"

namespace seqmix {

namespace {

// What is looked up once. PyTorch's dtype objects are unique, so identity tells them apart; names are interned.
// They live as long as the process.
struct Known {
    PyObject* dtypes[7] = {};
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    Known() {
        nb::module_ torch = nb::module_::import_("torch");
        const char* names[] = {nullptr, "float32", "bfloat16", "int64", "int32", "int8", "uint8"};
        for (int i = 1; i < 7; ++i) dtypes[i] = nb::object(torch.attr(names[i])).release().ptr();
    }
};

nb::object checked(PyObject* result) {
    if (!result) throw nb::python_error();
    return nb::steal(result);
}

int64_t whole(PyObject* number) {
    int64_t value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
}

// Addresses may have their highest bit set.
void* address(PyObject* number) {
    void* value = PyLong_AsVoidPtr(number);
    if (!value && PyErr_Occurred()) throw nb::python_error();
    return value;
}

}  // namespace

Tensor read_tensor(nb::handle object) {
    static const Known known;
    Tensor tensor;
    if (object.is_none()) return tensor;
    nb::object dtype = checked(PyObject_GetAttr(object.ptr(), known.dtype));
    for (int i = 1; i < 7; ++i)
        if (dtype.ptr() == known.dtypes[i]) tensor.dtype = Dtype(i);
    if (tensor.dtype == Dtype::none) throw nb::type_error("a dtype that no kernel takes");
    nb::object shape = checked(PyObject_GetAttr(object.ptr(), known.shape));
    nb::object strides = checked(PyObject_CallMethodNoArgs(object.ptr(), known.stride));
    Py_ssize_t axes = PyTuple_Size(shape.ptr());
    if (axes < 0 || PyTuple_Size(strides.ptr()) != axes) throw nb::type_error("not a tensor");
    if (axes > MOST_AXES) throw nb::type_error("more axes than any kernel takes");
    tensor.axes = int(axes);
    for (int i = 0; i < tensor.axes; ++i) {
        tensor.sizes[i] = whole(PyTuple_GetItem(shape.ptr(), i));
        tensor.strides[i] = whole(PyTuple_GetItem(strides.ptr(), i));
    }
    tensor.data = address(checked(PyObject_CallMethodNoArgs(object.ptr(), known.data_ptr)).ptr());
    return tensor;
}

}  // namespace seqmix

NB_MODULE(SEQMIX_MODULE, module) {
    pthread_atfork(nullptr, nullptr, [] { seqmix::is_forked = true; });
    for (seqmix::Bindings* list = seqmix::Bindings::first(); list; list = list->next) list->add(module);
}
