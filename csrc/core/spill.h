// Device memory outside the framework's allocator, for what cannot leave a device before it changes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include "core/driver.h"
#include "core/ring.h"

namespace dscheck {

// Blocks from the driver, taken one by one up to a budget and kept until they are idle and the device runs short.
// Not thread-safe but where it says so: its owner locks. The device's context must be current in calls of the driver.
class Spill {
 public:
  static constexpr std::size_t kBlockBytes = std::size_t{512} << 20;
  static constexpr std::size_t kAuto = ~std::size_t{0};

  explicit Spill(const cuda::Driver& driver) : driver_(driver) {}

  // How large the next block may be under `budget`; kAuto: what the driver has free, less `reserve()`. 0: none.
  std::size_t block_bytes(std::size_t budget) const noexcept { return std::min(kBlockBytes, budget - bytes_); }

  // A block from the driver, or 0: it has too little. Needs no lock, nor has it an effect before `add_block`.
  cuda::Address take_block(std::size_t bytes, std::size_t budget) const;
  void add_block(cuda::Address base, std::size_t bytes);

  // Whether the driver has less than half the reserve free, under kAuto. Needs no lock.
  bool is_scarce(std::size_t budget) const;

  // An idle block that is no longer ours, for the caller to free; 0: there is none.
  cuda::Address drop_block();

  // Device memory for `bytes` (at most kBlockBytes), or nothing when there is no room.
  std::optional<cuda::Address> allocate(std::size_t bytes);
  void free(cuda::Address address) noexcept;
  void release_all() noexcept;

  std::size_t bytes() const noexcept { return bytes_; }

  // What is left to others: 1 GiB, or a 20th of the device if that is more.
  static std::size_t reserve(std::size_t total) noexcept { return std::max(std::size_t{1} << 30, total / 20); }

 private:
  struct Block {
    cuda::Address base;
    std::size_t bytes;
    Ring ring;
  };

  const cuda::Driver& driver_;
  std::vector<Block> blocks_;
  std::size_t bytes_ = 0;
};

}  // namespace dscheck
