// Copies captures to host memory in the background, and answers fences: the engine of dscheck.snapshot.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/capture.h"
#include "core/region.h"
#include "core/ring.h"
#include "core/spill.h"

namespace dscheck {

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC, as Python's time.monotonic()

// The training streams of the calling thread, one a device.
using Streams = std::vector<std::pair<std::int32_t, cuda::Stream>>;

// What one take() captures: live addresses as of now, in the order of the shape, and who holds each piece back.
struct Live {
  std::span<const std::uint64_t> pieces;
  std::span<const std::int32_t> owners;
  std::span<const std::uint64_t> smalls;
  std::span<const std::uint64_t> watched;
};

struct CopierSettings {
  std::size_t threads = 4;     // that copy host memory and compute checksums
  std::size_t io_threads = 4;  // that write files
  std::size_t device_budget = Spill::kAuto;
};

// The part of the measured window before a fence that is counted on.
constexpr double kUsableWindow = 0.85;

// One device: its streams, its spill memory, the thread that feeds its copy engine.
struct Lane;

// All methods may be called from any thread; no method needs Python. Pieces get their place in the region in the order
// of consumption, whatever is copied first, so that a region smaller than a capture never fills up with pieces that
// the consumer is not waiting for. Errors of the driver fail the capture they happen in.
class Copier {
 public:
  explicit Copier(const CopierSettings& settings);
  ~Copier();
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  // Get `host_bytes` of region ready, page-locked when `devices` is not empty, and up to `spill_bytes` on each device.
  void prepare(std::size_t host_bytes, const std::vector<std::int32_t>& devices, std::size_t spill_bytes);

  // Captures `live` as of all that the streams hold. Returns once it may change as its owners allow.
  // Throws cuda::Error or std::bad_alloc, and then nothing is under way.
  std::shared_ptr<Capture> take(std::shared_ptr<const CaptureShape> shape, const Live& live, const Streams& streams,
                                double window_hint_s);

  // Everything of `owner` (kFrozen: of all) is copied, or enqueued ahead of the streams. With `may_wait` false it gives
  // up where the CPU would have to wait, or to copy much itself.
  enum class Fenced { kDone, kWouldWait, kTooLate };
  Fenced fence(Capture& capture, std::int32_t owner, const Streams& streams, Clock::time_point deadline, bool may_wait);

  void fail(Capture& capture, const std::string& reason);

  // Waits until all is copied and proved, it failed, or the deadline: false.
  bool wait(Capture& capture, Clock::time_point deadline);

  // Waits until piece `first` and its checksums are there, and returns how many from it on, before `stop`, are there as
  // well and lie side by side in the region, from its slot on. 0: failed, or past the deadline.
  std::size_t await_run(Capture& capture, std::size_t first, std::size_t stop, Clock::time_point deadline);

  // Waits until small tensors and samples are in the slab.
  bool await_slab(Capture& capture, Clock::time_point deadline);

  void free_run(Capture& capture, std::size_t first, std::size_t count);

  // The other way: threads write every piece to its place as soon as its checksums are there, and free its room. Once
  // a capture, not after await_run() of a piece that goes there.
  void write(Capture& capture, std::shared_ptr<Output> output);

  // Writes the small tensors, and waits until all is written. False: the capture failed, a write did (its errno is in
  // the output), or the deadline has passed.
  bool await_written(Capture& capture, Clock::time_point deadline);

  // Nothing touches the capture's memory any more and its room is free; false when a copy does not end in time.
  bool release(Capture& capture, Clock::time_point deadline);

  // Somebody waits for room: what is under way is copied without pauses.
  void hurry();

  // Whether the region, once it is ready, has places for `bytes` in pieces of at most `longest`, and no capture waits
  // for them.
  bool has_room(std::size_t bytes, std::size_t longest) const;

  // The first piece that is not captured yet, for messages.
  std::optional<std::size_t> pending(const Capture& capture) const;

  // What fail() was given, or the driver's error; the piece that was seen to have changed.
  std::string failure(const Capture& capture) const;
  std::optional<std::size_t> torn(const Capture& capture) const;

  std::pair<double, double> rate_and_window(std::int32_t device) const;  // bytes a second; seconds, 0: not known
  std::size_t spill_bytes(std::int32_t device) const;
  const Region& region() const noexcept { return region_; }

 private:
  friend struct Lane;

  Lane& lane(std::int32_t device);
  Slab take_slab(std::size_t bytes, const std::vector<std::int32_t>& devices);
  void begin_on(Capture& capture, OnDevice& on, const Live& live, cuda::Stream stream);
  void order_by_owner(Capture& capture, OnDevice& on);
  void begin_on_host(Capture& capture, const Live& live);
  void choose_spill(Capture& capture, OnDevice& on, double window_hint_s);
  bool spill(Capture& capture, OnDevice& on, std::uint32_t index);
  void launch_spill(Capture& capture, OnDevice& on, std::size_t first);
  void place();
  void wake_all();
  bool advance(Capture& capture, std::int32_t owner, bool may_wait, std::unique_lock<std::mutex>& lock);
  void hold_back(Capture& capture, std::int32_t owner, const Streams& streams);
  void seal(Capture& capture, OnDevice& on, std::int32_t owner, cuda::Stream stream);
  void settle(Capture& capture);
  bool captured(const Capture& capture) const;
  void refuse(Capture& capture, std::string reason);
  void copy_on_host(const std::shared_ptr<Capture>& capture, std::size_t index, std::unique_lock<std::mutex>& lock);
  std::optional<std::pair<std::shared_ptr<Capture>, std::size_t>> next_on_host();
  void note_copied(const std::shared_ptr<Capture>& capture, std::size_t index);
  void checksum(std::unique_lock<std::mutex>& lock);
  void work();
  void write_piece(std::unique_lock<std::mutex>& lock);
  void write_work();
  int write_smalls(const Capture& capture, Output& output) const;
  bool quiet(const Capture& capture, std::unique_lock<std::mutex>& lock, Clock::time_point deadline);
  void discard(Capture& capture);
  void forget(Capture& capture);

  const CopierSettings settings_;
  mutable std::mutex mutex_;
  // One each for those who wait for the same: a thousand pieces a save would else wake all threads each time.
  std::condition_variable changed_;  // pieces are further; for the consumer, fences and release()
  std::condition_variable ended_;    // a capture, or its output, is complete or has failed
  std::condition_variable to_copy_;  // lanes have something to do, or to look at
  std::condition_variable to_work_;  // host pieces have places, or checksums are due
  std::condition_variable to_put_;   // pieces are due to be written
  bool stop_ = false;
  Ring ring_;
  std::deque<std::shared_ptr<Capture>> captures_;  // the oldest first
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Slab> slabs_;
  std::deque<std::pair<std::shared_ptr<Capture>, std::size_t>> to_sum_;
  std::deque<std::pair<std::shared_ptr<Capture>, std::size_t>> to_write_;
  std::vector<std::thread> workers_, writers_;
  Region region_;  // the first to go: its thread calls back until then
};

}  // namespace dscheck
