#include "core/sample.h"

#include <algorithm>
#include <cstring>

namespace dscheck {

void prefetch_sample(const std::byte* data, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  __builtin_prefetch(data);
  if (bytes <= kSampleBytes) return;
  for (std::size_t index = 64; index < 192; index += 4) __builtin_prefetch(data + sample_offset(bytes, index));
  __builtin_prefetch(data + bytes - 64);
}

void take_sample(const std::byte* data, std::size_t bytes, std::byte* out) noexcept {
  if (bytes <= kSampleBytes) {
    if (bytes > 0) std::memcpy(out, data, bytes);
    std::memset(out + bytes, 0, kSampleBytes - bytes);
    return;
  }
  std::memcpy(out, data, 64);
  for (std::size_t index = 64; index < 192; index += 4) std::memcpy(out + index, data + sample_offset(bytes, index), 4);
  std::memcpy(out + 192, data + bytes - 64, 64);
}

std::uint64_t hash_words(const std::byte* data, std::size_t bytes) noexcept {
  std::uint64_t sum = 0, word = 0;
  const std::size_t whole = bytes / 8;
  for (std::size_t index = 0; index < whole; ++index) {
    std::memcpy(&word, data + index * 8, 8);
    sum += mix_word(word, index);
  }
  if (bytes % 8 != 0) {
    word = 0;
    std::memcpy(&word, data + whole * 8, bytes % 8);
    sum += mix_word(word, whole);
  }
  return sum;
}

}  // namespace dscheck
