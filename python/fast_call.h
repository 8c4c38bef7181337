// Functions by Python's own calling convention, whose arguments are integers: pybind11's takes a third of a tiny
// layer's time. self is the capsule of what was prepared.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <stdexcept>

namespace lgk {

template <typename T>
const T& prepared(PyObject* self) {
  return *static_cast<const T*>(PyCapsule_GetPointer(self, nullptr));
}

// The arguments as numbers; false with Python's error set where they are not kCount integers.
template <Py_ssize_t kCount>
bool read_numbers(const char* op, PyObject* const* arguments, Py_ssize_t count, int64_t (&numbers)[kCount]) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, not %zd", op, kCount, count);
    return false;
  }
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    numbers[i] = PyLong_AsLongLong(arguments[i]);
    if (numbers[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

// None, or null with the error of what `run` threw.
template <typename F>
PyObject* none_of(F run) {
  try {
    run();
  } catch (const std::exception& error) {
    PyErr_SetString(
        dynamic_cast<const std::invalid_argument*>(&error) != nullptr ? PyExc_ValueError : PyExc_MemoryError,
        error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyCFunction fast(FastCall function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// A function bound to `made`, which it comes to own.
template <typename T>
pybind11::object bound(PyMethodDef* method, T* made) {
  const pybind11::capsule self(made, [](void* p) { delete static_cast<T*>(p); });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(method, self.ptr(), nullptr));
}

}  // namespace lgk
