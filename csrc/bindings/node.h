#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <utility>

#include "bindings/weak.h"

namespace dscheck {

// What one value of a graph of Python objects is expected to be.
class Node {
 public:
  virtual ~Node() = default;
  // Whether `value` is as recorded. Puts what the caller asked for into `wanted`, by name.
  virtual bool same(nanobind::handle value, nanobind::dict& wanted) const = 0;
};

// The very object, by its address alone.
class At final : public Node {
 public:
  explicit At(nanobind::handle object) : address_(object.ptr()) {}
  bool same(nanobind::handle value, nanobind::dict&) const override { return value.ptr() == address_; }
  PyObject* address() const { return address_; }

 private:
  PyObject* address_;
};

// A node as part of another one. The address of an At lies here, so that thousands of them are read in one sweep.
class Child {
 public:
  explicit Child(nanobind::object node) {
    if (nanobind::isinstance<At>(node)) {
      address_ = nanobind::cast<const At&>(node).address();
    } else {
      node_ = nanobind::cast<const Node*>(node);
      owner_ = std::move(node);
    }
  }

  bool same(nanobind::handle value, nanobind::dict& wanted) const {
    return node_ == nullptr ? value.ptr() == address_ : node_->same(value, wanted);
  }

 private:
  PyObject* address_ = nullptr;
  const Node* node_ = nullptr;
  nanobind::object owner_;
};

inline bool is_equal(nanobind::handle one, nanobind::handle other) {
  const int result = PyObject_RichCompareBool(one.ptr(), other.ptr(), Py_EQ);
  if (result < 0) throw nanobind::python_error();
  return result == 1;
}

inline bool is_exactly(nanobind::handle value, nanobind::handle type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == type.ptr();
}

// A key of a dict: texts and numbers by value, all else (the parameters in an optimizer's state) by identity.
class Key {
 public:
  explicit Key(nanobind::handle key) {
    if (PyUnicode_CheckExact(key.ptr()) || PyLong_CheckExact(key.ptr())) {
      value_ = nanobind::borrow(key);
    } else {
      weak_.emplace(key);
    }
  }

  bool is(nanobind::handle key) const {
    if (weak_) return weak_->is(key);
    return value_.is(key) || (is_exactly(key, value_.type()) && is_equal(value_, key));
  }

 private:
  nanobind::object value_;
  std::optional<Weak> weak_;
};

}  // namespace dscheck
