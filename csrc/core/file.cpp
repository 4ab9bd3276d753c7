#include "core/file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "core/direct.h"

namespace dscheck {

File::File(int descriptor) : buffered_(fcntl(descriptor, F_DUPFD_CLOEXEC, 0)) {
  if (buffered_ < 0) throw std::system_error(errno, std::generic_category(), "cannot duplicate a file descriptor");
  const DirectUnits units = direct_units(descriptor);
  unit_ = std::max(units.file, units.memory);
  if (units && unit_ <= kMaxUnit) direct_ = reopen_direct(descriptor, O_RDONLY);
  direct_works_ = direct_ >= 0;
}

File::~File() {
  close(buffered_);
  if (direct_ >= 0) close(direct_);
}

int File::read(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& at, std::size_t& got) {
  at = direct_works_ ? start % unit_ : 0;
  got = 0;
  if (direct_works_) read_direct(start - at, (at + bytes + unit_ - 1) / unit_ * unit_, buffer, got);
  got = std::min(got - std::min(got, at), bytes);
  return got == bytes ? 0 : read_buffered(start, bytes, buffer + at, got);
}

// What a file system refuses, or cuts short, the page cache gives.
void File::read_direct(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& got) {
  while (got < bytes && got % unit_ == 0) {
    const ssize_t count = pread(direct_, buffer + got, bytes - got, static_cast<off_t>(start + got));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) direct_works_ = false;
    if (count <= 0) return;
    got += static_cast<std::size_t>(count);
  }
}

int File::read_buffered(std::uint64_t start, std::size_t bytes, std::byte* buffer, std::size_t& got) const {
  while (got < bytes) {
    const ssize_t count = pread(buffered_, buffer + got, bytes - got, static_cast<off_t>(start + got));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    if (count == 0) return 0;
    got += static_cast<std::size_t>(count);
  }
  return 0;
}

}  // namespace dscheck
