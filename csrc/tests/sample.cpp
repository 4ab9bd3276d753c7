#include "core/sample.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "check.h"

namespace dscheck {
namespace {

std::uint64_t slow_hash(const std::vector<std::byte>& data) {
  std::uint64_t sum = 0;
  for (std::size_t word = 0; word * 8 < data.size(); ++word) {
    std::uint64_t value = 0;
    for (std::size_t byte = 0; byte < 8 && word * 8 + byte < data.size(); ++byte) {
      value |= static_cast<std::uint64_t>(data[word * 8 + byte]) << (8 * byte);
    }
    sum += mix_word(value, word);
  }
  return sum;
}

}  // namespace

TEST(a_sample_is_the_bytes_at_its_offsets_with_zeros_behind) {
  test::Random random(5);
  for (int round = 0; round < 500; ++round) {
    const auto data =
        test::random_bytes(random, test::between(random, 0, std::size_t{1} << test::between(random, 0, 16)));
    std::array<std::byte, kSampleBytes> found;
    take_sample(data.data(), data.size(), found.data());
    prefetch_sample(data.data(), data.size());
    for (std::size_t index = 0; index < kSampleBytes; ++index) {
      const std::size_t offset = sample_offset(data.size(), index);
      CHECK(offset < data.size() || data.size() <= kSampleBytes);
      CHECK(found[index] == (offset < data.size() ? data[offset] : std::byte{0}));
    }
  }
}

TEST(a_sample_has_the_edges_and_no_byte_twice) {
  for (const std::size_t bytes : {257, 300, 4096, 1 << 20, (1 << 20) + 3}) {
    std::vector<std::size_t> offsets;
    for (std::size_t index = 0; index < kSampleBytes; ++index) offsets.push_back(sample_offset(bytes, index));
    CHECK_EQUAL(offsets.front(), 0u);
    CHECK_EQUAL(offsets.back(), bytes - 1);
    CHECK(std::is_sorted(offsets.begin(), offsets.end()));
    CHECK(std::adjacent_find(offsets.begin(), offsets.end()) == offsets.end());
  }
}

TEST(a_hash_is_that_of_the_slow_twin) {
  test::Random random(6);
  for (const std::size_t bytes : {0, 1, 7, 8, 9, 4096, 10'001}) {
    const auto data = test::random_bytes(random, bytes);
    CHECK_EQUAL(hash_words(data.data(), data.size()), slow_hash(data));
  }
}

}  // namespace dscheck
