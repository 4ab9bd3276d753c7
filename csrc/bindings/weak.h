#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

// A Python object remembered without keeping it alive. Its address alone would not do: once it is gone, another one may
// be made in the same place.
class Weak {
 public:
  // Throws TypeError for an object that cannot be weakly referenced.
  explicit Weak(nanobind::handle object) : reference_(nanobind::steal(PyWeakref_NewRef(object.ptr(), nullptr))) {
    if (!reference_.is_valid()) throw nanobind::python_error();
  }

  // The object, or null when it is gone.
  nanobind::object get() const {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference_.ptr(), &object) < 0) PyErr_Clear();
    return nanobind::steal(object);
#else
    PyObject* object = PyWeakref_GetObject(reference_.ptr());
    return object == Py_None ? nanobind::object() : nanobind::borrow(object);
#endif
  }

  bool is(nanobind::handle object) const { return get().ptr() == object.ptr(); }

 private:
  nanobind::object reference_;
};

}  // namespace dscheck
