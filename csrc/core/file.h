// An open file as a load reads it: past the page cache where kernel and file system allow it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace dscheck {

// Any thread may read.
class File {
 public:
  static constexpr std::size_t kMaxUnit = std::size_t{1} << 20;

  // By descriptors of its own: the caller may close `descriptor`. Throws std::system_error.
  explicit File(int descriptor);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Brings [start, start + bytes) to `buffer`, aligned to kMaxUnit, which has room for kMaxUnit more before them and
  // behind; `at` is where in it they begin, `got` how many there were. Returns 0 or errno.
  int read(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& at, std::size_t& got);

 private:
  void read_direct(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& got);
  int read_buffered(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& got) const;

  int buffered_;
  int direct_ = -1;
  std::size_t unit_;
  std::atomic<bool> direct_works_;
};

}  // namespace dscheck
