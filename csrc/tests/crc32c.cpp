#include "core/crc32c.h"

#include <cstring>
#include <vector>

#include "check.h"

namespace dscheck {
namespace {

// RFC 3720, bit by bit.
std::uint32_t slow(std::span<const std::byte> data, std::uint32_t value) {
  std::uint32_t crc = ~value;
  for (const std::byte byte : data) {
    crc ^= static_cast<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

}  // namespace

TEST(the_check_value_of_the_standard) {
  const char text[] = "123456789";
  CHECK_EQUAL(crc32c({reinterpret_cast<const std::byte*>(text), 9}), 0xE3069283u);
}

TEST(both_paths_agree_with_the_slow_twin_at_any_length_and_address) {
  test::Random random(2);
  for (int round = 0; round < 400; ++round) {
    // Exactly as long as it is read: an address sanitizer sees a byte too far.
    const auto data =
        test::random_bytes(random, test::between(random, 0, std::size_t{1} << test::between(random, 0, 13)));
    const std::size_t skipped = test::between(random, 0, std::min<std::size_t>(data.size(), 9));
    const auto part = std::span(data).subspan(skipped);
    const auto value = static_cast<std::uint32_t>(random());
    CHECK_EQUAL(crc32c(part, value), slow(part, value));
    CHECK_EQUAL(crc32c_scalar(part, value), slow(part, value));
  }
}

TEST(a_checksum_goes_on_where_it_ended) {
  test::Random random(3);
  const auto data = test::random_bytes(random, 10'000);
  for (const std::size_t cut : {0, 1, 767, 768, 5000, 10'000}) {
    CHECK_EQUAL(crc32c(std::span(data).subspan(cut), crc32c(std::span(data).first(cut))), slow(data, 0));
  }
}

TEST(blocks_are_checksummed_one_by_one_the_last_one_short) {
  test::Random random(4);
  for (const std::size_t size : {0, 1, 4095, 4096, 4097, 20'000}) {
    const auto data = test::random_bytes(random, size);
    std::vector<std::uint32_t> found(block_count(size, 4096));
    crc32c_blocks(data, 4096, found);
    for (std::size_t block = 0; block < found.size(); ++block) {
      const auto rest = std::span(data).subspan(block * 4096);
      CHECK_EQUAL(found[block], slow(rest.first(std::min<std::size_t>(4096, rest.size())), 0));
    }
  }
}

}  // namespace dscheck
