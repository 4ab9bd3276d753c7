// A state that a test trains and saves: whole parts have one value, so that each capture can be told from its moment.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/copier.h"
#include "core/crc32c.h"
#include "core/ring.h"

namespace dscheck::test {

constexpr std::size_t kBlockBytes = 64 << 10;

struct Part {
  std::vector<std::byte> memory;
  std::int32_t device, owner;
};

class Model {
 public:
  explicit Model(std::vector<Part> parts) : parts(std::move(parts)) {}

  std::shared_ptr<CaptureShape> shape(bool check = false) const {
    auto made = std::make_shared<CaptureShape>();
    for (const Part& part : parts) made->pieces.push_back({part.memory.size(), part.device});
    const std::int32_t device = parts.front().device;
    made->smalls.push_back({small.size(), device});
    made->targets.push_back(0);
    made->watched.push_back({small.size(), device});
    made->block_bytes = kBlockBytes;
    made->check = check;
    made->arrange();
    return made;
  }

  // Sum and largest of the parts, as a region needs them.
  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const Part& part : parts) sum += align_up(part.memory.size(), 4096);
    return sum;
  }
  std::size_t largest() const {
    std::size_t most = 0;
    for (const Part& part : parts) most = std::max(most, part.memory.size());
    return most;
  }

  std::shared_ptr<Capture> take(Copier& copier, std::shared_ptr<const CaptureShape> shape, const Streams& streams = {},
                                double window_hint_s = 0) {
    std::vector<std::uint64_t> pieces, smalls{reinterpret_cast<std::uint64_t>(small.data())};
    std::vector<std::int32_t> owners;
    for (const Part& part : parts) {
      pieces.push_back(reinterpret_cast<std::uint64_t>(part.memory.data()));
      owners.push_back(part.owner);
    }
    return copier.take(std::move(shape), Live{pieces, owners, smalls, smalls}, streams, window_hint_s);
  }

  std::vector<Part> parts;
  std::vector<std::byte> small = std::vector<std::byte>(1000);
};

// Consumes a capture as the writer does. What is wrong with it when each part should have `value`, or nothing.
inline std::string consume(Copier& copier, Capture& capture, std::byte value) {
  const CaptureShape& shape = *capture.shape;
  std::vector<std::byte> expected;
  for (std::size_t first = 0; first < shape.pieces.size();) {
    const std::size_t count = copier.await_run(capture, first, shape.pieces.size(), soon());
    if (count == 0) return "no piece " + std::to_string(first) + ": " + copier.failure(capture);
    for (std::size_t index = first; index < first + count; ++index) {
      const std::size_t bytes = shape.pieces[index].bytes;
      expected.assign(bytes, value);
      if (std::memcmp(copier.region().data() + capture.pieces[index].slot, expected.data(), bytes) != 0) {
        return "piece " + std::to_string(index) + " is of another moment";
      }
      std::vector<std::uint32_t> sums(block_count(bytes, kBlockBytes));
      crc32c_blocks(expected, kBlockBytes, sums);
      if (!std::equal(sums.begin(), sums.end(),
                      capture.checksums.begin() + static_cast<std::ptrdiff_t>(shape.first_block[index]))) {
        return "piece " + std::to_string(index) + " has other checksums";
      }
    }
    copier.free_run(capture, first, count);
    first += count;
  }
  if (!copier.wait(capture, soon())) return "not captured in time";
  if (const auto torn = copier.torn(capture)) return "piece " + std::to_string(*torn) + " was seen to change";
  return copier.failure(capture);
}

// Waits until the copier has `bytes` of region.
inline void await_region(const Copier& copier, std::size_t bytes) {
  const auto deadline = soon();
  while (copier.region().usable() < bytes && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(copier.region().usable() >= bytes);
}

}  // namespace dscheck::test
