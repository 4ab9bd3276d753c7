// Devices of a copier: streams, events, spill memory and fences, over the fake driver.
#include <functional>

#include "core/copier.h"
#include "fake_cuda.h"
#include "saves.h"

namespace dscheck {
namespace {

using namespace std::chrono_literals;
using test::consume;
using test::Model;
using test::Part;
using test::soon;

constexpr auto kDone = Copier::Fenced::kDone;

// Training streams of `devices` devices. What the driver was not given back, or called wrongly, fails the test.
class Devices {
 public:
  explicit Devices(std::int32_t devices) {
    fake_cuda::reset();
    before_ = fake_cuda::standing();
    for (std::int32_t device = 0; device < devices; ++device) {
      streams.emplace_back(device, fake_cuda::make_stream());
      numbers.push_back(device);
    }
  }
  ~Devices() {
    fake_cuda::let_copies();
    for (const auto& [device, stream] : streams) fake_cuda::destroy(stream);
  }
  Devices(const Devices&) = delete;
  Devices& operator=(const Devices&) = delete;

  // Once the copier has gone.
  void check_clean() const {
    const fake_cuda::Misuse wrong = fake_cuda::misuse();
    CHECK_EQUAL(wrong.without_context, 0);
    CHECK_EQUAL(wrong.unrecorded_waits, 0);
    CHECK_EQUAL(wrong.crossed_registrations, 0);
    CHECK_EQUAL(wrong.unknown_frees, 0);
    const fake_cuda::Standing after = fake_cuda::standing();
    CHECK_EQUAL(after.device_bytes, before_.device_bytes);
    CHECK_EQUAL(after.host_bytes, before_.host_bytes);
    CHECK_EQUAL(after.registered_ranges, before_.registered_ranges);
    CHECK_EQUAL(after.streams, before_.streams);
    CHECK_EQUAL(after.events, before_.events);
    CHECK_EQUAL(after.contexts, before_.contexts);
  }

  void synchronize() const {
    for (const auto& [device, stream] : streams) fake_cuda::synchronize(stream);
  }

  // As training does on its streams, or on the CPU.
  void fill(Part& part, int value) const {
    if (part.device == kHost) {
      std::memset(part.memory.data(), value, part.memory.size());
    } else {
      fake_cuda::fill(streams[static_cast<std::size_t>(part.device)].second, part.memory.data(), value,
                      part.memory.size());
    }
  }

  Streams streams;
  std::vector<std::int32_t> numbers;

 private:
  fake_cuda::Standing before_;
};

Model spread(test::Random& random, std::int32_t devices, std::size_t parts) {
  std::vector<Part> made;
  for (std::size_t i = 0; i < parts; ++i) {
    const auto number = static_cast<std::int32_t>(i);
    const std::int32_t owner = i % 3 == 0 ? kVolatile : i % 7 == 1 ? kFrozen : number % 2;
    made.push_back(
        {std::vector<std::byte>(test::between(random, 1, 300'000)), i % 5 == 4 ? kHost : number % devices, owner});
  }
  return Model(std::move(made));
}

// One device with one part of one owner, and no spill memory: saved once, so that its lane has measured its rate.
struct One {
  explicit One(std::int32_t owner, std::size_t spill_bytes = 0)
      : state({Part{std::vector<std::byte>(200'000, std::byte{1}), 0, owner}}),
        shape(state.shape()),
        copier(std::in_place, CopierSettings{.threads = 1, .device_budget = spill_bytes}) {
    copier->prepare(2 * state.bytes(), devices.numbers, spill_bytes);
    const auto deadline = soon();
    while (copier->spill_bytes(0) < spill_bytes && Clock::now() < deadline) std::this_thread::sleep_for(1ms);
    save(std::byte{1});
  }
  ~One() { fake_cuda::let_copies(); }

  std::shared_ptr<Capture> take() { return state.take(*copier, shape, devices.streams); }

  void save(std::byte value) {
    const auto capture = take();
    CHECK_EQUAL(consume(*copier, *capture, value), "");
    CHECK(copier->release(*capture, soon()));
  }

  void close() {
    copier.reset();
    devices.check_clean();
  }

  Devices devices{1};
  Model state;
  std::shared_ptr<CaptureShape> shape;
  std::optional<Copier> copier;
};

// Six saves while training writes behind its fences, some of them given up.
void train(test::Random& random, int round) {
  const std::int32_t count = 1 + round % 2;
  const Devices devices(count);
  Model state = spread(random, count, 30);
  const auto shape = state.shape(round % 2 == 1);
  const bool spilling = round % 4 != 3;
  std::vector<std::string> wrong(6);
  {
    Copier copier({.threads = 2, .device_budget = spilling ? Spill::kAuto : 0});
    copier.prepare(round % 3 == 0 ? std::max(state.largest(), state.bytes() / 3) + 4096 : 2 * state.bytes(),
                   devices.numbers, spilling ? state.bytes() : 0);
    std::vector<std::jthread> writers;
    for (int save = 0; save < 6; ++save) {
      const int value = 6 * round + save + 1;
      for (Part& part : state.parts) devices.fill(part, value);
      const auto capture = state.take(copier, shape, devices.streams, 0.002);
      const bool given_up = save == 4 && round % 2 == 0;
      const auto nap = std::chrono::microseconds(test::between(random, 0, 3000));
      writers.emplace_back([&copier, &wrong, capture, given_up, nap, save, value] {
        if (given_up) {
          std::this_thread::sleep_for(nap);
          copier.fail(*capture, "enough");
        } else {
          if (!copier.await_slab(*capture, soon())) wrong[save] = "no slab, ";
          wrong[save] += consume(copier, *capture, static_cast<std::byte>(value));
        }
        if (!copier.release(*capture, soon())) wrong[save] += ", not released";
      });
      // No fence holds back for a capture that was given up: kernels may still read what training would write.
      if (given_up) writers.back().join();
      for (const std::int32_t owner : {kVolatile, 0, 1, kFrozen}) {
        auto fenced = copier.fence(*capture, owner, devices.streams, soon(), false);
        if (fenced != kDone) fenced = copier.fence(*capture, owner, devices.streams, soon(), true);
        CHECK(fenced == kDone);
        for (Part& part : state.parts) {
          if (part.owner == owner) devices.fill(part, 255);
        }
      }
    }
    writers.clear();
    devices.synchronize();
  }
  for (const std::string& one : wrong) CHECK_EQUAL(one, "");
  devices.check_clean();
}

// Whether calling it is refused with the driver's words.
bool refused(const std::function<void()>& call) {
  try {
    call();
  } catch (const cuda::Error& error) {
    return std::string(error.what()).find("a fault of the test") != std::string::npos;
  }
  return false;
}

}  // namespace

TEST(captures_are_of_their_moment_while_training_writes_behind_its_fences) {
  test::Random random(13);
  for (int round = 0; round < 12; ++round) train(random, round);
}

TEST(a_fence_holds_the_stream_back_and_not_the_cpu) {
  One one(0);
  fake_cuda::hold_copies();
  const auto capture = one.take();
  CHECK(one.copier->fence(*capture, 0, one.devices.streams, soon(), true) == kDone);
  one.devices.fill(one.state.parts[0], 2);
  std::this_thread::sleep_for(20ms);
  CHECK(one.state.parts[0].memory[0] == std::byte{1});
  fake_cuda::let_copies();
  CHECK_EQUAL(consume(*one.copier, *capture, std::byte{1}), "");
  one.devices.synchronize();
  CHECK(one.state.parts[0].memory[0] == std::byte{2});
  CHECK(one.copier->release(*capture, soon()));
  one.close();
}

TEST(a_write_without_a_fence_is_seen) {
  One one(0);
  fake_cuda::hold_copies();
  const auto capture = one.take();
  one.devices.fill(one.state.parts[0], 2);
  one.devices.synchronize();
  fake_cuda::let_copies();
  CHECK(one.copier->wait(*capture, soon()));
  CHECK_EQUAL(one.copier->torn(*capture).value_or(99), 0u);
  CHECK(one.copier->release(*capture, soon()));
  one.close();
}

TEST(what_is_spilled_may_change_before_a_byte_has_left_the_device) {
  One one(kVolatile, std::size_t{4} << 20);
  fake_cuda::hold_copies();
  const auto capture = one.take();
  CHECK(capture->pieces[0].spilled);
  CHECK(one.copier->fence(*capture, kVolatile, one.devices.streams, soon(), false) == kDone);
  one.devices.fill(one.state.parts[0], 2);
  one.devices.synchronize();
  fake_cuda::let_copies();
  CHECK_EQUAL(consume(*one.copier, *capture, std::byte{1}), "");
  CHECK(one.copier->release(*capture, soon()));
  one.close();
}

TEST(a_capture_goes_on_while_the_device_is_far_from_a_later_save) {
  for (const std::size_t spill_bytes : {std::size_t{0}, std::size_t{4} << 20}) {
    One one(spill_bytes == 0 ? 0 : kVolatile, spill_bytes);
    std::promise<void> reached;
    fake_cuda::hold_copies();
    const auto earlier = one.take();
    CHECK_EQUAL(earlier->pieces[0].spilled, spill_bytes > 0);
    fake_cuda::wait_in(one.devices.streams[0].second, reached.get_future().share());
    const auto later = one.take();
    fake_cuda::let_copies();
    CHECK_EQUAL(consume(*one.copier, *earlier, std::byte{1}), "");
    CHECK(one.copier->release(*earlier, soon()));
    CHECK(!one.copier->wait(*later, Clock::now() + 20ms));
    reached.set_value();
    CHECK_EQUAL(consume(*one.copier, *later, std::byte{1}), "");
    CHECK(one.copier->release(*later, soon()));
    one.close();
  }
}

TEST(a_copy_that_is_refused_fails_its_capture_and_no_other) {
  for (const char* const call : {"cuMemcpyDtoHAsync", "cuStreamWaitEvent"}) {
    One one(0);
    fake_cuda::hold_copies();
    const auto held = one.take();
    fake_cuda::let_copies();
    CHECK_EQUAL(consume(*one.copier, *held, std::byte{1}), "");
    CHECK(one.copier->release(*held, soon()));
    fake_cuda::fail(call, 700);
    std::shared_ptr<Capture> capture;
    if (!refused([&] { capture = one.take(); })) {
      CHECK(one.copier->fence(*capture, 0, one.devices.streams, soon(), true) == kDone);
      CHECK(one.copier->wait(*capture, soon()));
      CHECK(one.copier->failure(*capture).find("a fault of the test") != std::string::npos);
      CHECK(one.copier->release(*capture, soon()));
    }
    one.save(std::byte{1});
    one.close();
  }
}

TEST(a_take_that_the_driver_refuses_leaves_nothing_under_way) {
  for (const char* const call : {"cuLaunchKernel", "cuEventRecord"}) {
    One one(0);
    fake_cuda::fail(call, 700);
    CHECK(refused([&] { one.take(); }));
    one.devices.synchronize();
    CHECK(one.copier->has_room(one.state.bytes(), 0));
    one.save(std::byte{1});
    one.close();
  }
}

TEST(a_device_without_memory_to_spare_is_copied_all_the_same) {
  const Devices devices(1);
  Model state({Part{std::vector<std::byte>(200'000, std::byte{1}), 0, kVolatile}});
  fake_cuda::reset(0);
  {
    Copier copier({.threads = 1});
    copier.prepare(state.bytes(), devices.numbers, state.bytes());
    const auto capture = state.take(copier, state.shape(), devices.streams);
    CHECK(copier.fence(*capture, kVolatile, devices.streams, soon(), true) == kDone);
    devices.fill(state.parts[0], 2);
    CHECK_EQUAL(consume(copier, *capture, std::byte{1}), "");
    CHECK(copier.release(*capture, soon()));
    CHECK_EQUAL(copier.spill_bytes(0), 0u);
    devices.synchronize();
  }
  devices.check_clean();
}

TEST(release_waits_until_the_device_is_off_the_capture) {
  One one(0);
  fake_cuda::hold_copies();
  const auto capture = one.take();
  CHECK(one.copier->fence(*capture, 0, one.devices.streams, soon(), true) == kDone);
  one.copier->fail(*capture, "enough");
  CHECK(!one.copier->release(*capture, Clock::now() + 20ms));
  fake_cuda::let_copies();
  CHECK(one.copier->release(*capture, soon()));
  one.close();
}

TEST(a_copier_ends_with_copies_that_have_not_begun) {
  One one(0);
  fake_cuda::hold_copies();
  const auto capture = one.take();
  CHECK(one.copier->fence(*capture, 0, one.devices.streams, soon(), true) == kDone);
  const std::jthread later([] {
    std::this_thread::sleep_for(20ms);
    fake_cuda::let_copies();
  });
  one.close();
}

TEST(a_copier_ends_with_captures_under_way) {
  test::Random random(14);
  for (int round = 0; round < 10; ++round) {
    const Devices devices(2);
    Model state = spread(random, 2, 20);
    {
      Copier copier({.threads = 2});
      copier.prepare(state.bytes(), devices.numbers, state.bytes());
      state.take(copier, state.shape(), devices.streams);
      std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
    }
    devices.check_clean();
    devices.synchronize();
  }
}

}  // namespace dscheck
