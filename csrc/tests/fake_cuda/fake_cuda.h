// A stand-in for libcuda.so.1 on any machine: streams are threads, device memory is host memory, and the three kernels
// of csrc/cuda are what csrc/core/sample.h says they are. Its own calls, beside the driver's, steer it from a test.
#pragma once

#include <cstddef>
#include <future>

#include "core/driver.h"

namespace dscheck::fake_cuda {

// What calls of the driver got wrong, as a real one would refuse or forget in silence; counted since reset().
struct Misuse {
  int without_context = 0;        // no context was current
  int unrecorded_waits = 0;       // a stream waited for an event that nobody had recorded: it does not wait
  int crossed_registrations = 0;  // one copy into more than one registered range
  int unknown_frees = 0;          // freed, or unregistered, what was not there

  bool any() const { return without_context + unrecorded_waits + crossed_registrations + unknown_frees > 0; }
};

// What is there now.
struct Standing {
  std::size_t device_bytes = 0, host_bytes = 0, registered_ranges = 0;
  int streams = 0, events = 0, contexts = 0;

  bool operator==(const Standing&) const = default;
};

// All as in the beginning: no faults, no misuse, copies flow, memory of `device_bytes` a device.
void reset(std::size_t device_bytes = std::size_t{8} << 30);

Misuse misuse();
Standing standing();

// The next `times` calls of the driver's function `name` (as in core/driver.h) return `result` and do nothing.
void fail(const char* name, int result, int times = 1);

// Copies to the host wait at their turn in their streams, until let_copies().
void hold_copies();
void let_copies();

// How long, at most, a copy or a kernel takes at random beyond its work, in microseconds.
void set_delay(unsigned most_us);

// A training stream, and what training does on it: memory that is set to `value` in the stream's order.
cuda::Stream make_stream();
void destroy(cuda::Stream stream);
void synchronize(cuda::Stream stream);
void fill(cuda::Stream stream, void* memory, int value, std::size_t bytes);
void wait_in(cuda::Stream stream, std::shared_future<void> event);

}  // namespace dscheck::fake_cuda
