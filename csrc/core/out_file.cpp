#include "core/out_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace dscheck {
namespace {

constexpr std::size_t kPage = 4096;

}  // namespace

OutFile::OutFile(int file, bool direct, std::size_t slice_bytes)
    : file_(fcntl(file, F_DUPFD_CLOEXEC, 0)), slice_bytes_(std::max(slice_bytes / kPage * kPage, kPage)) {
  if (file_ < 0) throw std::system_error(errno, std::generic_category(), "a second descriptor of the file");
  if (!direct) return;
  units_ = direct_units(file_);
  // Larger units than a page are possible, and not worth a second way to cut.
  if (units_ && kPage % units_.memory == 0 && kPage % units_.file == 0) direct_ = reopen_direct(file_, O_WRONLY);
}

OutFile::~OutFile() {
  if (direct_ >= 0) close(direct_);
  close(file_);
}

int OutFile::reserve(std::uint64_t bytes) {
  if (!direct() || bytes == 0 || fallocate(file_, 0, 0, static_cast<off_t>(bytes)) == 0) return 0;
  return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? errno : 0;
}

int OutFile::write(std::span<const std::byte> bytes, std::uint64_t offset, const std::atomic<bool>& cancelled) {
  const std::uint64_t end = offset + bytes.size();
  const std::uint64_t first = (offset + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  const bool aligned = reinterpret_cast<std::uintptr_t>(bytes.data()) % kPage == offset % kPage;
  if (!direct() || !aligned || first >= last) return put(file_, bytes, offset, cancelled);
  const std::size_t head = first - offset, middle = last - first;
  int error = put(direct_, bytes.subspan(head, middle), first, cancelled);
  if (error == EINVAL || error == EOPNOTSUPP) {
    refused_ = true;
    return put(file_, bytes, offset, cancelled);
  }
  if (error == 0) error = put(file_, bytes.first(head), offset, cancelled);
  if (error == 0) error = put(file_, bytes.subspan(head + middle), last, cancelled);
  return error;
}

int OutFile::put(int file, std::span<const std::byte> bytes, std::uint64_t offset,
                 const std::atomic<bool>& cancelled) const {
  while (!bytes.empty()) {
    if (cancelled) return ECANCELED;
    const ssize_t count = pwrite(file, bytes.data(), std::min(bytes.size(), slice_bytes_), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count < 0 ? errno : EIO;
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
  return 0;
}

}  // namespace dscheck
