// The host side of captures: one mapping, touched and page-locked ahead of time, by segments, in the background.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/driver.h"

namespace dscheck {

// Memory of an anonymous file (memfd): exact in size, while torch's page-locked allocator rounds up to powers of two,
// and mappable by another process later. Both touching (about 4 GB/s) and registering (17 GB/s) are slow, so they
// happen once.
class Region {
 public:
  static constexpr std::size_t kSegmentBytes = std::size_t{256} << 20;

  // `ready` is called from the background, without locks, when more bytes are usable or preparing has failed.
  explicit Region(std::function<void()> ready);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Ask for at least `bytes`, returning at once; page-locked for `context` when that is not null. Throws
  // std::bad_alloc when there is not even that much address space.
  void prepare(std::size_t bytes, cuda::Context context);

  std::byte* data() const noexcept { return data_; }
  std::size_t asked() const;
  std::size_t usable() const;   // bytes from the start that are touched, and page-locked where that was asked for
  std::string problem() const;  // why there will not be more, or nothing
  bool page_locked() const;     // whether all usable bytes are, so far as asked
  double prepared_s() const;    // seconds that the background spent

  // The end of the registered range that `offset` lies in, or `end` behind all of them. One copy by the device must
  // not cross ranges.
  std::size_t run_end(std::size_t offset, std::size_t end) const;

 private:
  void work();
  bool step(std::unique_lock<std::mutex>& lock);
  std::string touch(std::byte* begin, std::size_t bytes) const;

  const std::function<void()> ready_;
  int file_ = -1;
  std::byte* data_ = nullptr;
  std::size_t reserved_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t asked_ = 0, mapped_ = 0, locked_ = 0;
  cuda::Context context_ = nullptr;
  bool lockable_ = true, stop_ = false;
  std::string problem_;
  double prepared_s_ = 0;
  std::vector<std::size_t> registered_;  // where each range begins, ascending
  std::thread thread_;
};

}  // namespace dscheck
