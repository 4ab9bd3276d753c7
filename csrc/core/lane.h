// One device of a Copier: the streams beside the training stream, and the thread that feeds the copy engine.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/copier.h"

namespace dscheck {

// A copy that is enqueued. `end` is recorded behind it.
struct Flight {
  std::shared_ptr<Capture> capture;
  std::uint32_t piece;
  cuda::Event end;
  bool chained;  // enqueued while the one before was under way: the time between their ends is that of its bytes
};

struct Lane {
  Lane(Copier& copier, const cuda::Driver& driver, std::int32_t device);
  ~Lane();

  // All below with the copier's lock held and the device's context current.
  cuda::Event event();
  void recycle(cuda::Event& event) {
    if (event != nullptr) spare.push_back(std::exchange(event, nullptr));
  }
  void launch(cuda::Function function, unsigned blocks, unsigned rows, unsigned threads, cuda::Stream stream,
              const void* table, void* out);
  void enqueue(const std::shared_ptr<Capture>& capture, OnDevice& on, std::uint32_t index);
  void retire();
  void finish(Capture& capture, OnDevice& on);
  bool advance_finished();
  bool is_due(OnDevice& on, bool spilled) const;
  std::optional<std::pair<std::shared_ptr<Capture>, std::uint32_t>> next(bool& later);
  double pause(const Capture& capture, const OnDevice& on, const Piece& piece) const;

  void more_spill(std::unique_lock<std::mutex>& lock);
  void less_spill(std::unique_lock<std::mutex>& lock);
  void calibrate(std::unique_lock<std::mutex>& lock);
  void start();
  void end() noexcept;
  void work();

  Copier& copier;
  const cuda::Driver& driver;
  const std::int32_t device;
  cuda::Context context = nullptr;
  cuda::Stream copy = nullptr, aside = nullptr;
  cuda::Function gather = nullptr, sample = nullptr, hash = nullptr;
  std::vector<cuda::Event> spare;
  std::deque<Flight> flights;
  cuda::Event last_end = nullptr;  // of the copy before the first flight
  Spill spill;
  std::size_t spill_wanted = 0;
  double rate = 25e9;  // bytes a second to page-locked host memory; assumed until measured
  bool measured = false;
  double window_s = 0;
  Clock::time_point due{};
  std::thread thread;
};

}  // namespace dscheck
