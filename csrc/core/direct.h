// Direct I/O: past the page cache, where kernel and file system allow it.
#pragma once

#include <cstddef>

namespace dscheck {

// What buffers in memory, and offsets and lengths in the file, must be multiples of, in bytes. 0: no direct I/O.
struct DirectUnits {
  std::size_t memory = 0;
  std::size_t file = 0;

  explicit operator bool() const noexcept { return memory != 0 && file != 0; }
};

// As the kernel reports them for an open file (statx(2), STATX_DIOALIGN, Linux 6.1). An older kernel, or a file system
// that says nothing, gets 4 KiB for both, which all block devices take; the first call is then the test.
DirectUnits direct_units(int file);

// The open file once more, with O_DIRECT and `flags` (O_RDONLY or O_WRONLY): a descriptor of the caller's, or -1.
int reopen_direct(int file, int flags);

}  // namespace dscheck
