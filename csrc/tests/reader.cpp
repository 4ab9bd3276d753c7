#include "core/reader.h"

#include <fcntl.h>

#include <algorithm>
#include <thread>

#include "core/crc32c.h"
#include "file.h"

namespace dscheck {
namespace {

using test::soon;

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kReadBytes = 10 * kBlock;

// A file of random bytes, of which the last block is short.
struct Stored {
  explicit Stored(const std::string& folder, std::size_t bytes = 50 * kBlock + 777) : file(folder), data() {
    test::Random random(22);
    data = test::random_bytes(random, bytes);
    CHECK_EQUAL(write(file.descriptor(), data.data(), bytes), static_cast<ssize_t>(bytes));
    opened = std::make_shared<File>(file.descriptor());
  }

  Blocks blocks(std::size_t start, std::size_t bytes) const {
    Blocks made{0, bytes, std::vector<std::uint32_t>(block_count(bytes, kBlock))};
    crc32c_blocks(std::span(data).subspan(start, bytes), kBlock, made.expected);
    return made;
  }

  // The blocks from `start` on, to the same place of `target`.
  Read read(std::size_t start, std::byte* target) const {
    const std::size_t bytes = std::min(kReadBytes, data.size() - start);
    Read made{opened, start, bytes, {blocks(start, bytes)}, {}};
    made.copies.emplace_back(0, target + start, 1, std::vector<Axis>{{bytes, 1, 1}});
    return made;
  }

  test::File file;
  std::vector<std::byte> data;
  std::shared_ptr<File> opened;
};

ReaderSettings settings(unsigned threads, std::size_t buffers) { return {threads, buffers, kReadBytes, kBlock}; }

Fault fault_of(Reader& reader) {
  CHECK(!reader.finished(soon()));
  CHECK(reader.fault().has_value());
  return *reader.fault();
}

}  // namespace

TEST(all_bytes_of_a_file_arrive_each_read_once) {
  for (const std::string& folder : test::folders()) {
    const Stored stored(folder);
    for (const unsigned threads : {1, 3}) {
      std::vector<std::byte> target(stored.data.size());
      Reader reader(settings(threads, 2));
      std::vector<bool> seen;
      for (std::size_t start = 0; start < stored.data.size(); start += kReadBytes) {
        CHECK_EQUAL(reader.add(stored.read(start, target.data())), seen.size());
        seen.push_back(false);
      }
      for (std::size_t left = seen.size(); left > 0; --left) {
        const auto number = reader.finished(soon());
        CHECK(number.has_value() && !seen[*number]);
        seen[*number] = true;
      }
      CHECK(target == stored.data);
      CHECK(!reader.finished(std::chrono::steady_clock::now()));
      CHECK(!reader.fault());
    }
  }
}

TEST(reads_that_begin_and_end_anywhere_bring_their_bytes) {
  test::Random random(23);
  for (const std::string& folder : test::folders()) {
    const Stored stored(folder);
    Reader reader(settings(2, 2));
    for (int round = 0; round < 100; ++round) {
      const std::size_t start = test::between(random, 0, stored.data.size() - 1);
      const std::size_t bytes = test::between(random, 1, std::min(kReadBytes, stored.data.size() - start));
      Read read{stored.opened, start, bytes, {}, {}};
      read.kept = true;
      reader.add(std::move(read));
      const std::size_t number = reader.finished(soon()).value();
      CHECK(std::ranges::equal(reader.buffer(number), std::span(stored.data).subspan(start, bytes)));
      reader.release(number);
    }
  }
}

TEST(a_damaged_block_is_named_and_no_byte_of_its_read_is_placed) {
  const Stored stored(test::folders().front());
  std::vector<std::byte> target(stored.data.size());
  Read read = stored.read(kReadBytes, target.data());
  read.blocks[0].expected[3] ^= 1;
  const std::uint32_t expected = read.blocks[0].expected[3];
  Reader reader(settings(2, 2));
  reader.add(std::move(read));
  const Fault fault = fault_of(reader);
  CHECK(fault.kind == Fault::Kind::kDamaged);
  CHECK_EQUAL(fault.offset, kReadBytes + 3 * kBlock);
  CHECK_EQUAL(fault.expected, expected);
  CHECK_EQUAL(fault.found, expected ^ 1);
  CHECK(std::ranges::all_of(target, [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(a_file_that_ends_early_and_one_that_cannot_be_read_are_told_apart) {
  const Stored stored(test::folders().front());
  {
    Reader reader(settings(1, 1));
    reader.add({stored.opened, stored.data.size() - 100, 200, {}, {}});
    const Fault fault = fault_of(reader);
    CHECK(fault.kind == Fault::Kind::kShort);
    CHECK_EQUAL(fault.offset, stored.data.size());
  }
  const int folder = open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  Reader reader(settings(1, 1));
  reader.add({std::make_shared<File>(folder), 0, 100, {}, {}});
  close(folder);
  const Fault fault = fault_of(reader);
  CHECK(fault.kind == Fault::Kind::kSystem);
  CHECK_EQUAL(fault.error, EISDIR);
}

TEST(what_a_caller_fills_is_verified_and_placed_as_well) {
  const Stored stored(test::folders().front());
  std::vector<std::byte> target(stored.data.size());
  Reader reader(settings(1, 2));
  Read read = stored.read(0, target.data());
  read.file.reset();
  reader.add(std::move(read));
  const std::size_t number = reader.next_to_fill(soon()).value();
  CHECK_EQUAL(reader.buffer(number).size(), kReadBytes);
  std::copy_n(stored.data.begin(), kReadBytes, reader.buffer(number).begin());
  reader.filled(number);
  CHECK_EQUAL(reader.finished(soon()).value(), number);
  CHECK(std::equal(target.begin(), target.begin() + kReadBytes, stored.data.begin()));
}

TEST(buffers_that_are_kept_hold_the_others_up_until_they_are_released) {
  const Stored stored(test::folders().front());
  Reader reader(settings(2, 1));
  for (int i = 0; i < 2; ++i) {
    Read read{stored.opened, 0, kBlock, {}, {}};
    read.kept = true;
    reader.add(std::move(read));
  }
  CHECK_EQUAL(reader.finished(soon()).value(), 0u);
  CHECK(!reader.finished(std::chrono::steady_clock::now() + std::chrono::milliseconds(20)));
  reader.release(0);
  CHECK_EQUAL(reader.finished(soon()).value(), 1u);
}

TEST(a_read_that_its_blocks_or_copies_do_not_fit_is_refused) {
  const Stored stored(test::folders().front());
  std::vector<std::byte> target(stored.data.size());
  Reader reader(settings(1, 1));
  std::vector<Read> wrong(3, stored.read(0, target.data()));
  wrong[0].blocks[0].offset = kBlock;
  wrong[1].copies[0] = Scatter(1, target.data(), 1, {{kReadBytes, 1, 1}});
  wrong[2].bytes = kReadBytes + 1;
  for (Read& read : wrong) {
    bool refused = false;
    try {
      reader.add(std::move(read));
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

// The target is freed as soon as stop() returns: an address sanitizer sees who still writes to it.
TEST(nothing_is_placed_once_a_reader_has_stopped) {
  const Stored stored(test::folders().front());
  for (int round = 0; round < 50; ++round) {
    auto target = std::make_unique<std::vector<std::byte>>(stored.data.size());
    Reader reader(settings(3, 3));
    for (std::size_t start = 0; start < stored.data.size(); start += kReadBytes) {
      Read read = stored.read(start, target->data());
      read.copies.resize(100, read.copies.front());  // so that it takes a while
      reader.add(std::move(read));
    }
    std::jthread waiting([&reader] {
      while (reader.finished(soon())) {
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(20 * round));
    reader.stop();
    target.reset();
  }
}

}  // namespace dscheck
