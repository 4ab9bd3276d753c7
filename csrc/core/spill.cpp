#include "core/spill.h"

namespace dscheck {

cuda::Address Spill::take_block(std::size_t bytes, std::size_t budget) const {
  std::size_t free = 0, total = 0;
  driver_.check(driver_.cuMemGetInfo(&free, &total), "cuMemGetInfo");
  if (free < bytes + (budget == kAuto ? reserve(total) : 0)) return 0;
  cuda::Address base = 0;
  return driver_.cuMemAlloc(&base, bytes) == 0 ? base : 0;  // another may have taken it in between
}

void Spill::add_block(cuda::Address base, std::size_t bytes) {
  blocks_.push_back({base, bytes, Ring(bytes)});
  bytes_ += bytes;
}

bool Spill::is_scarce(std::size_t budget) const {
  if (budget != kAuto) return false;
  std::size_t free = 0, total = 0;
  driver_.check(driver_.cuMemGetInfo(&free, &total), "cuMemGetInfo");
  return free < reserve(total) / 2;
}

cuda::Address Spill::drop_block() {
  if (blocks_.empty() || !blocks_.back().ring.empty()) return 0;
  const cuda::Address base = blocks_.back().base;
  bytes_ -= blocks_.back().bytes;
  blocks_.pop_back();
  return base;
}

std::optional<cuda::Address> Spill::allocate(std::size_t bytes) {
  for (Block& block : blocks_) {
    if (const auto offset = block.ring.allocate(bytes)) return block.base + *offset;
  }
  return std::nullopt;
}

void Spill::free(cuda::Address address) noexcept {
  for (Block& block : blocks_) {
    if (address >= block.base && address < block.base + block.bytes) return block.ring.free(address - block.base);
  }
}

void Spill::release_all() noexcept {
  for (const Block& block : blocks_) driver_.cuMemFree(block.base);
  blocks_.clear();
  bytes_ = 0;
}

}  // namespace dscheck
