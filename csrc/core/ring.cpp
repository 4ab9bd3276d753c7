#include "core/ring.h"

#include <algorithm>

namespace dscheck {

std::optional<std::size_t> Ring::allocate(std::size_t bytes) {
  if (blocks_.empty()) {
    if (bytes > capacity_) return std::nullopt;
    blocks_.push_back({0, bytes, false});
    return 0;
  }
  const std::size_t head = blocks_.front().offset, tail = blocks_.back().end;
  const std::size_t begin = align_up(tail, alignment_of(bytes));
  const bool wrapped = blocks_.back().offset < head;
  const std::size_t limit = wrapped ? head : capacity_;
  if (begin <= limit && bytes <= limit - begin) {
    blocks_.push_back({begin, begin + bytes, false});
    return begin;
  }
  if (wrapped || bytes > head) return std::nullopt;
  blocks_.push_back({0, bytes, false});
  return 0;
}

std::size_t Ring::room(std::size_t capacity) const noexcept {
  if (blocks_.empty()) return capacity;
  const std::size_t head = blocks_.front().offset, tail = blocks_.back().end;
  return blocks_.back().offset < head ? head - tail : head + std::max(capacity, tail) - tail;
}

void Ring::free(std::size_t offset) noexcept {
  const auto found = std::find_if(blocks_.begin(), blocks_.end(),
                                  [offset](const Block& block) { return block.offset == offset && !block.free; });
  if (found == blocks_.end()) return;
  found->free = true;
  while (!blocks_.empty() && blocks_.front().free) blocks_.pop_front();
}

}  // namespace dscheck
