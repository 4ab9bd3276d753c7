// What is compared to see that memory did not change: 256 bytes of a piece, and a hash of all of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dscheck {

constexpr std::size_t kSampleBytes = 256;

// Byte `index` (< 256) of a sample of `bytes` bytes lies at this offset: the first 64, 32 inner words of 4, the
// last 64. A piece of at most 256 bytes is its own sample, zeros behind it. csrc/cuda/kernels.cu computes the same.
constexpr std::size_t sample_offset(std::size_t bytes, std::size_t index) noexcept {
  if (bytes <= kSampleBytes || index < 64) return index;
  if (index >= 192) return bytes - kSampleBytes + index;
  const std::size_t word = (index - 64) / 4;
  const std::size_t inner = (bytes - 128) / 4;  // whole words between the edges, at least 32
  return 64 + (word * inner / 32 + inner / 64) * 4 + index % 4;
}

// Asks for the cache lines of a sample that will be taken soon: cold, it is 35 misses of 100 ns.
void prefetch_sample(const std::byte* data, std::size_t bytes) noexcept;

void take_sample(const std::byte* data, std::size_t bytes, std::byte* out) noexcept;

// A 64-bit hash of all bytes that any number of threads can compute in any order: the sum over 8-byte words (the last
// one padded with zeros) of a mix of the word and its index.
constexpr std::uint64_t mix_word(std::uint64_t word, std::uint64_t index) noexcept {
  std::uint64_t h = word ^ (index * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull);
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
  return h ^ (h >> 31);
}

std::uint64_t hash_words(const std::byte* data, std::size_t bytes) noexcept;

}  // namespace dscheck
