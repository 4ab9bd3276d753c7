#include "bindings/shuffle.h"

#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

#include "bindings/buffer.h"
#include "core/shuffle.h"

namespace nb = nanobind;

namespace dscheck {
namespace {

using Out = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<std::byte> checked(std::span<const std::byte> data, std::size_t width, std::size_t block_bytes,
                             const Out& out) {
  const bool known = width == 1 || width == 2 || width == 4 || width == 8;
  if (!known || block_bytes == 0 || block_bytes % width != 0 || data.size() % width != 0) {
    throw std::invalid_argument("blocks are not whole elements of 1, 2, 4 or 8 bytes");
  }
  if (out.size() != data.size()) throw std::invalid_argument("the output is not as long as the input");
  const std::span<std::byte> found(reinterpret_cast<std::byte*>(out.data()), out.size());
  const auto begins = [](auto bytes) { return reinterpret_cast<std::uintptr_t>(bytes.data()); };
  if (begins(found) < begins(data) + data.size() && begins(data) < begins(found) + found.size()) {
    throw std::invalid_argument("the output overlaps the input");
  }
  return found;
}

}  // namespace

void bind_shuffle(nb::module_& module) {
  using namespace nb::literals;
  module.def(
      "shuffle_blocks",
      [](nb::handle data, std::size_t width, std::size_t block_bytes, const Out& out) {
        const ByteView view(data);
        const auto to = checked(view.bytes(), width, block_bytes, out);
        const nb::gil_scoped_release released;
        shuffle_blocks(view.bytes(), width, block_bytes, to);
      },
      "data"_a, "width"_a, "block_bytes"_a, "out"_a);
  module.def(
      "unshuffle",
      [](nb::handle data, std::size_t width, const Out& out) {
        const ByteView view(data);
        const auto to = checked(view.bytes(), width, width, out);
        const nb::gil_scoped_release released;
        unshuffle(view.bytes(), width, to);
      },
      "data"_a, "width"_a, "out"_a);
}

}  // namespace dscheck
