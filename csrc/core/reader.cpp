#include "core/reader.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "core/crc32c.h"
#include "core/driver.h"

namespace dscheck {
namespace {

using Clock = Reader::Clock;

constexpr unsigned kPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE: for all devices
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// Aligned for any device, in huge pages where the system has them: a direct read pins each page it fills.
class Buffer {
 public:
  Buffer(std::size_t bytes, int device)
      : bytes_(round_up(bytes, kHugePage)), data_(static_cast<std::byte*>(std::aligned_alloc(kHugePage, bytes_))) {
    if (data_ == nullptr) throw std::bad_alloc();
    madvise(data_, bytes_, MADV_HUGEPAGE);
    if (device >= 0) lock(device);
  }
  ~Buffer() {
    if (context_ != nullptr) {
      const cuda::Driver& driver = *cuda::driver();
      try {
        const cuda::InContext current(driver, context_);
        driver.cuMemHostUnregister(data_);
      } catch (const cuda::Error&) {  // the process ends, and the driver with it
      }
      driver.cuDevicePrimaryCtxRelease(device_);
    }
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const noexcept { return data_; }

 private:
  // Without it copies still arrive, slowly, through the driver's own buffers.
  void lock(int device) {
    const cuda::Driver* const driver = cuda::driver();
    cuda::Context context = nullptr;
    if (driver == nullptr || driver->cuDevicePrimaryCtxRetain(&context, device) != 0) return;
    try {
      const cuda::InContext current(*driver, context);
      if (driver->cuMemHostRegister(data_, bytes_, kPortable) == 0) {
        context_ = context;
        device_ = device;
        return;
      }
    } catch (const cuda::Error&) {
    }
    driver->cuDevicePrimaryCtxRelease(device);
  }

  std::size_t bytes_;
  std::byte* data_;
  cuda::Context context_ = nullptr;
  int device_ = -1;
};

}  // namespace

std::optional<Damage> find_damage(std::span<const Blocks> blocks, std::size_t block_bytes,
                                  const std::byte* data) noexcept {
  for (const Blocks& run : blocks) {
    std::size_t at = run.offset, left = run.bytes;
    for (const std::uint32_t expected : run.expected) {
      const std::size_t length = std::min(block_bytes, left);
      const std::uint32_t found = crc32c({data + at, length});
      if (found != expected) return Damage{at, expected, found};
      at += length;
      left -= length;
    }
  }
  return std::nullopt;
}

void check_inside(std::span<const Blocks> blocks, std::span<const Scatter> copies, std::size_t bytes,
                  std::size_t block_bytes) {
  bool inside = block_bytes > 0;
  for (const Blocks& run : blocks) {
    inside = inside && run.offset <= bytes && run.bytes <= bytes - run.offset &&
             run.expected.size() == block_count(run.bytes, block_bytes);
  }
  for (const Scatter& copy : copies) inside = inside && copy.source_end() <= bytes;
  if (!inside) throw std::invalid_argument("blocks or copies that do not lie in the bytes they are of");
}

// What the threads share: it lives until the last of them has come back from its system call.
class Reader::Pool : public std::enable_shared_from_this<Reader::Pool> {
 public:
  explicit Pool(const ReaderSettings& settings) : settings_(settings) {}

  void begin() {
    for (unsigned i = 0; i < settings_.threads; ++i) {
      try {
        std::thread([pool = shared_from_this()] { pool->work(); }).detach();
      } catch (const std::system_error&) {  // no more threads: fewer do it, more slowly
        if (i == 0) throw;
        return;
      }
    }
  }

  std::size_t add(Read read) {
    check_inside(read.blocks, read.copies, read.bytes, settings_.block_bytes);
    if (read.bytes > settings_.buffer_bytes) throw std::invalid_argument("a read is longer than a buffer");
    const std::lock_guard lock(mutex_);
    (read.file == nullptr ? to_fill_ : to_read_).push_back(jobs_.size());
    jobs_.push_back(std::make_unique<Job>(std::move(read)));
    changed_.notify_all();
    return jobs_.size() - 1;
  }

  std::optional<std::size_t> finished(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    if (!wait(lock, deadline, [&] { return stopped_ || !finished_.empty(); }) || stopped_) return std::nullopt;
    const std::size_t number = finished_.front();
    finished_.pop_front();
    return number;
  }

  std::optional<Fault> fault() const {
    const std::lock_guard lock(mutex_);
    return fault_;
  }

  std::span<std::byte> buffer(std::size_t number) const {
    const std::lock_guard lock(mutex_);
    const Job& job = *jobs_.at(number);
    if (job.buffer == nullptr) return {};
    return {job.buffer->data() + job.at, job.read.bytes};
  }

  void release(std::size_t number) {
    const std::lock_guard lock(mutex_);
    give_back(*jobs_.at(number));
  }

  std::optional<std::size_t> next_to_fill(Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    const auto number = take(lock, to_fill_, deadline);
    lock.unlock();
    if (number && !give_buffer(job_of(*number))) throw std::bad_alloc();
    return number;
  }

  void filled(std::size_t number) { place(number, job_of(number)); }

  void stop() noexcept {
    std::unique_lock lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return placing_ == 0; });
  }

 private:
  struct Job {
    explicit Job(Read given) : read(std::move(given)) {}
    Read read;
    std::unique_ptr<Buffer> buffer;
    std::size_t at = 0;
  };

  void work() {
    while (true) {
      std::unique_lock lock(mutex_);
      const auto number = take(lock, to_read_, Clock::time_point::max());
      if (!number) return;
      Job& job = *jobs_[*number];
      lock.unlock();
      if (!give_buffer(job)) {
        fail({Fault::Kind::kSystem, *number, job.read.start, ENOMEM});
        return;
      }
      std::size_t got = 0;
      const int error = job.read.file->read(job.read.start, job.read.bytes, job.buffer->data(), job.at, got);
      if (error != 0) {
        fail({Fault::Kind::kSystem, *number, job.read.start + got, error});
      } else if (got < job.read.bytes) {
        fail({Fault::Kind::kShort, *number, job.read.start + got});
      } else {
        place(*number, job);
      }
    }
  }

  // The next of `queue`, which has room for a buffer from here on: what was added first has it first.
  std::optional<std::size_t> take(std::unique_lock<std::mutex>& lock, std::deque<std::size_t>& queue,
                                  Clock::time_point deadline) {
    const auto ready = [&] { return stopped_ || (!queue.empty() && in_use_ < settings_.buffers); };
    if (!wait(lock, deadline, ready) || stopped_) return std::nullopt;
    const std::size_t number = queue.front();
    queue.pop_front();
    ++in_use_;
    return number;
  }

  bool give_buffer(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        job.buffer = std::move(free_.back());
        free_.pop_back();
        return true;
      }
    }
    try {
      job.buffer = std::make_unique<Buffer>(settings_.buffer_bytes + 2 * File::kMaxUnit, settings_.device);
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  template <typename Condition>
  bool wait(std::unique_lock<std::mutex>& lock, Clock::time_point deadline, Condition condition) {
    if (deadline != Clock::time_point::max()) return changed_.wait_until(lock, deadline, condition);
    changed_.wait(lock, condition);
    return true;
  }

  void place(std::size_t number, Job& job) {
    const std::byte* const data = job.buffer->data() + job.at;
    if (const auto damage = find_damage(job.read.blocks, settings_.block_bytes, data)) {
      return fail({Fault::Kind::kDamaged, number, job.read.start + damage->offset, 0, damage->expected, damage->found});
    }
    {
      const std::lock_guard lock(mutex_);
      if (stopped_) return;
      ++placing_;
    }
    for (const Scatter& copy : job.read.copies) copy(data);
    const std::lock_guard lock(mutex_);
    --placing_;
    job.read.file.reset();
    job.read.blocks = {};
    job.read.copies = {};
    if (!job.read.kept) give_back(job);
    finished_.push_back(number);
    changed_.notify_all();
  }

  void give_back(Job& job) {
    if (job.buffer == nullptr) return;
    free_.push_back(std::move(job.buffer));
    --in_use_;
    changed_.notify_all();
  }

  void fail(const Fault& fault) {
    const std::lock_guard lock(mutex_);
    if (!stopped_) fault_ = fault;
    stopped_ = true;
    changed_.notify_all();
  }

  Job& job_of(std::size_t number) {
    const std::lock_guard lock(mutex_);
    return *jobs_.at(number);
  }

  const ReaderSettings settings_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Job>> jobs_;
  std::deque<std::size_t> to_read_, to_fill_, finished_;
  std::vector<std::unique_ptr<Buffer>> free_;
  std::size_t in_use_ = 0, placing_ = 0;
  bool stopped_ = false;
  std::optional<Fault> fault_;
};

Reader::Reader(const ReaderSettings& settings) : pool_(std::make_shared<Pool>(settings)) { pool_->begin(); }
Reader::~Reader() { stop(); }
std::size_t Reader::add(Read read) { return pool_->add(std::move(read)); }
std::optional<std::size_t> Reader::finished(Clock::time_point deadline) { return pool_->finished(deadline); }
std::optional<Fault> Reader::fault() const { return pool_->fault(); }
std::span<std::byte> Reader::buffer(std::size_t read) const { return pool_->buffer(read); }
void Reader::release(std::size_t read) { pool_->release(read); }
std::optional<std::size_t> Reader::next_to_fill(Clock::time_point deadline) { return pool_->next_to_fill(deadline); }
void Reader::filled(std::size_t read) { pool_->filled(read); }
void Reader::stop() noexcept { pool_->stop(); }

}  // namespace dscheck
