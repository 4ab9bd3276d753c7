#include "fake_cuda.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <string_view>
#include <thread>

#include "core/capture.h"
#include "core/sample.h"

namespace {

using Clock = std::chrono::steady_clock;
using dscheck::fake_cuda::Misuse;
using dscheck::fake_cuda::Standing;

enum Result { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kInvalidHandle = 400 };

struct Machine {
  std::mutex mutex;
  std::condition_variable changed;
  Misuse misuse;
  Standing standing;
  std::map<std::string, std::pair<int, int>> faults;  // result and times, by function
  std::map<std::uintptr_t, std::size_t> device, host, registered;
  std::size_t device_total = std::size_t{8} << 30;
  bool copies_held = false;
  unsigned delay_us = 100;
};

// Never destroyed: streams may outlive the end of main().
Machine& machine() {
  static Machine& one = *new Machine;
  return one;
}

thread_local int depth = 0;

// What a call of `symbol` returns before it does anything; 0: it may go on.
int refusal(const char* symbol, bool needs_context = true) {
  const std::string_view whole = symbol;
  const std::string name(whole.ends_with("_v2") ? whole.substr(0, whole.size() - 3) : whole);
  Machine& at = machine();
  const std::lock_guard lock(at.mutex);
  if (needs_context && depth <= 0) {
    ++at.misuse.without_context;
    return kInvalidContext;
  }
  const auto fault = at.faults.find(name);
  if (fault == at.faults.end() || fault->second.second == 0) return kSuccess;
  --fault->second.second;
  return fault->second.first;
}

void delay() {
  thread_local std::minstd_rand random{std::random_device{}()};
  unsigned most_us;
  {
    const std::lock_guard lock(machine().mutex);
    most_us = machine().delay_us;
  }
  if (most_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % most_us));
}

// Something that a stream reaches in its order.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool reached = false;
  Clock::time_point when;

  void reach() {
    const std::lock_guard lock(mutex);
    reached = true;
    when = Clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return reached; });
  }
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Mark> last;

  std::shared_ptr<Mark> mark() {
    const std::lock_guard lock(mutex);
    return last;
  }
};

class Stream {
 public:
  ~Stream() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }

  std::shared_ptr<Mark> mark() {
    auto made = std::make_shared<Mark>();
    push([made] { made->reach(); });
    return made;
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool stop_ = false;
  std::thread thread_{&Stream::run, this};
};

int allocate(std::map<std::uintptr_t, std::size_t>& into, std::size_t& total, std::size_t bytes, std::uintptr_t& out) {
  void* const made = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (made == nullptr) return kOutOfMemory;
  out = reinterpret_cast<std::uintptr_t>(made);
  into[out] = bytes;
  total += bytes;
  return kSuccess;
}

int release(std::map<std::uintptr_t, std::size_t>& from, std::size_t& total, std::uintptr_t address) {
  Machine& at = machine();
  const auto found = from.find(address);
  if (found == from.end()) {
    ++at.misuse.unknown_frees;
    return kInvalidValue;
  }
  total -= found->second;
  from.erase(found);
  std::free(reinterpret_cast<void*>(address));
  return kSuccess;
}

// Whether [address, address + bytes) lies in one registered range, or outside of all.
bool in_one_range(std::uintptr_t address, std::size_t bytes) {
  const auto& ranges = machine().registered;
  const auto next = ranges.upper_bound(address);
  if (next != ranges.end() && next->first < address + bytes) return false;
  if (next == ranges.begin()) return true;
  const auto& [begin, length] = *std::prev(next);
  return address >= begin + length || address + bytes <= begin + length;
}

void run_kernel(const std::string& name, const dscheck::Entry* table, std::uintptr_t out, unsigned blocks,
                unsigned rows) {
  delay();
  for (unsigned i = 0; i < blocks; ++i) {
    const auto [source, bytes, target] = table[i];
    const auto* const from = reinterpret_cast<const std::byte*>(source);
    if (name == "dscheck_gather") {
      std::memcpy(reinterpret_cast<void*>(out + target), from, bytes);
    } else if (name == "dscheck_sample") {
      dscheck::take_sample(from, bytes, reinterpret_cast<std::byte*>(out) + target * dscheck::kSampleBytes);
    } else {
      std::uint64_t* const parts = reinterpret_cast<std::uint64_t*>(out) + target * rows;
      std::fill(parts, parts + rows, 0);
      parts[0] = dscheck::hash_words(from, bytes);
    }
  }
}

const char* const kKernelNames[] = {"dscheck_gather", "dscheck_sample", "dscheck_hash"};

}  // namespace

#define REFUSE \
  if (const int refused = refusal(__func__); refused != kSuccess) return refused

// Source of names and meanings: CUDA driver API reference.
extern "C" {

int cuInit(unsigned) { return refusal(__func__, false); }

int cuGetErrorString(int result, const char** words) {
  *words = result == kInvalidContext ? "invalid device context" : "a fault of the test";
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  const int refused = refusal(__func__, false);
  if (refused != kSuccess) return refused;
  *context = &machine();
  const std::lock_guard lock(machine().mutex);
  ++machine().standing.contexts;
  return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  const std::lock_guard lock(machine().mutex);
  --machine().standing.contexts;
  return kSuccess;
}

int cuCtxPushCurrent_v2(void*) {
  const int refused = refusal(__func__, false);
  if (refused == kSuccess) ++depth;
  return refused;
}

int cuCtxPopCurrent_v2(void**) {
  --depth;
  return kSuccess;
}

int cuStreamCreate(Stream** stream, unsigned) {
  REFUSE;
  *stream = new Stream;
  const std::lock_guard lock(machine().mutex);
  ++machine().standing.streams;
  return kSuccess;
}

int cuStreamDestroy_v2(Stream* stream) {
  REFUSE;
  delete stream;
  const std::lock_guard lock(machine().mutex);
  --machine().standing.streams;
  return kSuccess;
}

int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  REFUSE;
  if (const auto mark = event->mark()) {
    stream->push([mark] { mark->wait(); });
    return kSuccess;
  }
  const std::lock_guard lock(machine().mutex);
  ++machine().misuse.unrecorded_waits;
  return kSuccess;
}

int cuStreamSynchronize(Stream* stream) {
  REFUSE;
  stream->mark()->wait();
  return kSuccess;
}

int cuEventCreate(Event** event, unsigned) {
  REFUSE;
  *event = new Event;
  const std::lock_guard lock(machine().mutex);
  ++machine().standing.events;
  return kSuccess;
}

int cuEventDestroy_v2(Event* event) {
  REFUSE;
  delete event;
  const std::lock_guard lock(machine().mutex);
  --machine().standing.events;
  return kSuccess;
}

int cuEventRecord(Event* event, Stream* stream) {
  REFUSE;
  const std::lock_guard lock(event->mutex);
  event->last = stream->mark();
  return kSuccess;
}

int cuEventQuery(Event* event) {
  REFUSE;
  if (event == nullptr) return kInvalidHandle;
  const auto mark = event->mark();
  if (mark == nullptr) return kSuccess;
  const std::lock_guard lock(mark->mutex);
  return mark->reached ? kSuccess : dscheck::cuda::kNotReady;
}

int cuEventElapsedTime(float* elapsed_ms, Event* begin, Event* end) {
  REFUSE;
  if (begin == nullptr || end == nullptr) return kInvalidHandle;
  Clock::time_point times[2];
  for (int i = 0; i < 2; ++i) {
    const auto mark = (i == 0 ? begin : end)->mark();
    if (mark == nullptr) return kInvalidHandle;
    const std::lock_guard lock(mark->mutex);
    if (!mark->reached) return dscheck::cuda::kNotReady;
    times[i] = mark->when;
  }
  *elapsed_ms = std::chrono::duration<float, std::milli>(times[1] - times[0]).count();
  return kSuccess;
}

int cuMemcpyDtoHAsync_v2(void* target, std::uintptr_t source, std::size_t bytes, Stream* stream) {
  REFUSE;
  Machine& at = machine();
  {
    const std::lock_guard lock(at.mutex);
    if (!in_one_range(reinterpret_cast<std::uintptr_t>(target), bytes)) {
      ++at.misuse.crossed_registrations;
      return kInvalidValue;
    }
  }
  stream->push([&at, target, source, bytes] {
    delay();
    {
      std::unique_lock lock(at.mutex);
      at.changed.wait(lock, [&at] { return !at.copies_held; });
    }
    std::memcpy(target, reinterpret_cast<const void*>(source), bytes);
  });
  return kSuccess;
}

int cuMemAlloc_v2(std::uintptr_t* address, std::size_t bytes) {
  REFUSE;
  Machine& at = machine();
  const std::lock_guard lock(at.mutex);
  if (at.standing.device_bytes + bytes > at.device_total) return kOutOfMemory;
  return allocate(at.device, at.standing.device_bytes, bytes, *address);
}

int cuMemFree_v2(std::uintptr_t address) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  return release(machine().device, machine().standing.device_bytes, address);
}

int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  *total = machine().device_total;
  *free = machine().device_total - machine().standing.device_bytes;
  return kSuccess;
}

int cuMemHostAlloc(void** memory, std::size_t bytes, unsigned) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  return allocate(machine().host, machine().standing.host_bytes, bytes, *reinterpret_cast<std::uintptr_t*>(memory));
}

int cuMemFreeHost(void* memory) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  return release(machine().host, machine().standing.host_bytes, reinterpret_cast<std::uintptr_t>(memory));
}

int cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  machine().registered[reinterpret_cast<std::uintptr_t>(memory)] = bytes;
  ++machine().standing.registered_ranges;
  return kSuccess;
}

int cuMemHostUnregister(void* memory) {
  REFUSE;
  const std::lock_guard lock(machine().mutex);
  if (machine().registered.erase(reinterpret_cast<std::uintptr_t>(memory)) == 0) {
    ++machine().misuse.unknown_frees;
    return kInvalidValue;
  }
  --machine().standing.registered_ranges;
  return kSuccess;
}

int cuModuleLoadData(void** module, const void*) {
  REFUSE;
  *module = &machine();
  return kSuccess;
}

int cuModuleGetFunction(const char* const** function, void*, const char* name) {
  REFUSE;
  const auto found = std::find_if(std::begin(kKernelNames), std::end(kKernelNames),
                                  [name](const char* known) { return std::strcmp(known, name) == 0; });
  if (found == std::end(kKernelNames)) return kInvalidValue;
  *function = found;
  return kSuccess;
}

int cuLaunchKernel(const char* const* function, unsigned blocks, unsigned rows, unsigned, unsigned, unsigned, unsigned,
                   unsigned, Stream* stream, void** arguments, void**) {
  REFUSE;
  const auto* const table = *static_cast<const dscheck::Entry**>(arguments[0]);
  const auto out = *static_cast<std::uintptr_t*>(arguments[1]);
  stream->push([=] { run_kernel(*function, table, out, blocks, rows); });
  return kSuccess;
}

}  // extern "C"

namespace dscheck::fake_cuda {
namespace {

Stream& of(cuda::Stream stream) { return *reinterpret_cast<Stream*>(stream); }

}  // namespace

void reset(std::size_t device_bytes) {
  Machine& at = machine();
  const std::lock_guard lock(at.mutex);
  at.misuse = {};
  at.faults.clear();
  at.device_total = device_bytes;
  at.copies_held = false;
  at.delay_us = 100;
  at.changed.notify_all();
}

Misuse misuse() {
  const std::lock_guard lock(machine().mutex);
  return machine().misuse;
}

Standing standing() {
  const std::lock_guard lock(machine().mutex);
  return machine().standing;
}

void fail(const char* name, int result, int times) {
  const std::lock_guard lock(machine().mutex);
  machine().faults[name] = {result, times};
}

void hold_copies() {
  const std::lock_guard lock(machine().mutex);
  machine().copies_held = true;
}

void let_copies() {
  const std::lock_guard lock(machine().mutex);
  machine().copies_held = false;
  machine().changed.notify_all();
}

void set_delay(unsigned most_us) {
  const std::lock_guard lock(machine().mutex);
  machine().delay_us = most_us;
}

cuda::Stream make_stream() { return reinterpret_cast<cuda::Stream>(new Stream); }
void destroy(cuda::Stream stream) { delete &of(stream); }
void synchronize(cuda::Stream stream) { of(stream).mark()->wait(); }

void wait_in(cuda::Stream stream, std::shared_future<void> event) {
  of(stream).push([event = std::move(event)] { event.wait(); });
}

void fill(cuda::Stream stream, void* memory, int value, std::size_t bytes) {
  of(stream).push([=] {
    delay();
    std::memset(memory, value, bytes);
  });
}

}  // namespace dscheck::fake_cuda
