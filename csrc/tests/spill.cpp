#include "core/spill.h"

#include <vector>

#include "check.h"
#include "fake_cuda.h"

namespace dscheck {
namespace {

constexpr std::size_t kMib = std::size_t{1} << 20;

// The fake driver, with a context of its own current.
struct Device {
  explicit Device(std::size_t bytes) : driver(*cuda::driver()), current(driver, context()) { fake_cuda::reset(bytes); }
  static cuda::Context context() {
    cuda::Context made = nullptr;
    cuda::driver()->cuDevicePrimaryCtxRetain(&made, 0);
    return made;
  }
  ~Device() { driver.cuDevicePrimaryCtxRelease(0); }
  const cuda::Driver& driver;
  cuda::InContext current;
};

}  // namespace

TEST(the_reserve_is_left_to_others) {
  const Device device(3072 * kMib);
  Spill spill(device.driver);
  CHECK_EQUAL(Spill::reserve(std::size_t{3} << 30), std::size_t{1} << 30);
  const cuda::Address base = spill.take_block(512 * kMib, Spill::kAuto);
  CHECK(base != 0);
  spill.add_block(base, 512 * kMib);
  CHECK_EQUAL(spill.take_block(2048 * kMib, Spill::kAuto), 0u);
  CHECK(!spill.is_scarce(Spill::kAuto));
  spill.release_all();
  CHECK_EQUAL(fake_cuda::standing().device_bytes, 0u);
}

TEST(a_block_is_given_back_only_when_it_is_idle) {
  const Device device(std::size_t{8} << 30);
  Spill spill(device.driver);
  spill.add_block(spill.take_block(kMib, 4 * kMib), kMib);
  const cuda::Address piece = spill.allocate(1000).value();
  CHECK(!spill.allocate(kMib));
  CHECK_EQUAL(spill.drop_block(), 0u);
  spill.free(piece);
  const cuda::Address base = spill.drop_block();
  CHECK_EQUAL(base, piece);
  CHECK_EQUAL(spill.bytes(), 0u);
  CHECK(!spill.allocate(1));
  CHECK_EQUAL(device.driver.cuMemFree(base), 0);
}

TEST(pieces_in_spill_memory_lie_apart) {
  const Device device(std::size_t{8} << 30);
  Spill spill(device.driver);
  for (int block = 0; block < 3; ++block) spill.add_block(spill.take_block(kMib, 4 * kMib), kMib);
  test::Random random(8);
  std::vector<std::pair<cuda::Address, std::size_t>> held;
  for (int step = 0; step < 500; ++step) {
    const std::size_t bytes = test::between(random, 1, kMib / 3);
    if (const auto made = spill.allocate(bytes)) {
      for (const auto& [other, length] : held) CHECK(*made + bytes <= other || other + length <= *made);
      held.emplace_back(*made, bytes);
    } else {
      const std::size_t index = test::between(random, 0, held.size() - 1);
      spill.free(held[index].first);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(index));
    }
  }
  spill.release_all();
  CHECK(!fake_cuda::misuse().any());
}

}  // namespace dscheck
