// The Python module: one for each instruction set, each holding the bindings of every source file.
#include "tensor.hpp"

namespace seqmix {

namespace {

// PyTorch's dtype objects are unique, so identity tells them apart. They live as long as the process.
struct Dtypes {
    PyObject* objects[7] = {};
    Dtypes() {
        nb::module_ torch = nb::module_::import_("torch");
        const char* names[] = {nullptr, "float32", "bfloat16", "int64", "int32", "int8", "uint8"};
        for (int i = 1; i < 7; ++i) objects[i] = nb::object(torch.attr(names[i])).release().ptr();
    }
};

int64_t whole(PyObject* number) { return PyLong_AsLongLong(number); }

nb::object attribute(nb::handle object, const char* name) { return nb::getattr(object, name); }

}  // namespace

Tensor read_tensor(nb::handle object) {
    static const Dtypes known;
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    Tensor tensor;
    if (object.is_none()) return tensor;
    nb::object dtype = attribute(object, "dtype"), shape = attribute(object, "shape");
    for (int i = 1; i < 7; ++i)
        if (dtype.ptr() == known.objects[i]) tensor.dtype = Dtype(i);
    if (tensor.dtype == Dtype::none) throw nb::type_error("a dtype that no kernel takes");
    nb::object strides = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), stride));
    nb::object address = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), data_ptr));
    if (!strides.is_valid() || !address.is_valid()) throw nb::python_error();
    tensor.axes = int(PyTuple_Size(shape.ptr()));
    if (tensor.axes > MOST_AXES) throw nb::type_error("more axes than any kernel takes");
    for (int i = 0; i < tensor.axes; ++i) {
        tensor.sizes[i] = whole(PyTuple_GetItem(shape.ptr(), i));
        tensor.strides[i] = whole(PyTuple_GetItem(strides.ptr(), i));
    }
    tensor.data = reinterpret_cast<void*>(whole(address.ptr()));
    return tensor;
}

}  // namespace seqmix

NB_MODULE(SEQMIX_MODULE, module) {
    for (seqmix::Bindings* list = seqmix::Bindings::first(); list; list = list->next) list->add(module);
}
