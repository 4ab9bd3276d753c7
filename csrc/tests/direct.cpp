#include "core/direct.h"

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "file.h"

namespace dscheck {
namespace {

struct Freed {
  void operator()(std::byte* memory) const { std::free(memory); }
};

void round_trip(const std::string& folder) {
  const test::File file(folder);
  const DirectUnits units = direct_units(file.descriptor());
  if (!units) return;
  CHECK(std::has_single_bit(units.memory));
  CHECK(std::has_single_bit(units.file));
  const int direct = reopen_direct(file.descriptor(), O_WRONLY);
  if (direct < 0) return;  // the file system takes no direct I/O
  const std::size_t bytes = 4 * std::max<std::size_t>(units.file, 4096);
  const std::unique_ptr<std::byte, Freed> memory(
      static_cast<std::byte*>(std::aligned_alloc(std::max(units.memory, sizeof(void*)), bytes)));
  test::Random random(7);
  const auto expected = test::random_bytes(random, bytes);
  std::memcpy(memory.get(), expected.data(), bytes);
  CHECK_EQUAL(pwrite(direct, memory.get(), bytes, 0), static_cast<ssize_t>(bytes));
  close(direct);
  std::vector<std::byte> found(bytes);
  CHECK_EQUAL(pread(file.descriptor(), found.data(), bytes, 0), static_cast<ssize_t>(bytes));
  CHECK(found == expected);
}

}  // namespace

TEST(direct_writes_in_the_units_arrive) {
  for (const std::string& folder : test::folders()) round_trip(folder);
}

TEST(a_descriptor_that_is_no_file_gives_no_descriptor) { CHECK_EQUAL(reopen_direct(-1, O_RDONLY), -1); }

}  // namespace dscheck
