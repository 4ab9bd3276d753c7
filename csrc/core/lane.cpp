#include "core/lane.h"

#include <algorithm>

#include "core/kernels.h"
#include "core/sample.h"

namespace dscheck {
namespace {

constexpr unsigned kNonBlocking = 1;
// Copies enqueued at a time: the engine stays busy, and others wait for at most these.
constexpr std::size_t kDepth = 3;
constexpr auto kPoll = std::chrono::microseconds(100);
constexpr double kPaced = 0.8;    // of the measured window that a capture is spread over
constexpr double kRelaxed = 0.7;  // of the copy engine's time that the draining of spilled pieces may take

// Without the lock as long as it lives, and with it again however that ends.
class Unlocked {
 public:
  explicit Unlocked(std::unique_lock<std::mutex>& lock) : lock_(lock) { lock_.unlock(); }
  ~Unlocked() { lock_.lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  std::unique_lock<std::mutex>& lock_;
};

double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

}  // namespace

Lane::Lane(Copier& copier, const cuda::Driver& driver, std::int32_t device)
    : copier(copier), driver(driver), device(device), spill(driver) {
  driver.check(driver.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  const cuda::InContext current(driver, context);
  driver.check(driver.cuStreamCreate(&copy, kNonBlocking), "cuStreamCreate");
  driver.check(driver.cuStreamCreate(&aside, kNonBlocking), "cuStreamCreate");
  cuda::Module module = nullptr;
  driver.check(driver.cuModuleLoadData(&module, kKernels), "cuModuleLoadData");
  driver.check(driver.cuModuleGetFunction(&gather, module, "dscheck_gather"), "cuModuleGetFunction");
  driver.check(driver.cuModuleGetFunction(&sample, module, "dscheck_sample"), "cuModuleGetFunction");
  driver.check(driver.cuModuleGetFunction(&hash, module, "dscheck_hash"), "cuModuleGetFunction");
}

void Lane::start() { thread = std::thread(&Lane::work, this); }

// Returns when its thread has ended, once the copier stops, and its streams are empty.
void Lane::end() noexcept {
  if (thread.joinable()) thread.join();
  try {
    const cuda::InContext current(driver, context);
    for (const std::shared_ptr<Capture>& capture : copier.captures_) {
      for (const OnDevice& on : capture->devices) {  // samples and small tensors, which come on the training stream
        if (on.device == device && on.began != nullptr) driver.cuStreamWaitEvent(copy, on.began, 0);
      }
    }
    driver.cuStreamSynchronize(copy);
    driver.cuStreamSynchronize(aside);
  } catch (const cuda::Error&) {  // the process ends
  }
}

Lane::~Lane() {
  end();
  try {
    const cuda::InContext current(driver, context);
    spill.release_all();
    for (const cuda::Event unused : spare) driver.cuEventDestroy(unused);
    for (const Flight& flight : flights) driver.cuEventDestroy(flight.end);
    if (last_end != nullptr) driver.cuEventDestroy(last_end);
    driver.cuStreamDestroy(copy);
    driver.cuStreamDestroy(aside);
  } catch (const cuda::Error&) {  // the process ends, and the context with it
  }
  driver.cuDevicePrimaryCtxRelease(device);
}

cuda::Event Lane::event() {
  if (!spare.empty()) {
    const cuda::Event reused = spare.back();
    spare.pop_back();
    return reused;
  }
  cuda::Event made = nullptr;
  driver.check(driver.cuEventCreate(&made, 0), "cuEventCreate");
  return made;
}

void Lane::launch(cuda::Function function, unsigned blocks, unsigned rows, unsigned threads, cuda::Stream stream,
                  const void* table, void* out) {
  void* arguments[] = {&table, &out};
  driver.check(driver.cuLaunchKernel(function, blocks, rows, 1, threads, 1, 1, 0, stream, arguments, nullptr),
               "cuLaunchKernel");
}

void Lane::enqueue(const std::shared_ptr<Capture>& capture, OnDevice& on, std::uint32_t index) {
  Piece& piece = capture->pieces[index];
  if (!piece.spilled && !on.has_begun) {
    driver.check(driver.cuStreamWaitEvent(copy, on.began, 0), "cuStreamWaitEvent");
    on.has_begun = true;
  }
  piece.began_s = now_s();
  piece.state = State::kUnderWay;
  ++capture->under_way;
  Flight flight{capture, index, nullptr, !flights.empty()};
  try {
    for (std::size_t at = 0; at < piece.bytes;) {
      const std::size_t begin = piece.slot + at;
      const std::size_t end = copier.region_.run_end(begin, piece.slot + piece.bytes);
      driver.check(driver.cuMemcpyDtoHAsync(copier.region_.data() + begin, piece.source + at, end - begin, copy),
                   "cuMemcpyDtoHAsync");
      at += end - begin;
    }
    flight.end = event();
    driver.check(driver.cuEventRecord(flight.end, copy), "cuEventRecord");
  } catch (...) {
    driver.cuStreamSynchronize(copy);  // a part may be under way
    --capture->under_way;
    piece.state = State::kPending;
    throw;
  }
  flights.push_back(std::move(flight));
}

// Takes note of the copies that have ended.
void Lane::retire() {
  while (!flights.empty()) {
    Flight& flight = flights.front();
    const int result = driver.cuEventQuery(flight.end);
    if (result == cuda::kNotReady) return;
    Capture& capture = *flight.capture;
    Piece& piece = capture.pieces[flight.piece];
    if (result != 0) {
      try {
        driver.check(result, "the copy from the device");
      } catch (const cuda::Error& error) {
        copier.refuse(capture, error.what());
      }
    } else if (float elapsed_ms = 0; flight.chained && last_end != nullptr &&
                                     driver.cuEventElapsedTime(&elapsed_ms, last_end, flight.end) == 0 &&
                                     elapsed_ms > 0 && piece.bytes >= (std::size_t{4} << 20)) {
      const double seen = static_cast<double>(piece.bytes) / (elapsed_ms * 1e-3);
      rate = measured ? 0.9 * rate + 0.1 * seen : seen;
      measured = true;
    }
    recycle(last_end);
    last_end = std::exchange(flight.end, nullptr);
    --capture.under_way;
    if (piece.spilled) spill.free(piece.source);
    take_sample(copier.region_.data() + piece.slot, piece.bytes,
                capture.sample(capture.shape->captured_at, flight.piece));
    for (OnDevice& on : capture.devices) {
      if (on.device == device) --on.left;
    }
    copier.note_copied(flight.capture, flight.piece);
    flights.pop_front();
  }
}

// All pieces of the capture have left this device: the second samples of whatever no fence has sealed, and the proof.
void Lane::finish(Capture& capture, OnDevice& on) {
  if (on.ended == nullptr) {
    if (!is_due(on, false)) return;
    copier.seal(capture, on, kFrozen, copy);
    if (on.sealed_aside != nullptr) {
      driver.check(driver.cuStreamWaitEvent(copy, on.sealed_aside, 0), "cuStreamWaitEvent");
    }
    on.ended = event();
    driver.check(driver.cuEventRecord(on.ended, copy), "cuEventRecord");
    return;
  }
  const int result = driver.cuEventQuery(on.ended);
  if (result == cuda::kNotReady) return;
  driver.check(result, "the proof of a capture");
  on.proved = true;
  copier.settle(capture);
}

bool Lane::advance_finished() {
  bool waiting = false;
  for (const std::shared_ptr<Capture>& capture : copier.captures_) {
    for (OnDevice& on : capture->devices) {
      if (on.device != device || on.proved || on.left > 0 || capture->failed()) continue;
      finish(*capture, on);
      waiting = waiting || !on.proved;
    }
  }
  return waiting;
}

// Whether what is copied now waits for nothing on the device. Else it would hold up what is due behind it: when the CPU
// runs ahead, the device may reach the moment of a save only a step after save() has returned.
bool Lane::is_due(OnDevice& on, bool spilled) const {
  if (spilled) return driver.cuEventQuery(on.spilled) != cuda::kNotReady;
  return on.has_begun = on.has_begun || driver.cuEventQuery(on.began) != cuda::kNotReady;
}

// What to copy next: live memory before what was spilled, which can wait; the oldest capture first. `later`: something
// is left that is not due yet.
std::optional<std::pair<std::shared_ptr<Capture>, std::uint32_t>> Lane::next(bool& later) {
  for (const bool spilled : {false, true}) {
    for (const std::shared_ptr<Capture>& capture : copier.captures_) {
      if (capture->failed()) continue;
      for (OnDevice& on : capture->devices) {
        if (on.device != device) continue;
        std::uint32_t& cursor = spilled ? on.spilled_cursor : on.direct_cursor;
        for (; cursor < capture->placed; ++cursor) {
          const Piece& piece = capture->pieces[cursor];
          if (piece.device != device || piece.spilled != spilled || piece.state != State::kPending) continue;
          if (is_due(on, spilled)) return std::pair(capture, cursor);
          later = true;
          break;
        }
      }
    }
  }
  return std::nullopt;
}

// Seconds from the start of this copy to the start of the next, so that others get at the copy engine in between.
double Lane::pause(const Capture& capture, const OnDevice& on, const Piece& piece) const {
  const auto pending = [&capture](const auto& other) {
    return other.get() != &capture && !other->failed() && other->captured_s == 0;
  };
  // Who saves faster than the bus takes it waits for the bus in the end.
  if (capture.hurried || std::any_of(copier.captures_.begin(), copier.captures_.end(), pending)) return 0;
  const double least = static_cast<double>(piece.bytes) / rate;
  if (piece.spilled) return least / kRelaxed;
  if (on.urgent || window_s == 0 || on.pace_bytes == 0) return 0;
  return std::min(kPaced * window_s * static_cast<double>(piece.bytes) / static_cast<double>(on.pace_bytes),
                  least / kRelaxed);
}

// The driver's own calls take milliseconds: nobody waits for the lock meanwhile.
void Lane::more_spill(std::unique_lock<std::mutex>& lock) {
  const std::size_t budget = copier.settings_.device_budget, bytes = std::min(spill.block_bytes(budget), spill_wanted);
  cuda::Address base = 0;
  if (bytes > 0) {
    const Unlocked unlocked(lock);
    base = spill.take_block(bytes, budget);
  }
  if (base == 0) {
    spill_wanted = spill.bytes();
  } else {
    spill.add_block(base, bytes);
  }
}

void Lane::less_spill(std::unique_lock<std::mutex>& lock) {
  bool needed = false;
  {
    const Unlocked unlocked(lock);
    needed = spill.is_scarce(copier.settings_.device_budget);
  }
  const cuda::Address base = needed ? spill.drop_block() : 0;
  if (base == 0) return;
  const Unlocked unlocked(lock);
  driver.cuMemFree(base);
}

// One copy, timed, so that the first capture knows how much it can count on.
void Lane::calibrate(std::unique_lock<std::mutex>& lock) {
  constexpr std::size_t kBytes = std::size_t{32} << 20;
  const cuda::InContext current(driver, context);
  cuda::Event begin = event(), end = event();
  lock.unlock();
  cuda::Address source = 0;
  void* target = nullptr;
  float elapsed_ms = 0;
  if (driver.cuMemAlloc(&source, kBytes) == 0) {
    if (driver.cuMemHostAlloc(&target, kBytes, 0) == 0) {
      driver.cuMemcpyDtoHAsync(target, source, kBytes, aside);  // the first one also sets things up
      driver.cuEventRecord(begin, aside);
      driver.cuMemcpyDtoHAsync(target, source, kBytes, aside);
      driver.cuEventRecord(end, aside);
      driver.cuStreamSynchronize(aside);
      driver.cuEventElapsedTime(&elapsed_ms, begin, end);
      lock.lock();  // freeing waits for all that training has enqueued: this cannot
      if (elapsed_ms > 0 && !measured) rate = static_cast<double>(kBytes) / (elapsed_ms * 1e-3);
      lock.unlock();
      driver.cuMemFreeHost(target);
    }
    driver.cuMemFree(source);
  }
  lock.lock();
  recycle(begin);
  recycle(end);
}

void Lane::work() {
  std::unique_lock lock(copier.mutex_);
  try {
    calibrate(lock);
  } catch (const cuda::Error&) {  // a lower rate is assumed
  }
  bool looked = false;  // for spill memory to give back, since it last waited
  while (!copier.stop_) {
    std::shared_ptr<Capture> working;
    bool waiting = false, idle = true;
    try {
      const cuda::InContext current(driver, context);
      if (spill.bytes() < spill_wanted) {
        more_spill(lock);
        idle = false;
      }
      retire();
      waiting = advance_finished() || !flights.empty();
      if (flights.size() < kDepth) {
        if (auto found = next(waiting)) {
          working = found->first;
          waiting = true;
          OnDevice& on = *std::find_if(working->devices.begin(), working->devices.end(),
                                       [this](const OnDevice& one) { return one.device == device; });
          if (Clock::now() >= due || on.urgent) {
            enqueue(working, on, found->second);
            const double pause_s = pause(*working, on, working->pieces[found->second]);
            due = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(pause_s));
            idle = false;
          }
        }
      }
      if (!waiting && copier.captures_.empty() && !looked) {
        looked = true;
        less_spill(lock);
        idle = false;  // what came meanwhile has woken nobody
      }
    } catch (const std::exception& error) {
      if (working != nullptr) {
        copier.refuse(*working, error.what());
      } else {
        for (const auto& capture : copier.captures_) copier.refuse(*capture, error.what());
      }
    }
    if (!idle) continue;
    if (waiting) {
      copier.to_copy_.wait_for(lock, kPoll);
    } else if (!copier.stop_) {  // which more_spill() may have missed
      copier.to_copy_.wait(lock);
      looked = false;
    }
  }
}

}  // namespace dscheck
