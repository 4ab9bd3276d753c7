#include "core/driver.h"

#include <dlfcn.h>

#include <string>

namespace dscheck::cuda {
namespace {

template <typename Pointer>
bool find(void* library, const char* name, Pointer& out) noexcept {
  out = reinterpret_cast<Pointer>(dlsym(library, name));
  return out != nullptr;
}

// The suffixed names are those that the driver's header maps the plain ones to.
bool load(Driver& d) noexcept {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  return find(library, "cuInit", d.cuInit) && find(library, "cuGetErrorString", d.cuGetErrorString) &&
         find(library, "cuDevicePrimaryCtxRetain", d.cuDevicePrimaryCtxRetain) &&
         find(library, "cuDevicePrimaryCtxRelease_v2", d.cuDevicePrimaryCtxRelease) &&
         find(library, "cuCtxPushCurrent_v2", d.cuCtxPushCurrent) &&
         find(library, "cuCtxPopCurrent_v2", d.cuCtxPopCurrent) && find(library, "cuStreamCreate", d.cuStreamCreate) &&
         find(library, "cuStreamDestroy_v2", d.cuStreamDestroy) &&
         find(library, "cuStreamWaitEvent", d.cuStreamWaitEvent) &&
         find(library, "cuStreamSynchronize", d.cuStreamSynchronize) &&
         find(library, "cuEventCreate", d.cuEventCreate) && find(library, "cuEventDestroy_v2", d.cuEventDestroy) &&
         find(library, "cuEventRecord", d.cuEventRecord) && find(library, "cuEventQuery", d.cuEventQuery) &&
         find(library, "cuEventElapsedTime", d.cuEventElapsedTime) &&
         find(library, "cuMemcpyDtoHAsync_v2", d.cuMemcpyDtoHAsync) && find(library, "cuMemAlloc_v2", d.cuMemAlloc) &&
         find(library, "cuMemFree_v2", d.cuMemFree) && find(library, "cuMemGetInfo_v2", d.cuMemGetInfo) &&
         find(library, "cuMemHostAlloc", d.cuMemHostAlloc) && find(library, "cuMemFreeHost", d.cuMemFreeHost) &&
         find(library, "cuMemHostRegister_v2", d.cuMemHostRegister) &&
         find(library, "cuMemHostUnregister", d.cuMemHostUnregister) &&
         find(library, "cuModuleLoadData", d.cuModuleLoadData) &&
         find(library, "cuModuleGetFunction", d.cuModuleGetFunction) &&
         find(library, "cuLaunchKernel", d.cuLaunchKernel) && d.cuInit(0) == 0;
}

}  // namespace

void Driver::check(int result, const char* call) const {
  if (result == 0) return;
  const char* words = nullptr;
  cuGetErrorString(result, &words);
  throw Error(std::string(call) + ": " + (words == nullptr ? "unknown error" : words) + " (" + std::to_string(result) +
              ")");
}

const Driver* driver() noexcept {
  static Driver found{};
  static const bool usable = load(found);
  return usable ? &found : nullptr;
}

}  // namespace dscheck::cuda
