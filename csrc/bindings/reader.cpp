#include "bindings/reader.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/buffer.h"
#include "core/crc32c.h"
#include "core/reader.h"

namespace nb = nanobind;

namespace dscheck {
namespace {

using Checksums = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;
using GivenBlocks = std::vector<std::tuple<std::size_t, std::size_t, Checksums>>;
using GivenAxes = std::vector<std::tuple<std::size_t, std::ptrdiff_t, std::ptrdiff_t>>;
using GivenCopies = std::vector<std::tuple<std::size_t, std::uintptr_t, std::size_t, GivenAxes>>;

std::vector<Blocks> blocks_of(const GivenBlocks& given) {
  std::vector<Blocks> blocks;
  blocks.reserve(given.size());
  for (const auto& [offset, bytes, crcs] : given) {
    blocks.push_back({offset, bytes, {crcs.data(), crcs.data() + crcs.size()}});
  }
  return blocks;
}

std::vector<Scatter> copies_of(const GivenCopies& given) {
  std::vector<Scatter> copies;
  copies.reserve(given.size());
  for (const auto& [source, target, element_bytes, given_axes] : given) {
    std::vector<Axis> axes;
    for (const auto& [count, from, to] : given_axes) axes.push_back({count, from, to});
    copies.emplace_back(source, reinterpret_cast<std::byte*>(target), element_bytes, std::move(axes));
  }
  return copies;
}

Reader::Clock::time_point at(double seconds) {
  return Reader::Clock::time_point(
      std::chrono::duration_cast<Reader::Clock::duration>(std::chrono::duration<double>(seconds)));
}

// Not a File itself: nanobind's own shared pointers need the GIL where they end, which may be in any thread.
struct OpenFile {
  std::shared_ptr<File> file;
};

std::size_t add(Reader& reader, const OpenFile* file, std::uint64_t start, std::size_t bytes, const GivenBlocks& blocks,
                const GivenCopies& copies, bool kept) {
  return reader.add({file == nullptr ? nullptr : file->file, start, bytes, blocks_of(blocks), copies_of(copies), kept});
}

// Memory of the reader's own: `self` stays alive as long as the array does.
Bytes buffer(nb::handle self, std::size_t read) {
  const auto bytes = nb::inst_ptr<Reader>(self)->buffer(read);
  return Bytes(reinterpret_cast<std::uint8_t*>(bytes.data()), {bytes.size()}, self);
}

using GivenFault = std::tuple<std::size_t, std::uint64_t, int, std::optional<std::tuple<std::uint32_t, std::uint32_t>>>;

std::optional<GivenFault> fault(const Reader& reader) {
  const auto found = reader.fault();
  if (!found) return std::nullopt;
  std::optional<std::tuple<std::uint32_t, std::uint32_t>> crcs;
  if (found->kind == Fault::Kind::kDamaged) crcs = {found->expected, found->found};
  return GivenFault{found->read, found->offset, found->error, crcs};
}

using GivenDamage = std::tuple<std::size_t, std::uint32_t, std::uint32_t>;

std::optional<GivenDamage> place(nb::handle data, std::size_t block_bytes, const GivenBlocks& given_blocks,
                                 const GivenCopies& given_copies) {
  const ByteView view(data);
  const auto blocks = blocks_of(given_blocks);
  const auto copies = copies_of(given_copies);
  check_inside(blocks, copies, view.bytes().size(), block_bytes);
  const nb::gil_scoped_release released;
  if (const auto damage = find_damage(blocks, block_bytes, view.bytes().data())) {
    return GivenDamage{damage->offset, damage->expected, damage->found};
  }
  for (const Scatter& copy : copies) copy(view.bytes().data());
  return std::nullopt;
}

}  // namespace

void bind_reader(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<OpenFile>(module, "File")
      .def(nb::new_([](int fd) { return OpenFile{std::make_shared<File>(fd)}; }), "fd"_a);
  nb::class_<Reader>(module, "NativeReader")
      .def(
          "__init__",
          [](Reader* self, unsigned threads, std::size_t buffers, std::size_t buffer_bytes, std::size_t block_bytes,
             int device) { new (self) Reader({threads, buffers, buffer_bytes, block_bytes, device}); },
          "threads"_a, "buffers"_a, "buffer_bytes"_a, "block_bytes"_a, "device"_a)
      .def("add", &add, "file"_a.none(), "start"_a, "nbytes"_a, "blocks"_a, "copies"_a, "kept"_a)
      .def(
          "finished", [](Reader& reader, double deadline_s) { return reader.finished(at(deadline_s)); }, "deadline_s"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def("fault", &fault)
      .def("buffer", &buffer, "read"_a)
      .def("release", &Reader::release, "read"_a)
      .def(
          "next_to_fill", [](Reader& reader, double deadline_s) { return reader.next_to_fill(at(deadline_s)); },
          "deadline_s"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("filled", &Reader::filled, "read"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("stop", &Reader::stop, nb::call_guard<nb::gil_scoped_release>());
  module.def("place", &place, "data"_a, "block_bytes"_a, "blocks"_a, "copies"_a);
}

}  // namespace dscheck
