#include "core/ring.h"

#include <algorithm>
#include <vector>

#include "check.h"

namespace dscheck {
namespace {

struct Held {
  std::size_t offset, bytes;
};

}  // namespace

TEST(pieces_are_aligned_inside_and_apart_whatever_the_order_of_giving_back) {
  test::Random random(1);
  for (int round = 0; round < 200; ++round) {
    const std::size_t capacity = test::between(random, 1, 8 << 20);
    Ring ring(capacity);
    std::vector<Held> held;
    for (int step = 0; step < 200; ++step) {
      if (held.empty() || test::between(random, 0, 2) > 0) {
        const std::size_t bytes = test::between(random, 1, std::size_t{1} << test::between(random, 1, 21));
        const auto offset = ring.allocate(bytes);
        if (!offset) {
          CHECK(!held.empty() || bytes > capacity);
          continue;
        }
        CHECK_EQUAL(*offset % alignment_of(bytes), 0u);
        CHECK(*offset + bytes <= capacity);
        for (const Held& other : held) {
          CHECK(*offset + bytes <= other.offset || other.offset + other.bytes <= *offset);
        }
        held.push_back({*offset, bytes});
      } else {
        const std::size_t index = test::between(random, 0, held.size() - 1);
        ring.free(held[index].offset);
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
      }
      CHECK(ring.room(capacity) <= capacity);
      CHECK_EQUAL(ring.empty(), held.empty());
    }
  }
}

TEST(an_empty_ring_gives_equal_sequences_equal_offsets) {
  Ring ring(10 << 20);
  std::vector<std::size_t> first;
  for (int round = 0; round < 3; ++round) {
    std::vector<std::size_t> offsets;
    for (const std::size_t bytes : {std::size_t{100}, kLargeBytes, std::size_t{1}, 3 * kLargeBytes}) {
      offsets.push_back(ring.allocate(bytes).value());
    }
    if (round == 0) first = offsets;
    CHECK(offsets == first);
    for (const std::size_t offset : offsets) ring.free(offset);
  }
}

TEST(an_unknown_offset_gives_nothing_back) {
  Ring ring(1 << 20);
  const std::size_t offset = ring.allocate(1000).value();
  ring.free(offset + 64);
  CHECK_EQUAL(ring.room(ring.capacity()), (1u << 20) - 1000);
  ring.free(offset);
  ring.free(offset);
  CHECK_EQUAL(ring.room(ring.capacity()), 1u << 20);
}

TEST(there_is_as_much_room_as_it_says) {
  test::Random random(2);
  for (int round = 0; round < 200; ++round) {
    Ring ring(std::size_t{64} << 10);
    std::vector<std::size_t> held;
    for (int step = 0; step < 60; ++step) {
      const auto offset = ring.allocate(64 * test::between(random, 1, 200));
      if (offset) held.push_back(*offset);
      if (!held.empty() && test::between(random, 0, 1) == 0) {
        const std::size_t index = test::between(random, 0, held.size() - 1);
        ring.free(held[index]);
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
      }
    }
    std::size_t left = ring.room(ring.capacity());
    for (; ring.allocate(64); left -= 64) CHECK(left >= 64);
    CHECK_EQUAL(left, 0u);
  }
}

TEST(room_at_the_end_is_used_once_it_is_there) {
  Ring ring;
  CHECK(!ring.allocate(1));
  ring.grow(100);
  CHECK_EQUAL(ring.allocate(100).value(), 0u);
  CHECK(!ring.allocate(64));
  ring.grow(192);
  CHECK_EQUAL(ring.allocate(64).value(), 128u);
}

}  // namespace dscheck
