#include "core/scatter.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"

namespace dscheck {
namespace {

constexpr std::size_t kGuard = 64;  // bytes behind the target that nothing may touch

// Element by element.
void slow(const std::byte* source, std::byte* target, std::size_t element_bytes, const std::vector<Axis>& axes,
          std::size_t depth = 0) {
  if (depth == axes.size()) {
    std::memcpy(target, source, element_bytes);
    return;
  }
  const Axis& axis = axes[depth];
  for (std::size_t i = 0; i < axis.count; ++i, source += axis.source, target += axis.target) {
    slow(source, target, element_bytes, axes, depth + 1);
  }
}

// The box of `shape` in places with gaps of their own, the target's dimensions in any order. What each place takes.
std::pair<std::size_t, std::size_t> lay_out(test::Random& random, std::vector<Axis>& axes, std::size_t element_bytes) {
  std::size_t far = element_bytes, near = element_bytes;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    axis->source = static_cast<std::ptrdiff_t>(far);
    far *= axis->count + test::between(random, 0, 2);
  }
  std::vector<Axis*> order;
  for (Axis& axis : axes) order.push_back(&axis);
  if (test::between(random, 0, 1) == 1) std::shuffle(order.begin(), order.end(), random);
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    (*axis)->target = static_cast<std::ptrdiff_t>(near);
    near *= (*axis)->count + test::between(random, 0, 2);
  }
  return {far, near};
}

}  // namespace

TEST(a_box_equals_its_slow_twin_and_touches_nothing_else) {
  test::Random random(20);
  for (int round = 0; round < 2000; ++round) {
    const std::size_t element_bytes = std::size_t{1} << test::between(random, 0, 4);
    std::vector<Axis> axes(test::between(random, 0, 4));
    for (Axis& axis : axes) axis.count = test::between(random, 1, 4);
    if (!axes.empty() && round % 2 == 0) axes.back().count = test::between(random, 1, 200);
    const auto [far, near] = lay_out(random, axes, element_bytes);
    const std::size_t skipped = test::between(random, 0, 9);
    // Exactly as long as it is read: an address sanitizer sees a byte too far.
    const Scatter probe(skipped, nullptr, element_bytes, axes);
    const auto source = test::random_bytes(random, probe.source_end());
    CHECK(probe.source_end() <= skipped + far);
    std::vector<std::byte> found(near + kGuard), expected(near + kGuard);
    Scatter(skipped, found.data(), element_bytes, axes)(source.data());
    slow(source.data() + skipped, expected.data(), element_bytes, axes);
    CHECK(found == expected);
  }
}

TEST(large_boxes_of_whole_lines_equal_their_slow_twin) {
  test::Random random(21);
  for (const std::size_t row : {64, 192, 4096}) {
    for (const std::size_t apart : {row, 2 * row}) {
      const std::size_t rows = (std::size_t{2} << 20) / row;
      const auto source = test::random_bytes(random, 2 * rows * row);
      const std::vector<Axis> axes{{rows, static_cast<std::ptrdiff_t>(2 * row), static_cast<std::ptrdiff_t>(apart)},
                                   {row, 1, 1}};
      const std::unique_ptr<std::byte, decltype(&std::free)> target(
          static_cast<std::byte*>(std::aligned_alloc(64, rows * apart)), std::free);
      std::memset(target.get(), 0, rows * apart);
      std::vector<std::byte> expected(rows * apart);
      Scatter(0, target.get(), 1, axes)(source.data());
      slow(source.data(), expected.data(), 1, axes);
      CHECK(std::memcmp(target.get(), expected.data(), expected.size()) == 0);
    }
  }
}

TEST(an_empty_box_reads_and_writes_nothing) {
  const Scatter none(5, nullptr, 4, {{3, 4, 4}, {0, 4, 4}});
  CHECK_EQUAL(none.source_end(), 0u);
  none(nullptr);
}

}  // namespace dscheck
