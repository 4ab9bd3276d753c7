#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <span>

namespace dscheck {

// The bytes of a contiguous one-dimensional uint8 object in host memory, which stays alive and unmoved while this does.
// Construction needs the GIL; reading the bytes does not.
class ByteView {
 public:
  // Throws TypeError or ValueError that says what was given instead.
  explicit ByteView(nanobind::handle object);

  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  nanobind::ndarray<nanobind::ro> array_;
  std::span<const std::byte> bytes_;
};

}  // namespace dscheck
