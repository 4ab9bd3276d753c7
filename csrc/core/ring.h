// A ring of bytes: contiguous pieces handed out in order, given back in any order.
#pragma once

#include <cstddef>
#include <deque>
#include <optional>

namespace dscheck {

// Offsets in [0, capacity). Not thread-safe: its owner locks.
class Ring {
 public:
  // The first piece starts anew at 0 whenever nothing is held, so equal sequences get equal offsets.
  explicit Ring(std::size_t capacity = 0) noexcept : capacity_(capacity) {}

  // Where `bytes` (> 0) contiguous bytes begin, at a multiple of alignment_of(bytes); nothing when there is no room
  // now.
  std::optional<std::size_t> allocate(std::size_t bytes);

  // Gives back the piece that begins at `offset`. Room becomes usable when all older pieces are given back as well.
  void free(std::size_t offset) noexcept;

  // More room at the end.
  void grow(std::size_t capacity) noexcept { capacity_ = capacity > capacity_ ? capacity : capacity_; }

  std::size_t capacity() const noexcept { return capacity_; }
  // Bytes that a ring of this capacity has to give, in one or two stretches.
  std::size_t room(std::size_t capacity) const noexcept;
  bool empty() const noexcept { return blocks_.empty(); }

 private:
  struct Block {
    std::size_t offset, end;
    bool free;
  };

  std::size_t capacity_;
  std::deque<Block> blocks_;  // in the order of allocation, the skipped end of the ring included
};

// Large pieces begin on a page, as in a data file, so that direct I/O may take them from here; small ones are packed.
constexpr std::size_t kLargeBytes = std::size_t{1} << 20;
constexpr std::size_t alignment_of(std::size_t bytes) noexcept { return bytes >= kLargeBytes ? 4096 : 64; }
constexpr std::size_t align_up(std::size_t value, std::size_t alignment) noexcept {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace dscheck
