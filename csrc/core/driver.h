// The few functions of the CUDA driver that a capture needs, found at run time: dscheck is built without CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
struct CUfunc_st;
struct CUmod_st;

namespace dscheck::cuda {

using Context = CUctx_st*;
using Stream = CUstream_st*;
using Event = CUevent_st*;
using Function = CUfunc_st*;
using Module = CUmod_st*;
using Device = int;
using Address = std::uint64_t;

constexpr int kNotReady = 600;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Source: CUDA driver API reference; the names are those of the symbols in libcuda.so.1.
struct Driver {
  int (*cuInit)(unsigned);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDevicePrimaryCtxRetain)(Context*, Device);
  int (*cuDevicePrimaryCtxRelease)(Device);
  int (*cuCtxPushCurrent)(Context);
  int (*cuCtxPopCurrent)(Context*);
  int (*cuStreamCreate)(Stream*, unsigned);
  int (*cuStreamDestroy)(Stream);
  int (*cuStreamWaitEvent)(Stream, Event, unsigned);
  int (*cuStreamSynchronize)(Stream);
  int (*cuEventCreate)(Event*, unsigned);
  int (*cuEventDestroy)(Event);
  int (*cuEventRecord)(Event, Stream);
  int (*cuEventQuery)(Event);
  int (*cuEventElapsedTime)(float*, Event, Event);
  int (*cuMemcpyDtoHAsync)(void*, Address, std::size_t, Stream);
  int (*cuMemAlloc)(Address*, std::size_t);
  int (*cuMemFree)(Address);
  int (*cuMemGetInfo)(std::size_t*, std::size_t*);
  int (*cuMemHostAlloc)(void**, std::size_t, unsigned);
  int (*cuMemFreeHost)(void*);
  int (*cuMemHostRegister)(void*, std::size_t, unsigned);
  int (*cuMemHostUnregister)(void*);
  int (*cuModuleLoadData)(Module*, const void*);
  int (*cuModuleGetFunction)(Function*, Module, const char*);
  int (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**,
                        void**);

  // Throws Error with the driver's own words when `result` is a failure.
  void check(int result, const char* call) const;
};

// The driver of this machine; null when there is none. Loaded once.
const Driver* driver() noexcept;

// Makes a device's primary context, the one torch uses, current for this thread while it lives.
class InContext {
 public:
  InContext(const Driver& driver, Context context) : driver_(driver) {
    driver_.check(driver_.cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~InContext() {
    Context popped;
    driver_.cuCtxPopCurrent(&popped);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

 private:
  const Driver& driver_;
};

}  // namespace dscheck::cuda
