// A file that several threads fill, each at positions of its own, past the page cache where that is possible.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/direct.h"

namespace dscheck {

// Methods return 0 or the errno of the call that failed; they may be called from any thread but reserve(), which comes
// first.
class OutFile {
 public:
  // `file` is open for writing, and duplicated. `slice_bytes` (a multiple of a page): most bytes of one call.
  OutFile(int file, bool direct, std::size_t slice_bytes);
  ~OutFile();
  OutFile(const OutFile&) = delete;
  OutFile& operator=(const OutFile&) = delete;

  // The file's first `bytes` get their room now: direct writes into it need not take turns to extend the file, and a
  // full disk is known before anything is written. Nothing where that is no gain, or not to be had.
  int reserve(std::uint64_t bytes);

  // All of `bytes`, at `offset`. Whole pages go past the page cache, the rest does not: no page takes both ways. Ends
  // early, with ECANCELED, once `cancelled` is set.
  int write(std::span<const std::byte> bytes, std::uint64_t offset, const std::atomic<bool>& cancelled);

  bool direct() const noexcept { return direct_ >= 0 && !refused_; }

 private:
  int put(int file, std::span<const std::byte> bytes, std::uint64_t offset, const std::atomic<bool>& cancelled) const;

  const int file_;
  int direct_ = -1;
  DirectUnits units_;
  const std::size_t slice_bytes_;
  std::atomic<bool> refused_ = false;  // a direct write, by the file system
};

}  // namespace dscheck
