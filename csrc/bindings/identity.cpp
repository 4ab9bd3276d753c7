#include "bindings/identity.h"

#include <optional>
#include <utility>
#include <vector>

#include "bindings/node.h"

// Tells in one call whether a graph of Python objects is still what it was: 10 ns an entry, where Python takes 300.
//
// A record keeps nothing alive but types, texts and numbers. What stands for itself (a tensor, a module, an optimizer)
// is held weakly, and is the same if that reference still leads to it. An address alone would not do, as another object
// may be made there: it serves only (`At`) where something else in the record tells that the object is alive. Dicts and
// lists have no weak references and need none: each look reaches them anew from the object that holds them, and they
// are the same if all that they hold is.

namespace nb = nanobind;

namespace dscheck {
namespace {

// Calls `visit(key, value)` for all that a container holds (a sequence: with a null key) until it returns false.
template <typename Visit>
bool each(nb::handle container, Visit visit) {
  PyObject* const object = container.ptr();
  const bool is_empty = PyODict_CheckExact(object) && PyDict_GET_SIZE(object) == 0;
  if (is_empty || (PyDict_Check(object) && Py_TYPE(object)->tp_iter == PyDict_Type.tp_iter)) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(object, &at, &key, &value);) {
      const nb::object held = nb::borrow(value);
      if (!visit(nb::handle(key), held)) return false;
    }
    return true;
  }
  const bool is_mapping = !PyList_Check(object) && !PyTuple_Check(object);
  const nb::object items = nb::steal(is_mapping ? PyMapping_Items(object) : PySequence_List(object));
  if (!items.is_valid()) throw nb::python_error();
  for (const nb::handle item : nb::borrow<nb::list>(items)) {
    if (!(is_mapping ? visit(nb::object(item[0]), nb::object(item[1])) : visit(nb::handle(), item))) return false;
  }
  return true;
}

class Anything final : public Node {
 public:
  bool same(nb::handle, nb::dict&) const override { return true; }
};

class Same final : public Node {
 public:
  explicit Same(nb::handle object) : weak_(object) {}
  bool same(nb::handle value, nb::dict&) const override { return weak_.is(value); }

 private:
  Weak weak_;
};

class Kind final : public Node {
 public:
  Kind(nb::object type, nb::object wanted_as) : type_(std::move(type)), name_(std::move(wanted_as)) {}

  bool same(nb::handle value, nb::dict& wanted) const override {
    if (!is_exactly(value, type_)) return false;
    if (!name_.is_none()) wanted[name_] = value;
    return true;
  }

 private:
  nb::object type_, name_;
};

class Equal final : public Node {
 public:
  explicit Equal(nb::object value) : value_(std::move(value)) {}
  bool same(nb::handle value, nb::dict&) const override { return is_equal(value_, value); }

 private:
  nb::object value_;
};

class Entries final : public Node {
 public:
  Entries(nb::handle container, const nb::sequence& nodes) : type_(nb::borrow(container.type())) {
    nb::iterator node = nb::iter(nodes);
    each(container, [&](nb::handle key, nb::handle) {
      if (node == nb::iterator::sentinel()) throw nb::value_error("expected a node for every entry of the container");
      entries_.push_back({key.is_valid() ? std::optional<Key>(key) : std::nullopt, Child(nb::borrow(*node))});
      ++node;
      return true;
    });
  }

  bool same(nb::handle value, nb::dict& wanted) const override {
    if (!is_exactly(value, type_)) return false;
    auto entry = entries_.begin();
    const bool matched = each(value, [&](nb::handle key, nb::handle item) {
      if (entry == entries_.end() || (entry->key && !entry->key->is(key))) return false;
      return (entry++)->node.same(item, wanted);
    });
    return matched && entry == entries_.end();
  }

 private:
  struct Entry {
    std::optional<Key> key;
    Child node;
  };
  nb::object type_;
  std::vector<Entry> entries_;
};

class Members final : public Node {
 public:
  explicit Members(const nb::dict& nodes) {
    for (const auto [key, node] : nodes) members_.emplace_back(nb::borrow(key), Child(nb::borrow(node)));
  }

  bool same(nb::handle value, nb::dict& wanted) const override {
    if (!PyDict_Check(value.ptr())) return false;
    for (const auto& [key, node] : members_) {
      const nb::object member = nb::borrow(PyDict_GetItemWithError(value.ptr(), key.ptr()));
      if (!member.is_valid() || !node.same(member, wanted)) return false;
    }
    return true;
  }

 private:
  std::vector<std::pair<nb::object, Child>> members_;
};

// Where a record begins: an object that is reached by its weak reference alone.
class Standing {
 public:
  Standing(nb::handle object, const nb::dict& attributes, const nb::sequence& absent)
      : weak_(object), type_(nb::borrow(object.type())) {
    for (const auto [name, node] : attributes) attributes_.emplace_back(nb::borrow(name), Child(nb::borrow(node)));
    for (const nb::handle name : absent) absent_.push_back(nb::borrow(name));
  }

  bool same(nb::dict& wanted) const {
    const nb::object object = weak_.get();
    if (!object.is_valid() || !is_exactly(object, type_)) return false;
    const nb::object own = nb::steal(PyObject_GenericGetDict(object.ptr(), nullptr));
    if (!own.is_valid()) PyErr_Clear();
    for (const auto& [name, node] : attributes_) {
      const nb::object value = attribute(object, own, name);
      if (!value.is_valid() || !node.same(value, wanted)) return false;
    }
    for (const nb::object& name : absent_) {
      if (own.is_valid() && PyDict_Contains(own.ptr(), name.ptr())) return false;
    }
    return true;
  }

 private:
  // Null for an attribute that is gone.
  static nb::object attribute(nb::handle object, nb::handle own, nb::handle name) {
    PyObject* const found = own.is_valid() ? PyDict_GetItemWithError(own.ptr(), name.ptr()) : nullptr;
    if (found != nullptr) return nb::borrow(found);
    nb::object value = nb::steal(PyObject_GetAttr(object.ptr(), name.ptr()));
    if (!value.is_valid()) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw nb::python_error();
      PyErr_Clear();
    }
    return value;
  }

  Weak weak_;
  nb::object type_;
  std::vector<std::pair<nb::object, Child>> attributes_;
  std::vector<nb::object> absent_;
};

nb::object look(const nb::sequence& roots) {
  nb::dict wanted;
  for (const nb::handle root : roots) {
    if (!nb::cast<const Standing*>(root)->same(wanted)) return nb::none();
  }
  return wanted;
}

}  // namespace

void bind_identity(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Node>(module, "Node");
  nb::class_<Anything, Node>(module, "Anything").def(nb::init<>());
  nb::class_<At, Node>(module, "At").def(nb::init<nb::handle>(), "object"_a);
  nb::class_<Same, Node>(module, "Same").def(nb::init<nb::handle>(), "object"_a);
  nb::class_<Kind, Node>(module, "Kind")
      .def(nb::init<nb::object, nb::object>(), "type"_a, "wanted_as"_a.none() = nb::none());
  nb::class_<Equal, Node>(module, "Equal").def(nb::init<nb::object>(), "value"_a);
  nb::class_<Entries, Node>(module, "Entries").def(nb::init<nb::handle, nb::sequence>(), "container"_a, "nodes"_a);
  nb::class_<Members, Node>(module, "Members").def(nb::init<nb::dict>(), "nodes"_a);
  nb::class_<Standing>(module, "Standing")
      .def(nb::init<nb::handle, nb::dict, nb::sequence>(), "object"_a, "attributes"_a, "absent"_a = nb::make_tuple());
  module.def("look", &look, "roots"_a);
}

}  // namespace dscheck
