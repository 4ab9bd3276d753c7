// Reads of a load: byte ranges of files or of a caller's own, verified block by block, then placed (C5).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/file.h"
#include "core/scatter.h"

namespace dscheck {

// Whole blocks, side by side, at `offset` of a read, and the CRC32C of each.
struct Blocks {
  std::size_t offset = 0;
  std::size_t bytes = 0;
  std::vector<std::uint32_t> expected;
};

// The first block whose bytes are not those that were stored.
struct Damage {
  std::size_t offset = 0;
  std::uint32_t expected = 0, found = 0;
};
std::optional<Damage> find_damage(std::span<const Blocks> blocks, std::size_t block_bytes,
                                  const std::byte* data) noexcept;

// Throws std::invalid_argument when blocks or copies want more than the `bytes` that there are.
void check_inside(std::span<const Blocks> blocks, std::span<const Scatter> copies, std::size_t bytes,
                  std::size_t block_bytes);

// Bytes [start, start + bytes) of a file; without one a caller brings them. A kept read keeps its buffer until
// release().
struct Read {
  std::shared_ptr<File> file;
  std::uint64_t start = 0;
  std::size_t bytes = 0;
  std::vector<Blocks> blocks;
  std::vector<Scatter> copies;
  bool kept = false;
};

// Why the first read to fail did. `offset` is in the file: of the damaged block, of its end, or of the failed call.
struct Fault {
  enum class Kind { kSystem, kShort, kDamaged };
  Kind kind = Kind::kSystem;
  std::size_t read = 0;
  std::uint64_t offset = 0;
  int error = 0;
  std::uint32_t expected = 0, found = 0;
};

struct ReaderSettings {
  unsigned threads = 1;
  std::size_t buffers = 1;       // reads that have a buffer at one time; they get one in the order of add()
  std::size_t buffer_bytes = 0;  // no read is longer
  std::size_t block_bytes = 0;
  int device = -1;  // the CUDA device that page-locked buffers are made for; -1: they are plain memory
};

// Native threads that read past the page cache where they may, verify, and place. Any thread may call.
//
// The first fault stops the rest. A system call that hangs is left behind with its thread and its buffer; after stop()
// nothing is placed.
class Reader {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Reader(const ReaderSettings& settings);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Reads are numbered from 0.
  std::size_t add(Read read);

  // A read that has been placed, each once; nothing at the deadline, after a fault, and after stop().
  std::optional<std::size_t> finished(Clock::time_point deadline);
  std::optional<Fault> fault() const;

  // The bytes of a kept read that is finished, or of one that is to be filled; until release() or filled().
  std::span<std::byte> buffer(std::size_t read) const;
  void release(std::size_t read);

  // The next read that a caller fills; nothing at the deadline, after a fault, and after stop().
  std::optional<std::size_t> next_to_fill(Clock::time_point deadline);
  // Verifies and places it, on this thread.
  void filled(std::size_t read);

  // Returns when nothing is being placed any more. Idempotent.
  void stop() noexcept;

 private:
  class Pool;
  std::shared_ptr<Pool> pool_;
};

}  // namespace dscheck
