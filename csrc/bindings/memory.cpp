#include "bindings/memory.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/weak.h"

// Where tensors lie and how, read in 20 ns each: torch's own methods take 300 for pointer, shape and strides.

namespace nb = nanobind;

namespace dscheck {
namespace {

using nb::dlpack::dltensor;

// DLPackExchangeAPI of DLPack 1.x, which torch offers from 2.10 on. Later minor versions only append.
struct ExchangeApi {
  std::uint32_t major, minor;
  const ExchangeApi* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*describe)(void* object, dltensor* out);  // borrows: valid while the object is; no work on any stream
  void* current_stream;
};

const ExchangeApi* api_of(nb::handle tensor) {
  const nb::object capsule = nb::getattr(tensor.type(), "__dlpack_c_exchange_api__");
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw nb::python_error();
  while (api != nullptr && api->major != 1) api = api->previous;
  if (api == nullptr) throw nb::type_error("expected tensors that describe themselves by version 1 of DLPack");
  return api;
}

class Memory {
 public:
  explicit Memory(const nb::sequence& tensors) {
    for (const nb::handle tensor : tensors) {
      if (api_ == nullptr) api_ = api_of(tensor);
      const dltensor now = described(tensor);
      const std::size_t first = lengths_.size();
      lengths_.insert(lengths_.end(), now.shape, now.shape + now.ndim);
      lengths_.insert(lengths_.end(), now.strides, now.strides + now.ndim);
      entries_.push_back({Weak(tensor), now.data, now.device, now.dtype, now.ndim, first});
    }
  }

  // The tensors, or None when one is gone or lies elsewhere.
  nb::object tensors() const {
    nb::list found;
    for (const Entry& entry : entries_) {
      nb::object tensor = entry.weak.get();
      if (!tensor.is_valid() || !unchanged(entry, described(tensor))) return nb::none();
      found.append(std::move(tensor));
    }
    return found;
  }

  // Whether as many tensors lay elsewhere in the same way: of equal shapes, strides, types and devices.
  bool is_like(const Memory& other) const {
    const auto like = [](const Entry& a, const Entry& b) {
      return a.ndim == b.ndim && a.device.device_type == b.device.device_type &&
             a.device.device_id == b.device.device_id && a.dtype == b.dtype;
    };
    return lengths_ == other.lengths_ &&
           std::equal(entries_.begin(), entries_.end(), other.entries_.begin(), other.entries_.end(), like);
  }

 private:
  struct Entry {
    Weak weak;
    void* data;
    nb::dlpack::device device;
    nb::dlpack::dtype dtype;
    std::int32_t ndim;
    std::size_t lengths;
  };

  dltensor described(nb::handle tensor) const {
    dltensor now{};
    if (api_->describe(tensor.ptr(), &now) != 0) throw nb::python_error();
    return now;
  }

  bool unchanged(const Entry& entry, const dltensor& now) const {
    const std::int64_t* const lengths = lengths_.data() + entry.lengths;
    return now.data == entry.data && now.ndim == entry.ndim && now.dtype == entry.dtype &&
           now.device.device_type == entry.device.device_type && now.device.device_id == entry.device.device_id &&
           std::equal(now.shape, now.shape + now.ndim, lengths) &&
           std::equal(now.strides, now.strides + now.ndim, lengths + now.ndim);
  }

  const ExchangeApi* api_ = nullptr;
  std::vector<Entry> entries_;
  std::vector<std::int64_t> lengths_;
};

}  // namespace

void bind_memory(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Memory>(module, "Memory")
      .def(nb::init<nb::sequence>(), "tensors"_a)
      .def("tensors", &Memory::tensors)
      .def("is_like", &Memory::is_like, "other"_a);
}

}  // namespace dscheck
