#include "bindings/crc32c.h"

#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>

#include "bindings/buffer.h"
#include "core/crc32c.h"

namespace nb = nanobind;

namespace dscheck {
namespace {

using Checksums = nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<1>>;

std::uint32_t checked_crc(std::int64_t value) {
  if (value < 0 || value > std::numeric_limits<std::uint32_t>::max()) {
    throw nb::value_error(("value: expected a CRC in [0, 2**32), got " + std::to_string(value)).c_str());
  }
  return static_cast<std::uint32_t>(value);
}

template <auto kFunction>
std::uint32_t checksum(nb::handle data, std::int64_t value) {
  const std::uint32_t start = checked_crc(value);
  const ByteView view(data);
  const nb::gil_scoped_release released;
  return kFunction(view.bytes(), start);
}

Checksums owned(std::unique_ptr<std::uint32_t[]> checksums, std::size_t count) {
  std::uint32_t* const first = checksums.get();
  const nb::capsule owner(first, [](void* p) noexcept { delete[] static_cast<std::uint32_t*>(p); });
  checksums.release();
  return Checksums(first, {count}, owner);
}

// A few dozen microseconds are not worth the 5 ms that it can take to get the GIL back.
constexpr std::size_t kKeepGil = std::size_t{256} << 10;

Checksums block_checksums(nb::handle data, std::int64_t block_bytes) {
  if (block_bytes <= 0) {
    throw nb::value_error(("block_bytes: expected at least 1, got " + std::to_string(block_bytes)).c_str());
  }
  const std::size_t length = static_cast<std::size_t>(block_bytes);
  const ByteView view(data);
  const std::size_t count = block_count(view.bytes().size(), length);
  auto checksums = std::make_unique<std::uint32_t[]>(count);
  const auto compute = [&] { crc32c_blocks(view.bytes(), length, {checksums.get(), count}); };
  if (view.bytes().size() < kKeepGil) {
    compute();
  } else {
    const nb::gil_scoped_release released;
    compute();
  }
  return owned(std::move(checksums), count);
}

using Sizes = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Checksums part_checksums(nb::handle data, const Sizes& sizes) {
  const ByteView view(data);
  std::span<const std::byte> left = view.bytes();
  auto checksums = std::make_unique<std::uint32_t[]>(sizes.size());
  if (std::accumulate(sizes.data(), sizes.data() + sizes.size(), std::size_t{0}) != left.size()) {
    throw nb::value_error("sizes: expected parts that are all of the data");
  }
  {
    const nb::gil_scoped_release released;
    for (std::size_t part = 0; part < sizes.size(); ++part) {
      checksums[part] = crc32c(left.first(sizes.data()[part]));
      left = left.subspan(sizes.data()[part]);
    }
  }
  return owned(std::move(checksums), sizes.size());
}

}  // namespace

void bind_crc32c(nb::module_& module) {
  using namespace nb::literals;
  module.def("crc32c", &checksum<&crc32c>, "data"_a.none(), "value"_a = 0);
  module.def("crc32c_scalar", &checksum<&crc32c_scalar>, "data"_a.none(), "value"_a = 0);
  module.def("crc32c_blocks", &block_checksums, "data"_a.none(), "block_bytes"_a);
  module.def("crc32c_parts", &part_checksums, "data"_a.none(), "sizes"_a);
  module.def("crc32c_is_accelerated", &crc32c_is_accelerated);
}

}  // namespace dscheck
