// Byte planes: byte i of every element side by side, so that exponents, which are alike, compress where mantissas do
// not.
#pragma once

#include <cstddef>
#include <span>

namespace dscheck {

// Elements of `width` bytes (1, 2, 4 or 8), of which each block of `block_bytes` and what is left are whole numbers:
// byte i of element j of a block of n elements comes to its byte i * n + j. `out` is as long as `data`, and another.
void shuffle_blocks(std::span<const std::byte> data, std::size_t width, std::size_t block_bytes,
                    std::span<std::byte> out) noexcept;

// The inverse, of one block.
void unshuffle(std::span<const std::byte> data, std::size_t width, std::span<std::byte> out) noexcept;

}  // namespace dscheck
