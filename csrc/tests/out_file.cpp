#include "core/out_file.h"

#include <fcntl.h>

#include <memory>
#include <thread>

#include "file.h"

namespace dscheck {
namespace {

constexpr std::size_t kPage = 4096;
const std::atomic<bool> kGoOn = false;

// Bytes that begin `skip` bytes behind a page.
class Buffer {
 public:
  Buffer(test::Random& random, std::size_t bytes, std::size_t skip)
      : memory_(static_cast<std::byte*>(std::aligned_alloc(kPage, (bytes + skip) / kPage * kPage + kPage)), std::free),
        bytes_(memory_.get() + skip, bytes) {
    const auto filled = test::random_bytes(random, bytes);
    std::copy(filled.begin(), filled.end(), bytes_.begin());
  }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
  std::span<std::byte> bytes_;
};

std::vector<std::byte> content(const test::File& file, std::size_t bytes) {
  std::vector<std::byte> found(bytes);
  CHECK_EQUAL(pread(file.descriptor(), found.data(), bytes, 0), static_cast<ssize_t>(bytes));
  return found;
}

}  // namespace

TEST(bytes_arrive_at_any_position_from_any_memory_and_thread) {
  test::Random random(3);
  for (const std::string& folder : test::folders()) {
    for (int round = 0; round < 20; ++round) {
      const test::File file(folder);
      OutFile out(file.descriptor(), round % 2 == 0, test::between(random, 1, 8) * kPage);
      CHECK_EQUAL(out.reserve(round % 3 == 0 ? 1 << 20 : 0), 0);
      std::vector<std::byte> expected;
      std::vector<std::jthread> threads;
      std::vector<int> errors(8, -1);
      for (std::size_t part = 0; part < errors.size(); ++part) {
        // Pages to begin on as large fragments do, and places in the middle of one.
        const std::size_t at = test::between(random, 0, 1) == 0 ? (expected.size() + kPage - 1) / kPage * kPage
                                                                : expected.size() + test::between(random, 0, 100);
        const std::size_t bytes = test::between(random, 0, 12 * kPage);
        auto buffer = std::make_shared<Buffer>(random, bytes, test::between(random, 0, 1) == 0 ? at % kPage : 64);
        expected.resize(at);
        expected.insert(expected.end(), buffer->bytes().begin(), buffer->bytes().end());
        threads.emplace_back(
            [&out, &error = errors[part], buffer, at] { error = out.write(buffer->bytes(), at, kGoOn); });
      }
      threads.clear();
      for (const int error : errors) CHECK_EQUAL(error, 0);
      CHECK(content(file, expected.size()) == expected);
    }
  }
}

TEST(a_write_that_is_given_up_ends) {
  test::Random random(4);
  const test::File file("/tmp");
  OutFile out(file.descriptor(), true, kPage);
  const std::atomic<bool> cancelled = true;
  CHECK_EQUAL(out.write(Buffer(random, 10 * kPage, 0).bytes(), 0, cancelled), ECANCELED);
}

TEST(a_full_device_is_told) {
  test::Random random(5);
  const int full = open("/dev/full", O_WRONLY);
  CHECK(full >= 0);
  OutFile out(full, true, kPage);
  CHECK_EQUAL(out.reserve(1 << 20), 0);
  CHECK_EQUAL(out.write(Buffer(random, 10 * kPage, 0).bytes(), 0, kGoOn), ENOSPC);
  close(full);
}

TEST(the_file_stays_open_while_it_is_needed) {
  test::Random random(6);
  const Buffer buffer(random, 2 * kPage, 0);
  const test::File file("/tmp");
  const int other = dup(file.descriptor());
  OutFile out(other, true, kPage);
  close(other);
  CHECK_EQUAL(out.write(buffer.bytes(), 0, kGoOn), 0);
  CHECK(content(file, 2 * kPage) == std::vector<std::byte>(buffer.bytes().begin(), buffer.bytes().end()));
}

}  // namespace dscheck
