#include "core/scatter.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dscheck {
namespace {

// Up to here 16 bytes at a time beat a call of memcpy.
constexpr std::size_t kInline = 512;

// More than a core's second cache has room for.
constexpr std::size_t kStreamed = std::size_t{1} << 20;

template <std::size_t kBytes>
void copy_fixed(std::byte* to, const std::byte* from) noexcept {
  std::byte chunk[kBytes];
  std::memcpy(chunk, from, kBytes);
  std::memcpy(to, chunk, kBytes);
}

template <std::size_t kBytes>
void rows_fixed(const Axis& axis, const std::byte* from, std::byte* to) noexcept {
  for (std::size_t i = 0; i < axis.count; ++i, from += axis.source, to += axis.target) copy_fixed<kBytes>(to, from);
}

// Rows of 2 * kBytes > bytes > kBytes: two copies that overlap.
template <std::size_t kBytes>
void rows_overlapping(const Axis& axis, std::size_t bytes, const std::byte* from, std::byte* to) noexcept {
  const std::size_t last = bytes - kBytes;
  for (std::size_t i = 0; i < axis.count; ++i, from += axis.source, to += axis.target) {
    copy_fixed<kBytes>(to, from);
    copy_fixed<kBytes>(to + last, from + last);
  }
}

void rows_inline(const Axis& axis, std::size_t bytes, const std::byte* from, std::byte* to) noexcept {
  const std::size_t last = bytes - 16;
  for (std::size_t i = 0; i < axis.count; ++i, from += axis.source, to += axis.target) {
    for (std::size_t at = 0; at < last; at += 16) copy_fixed<16>(to + at, from + at);
    copy_fixed<16>(to + last, from + last);
  }
}

#if defined(__SSE2__)

constexpr std::size_t kLine = 64;
constexpr std::size_t kAhead = 4096;
constexpr std::size_t kNearRow = 256;

// Of what is larger than the caches, reading each line of the target before it is overwritten would cost as much as
// reading the source. On Zen 4, rows of 64 to 2048 bytes to every second row of 64 MiB: 1.0 of one memcpy, not 0.55.
bool streams(std::span<const Axis> axes, std::size_t row_bytes, const std::byte* to) noexcept {
  const auto whole_lines = [](const Axis& axis) { return axis.target % static_cast<std::ptrdiff_t>(kLine) == 0; };
  std::size_t bytes = row_bytes;
  for (const Axis& axis : axes) bytes *= axis.count;
  return bytes >= kStreamed && row_bytes % kLine == 0 && reinterpret_cast<std::uintptr_t>(to) % kLine == 0 &&
         std::all_of(axes.begin(), axes.end(), whole_lines);
}

// Rows apart are no stream to the prefetcher. What is asked for into the second cache leaves the first one's few
// outstanding misses to the loads: on Zen 4, rows of 64 to 2048 bytes out of such twice as long, 0.8 to 1.3 of one
// memcpy, and 0.6 to 0.8 by way of the first; but for rows of 256 bytes, 0.6 and 0.9.
template <int kCache>
void rows_ahead(const Axis& axis, std::size_t bytes, const std::byte* from, std::byte* to) noexcept {
  const std::ptrdiff_t ahead = axis.source * static_cast<std::ptrdiff_t>(bytes < kAhead ? kAhead / bytes : 1);
  for (std::size_t i = 0; i < axis.count; ++i, from += axis.source, to += axis.target) {
    for (std::size_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(from + ahead + at, 0, kCache);
      const auto* const source = reinterpret_cast<const __m128i*>(from + at);
      auto* const target = reinterpret_cast<__m128i*>(to + at);
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
      const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(target, a);
      _mm_stream_si128(target + 1, b);
      _mm_stream_si128(target + 2, c);
      _mm_stream_si128(target + 3, d);
    }
  }
  _mm_sfence();
}

void rows_streamed(const Axis& axis, std::size_t bytes, const std::byte* from, std::byte* to) noexcept {
  constexpr int kFirst = 3, kSecond = 2;  // of __builtin_prefetch
  return bytes == kNearRow ? rows_ahead<kFirst>(axis, bytes, from, to) : rows_ahead<kSecond>(axis, bytes, from, to);
}

#else

bool streams(std::span<const Axis>, std::size_t, const std::byte*) noexcept { return false; }
void rows_streamed(const Axis&, std::size_t, const std::byte*, std::byte*) noexcept {}

#endif

void rows(const Axis& axis, std::size_t bytes, const std::byte* from, std::byte* to) noexcept {
  switch (bytes) {
    case 1:
      return rows_fixed<1>(axis, from, to);
    case 2:
      return rows_fixed<2>(axis, from, to);
    case 4:
      return rows_fixed<4>(axis, from, to);
    case 8:
      return rows_fixed<8>(axis, from, to);
    case 16:
      return rows_fixed<16>(axis, from, to);
    case 32:
      return rows_fixed<32>(axis, from, to);
    case 64:
      return rows_fixed<64>(axis, from, to);
  }
  if (bytes == 3) return rows_overlapping<2>(axis, bytes, from, to);
  if (bytes < 8) return rows_overlapping<4>(axis, bytes, from, to);
  if (bytes < 16) return rows_overlapping<8>(axis, bytes, from, to);
  if (bytes <= kInline) return rows_inline(axis, bytes, from, to);
  for (std::size_t i = 0; i < axis.count; ++i, from += axis.source, to += axis.target) std::memcpy(to, from, bytes);
}

template <auto kRows>
void copy(std::span<const Axis> axes, std::size_t row_bytes, const std::byte* from, std::byte* to) noexcept {
  if (axes.size() <= 1) return kRows(axes.empty() ? Axis{1, 0, 0} : axes.front(), row_bytes, from, to);
  const Axis& outer = axes.front();
  for (std::size_t i = 0; i < outer.count; ++i, from += outer.source, to += outer.target) {
    copy<kRows>(axes.subspan(1), row_bytes, from, to);
  }
}

bool is_one(const Axis& axis) { return axis.count == 1; }

}  // namespace

Scatter::Scatter(std::size_t source, std::byte* target, std::size_t element_bytes, std::vector<Axis> axes)
    : source_(source), target_(target), row_bytes_(element_bytes) {
  std::erase_if(axes, is_one);
  while (!axes.empty() && axes.back().source == static_cast<std::ptrdiff_t>(row_bytes_) &&
         axes.back().target == static_cast<std::ptrdiff_t>(row_bytes_)) {
    row_bytes_ *= axes.back().count;
    axes.pop_back();
  }
  for (const Axis& axis : axes) {
    const auto steps = static_cast<std::ptrdiff_t>(axis.count);
    if (!axes_.empty() && axes_.back().source == steps * axis.source && axes_.back().target == steps * axis.target) {
      axes_.back() = {axes_.back().count * axis.count, axis.source, axis.target};
    } else {
      axes_.push_back(axis);
    }
  }
}

std::size_t Scatter::source_end() const noexcept {
  std::size_t last = source_ + row_bytes_;
  for (const Axis& axis : axes_) {
    if (axis.count == 0) return 0;
    last += (axis.count - 1) * static_cast<std::size_t>(axis.source);
  }
  return row_bytes_ == 0 ? 0 : last;
}

void Scatter::operator()(const std::byte* buffer) const noexcept {
  if (source_end() == 0) return;
  if (streams(axes_, row_bytes_, target_)) {
    copy<rows_streamed>(axes_, row_bytes_, buffer + source_, target_);
  } else {
    copy<rows>(axes_, row_bytes_, buffer + source_, target_);
  }
}

}  // namespace dscheck
