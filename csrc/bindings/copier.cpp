#include "bindings/copier.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/copier.h"
#include "core/sample.h"

namespace nb = nanobind;

namespace dscheck {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;
using Handles = std::vector<std::pair<std::int32_t, std::uint64_t>>;
using Handle = std::shared_ptr<Capture>;

template <typename T>
std::span<const T> span_of(const Array<T>& array, std::size_t expected, const char* name) {
  if (array.size() != expected) {
    const std::string found = std::to_string(array.size()), wanted = std::to_string(expected);
    throw nb::value_error((std::string(name) + ": expected " + wanted + " entries, got " + found).c_str());
  }
  return {array.data(), array.size()};
}

std::vector<PieceSpec> specs_of(const Array<std::uint64_t>& bytes, const Array<std::int32_t>& devices) {
  const auto on = span_of(devices, bytes.size(), "devices");
  std::vector<PieceSpec> specs;
  for (std::size_t i = 0; i < bytes.size(); ++i) specs.push_back({bytes.data()[i], on[i]});
  return specs;
}

Clock::time_point at(double seconds) {
  return Clock::time_point(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
}

Streams streams_of(const Handles& handles) {
  Streams streams;
  for (const auto& [device, handle] : handles) streams.emplace_back(device, reinterpret_cast<cuda::Stream>(handle));
  return streams;
}

std::shared_ptr<CaptureShape> make_shape(
    const Array<std::uint64_t>& piece_bytes, const Array<std::int32_t>& piece_devices,
    const Array<std::uint64_t>& small_bytes, const Array<std::int32_t>& small_devices,
    const Array<std::uint64_t>& small_targets, const Array<std::uint64_t>& watched_bytes,
    const Array<std::int32_t>& watched_devices, std::size_t block_bytes, bool check) {
  auto shape = std::make_shared<CaptureShape>();
  shape->pieces = specs_of(piece_bytes, piece_devices);
  shape->smalls = specs_of(small_bytes, small_devices);
  shape->watched = specs_of(watched_bytes, watched_devices);
  const auto targets = span_of(small_targets, small_bytes.size(), "small_targets");
  shape->targets.assign(targets.begin(), targets.end());
  shape->block_bytes = std::max<std::size_t>(1, block_bytes);
  shape->check = check;
  shape->arrange();
  return shape;
}

// A forked process (a data loader's worker) that drops it has none of the threads to join: there it stays as it is.
std::shared_ptr<Copier> make_copier(std::size_t host_threads, std::size_t io_threads,
                                    std::optional<std::size_t> device_budget) {
  const auto drop = [owner = getpid()](Copier* copier) {
    if (getpid() != owner) return;
    const nb::gil_scoped_release released;  // it waits for its threads and devices, and gives gigabytes back
    delete copier;
  };
  return {new Copier({host_threads, io_threads, device_budget.value_or(Spill::kAuto)}), drop};
}

Handle take(Copier& copier, std::shared_ptr<CaptureShape> shape, const Array<std::uint64_t>& pieces,
            const Array<std::int32_t>& owners, const Array<std::uint64_t>& smalls, const Array<std::uint64_t>& watched,
            const Handles& streams, double window_hint_s) {
  const Live live{span_of(pieces, shape->pieces.size(), "pieces"), span_of(owners, shape->pieces.size(), "owners"),
                  span_of(smalls, shape->smalls.size(), "smalls"), span_of(watched, shape->watched.size(), "watched")};
  return copier.take(shape, live, streams_of(streams), window_hint_s);
}

// Most fences only enqueue, in microseconds: the GIL is let go of only where one has to wait.
bool fence(Copier& copier, const Handle& capture, std::int32_t owner, const Handles& handles, double deadline_s) {
  const Streams streams = streams_of(handles);
  Copier::Fenced fenced = copier.fence(*capture, owner, streams, at(deadline_s), false);
  if (fenced == Copier::Fenced::kWouldWait) {
    const nb::gil_scoped_release released;
    fenced = copier.fence(*capture, owner, streams, at(deadline_s), true);
  }
  return fenced == Copier::Fenced::kDone;
}

template <auto kMethod>
bool waiting(Copier& copier, const Handle& capture, double deadline_s) {
  const nb::gil_scoped_release released;
  return (copier.*kMethod)(*capture, at(deadline_s));
}

std::size_t await_run(Copier& copier, const Handle& capture, std::size_t first, std::size_t stop, double deadline_s) {
  const std::size_t there = copier.await_run(*capture, first, stop, Clock::time_point{});
  if (there > 0) return there;
  const nb::gil_scoped_release released;
  return copier.await_run(*capture, first, stop, at(deadline_s));
}

// Memory of the copier's own: `self` stays alive as long as the array does.
Bytes view(nb::handle self, std::byte* data, std::size_t bytes) {
  return Bytes(reinterpret_cast<std::uint8_t*>(data), {bytes}, self);
}

Bytes run(nb::handle self, const Handle& capture, std::size_t first, std::size_t count) {
  const Copier& copier = *nb::inst_ptr<Copier>(self);
  const Piece &begin = capture->pieces.at(first), &last = capture->pieces.at(first + count - 1);
  return view(self, copier.region().data() + begin.slot, last.slot + last.bytes - begin.slot);
}

nb::bytes checksums(const Handle& capture, std::size_t first, std::size_t count) {
  const CaptureShape& shape = *capture->shape;
  const std::size_t begin = shape.first_block.at(first);
  const std::size_t end = first + count < shape.first_block.size() ? shape.first_block[first + count] : shape.blocks;
  return nb::bytes(capture->checksums.data() + begin, (end - begin) * sizeof(std::uint32_t));
}

std::vector<std::uint64_t> values(const Array<std::uint64_t>& array, std::size_t expected, const char* name) {
  const auto found = span_of(array, expected, name);
  return {found.begin(), found.end()};
}

// 0, or the errno of what refused room for the file.
int write(Copier& copier, const Handle& capture, int file, bool direct, std::size_t slice_bytes, std::uint64_t room,
          const Array<std::uint64_t>& pieces, const Array<std::uint64_t>& smalls,
          const Array<std::uint64_t>& piece_blocks, const Array<std::uint64_t>& small_blocks) {
  const CaptureShape& shape = *capture->shape;
  auto output = std::make_shared<Output>();
  output->file = std::make_unique<OutFile>(file, direct, slice_bytes);
  output->pieces = values(pieces, shape.pieces.size(), "pieces");
  output->smalls = values(smalls, shape.smalls.size(), "smalls");
  output->piece_blocks = values(piece_blocks, shape.pieces.size(), "piece_blocks");
  output->small_blocks = values(small_blocks, shape.smalls.size(), "small_blocks");
  const nb::gil_scoped_release released;
  if (const int error = output->file->reserve(room); error != 0) return error;
  copier.write(*capture, std::move(output));
  return 0;
}

// Whether all is written, and the errno of a write that failed, or 0.
std::pair<bool, int> await_written(Copier& copier, const Handle& capture, double deadline_s) {
  const nb::gil_scoped_release released;
  const bool done = copier.await_written(*capture, at(deadline_s));
  return {done, capture->output->error};
}

void collect(const Handle& capture, const nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& out) {
  capture->collect({out.data(), out.size()});
}

Bytes slab(nb::handle self, const Handle& capture, std::size_t offset, std::size_t bytes) {
  if (offset + bytes > capture->shape->slab_bytes) throw nb::value_error("outside the slab");
  return view(self, capture->slab.data + offset, bytes);
}

nb::bytes watched(const Handle& capture, std::size_t index) {
  return nb::bytes(capture->sample(capture->shape->watched_at, index), kSampleBytes);
}

nb::bytes piece_sample(const Handle& capture, std::size_t index) {
  return nb::bytes(capture->sample(capture->shape->before_at, index), kSampleBytes);
}

// Whether bytes as they are stored have the hash that was taken of entry `index` (pieces, then small ones) at save().
bool matches(const Handle& capture, std::size_t index, const Array<std::uint8_t>& data) {
  const nb::gil_scoped_release released;
  const auto* const parts =
      reinterpret_cast<const std::uint64_t*>(capture->slab.data + capture->shape->hashes_at) + index * kHashRows;
  std::uint64_t sum = 0;
  for (unsigned row = 0; row < kHashRows; ++row) sum += parts[row];
  return sum == hash_words(reinterpret_cast<const std::byte*>(data.data()), data.size());
}

using Time = std::tuple<std::int32_t, bool, std::uint64_t, double, double, double, double>;

std::vector<Time> times(const Handle& capture) {
  std::vector<Time> found;
  for (const Piece& of : capture->pieces) {
    found.emplace_back(of.device, of.spilled, of.bytes, of.began_s, of.ended_s, of.write_began_s, of.write_ended_s);
  }
  return found;
}

nb::bytes sample(const Array<std::uint8_t>& data) {
  std::byte out[kSampleBytes];
  take_sample(reinterpret_cast<const std::byte*>(data.data()), data.size(), out);
  return nb::bytes(out, kSampleBytes);
}

}  // namespace

void bind_copier(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<CaptureShape>(module, "CaptureShape")
      .def(nb::new_(&make_shape), "piece_bytes"_a, "piece_devices"_a, "small_bytes"_a, "small_devices"_a,
           "small_targets"_a, "watched_bytes"_a, "watched_devices"_a, "block_bytes"_a, "check"_a)
      .def_ro("region_bytes", &CaptureShape::region_bytes);
  nb::class_<Capture>(module, "NativeCapture")
      .def_ro("captured_s", &Capture::captured_s)
      .def_ro("placed", &Capture::placed)
      .def_ro("stalled_s", &Capture::stalled_s);
  nb::class_<Copier>(module, "Copier")
      .def(nb::new_(&make_copier), "host_threads"_a, "io_threads"_a, "device_budget"_a.none())
      .def("prepare", &Copier::prepare, "host_bytes"_a, "devices"_a, "spill_bytes"_a)
      .def("take", &take, "shape"_a, "pieces"_a, "owners"_a, "smalls"_a, "watched"_a, "streams"_a, "window_hint_s"_a)
      .def("fence", &fence, "capture"_a, "owner"_a, "streams"_a, "deadline_s"_a)
      .def("fail", [](Copier& copier, const Handle& capture, const std::string& why) { copier.fail(*capture, why); })
      .def("wait", &waiting<&Copier::wait>, "capture"_a, "deadline_s"_a)
      .def("await_slab", &waiting<&Copier::await_slab>, "capture"_a, "deadline_s"_a)
      .def("release", &waiting<&Copier::release>, "capture"_a, "deadline_s"_a)
      .def("await_run", &await_run, "capture"_a, "first"_a, "stop"_a, "deadline_s"_a)
      .def("free_run", [](Copier& copier, const Handle& capture, std::size_t first,
                          std::size_t count) { copier.free_run(*capture, first, count); })
      .def("write", &write, "capture"_a, "file"_a, "direct"_a, "slice_bytes"_a, "room"_a, "pieces"_a, "smalls"_a,
           "piece_blocks"_a, "small_blocks"_a)
      .def("await_written", &await_written, "capture"_a, "deadline_s"_a)
      .def("run", &run, "capture"_a, "first"_a, "count"_a)
      .def("slab", &slab, "capture"_a, "offset"_a, "nbytes"_a)
      .def("failure", [](const Copier& copier, const Handle& capture) { return copier.failure(*capture); })
      .def("torn", [](const Copier& copier, const Handle& capture) { return copier.torn(*capture); })
      .def("pending", [](const Copier& copier, const Handle& capture) { return copier.pending(*capture); })
      .def("hurry", &Copier::hurry)
      .def("has_room", &Copier::has_room, "nbytes"_a, "longest"_a)
      .def("rate_and_window", &Copier::rate_and_window, "device"_a)
      .def("spill_bytes", &Copier::spill_bytes, "device"_a)
      .def_prop_ro("asked", [](const Copier& copier) { return copier.region().asked(); })
      .def_prop_ro("usable", [](const Copier& copier) { return copier.region().usable(); })
      .def_prop_ro("page_locked", [](const Copier& copier) { return copier.region().page_locked(); })
      .def_prop_ro("prepared_s", [](const Copier& copier) { return copier.region().prepared_s(); });
  module.def("watched_sample", &watched);
  module.def("piece_sample", &piece_sample);
  module.def("matches", &matches);
  module.def("times", &times);
  module.def("checksums", &checksums);
  module.def("collect", &collect, "capture"_a, "blocks"_a);
  module.def("sample", &sample, "data"_a);
  module.def("has_cuda_driver", [] { return cuda::driver() != nullptr; });
  module.attr("USABLE_WINDOW") = kUsableWindow;
  module.attr("DROPPED") = Output::kDropped;
  module.attr("KEPT") = Output::kKept;
  module.attr("HOST") = kHost;
  module.attr("FROZEN") = kFrozen;
  module.attr("VOLATILE") = kVolatile;
  module.attr("PRIVATE") = kPrivate;
}

}  // namespace dscheck
