#include "core/shuffle.h"

#include <vector>

#include "check.h"

namespace dscheck {
namespace {

// By the definition, element by element.
std::vector<std::byte> slow(std::span<const std::byte> data, std::size_t width, std::size_t block_bytes) {
  std::vector<std::byte> out(data.size());
  for (std::size_t at = 0; at < data.size(); ++at) {
    const std::size_t begin = at / block_bytes * block_bytes;
    const std::size_t count = std::min(block_bytes, data.size() - begin) / width;
    out[begin + (at - begin) % width * count + (at - begin) / width] = data[at];
  }
  return out;
}

}  // namespace

TEST(planes_are_those_of_the_slow_twin_and_come_back) {
  test::Random random(5);
  for (const std::size_t width : {1, 2, 4, 8}) {
    for (int round = 0; round < 200; ++round) {
      const std::size_t block_bytes = width * test::between(random, 1, 200);
      // Exactly as long as it is read: an address sanitizer sees a byte too far.
      const auto data = test::random_bytes(random, width * test::between(random, 0, 700));
      std::vector<std::byte> planes(data.size()), back(data.size());
      shuffle_blocks(data, width, block_bytes, planes);
      CHECK(planes == slow(data, width, block_bytes));
      for (std::size_t at = 0; at < data.size(); at += block_bytes) {
        const std::size_t length = std::min(block_bytes, data.size() - at);
        unshuffle(std::span(planes).subspan(at, length), width, std::span(back).subspan(at, length));
      }
      CHECK(back == data);
    }
  }
}

TEST(a_block_may_lie_at_any_address) {
  test::Random random(6);
  const auto data = test::random_bytes(random, 4096 + 7);
  const auto part = std::span(data).subspan(7);
  std::vector<std::byte> planes(4096 + 3), back(4096 + 5);
  shuffle_blocks(part, 4, 4096, std::span(planes).subspan(3));
  unshuffle(std::span(planes).subspan(3), 4, std::span(back).subspan(5));
  CHECK(std::equal(part.begin(), part.end(), back.begin() + 5));
}

}  // namespace dscheck
