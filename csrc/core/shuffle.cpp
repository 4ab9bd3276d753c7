#include "core/shuffle.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace dscheck {
namespace {

// 16 bytes are a register of every machine that this is built for: the compiler needs no target attribute.
using Vector = std::uint8_t __attribute__((vector_size(16)));
constexpr std::size_t kLanes = sizeof(Vector);

template <std::size_t kCount>
using Vectors = std::array<Vector, kCount>;

Vector evens(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
Vector odds(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
Vector low_halves(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Vector high_halves(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// kWidth vectors of elements, in order, to the vector of each plane: even bytes and odd bytes, each split again.
template <std::size_t kWidth>
Vectors<kWidth> split(const Vectors<kWidth>& elements) {
  if constexpr (kWidth == 1) {
    return elements;
  } else {
    Vectors<kWidth / 2> even, odd;
    for (std::size_t i = 0; i < kWidth / 2; ++i) {
      even[i] = evens(elements[2 * i], elements[2 * i + 1]);
      odd[i] = odds(elements[2 * i], elements[2 * i + 1]);
    }
    even = split<kWidth / 2>(even);
    odd = split<kWidth / 2>(odd);
    Vectors<kWidth> planes;
    for (std::size_t i = 0; i < kWidth / 2; ++i) {
      planes[2 * i] = even[i];
      planes[2 * i + 1] = odd[i];
    }
    return planes;
  }
}

template <std::size_t kWidth>
Vectors<kWidth> join(const Vectors<kWidth>& planes) {
  if constexpr (kWidth == 1) {
    return planes;
  } else {
    Vectors<kWidth / 2> even, odd;
    for (std::size_t i = 0; i < kWidth / 2; ++i) {
      even[i] = planes[2 * i];
      odd[i] = planes[2 * i + 1];
    }
    even = join<kWidth / 2>(even);
    odd = join<kWidth / 2>(odd);
    Vectors<kWidth> elements;
    for (std::size_t i = 0; i < kWidth / 2; ++i) {
      elements[2 * i] = low_halves(even[i], odd[i]);
      elements[2 * i + 1] = high_halves(even[i], odd[i]);
    }
    return elements;
  }
}

template <std::size_t kWidth>
void shuffle_block(const std::byte* in, std::size_t count, std::byte* out) {
  std::size_t element = 0;
  for (; element + kLanes <= count; element += kLanes) {
    Vectors<kWidth> vectors;
    std::memcpy(&vectors, in + element * kWidth, sizeof vectors);
    vectors = split<kWidth>(vectors);
    for (std::size_t i = 0; i < kWidth; ++i) std::memcpy(out + i * count + element, &vectors[i], kLanes);
  }
  for (; element < count; ++element) {
    for (std::size_t i = 0; i < kWidth; ++i) out[i * count + element] = in[element * kWidth + i];
  }
}

template <std::size_t kWidth>
void unshuffle_block(const std::byte* in, std::size_t count, std::byte* out) {
  std::size_t element = 0;
  for (; element + kLanes <= count; element += kLanes) {
    Vectors<kWidth> vectors;
    for (std::size_t i = 0; i < kWidth; ++i) std::memcpy(&vectors[i], in + i * count + element, kLanes);
    vectors = join<kWidth>(vectors);
    std::memcpy(out + element * kWidth, &vectors, sizeof vectors);
  }
  for (; element < count; ++element) {
    for (std::size_t i = 0; i < kWidth; ++i) out[element * kWidth + i] = in[i * count + element];
  }
}

}  // namespace

void shuffle_blocks(std::span<const std::byte> data, std::size_t width, std::size_t block_bytes,
                    std::span<std::byte> out) noexcept {
  for (std::size_t at = 0; at < data.size(); at += block_bytes) {
    const std::size_t count = std::min(block_bytes, data.size() - at) / width;
    const std::byte* const from = data.data() + at;
    std::byte* const to = out.data() + at;
    if (width == 1) std::memcpy(to, from, count);
    if (width == 2) shuffle_block<2>(from, count, to);
    if (width == 4) shuffle_block<4>(from, count, to);
    if (width == 8) shuffle_block<8>(from, count, to);
  }
}

void unshuffle(std::span<const std::byte> data, std::size_t width, std::span<std::byte> out) noexcept {
  const std::size_t count = data.size() / width;
  if (width == 1) std::memcpy(out.data(), data.data(), count);
  if (width == 2) unshuffle_block<2>(data.data(), count, out.data());
  if (width == 4) unshuffle_block<4>(data.data(), count, out.data());
  if (width == 8) unshuffle_block<8>(data.data(), count, out.data());
}

}  // namespace dscheck
