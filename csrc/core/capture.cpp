#include "core/capture.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/crc32c.h"
#include "core/ring.h"
#include "core/sample.h"

namespace dscheck {

constexpr std::size_t kHashBytes = kHashRows * 8;

void CaptureShape::arrange() {
  for (const PieceSpec& piece : pieces) {
    first_block.push_back(blocks);
    blocks += block_count(piece.bytes, block_bytes);
    region_bytes = align_up(region_bytes, alignment_of(piece.bytes)) + piece.bytes;
  }
  for (const PieceSpec& small : smalls) {
    first_small_block.push_back(small_blocks);
    small_blocks += block_count(small.bytes, block_bytes);
  }
  std::size_t smalls_bytes = 0;
  for (std::size_t i = 0; i < smalls.size(); ++i) {
    smalls_bytes = std::max<std::size_t>(smalls_bytes, targets[i] + smalls[i].bytes);
  }
  std::set<std::int32_t> found;
  for (const auto* specs : {&pieces, &smalls, &watched}) {
    for (const PieceSpec& spec : *specs) {
      if (spec.device != kHost) found.insert(spec.device);
    }
  }
  devices.assign(found.begin(), found.end());
  const std::size_t samples = pieces.size() * kSampleBytes;
  std::size_t at = align_up(smalls_bytes, kSampleBytes);
  const auto next = [&at](std::size_t bytes) { return std::exchange(at, at + align_up(bytes, kSampleBytes)); };
  before_at = next(samples);
  after_at = next(samples);
  captured_at = next(samples);
  watched_at = next(watched.size() * kSampleBytes);
  tables_at = next((2 * pieces.size() + 2 * smalls.size() + watched.size()) * sizeof(Entry));
  hashes_at = next(check ? (pieces.size() + smalls.size()) * kHashBytes : 0);
  slab_bytes = at;
}

std::byte* Capture::sample(std::size_t at, std::size_t index) const noexcept {
  return slab.data + at + index * kSampleBytes;
}

void Capture::collect(std::span<std::uint32_t> blocks) const noexcept {
  const auto copy = [&](const std::vector<PieceSpec>& specs, const std::vector<std::uint64_t>& targets,
                        const std::vector<std::uint32_t>& from, const std::vector<std::size_t>& first) {
    for (std::size_t i = 0; i < specs.size(); ++i) {
      const std::size_t count = block_count(specs[i].bytes, shape->block_bytes);
      if (targets[i] > blocks.size() || count > blocks.size() - targets[i]) continue;  // not in the file
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(first[i]), count,
                  blocks.begin() + static_cast<std::ptrdiff_t>(targets[i]));
    }
  };
  copy(shape->pieces, output->piece_blocks, checksums, shape->first_block);
  copy(shape->smalls, output->small_blocks, output->small_checksums, shape->first_small_block);
}

}  // namespace dscheck
