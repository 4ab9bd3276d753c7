// One capture: which pieces of live memory go to the host, how far each one is, and whether any has changed meanwhile.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/driver.h"
#include "core/out_file.h"

namespace dscheck {

constexpr std::int32_t kHost = -1;  // as a device

// Who holds back before a piece changes. From 0 on: an owner's fence. The others:
constexpr std::int32_t kFrozen = -1;    // nobody is known to change it: only a fence for all waits for it
constexpr std::int32_t kVolatile = -2;  // anyone may change it at any time: captured, or spilled, before take() returns
constexpr std::int32_t kPrivate = -3;   // a copy of the capture's own: cannot change

constexpr unsigned kHashRows = 8;  // partial hashes of a piece, for its blocks on the device

struct PieceSpec {
  std::uint64_t bytes;
  std::int32_t device;
};

// What a plan fixes, of any later memory of the same geometry. `pieces` in the order in which they are consumed. Small
// tensors are copied while take() runs, to `targets` (byte offsets, multiples of 16) of the capture's own slab.
struct CaptureShape {
  std::vector<PieceSpec> pieces;
  std::vector<PieceSpec> smalls;
  std::vector<std::uint64_t> targets;
  std::vector<PieceSpec> watched;  // sampled only

  std::size_t block_bytes = 1;           // every piece is a multiple of it, or the end of a tensor
  std::vector<std::size_t> first_block;  // of each piece, among the checksums
  std::size_t blocks = 0;
  std::vector<std::size_t> first_small_block;
  std::size_t small_blocks = 0;
  std::size_t region_bytes = 0;  // where the last piece ends when an empty ring takes all of them

  std::size_t slab_bytes = 0;
  std::size_t before_at = 0, after_at = 0, captured_at = 0, watched_at = 0, tables_at = 0, hashes_at = 0;
  std::vector<std::int32_t> devices;  // other than the host, ascending
  bool check = false;

  void arrange();
};

// Memory of a capture's own: small tensors, samples, kernel tables. Page-locked when devices write to it.
struct Slab {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  bool page_locked = false;
};

enum class State : std::uint8_t { kPending, kUnderWay, kCopied, kGone };

struct Piece {
  std::uint64_t source;  // the live memory, or where it was spilled to
  std::uint64_t bytes;
  std::size_t slot = 0;
  std::int32_t device;
  std::int32_t owner;
  State state = State::kPending;
  bool placed = false;                          // has a slot in the region
  bool spilled = false;                         // `source` is ours
  bool summed = false;                          // its checksums are there
  double began_s = 0, ended_s = 0;              // of the copy
  double write_began_s = 0, write_ended_s = 0;  // to the file
};

// Where the pieces and small tensors of a capture lie in a file, and how much of them is there.
struct Output {
  static constexpr std::uint64_t kDropped = ~std::uint64_t{0};  // as an offset: not in the file
  static constexpr std::uint64_t kKept = kDropped - 1;          // not in the file: left to await_run()

  std::unique_ptr<OutFile> file;
  std::vector<std::uint64_t> pieces, smalls;              // byte offsets
  std::vector<std::uint64_t> piece_blocks, small_blocks;  // the first of each among the blocks of the file

  std::vector<std::uint32_t> small_checksums;
  std::size_t left = 0;  // pieces that still hold their room
  int error = 0;         // errno of a write
  std::atomic<bool> cancelled = false;
};

// An entry of the kernels' tables; csrc/cuda/kernels.cu has the same.
struct Entry {
  std::uint64_t source, bytes, target;
};
static_assert(sizeof(Entry) == 24);

// Around a fence's wait, on the training stream.
struct FenceTiming {
  std::int32_t device;
  bool ends_window;  // a fence that training reached, not one inside save()
  cuda::Event before, after;
};

// The part of a capture that lies on one device.
struct OnDevice {
  std::int32_t device;
  std::vector<std::uint32_t> order;    // of pieces as the samples' table has them: by owner
  std::vector<std::int32_t> owners;    // one entry a run of `order`
  std::vector<std::uint32_t> runs;     // where each run begins, and the end
  std::vector<bool> sealed;            // a run whose second sample is enqueued
  std::size_t table = 0;               // index of the first entry of `order` in the capture's tables
  std::uint32_t left = 0;              // pieces not copied yet
  std::uint32_t direct_cursor = 0;     // no pending piece of live memory before it
  std::uint32_t spilled_cursor = 0;    // no pending spilled piece before it
  cuda::Event began = nullptr;         // on the training stream, at save()
  cuda::Event spilled = nullptr;       // on the spill stream, or null
  cuda::Event sealed_aside = nullptr;  // behind the last samples on the spill stream, or null
  cuda::Event ended = nullptr;         // behind the last copy and sample, once all is enqueued
  bool has_begun = false;              // the device, or the copy stream, is known to be past `began`
  bool urgent = false;
  bool proved = false;
  std::uint64_t pace_bytes = 0;  // what is copied straight from live memory
};

struct Capture : std::enable_shared_from_this<Capture> {
  std::shared_ptr<const CaptureShape> shape;
  std::vector<Piece> pieces;
  std::vector<OnDevice> devices;
  std::vector<FenceTiming> timings;
  Slab slab;
  std::size_t tabled = 0;  // entries of the tables that are in use
  std::size_t placed = 0;  // pieces before it have slots
  std::uint32_t host_left = 0;
  std::uint32_t host_cursor = 0;
  std::uint32_t under_way = 0;  // copies and checksums that still touch memory
  std::vector<std::uint32_t> checksums;
  std::shared_ptr<Output> output;     // once somebody writes it to a file
  std::string failure;                // why it is refused, or nothing
  std::optional<std::uint32_t> torn;  // the first piece that was seen to have changed
  bool released = false;
  bool hurried = false;  // somebody waits for its room: no pauses between its copies
  double began_s = 0, captured_s = 0;
  double stalled_s = 0;  // that fences held up the devices; known once it is released

  bool failed() const noexcept { return !failure.empty() || torn.has_value(); }
  std::byte* sample(std::size_t at, std::size_t index) const noexcept;

  // The checksums of all that is in the output's file, in the order of its blocks.
  void collect(std::span<std::uint32_t> blocks) const noexcept;
};

}  // namespace dscheck
