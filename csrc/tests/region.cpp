#include "core/region.h"

#include <atomic>
#include <thread>

#include "check.h"
#include "fake_cuda.h"

namespace dscheck {
namespace {

using namespace std::chrono_literals;

void await(const Region& region, std::size_t bytes) {
  const auto deadline = test::soon();
  while (region.usable() < bytes && region.problem().empty() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(1ms);
  }
  CHECK_EQUAL(region.problem(), "");
  CHECK(region.usable() >= bytes);
}

cuda::Context context() {
  cuda::Context made = nullptr;
  cuda::driver()->cuDevicePrimaryCtxRetain(&made, 0);
  return made;
}

constexpr std::size_t kBytes = Region::kSegmentBytes + 12'345;

}  // namespace

TEST(all_bytes_are_there_zero_and_writable_in_whole_pages) {
  std::atomic<int> calls = 0;
  Region region([&calls] { ++calls; });
  region.prepare(100'000, nullptr);
  await(region, 100'000);
  CHECK_EQUAL(region.asked() % 4096, 0u);
  CHECK(!region.page_locked());
  for (std::size_t at = 0; at < region.asked(); ++at) {
    CHECK(region.data()[at] == std::byte{0});
    region.data()[at] = std::byte{1};
  }
  CHECK_EQUAL(region.run_end(0, region.asked()), region.asked());
  CHECK(calls > 0);
}

TEST(what_was_ready_stays_in_its_place_while_more_is_prepared) {
  Region region([] {});
  std::byte* const data = region.data();
  std::vector<std::jthread> askers;
  for (std::size_t number = 1; number <= 4; ++number) {
    askers.emplace_back([&region, number] {
      region.prepare(number * 50'000, nullptr);
      await(region, number * 50'000);
    });
  }
  for (std::jthread& asker : askers) asker.join();
  data[0] = std::byte{7};
  region.prepare(400'000, nullptr);
  await(region, 400'000);
  CHECK(region.data() == data && data[0] == std::byte{7});
}

TEST(more_address_space_than_there_is_is_refused) {
  Region region([] {});
  bool refused = false;
  try {
    region.prepare(std::size_t{1} << 60, nullptr);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  CHECK(refused);
}

TEST(a_region_for_a_device_is_page_locked_by_segments_and_given_back) {
  fake_cuda::reset();
  {
    Region region([] {});
    region.prepare(kBytes, context());
    await(region, kBytes);
    CHECK(region.page_locked());
    CHECK_EQUAL(fake_cuda::standing().registered_ranges, 2u);
    CHECK_EQUAL(region.run_end(100, kBytes), Region::kSegmentBytes);
    CHECK_EQUAL(region.run_end(Region::kSegmentBytes, kBytes), kBytes);
  }
  CHECK_EQUAL(fake_cuda::standing().registered_ranges, 0u);
  CHECK(!fake_cuda::misuse().any());
  cuda::driver()->cuDevicePrimaryCtxRelease(0);
}

TEST(memory_that_cannot_be_page_locked_is_usable_all_the_same) {
  fake_cuda::reset();
  fake_cuda::fail("cuMemHostRegister", 2, 1);
  Region region([] {});
  region.prepare(kBytes, context());
  await(region, kBytes);
  CHECK(!region.page_locked());
  cuda::driver()->cuDevicePrimaryCtxRelease(0);
}

TEST(a_region_ends_while_it_is_prepared) {
  for (int round = 0; round < 20; ++round) {
    Region region([] {});
    region.prepare(std::size_t{8} << 20, nullptr);
    if (round % 2 == 1) std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
  }
}

}  // namespace dscheck
