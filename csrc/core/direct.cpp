#include "core/direct.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>

namespace dscheck {
namespace {

// Older C libraries know neither the mask nor the members.
constexpr unsigned kDirectAlignment = 0x2000;
constexpr std::size_t kAssumed = 4096;

struct Statx {
  std::uint32_t mask;
  std::uint32_t others[37];
  std::uint32_t memory_alignment, offset_alignment;
  std::uint32_t rest[24];
};
static_assert(sizeof(Statx) == 256);

}  // namespace

DirectUnits direct_units(int file) {
#ifdef SYS_statx
  Statx found{};
  if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, kDirectAlignment, &found) == 0 && (found.mask & kDirectAlignment)) {
    return {found.memory_alignment, found.offset_alignment};
  }
#else
  (void)file;
#endif
  return {kAssumed, kAssumed};
}

int reopen_direct(int file, int flags) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  return open(path, flags | O_DIRECT | O_CLOEXEC);
}

}  // namespace dscheck
