#include "bindings/buffer.h"

#include <cstdint>
#include <string>

namespace nb = nanobind;

namespace dscheck {
namespace {

using MakeError = decltype(&nb::value_error);

[[noreturn]] void refuse(MakeError make_error, const std::string& message) { throw make_error(message.c_str()); }

std::string kind_of(nb::handle object) { return nb::type_name(object.type()).c_str(); }

void require_host_bytes(const nb::ndarray<nb::ro>& array, nb::handle object) {
  const std::string given = "got a " + kind_of(object);
  if (array.dtype() != nb::dtype<std::uint8_t>()) {
    refuse(nb::type_error, "expected elements of type uint8, " + given + " of another type: view it as uint8 first");
  }
  if (array.device_type() != nb::device::cpu::value) {
    refuse(nb::value_error, "expected host memory, " + given + " on another device: copy it to the host first");
  }
  if (array.ndim() != 1) {
    const std::string found = std::to_string(array.ndim());
    refuse(nb::value_error, "expected 1 dimension, " + given + " with " + found + ": flatten it first");
  }
  if (array.shape(0) > 1 && array.stride(0) != 1) {
    const std::string found = std::to_string(array.stride(0));
    refuse(nb::value_error, "expected contiguous bytes, " + given + " with a stride of " + found);
  }
}

}  // namespace

ByteView::ByteView(nb::handle object) {
  if (!nb::try_cast(object, array_, false)) {
    refuse(nb::type_error,
           "expected a buffer of uint8 (bytes, memoryview, mmap, array or host tensor), got a " + kind_of(object));
  }
  require_host_bytes(array_, object);
  bytes_ = {static_cast<const std::byte*>(array_.data()), array_.size()};
}

}  // namespace dscheck
