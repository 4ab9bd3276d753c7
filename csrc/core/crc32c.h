// CRC32C (Castagnoli, RFC 3720): the block checksum of the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace dscheck {

// The CRC of the bytes that gave `value` followed by `data`; 0 is the CRC of no bytes.
std::uint32_t crc32c(std::span<const std::byte> data, std::uint32_t value = 0) noexcept;

// The same on any machine, without special instructions.
std::uint32_t crc32c_scalar(std::span<const std::byte> data, std::uint32_t value = 0) noexcept;

// Whether crc32c() runs on CRC instructions here.
bool crc32c_is_accelerated() noexcept;

constexpr std::size_t block_count(std::size_t data_bytes, std::size_t block_bytes) noexcept {
  return data_bytes / block_bytes + (data_bytes % block_bytes != 0);
}

// One CRC per block of `block_bytes` (> 0), the last block being what is left.
// `out` holds block_count(data.size(), block_bytes) entries.
void crc32c_blocks(std::span<const std::byte> data, std::size_t block_bytes, std::span<std::uint32_t> out) noexcept;

}  // namespace dscheck
