#include "core/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <new>

namespace dscheck {
namespace {

constexpr std::size_t kPage = 4096;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older headers lack the name
constexpr unsigned kPortableMapped = 1 | 2;

std::size_t segment_end(std::size_t offset) { return (offset / Region::kSegmentBytes + 1) * Region::kSegmentBytes; }

// Address space only: nothing is used until it is touched. As much as the machine has memory, since dozens of regions
// may be there; a quarter of a limit (ulimit -v), since the rest is for training.
std::size_t reserved_at_most() {
  std::size_t most =
      static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    most = std::min<std::size_t>(most, limit.rlim_cur / 4);
  }
  return std::bit_ceil(std::max(most, Region::kSegmentBytes));
}

std::byte* reserve(std::size_t& bytes) {
  for (bytes = reserved_at_most(); bytes >= Region::kSegmentBytes; bytes /= 2) {
    void* const at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) return static_cast<std::byte*>(at);
  }
  throw std::bad_alloc();
}

}  // namespace

Region::Region(std::function<void()> ready) : ready_(std::move(ready)) { data_ = reserve(reserved_); }

Region::~Region() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (context_ != nullptr) {
    const cuda::Driver* const driver = cuda::driver();
    try {
      const cuda::InContext current(*driver, context_);
      for (const std::size_t offset : registered_) driver->cuMemHostUnregister(data_ + offset);
    } catch (const cuda::Error&) {  // the process ends, and the driver with it
    }
  }
  munmap(data_, reserved_);
  if (file_ >= 0) close(file_);
}

void Region::prepare(std::size_t bytes, cuda::Context context) {
  const std::lock_guard lock(mutex_);
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (bytes > reserved_) throw std::bad_alloc();
  if (context != nullptr) context_ = context;
  asked_ = std::max(asked_, bytes);
  problem_.clear();
  if (!thread_.joinable()) thread_ = std::thread(&Region::work, this);
  changed_.notify_all();
}

std::size_t Region::asked() const {
  const std::lock_guard lock(mutex_);
  return asked_;
}

std::size_t Region::usable() const {
  const std::lock_guard lock(mutex_);
  return context_ == nullptr || !lockable_ ? mapped_ : std::min(mapped_, locked_);
}

std::string Region::problem() const {
  const std::lock_guard lock(mutex_);
  return problem_;
}

bool Region::page_locked() const {
  const std::lock_guard lock(mutex_);
  return context_ != nullptr && lockable_;
}

double Region::prepared_s() const {
  const std::lock_guard lock(mutex_);
  return prepared_s_;
}

std::size_t Region::run_end(std::size_t offset, std::size_t end) const {
  const std::lock_guard lock(mutex_);
  const auto next = std::upper_bound(registered_.begin(), registered_.end(), offset);
  const std::size_t here = next == registered_.end() ? locked_ : *next;
  return offset < here ? std::min(end, here) : end;  // a segment that could not be registered is no part of the last
}

void Region::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const auto began = std::chrono::steady_clock::now();
    if (step(lock)) {
      prepared_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
      lock.unlock();
      ready_();
      lock.lock();
    } else {
      changed_.wait(lock);
    }
  }
}

// One segment further: mapped and touched, or page-locked. False when there is nothing to do. Waits without the lock.
bool Region::step(std::unique_lock<std::mutex>& lock) {
  if (context_ != nullptr && lockable_ && locked_ < mapped_) {
    const cuda::Driver* const driver = cuda::driver();  // not sooner: what forks after cuInit() has no CUDA
    const std::size_t begin = locked_, end = std::min(segment_end(begin), mapped_);
    const cuda::Context context = context_;
    lock.unlock();
    int result = 0;
    try {
      const cuda::InContext current(*driver, context);
      result = driver->cuMemHostRegister(data_ + begin, end - begin, kPortableMapped);
    } catch (const cuda::Error&) {
      result = -1;
    }
    lock.lock();
    if (result == 0) {
      registered_.push_back(begin);
      locked_ = end;
    } else {
      lockable_ = false;  // copies still arrive, slowly, through the driver's own buffers
    }
    return true;
  }
  if (mapped_ >= asked_ || !problem_.empty()) return false;
  const std::size_t begin = mapped_, end = std::min(segment_end(begin), asked_);
  lock.unlock();
  std::string problem;
  if (file_ < 0) file_ = memfd_create("dscheck", MFD_CLOEXEC);
  if (file_ < 0 || ftruncate(file_, static_cast<off_t>(end)) != 0 ||
      mmap(data_ + begin, end - begin, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_,
           static_cast<off_t>(begin)) == MAP_FAILED) {
    problem = std::strerror(errno);
  } else {
    problem = touch(data_ + begin, end - begin);
  }
  lock.lock();
  if (problem.empty()) {
    mapped_ = end;
  } else {
    problem_ = problem;
  }
  return true;
}

// Why there is no memory for all of it, or nothing. Only old kernels make us find out by writing, which would end the
// process.
std::string Region::touch(std::byte* begin, std::size_t bytes) const {
  const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::size_t threads = std::clamp<std::size_t>(cores / 2, 1, 8);
  const std::size_t share = (bytes / threads + kPage) / kPage * kPage;
  std::atomic<int> error = 0;
  const auto populate = [begin, bytes, share, &error](std::size_t number) {
    const std::size_t from = std::min(number * share, bytes), to = std::min(from + share, bytes);
    if (from == to || madvise(begin + from, to - from, kPopulateWrite) == 0) return;
    if (errno != EINVAL) {
      error = errno;
      return;
    }
    for (std::size_t at = from; at < to; at += kPage) *reinterpret_cast<volatile char*>(begin + at) = 0;
  };
  std::vector<std::thread> helpers;
  for (std::size_t number = 1; number < threads; ++number) {
    try {
      helpers.emplace_back(populate, number);
    } catch (const std::exception&) {  // no memory, or no more threads: do it here
      populate(number);
    }
  }
  populate(0);
  for (std::thread& helper : helpers) helper.join();
  return error == 0 ? std::string() : std::strerror(error);
}

}  // namespace dscheck
