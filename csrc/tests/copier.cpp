#include "core/copier.h"

#include <fcntl.h>

#include <atomic>

#include "core/sample.h"
#include "file.h"
#include "saves.h"

namespace dscheck {
namespace {

using namespace std::chrono_literals;
using test::consume;
using test::kBlockBytes;
using test::Model;
using test::Part;
using test::soon;

constexpr auto kDone = Copier::Fenced::kDone;

// Two optimizers and what nobody is known to change.
Model trained(test::Random& random, std::size_t parts) {
  std::vector<Part> made;
  for (std::size_t i = 0; i < parts; ++i) {
    const std::size_t bytes = test::between(random, 1, std::size_t{1} << test::between(random, 4, 20));
    made.push_back({std::vector<std::byte>(bytes), kHost, i % 7 == 6 ? kFrozen : static_cast<std::int32_t>(i % 2)});
  }
  return Model(std::move(made));
}

void set(Model& state, std::int32_t owner, std::byte value) {
  for (Part& part : state.parts) {
    if (part.owner == owner) std::memset(part.memory.data(), static_cast<int>(value), part.memory.size());
  }
}

// One part that fills the region, so that a second capture finds no place until the first is consumed.
struct Full {
  static constexpr std::size_t kBytes = 40 * 4096;

  Full()
      : state({Part{std::vector<std::byte>(kBytes, std::byte{1}), kHost, 0}}),
        shape(state.shape()),
        copier({.threads = 2}) {
    copier.prepare(kBytes, {}, 0);
    test::await_region(copier, kBytes);
    first = state.take(copier, shape);
    CHECK(copier.wait(*first, soon()));
    second = state.take(copier, shape);
  }

  Model state;
  std::shared_ptr<CaptureShape> shape;
  Copier copier;
  std::shared_ptr<Capture> first, second;
};

}  // namespace

TEST(captures_are_of_their_moment_while_two_threads_train) {
  test::Random random(9);
  for (int round = 0; round < 12; ++round) {
    Model state = trained(random, 20);
    const auto shape = state.shape(round % 3 == 0);
    Copier copier({.threads = 1 + static_cast<std::size_t>(round % 3)});
    copier.prepare(round % 2 == 0 ? 2 * state.bytes() : std::max(state.largest(), state.bytes() / 3) + 4096, {}, 0);
    std::vector<std::string> wrong(6);
    std::vector<std::jthread> writers;
    for (int save = 0; save < 6; ++save) {
      const auto value = static_cast<std::byte>(6 * round + save + 1);
      for (const std::int32_t owner : {0, 1, kFrozen}) set(state, owner, value);
      const auto capture = state.take(copier, shape);
      writers.emplace_back([&copier, &wrong, capture, save, value] {
        wrong[save] = consume(copier, *capture, value);
        if (!copier.release(*capture, soon())) wrong[save] += ", not released";
      });
      std::vector<std::jthread> trainers;
      for (const std::int32_t owner : {0, 1}) {
        trainers.emplace_back([&copier, &state, capture, owner] {
          if (copier.fence(*capture, owner, {}, soon(), true) == kDone) set(state, owner, std::byte{0});
        });
      }
      trainers.clear();
      CHECK(copier.fence(*capture, kFrozen, {}, soon(), true) == kDone);
    }
    writers.clear();
    for (const std::string& one : wrong) CHECK_EQUAL(one, "");
    CHECK(copier.has_room(state.largest(), 0));
  }
}

TEST(captures_are_written_by_threads_while_two_others_train) {
  test::Random random(12);
  for (int round = 0; round < 12; ++round) {
    Model state = trained(random, 20);
    const auto shape = state.shape();
    Copier copier({.threads = 2, .io_threads = 1 + static_cast<std::size_t>(round % 3)});
    copier.prepare(round % 2 == 0 ? 2 * state.bytes() : std::max(state.largest(), state.bytes() / 3) + 4096, {}, 0);
    for (int save = 0; save < 4; ++save) {
      const auto value = static_cast<std::byte>(4 * round + save + 1);
      for (const std::int32_t owner : {0, 1, kFrozen}) set(state, owner, value);
      const test::File file("/tmp");
      const auto output = std::make_shared<Output>();
      output->file = std::make_unique<OutFile>(file.descriptor(), round % 2 == 0, 64 << 10);
      std::vector<std::byte> expected(state.small);
      std::uint64_t blocks = block_count(state.small.size(), kBlockBytes);
      output->smalls = {0};
      output->small_blocks = {0};
      for (const PieceSpec& piece : shape->pieces) {
        expected.resize(align_up(expected.size(), alignment_of(piece.bytes)));
        output->pieces.push_back(expected.size());
        output->piece_blocks.push_back(blocks);
        expected.insert(expected.end(), piece.bytes, value);
        blocks += block_count(piece.bytes, kBlockBytes);
      }
      const auto capture = state.take(copier, shape);
      std::vector<std::jthread> trainers;
      for (const std::int32_t owner : {0, 1}) {
        trainers.emplace_back([&copier, &state, capture, owner] {
          if (copier.fence(*capture, owner, {}, soon(), true) == kDone) set(state, owner, std::byte{0});
        });
      }
      copier.write(*capture, output);
      CHECK(copier.await_written(*capture, soon()));
      CHECK(copier.wait(*capture, soon()));
      trainers.clear();
      std::vector<std::byte> found(expected.size());
      CHECK_EQUAL(pread(file.descriptor(), found.data(), found.size(), 0), static_cast<ssize_t>(found.size()));
      CHECK(found == expected);
      std::vector<std::uint32_t> sums(blocks), collected(blocks);
      for (std::size_t i = 0; i < shape->pieces.size(); ++i) {
        const std::size_t count = block_count(shape->pieces[i].bytes, kBlockBytes);
        crc32c_blocks(std::span(found).subspan(output->pieces[i], shape->pieces[i].bytes), kBlockBytes,
                      std::span(sums).subspan(output->piece_blocks[i], count));
      }
      crc32c_blocks(state.small, kBlockBytes, std::span(sums).first(1));
      capture->collect(collected);
      CHECK(collected == sums);
      CHECK(copier.release(*capture, soon()));
    }
    CHECK(copier.has_room(state.largest(), 0));
  }
}

TEST(a_write_that_fails_ends_the_wait_and_gives_the_room_back) {
  test::Random random(13);
  Model state = trained(random, 20);
  Copier copier({.threads = 2, .io_threads = 2});
  copier.prepare(state.bytes(), {}, 0);
  const auto shape = state.shape();
  const int full = open("/dev/full", O_WRONLY);
  const auto output = std::make_shared<Output>();
  output->file = std::make_unique<OutFile>(full, true, 64 << 10);
  output->smalls = {Output::kDropped};
  output->small_blocks = {Output::kDropped};
  output->pieces.assign(shape->pieces.size(), 0);
  output->piece_blocks.assign(shape->pieces.size(), Output::kDropped);
  const auto capture = state.take(copier, shape);
  copier.write(*capture, output);
  CHECK(!copier.await_written(*capture, soon()));
  CHECK_EQUAL(output->error, ENOSPC);
  CHECK(copier.release(*capture, soon()));
  CHECK(copier.has_room(state.largest(), 0));
  close(full);
}

TEST(small_tensors_samples_and_hashes_are_of_take) {
  test::Random random(10);
  Model state = trained(random, 4);
  for (Part& part : state.parts) part.memory = test::random_bytes(random, part.memory.size());
  state.small = test::random_bytes(random, state.small.size());
  const auto small = state.small;
  const auto shape = state.shape(true);
  Copier copier({.threads = 1});
  copier.prepare(state.bytes(), {}, 0);
  const auto capture = state.take(copier, shape);
  std::fill(state.small.begin(), state.small.end(), std::byte{0});
  CHECK(copier.await_slab(*capture, soon()));
  CHECK(std::memcmp(capture->slab.data, small.data(), small.size()) == 0);
  CHECK(copier.wait(*capture, soon()));
  std::byte sample[kSampleBytes];
  take_sample(small.data(), small.size(), sample);
  CHECK(std::memcmp(capture->sample(shape->watched_at, 0), sample, kSampleBytes) == 0);
  const auto* const hashes = reinterpret_cast<const std::uint64_t*>(capture->slab.data + shape->hashes_at);
  for (std::size_t i = 0; i < state.parts.size(); ++i) {
    const auto& memory = state.parts[i].memory;
    CHECK_EQUAL(hashes[i * kHashRows], hash_words(memory.data(), memory.size()));
  }
  CHECK(copier.release(*capture, soon()));
}

TEST(what_changes_without_a_fence_before_it_is_copied_is_seen) {
  Full full;
  std::fill(full.state.parts[0].memory.begin(), full.state.parts[0].memory.end(), std::byte{2});
  CHECK_EQUAL(consume(full.copier, *full.first, std::byte{1}), "");
  CHECK(full.copier.wait(*full.second, soon()));
  CHECK_EQUAL(full.copier.torn(*full.second).value_or(99), 0u);
  CHECK(full.copier.release(*full.second, soon()));
  CHECK(full.copier.release(*full.first, soon()));
}

TEST(waits_end_at_their_deadlines) {
  Full full;
  const auto past = Clock::now() + 20ms;
  CHECK(!full.copier.has_room(1, 0));
  CHECK(!full.copier.wait(*full.second, past));
  CHECK_EQUAL(full.copier.await_run(*full.second, 0, 1, past), 0u);
  CHECK(full.copier.fence(*full.second, 0, {}, past, true) == Copier::Fenced::kTooLate);
  CHECK(full.copier.fence(*full.second, 0, {}, soon(), false) == Copier::Fenced::kWouldWait);
  CHECK_EQUAL(full.copier.pending(*full.second).value_or(99), 0u);
  CHECK(full.copier.fence(*full.first, 0, {}, past, false) == kDone);
  CHECK(!full.copier.pending(*full.first));
}

TEST(a_capture_that_is_given_up_gives_its_room_back) {
  Full full;
  full.copier.fail(*full.first, "enough");
  CHECK(full.copier.wait(*full.first, soon()));
  CHECK_EQUAL(full.copier.failure(*full.first), "enough");
  CHECK(full.copier.release(*full.first, soon()));
  CHECK(full.copier.release(*full.first, soon()));
  CHECK_EQUAL(consume(full.copier, *full.second, std::byte{1}), "");
  CHECK(full.copier.release(*full.second, soon()));
}

TEST(a_region_that_no_piece_fits_into_fails_the_capture) {
  Model state({Part{std::vector<std::byte>(100'000), kHost, 0}});
  Copier copier({.threads = 1});
  copier.prepare(4096, {}, 0);
  const auto capture = state.take(copier, state.shape());
  CHECK(copier.wait(*capture, soon()));
  CHECK_EQUAL(copier.failure(*capture), "the region is too small for a piece");
}

// Memory is freed as soon as release() says so: an address sanitizer sees who still reads it.
TEST(release_races_with_copies_fences_and_consumers) {
  test::Random random(11);
  for (int round = 0; round < 60; ++round) {
    auto state = std::make_unique<Model>(trained(random, 12));
    const auto shape = state->shape();
    Copier copier({.threads = 2});
    copier.prepare(std::max(state->largest(), state->bytes() / 2) + 4096, {}, 0);
    const auto capture = state->take(copier, shape);
    const auto nap = std::chrono::microseconds(test::between(random, 0, 500));
    std::jthread consumer([&] { consume(copier, *capture, std::byte{0}); });
    std::jthread trainer([&] { copier.fence(*capture, 0, {}, soon(), true); });
    std::jthread quitter([&] {
      std::this_thread::sleep_for(nap);
      if (round % 2 == 0) copier.fail(*capture, "enough");
      CHECK(copier.release(*capture, soon()));
      copier.hurry();
    });
    quitter.join();
    trainer.join();
    state.reset();
    consumer.join();
  }
}

TEST(a_copier_ends_with_captures_under_way) {
  test::Random random(12);
  for (int round = 0; round < 20; ++round) {
    Model state = trained(random, 12);
    const auto shape = state.shape();
    Copier copier({.threads = 2});
    copier.prepare(state.largest() + 4096, {}, 0);
    state.take(copier, shape);
    state.take(copier, shape);
    std::this_thread::sleep_for(std::chrono::microseconds(50 * round));
  }
}

}  // namespace dscheck
