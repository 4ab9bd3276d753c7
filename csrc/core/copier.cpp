#include "core/copier.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/crc32c.h"
#include "core/lane.h"
#include "core/sample.h"

namespace dscheck {
namespace {

constexpr unsigned kPortableMapped = 1 | 2;
constexpr std::size_t kAhead = 4;                                            // samples whose cache lines are on the way
constexpr std::size_t kAtOnceBytes = std::size_t{1} << 20;                   // copied by a fence that may not wait
constexpr std::size_t kRunBytes = std::size_t{256} << 20;                    // consumed at once, at most
constexpr unsigned kSpillRows = 8;                                           // blocks of threads a piece
constexpr std::size_t kJoinedGap = 64, kJoinedBytes = std::size_t{4} << 20;  // of small tensors in one write
constexpr int kNice = 5;
constexpr double kGrowth = 1.1;  // of the window from save to save: one that something else made long is no measure

double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

// Whether a fence for `owner` holds back for what `one` owns.
bool covers(std::int32_t owner, std::int32_t one) { return one == owner || (owner == kFrozen && one != kPrivate); }
bool belongs(const Piece& piece, std::int32_t owner) { return covers(owner, piece.owner); }

cuda::Stream stream_of(const Streams& streams, std::int32_t device) {
  for (const auto& [index, stream] : streams) {
    if (index == device) return stream;
  }
  throw cuda::Error("no stream was given for device " + std::to_string(device));
}

}  // namespace

Copier::Copier(const CopierSettings& settings)
    : settings_(settings), region_([this] {
        const std::lock_guard lock(mutex_);
        ring_.grow(region_.usable());
        place();
      }) {}

Copier::~Copier() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    for (const auto& capture : captures_) refuse(*capture, "the checkpointer was closed");
  }
  wake_all();
  for (std::thread& thread : workers_) thread.join();
  for (std::thread& thread : writers_) thread.join();
  for (const auto& lane : lanes_) lane->end();
  for (const auto& capture : captures_) {
    try {
      forget(*capture);
    } catch (const cuda::Error&) {  // the process ends, and the driver with it
    }
  }
  for (const Slab& slab : slabs_) {
    if (!slab.page_locked) std::free(slab.data);
  }
  if (lanes_.empty()) return;
  try {
    const Lane& any = *lanes_.front();
    const cuda::InContext current(any.driver, any.context);
    for (const Slab& slab : slabs_) {
      if (slab.page_locked) any.driver.cuMemFreeHost(slab.data);
    }
  } catch (const cuda::Error&) {  // the process ends, and the driver with it
  }
}

void Copier::prepare(std::size_t host_bytes, const std::vector<std::int32_t>& devices, std::size_t spill_bytes) {
  cuda::Context context = nullptr;
  std::unique_lock lock(mutex_);
  for (const std::int32_t device : devices) {
    Lane& on = lane(device);
    context = context == nullptr ? on.context : context;
    on.spill_wanted = std::max(on.spill_wanted, settings_.device_budget == 0 ? 0 : spill_bytes);
  }
  lock.unlock();
  region_.prepare(host_bytes, context);
  to_copy_.notify_all();  // lanes get spill memory
}

Lane& Copier::lane(std::int32_t device) {
  for (const auto& known : lanes_) {
    if (known->device == device) return *known;
  }
  const cuda::Driver* const driver = cuda::driver();
  if (driver == nullptr) throw cuda::Error("libcuda.so.1: not found, or without a device");
  lanes_.push_back(std::make_unique<Lane>(*this, *driver, device));
  try {
    lanes_.back()->start();
  } catch (...) {  // the system starts no more threads
    lanes_.pop_back();
    throw;
  }
  return *lanes_.back();
}

std::shared_ptr<Capture> Copier::take(std::shared_ptr<const CaptureShape> shape, const Live& live,
                                      const Streams& streams, double window_hint_s) {
  auto capture = std::make_shared<Capture>();
  capture->began_s = now_s();
  const CaptureShape& fixed = *shape;
  capture->shape = std::move(shape);
  capture->pieces.reserve(fixed.pieces.size());
  for (std::size_t i = 0; i < fixed.pieces.size(); ++i) {
    const PieceSpec& spec = fixed.pieces[i];
    Piece& piece = capture->pieces.emplace_back();
    piece.source = live.pieces[i];
    piece.bytes = spec.bytes;
    piece.device = spec.device;
    piece.owner = live.owners[i];
    if (spec.device == kHost) ++capture->host_left;
  }
  const std::lock_guard lock(mutex_);
  while (!fixed.pieces.empty() && workers_.size() < std::max<std::size_t>(1, settings_.threads)) {
    workers_.emplace_back(&Copier::work, this);
  }
  capture->slab = take_slab(fixed.slab_bytes, fixed.devices);
  try {
    for (const std::int32_t device : fixed.devices) {
      capture->devices.push_back(OnDevice{});
      capture->devices.back().device = device;
      begin_on(*capture, capture->devices.back(), live, stream_of(streams, device));
    }
    begin_on_host(*capture, live);
    captures_.push_back(capture);
    place();
    for (OnDevice& on : capture->devices) choose_spill(*capture, on, window_hint_s);
  } catch (...) {
    if (capture->slab.page_locked) capture->slab.bytes = 0;  // kernels may be at it: it serves no other capture
    discard(*capture);
    throw;
  }
  settle(*capture);
  to_copy_.notify_all();
  to_work_.notify_all();
  return capture;
}

Slab Copier::take_slab(std::size_t bytes, const std::vector<std::int32_t>& devices) {
  const bool page_locked = !devices.empty();
  for (auto slab = slabs_.begin(); slab != slabs_.end(); ++slab) {
    if (slab->bytes >= bytes && slab->page_locked == page_locked) {
      const Slab found = *slab;
      slabs_.erase(slab);
      return found;
    }
  }
  Slab made{nullptr, std::max<std::size_t>(bytes, 4096), page_locked};
  if (page_locked) {
    Lane& on = lane(devices.front());
    const cuda::InContext current(on.driver, on.context);
    on.driver.check(on.driver.cuMemHostAlloc(reinterpret_cast<void**>(&made.data), made.bytes, kPortableMapped),
                    "cuMemHostAlloc");
  } else {
    made.data = static_cast<std::byte*>(std::aligned_alloc(4096, align_up(made.bytes, 4096)));
    if (made.data == nullptr) throw std::bad_alloc();
  }
  return made;
}

// The entries of those of `specs` that lie on a device, behind what the capture's tables hold already.
template <typename Target>
std::pair<std::size_t, unsigned> list(Capture& capture, const std::vector<PieceSpec>& specs,
                                      std::span<const std::uint64_t> sources, std::int32_t device, Target target) {
  Entry* const tables = reinterpret_cast<Entry*>(capture.slab.data + capture.shape->tables_at);
  const std::size_t first = capture.tabled;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].device == device) tables[capture.tabled++] = {sources[i], specs[i].bytes, target(i)};
  }
  return {first, static_cast<unsigned>(capture.tabled - first)};
}

void Copier::order_by_owner(Capture& capture, OnDevice& on) {
  for (std::uint32_t i = 0; i < capture.pieces.size(); ++i) {
    if (capture.pieces[i].device == on.device) on.order.push_back(i);
  }
  on.left = static_cast<std::uint32_t>(on.order.size());
  std::stable_sort(on.order.begin(), on.order.end(), [&capture](std::uint32_t a, std::uint32_t b) {
    return capture.pieces[a].owner < capture.pieces[b].owner;
  });
  Entry* const tables = reinterpret_cast<Entry*>(capture.slab.data + capture.shape->tables_at);
  on.table = capture.tabled;
  for (const std::uint32_t index : on.order) {
    const Piece& piece = capture.pieces[index];
    if (on.owners.empty() || on.owners.back() != piece.owner) {
      on.owners.push_back(piece.owner);
      on.runs.push_back(static_cast<std::uint32_t>(capture.tabled - on.table));
    }
    tables[capture.tabled++] = {piece.source, piece.bytes, index};
  }
  on.runs.push_back(on.left);
  on.sealed.assign(on.owners.size(), false);
}

// On the training stream: small tensors and first samples leave before anything that is enqueued later can change them.
void Copier::begin_on(Capture& capture, OnDevice& on, const Live& live, cuda::Stream stream) {
  const CaptureShape& shape = *capture.shape;
  Lane& at = lane(on.device);
  const cuda::InContext current(at.driver, at.context);
  const Entry* const tables = reinterpret_cast<const Entry*>(capture.slab.data + shape.tables_at);
  const auto launch = [&](cuda::Function function, std::pair<std::size_t, unsigned> entries, unsigned rows,
                          std::size_t out) {
    if (entries.second == 0) return;
    at.launch(function, entries.second, rows, 256, stream, tables + entries.first, capture.slab.data + out);
  };
  order_by_owner(capture, on);
  const std::pair<std::size_t, unsigned> pieces{on.table, on.left};
  launch(at.sample, pieces, 1, shape.before_at);
  launch(at.gather, list(capture, shape.smalls, live.smalls, on.device, [&](auto i) { return shape.targets[i]; }), 4,
         0);
  launch(at.sample, list(capture, shape.watched, live.watched, on.device, [](auto i) { return i; }), 1,
         shape.watched_at);
  if (shape.check) {
    launch(at.hash, pieces, kHashRows, shape.hashes_at);
    launch(at.hash,
           list(capture, shape.smalls, live.smalls, on.device, [&](auto i) { return shape.pieces.size() + i; }),
           kHashRows, shape.hashes_at);
  }
  on.began = at.event();
  at.driver.check(at.driver.cuEventRecord(on.began, stream), "cuEventRecord");
}

void Copier::begin_on_host(Capture& capture, const Live& live) {
  const CaptureShape& shape = *capture.shape;
  const auto memory = [](std::uint64_t address) { return reinterpret_cast<const std::byte*>(address); };
  const auto hash = [&](std::size_t at, std::uint64_t address, std::uint64_t bytes) {
    std::uint64_t* const parts = reinterpret_cast<std::uint64_t*>(capture.slab.data + shape.hashes_at) + at * kHashRows;
    std::fill(parts, parts + kHashRows, 0);
    parts[0] = hash_words(memory(address), bytes);
  };
  const auto ahead = [&](const std::vector<PieceSpec>& specs, std::span<const std::uint64_t> sources, std::size_t i) {
    if (i < specs.size() && specs[i].device == kHost) prefetch_sample(memory(sources[i]), specs[i].bytes);
  };
  for (std::size_t i = 0; i < shape.pieces.size(); ++i) {
    ahead(shape.pieces, live.pieces, i + kAhead);
    if (shape.pieces[i].device != kHost) continue;
    take_sample(memory(live.pieces[i]), shape.pieces[i].bytes, capture.sample(shape.before_at, i));
    if (shape.check) hash(i, live.pieces[i], shape.pieces[i].bytes);
  }
  for (std::size_t i = 0; i < shape.smalls.size(); ++i) {
    ahead(shape.smalls, live.smalls, i + 4 * kAhead);
    if (shape.smalls[i].device != kHost) continue;
    std::memcpy(capture.slab.data + shape.targets[i], memory(live.smalls[i]), shape.smalls[i].bytes);
    if (shape.check) hash(shape.pieces.size() + i, live.smalls[i], shape.smalls[i].bytes);
  }
  for (std::size_t i = 0; i < shape.watched.size(); ++i) {
    if (shape.watched[i].device != kHost) continue;
    take_sample(memory(live.watched[i]), shape.watched[i].bytes, capture.sample(shape.watched_at, i));
  }
}

// What cannot be copied in the window before the fence is copied on the device now, as far as there is room.
void Copier::choose_spill(Capture& capture, OnDevice& on, double window_hint_s) {
  Lane& at = lane(on.device);
  const cuda::InContext current(at.driver, at.context);
  const double window_s = at.window_s == 0 || window_hint_s == 0 ? std::max(at.window_s, window_hint_s)
                                                                 : std::min(at.window_s, window_hint_s);
  double capacity = kUsableWindow * at.rate * window_s;
  for (const auto& earlier : captures_) {
    if (earlier.get() == &capture) continue;
    for (const Piece& piece : earlier->pieces) {
      const bool waits = piece.device == on.device && !piece.spilled && piece.state < State::kCopied;
      if (waits && !earlier->failed()) capacity -= static_cast<double>(piece.bytes);
    }
  }
  const std::size_t first = capture.tabled;
  for (std::uint32_t index = 0; index < capture.pieces.size(); ++index) {
    const Piece& piece = capture.pieces[index];
    if (piece.device == on.device && piece.owner == kVolatile) spill(capture, on, index);
  }
  for (std::uint32_t index = 0; index < capture.pieces.size(); ++index) {
    const Piece& piece = capture.pieces[index];
    if (piece.device != on.device || piece.owner < 0) continue;
    const double bytes = static_cast<double>(piece.bytes);
    if (piece.placed && bytes <= capacity) {
      capacity -= bytes;
      on.pace_bytes += piece.bytes;
    } else if (!spill(capture, on, index)) {
      on.pace_bytes += piece.bytes;
    }
  }
  launch_spill(capture, on, first);
}

// A place in spill memory for one piece, so that its owner need not wait for the host; launch_spill() copies. False: no
// room.
bool Copier::spill(Capture& capture, OnDevice& on, std::uint32_t index) {
  Piece& piece = capture.pieces[index];
  const auto address = piece.bytes > Spill::kBlockBytes ? std::nullopt : lane(on.device).spill.allocate(piece.bytes);
  if (!address) return false;
  Entry* const tables = reinterpret_cast<Entry*>(capture.slab.data + capture.shape->tables_at);
  tables[capture.tabled++] = {piece.source, piece.bytes, *address};
  piece.source = *address;
  piece.spilled = true;
  on.spilled_cursor = 0;
  return true;
}

// Copies what spill() has listed from entry `first` on, behind all that the training stream held at save().
void Copier::launch_spill(Capture& capture, OnDevice& on, std::size_t first) {
  const std::size_t count = capture.tabled - first;
  if (count == 0) return;
  Lane& at = lane(on.device);
  const Entry* const tables = reinterpret_cast<const Entry*>(capture.slab.data + capture.shape->tables_at);
  at.driver.check(at.driver.cuStreamWaitEvent(at.aside, on.began, 0), "cuStreamWaitEvent");
  // One kernel for all: hundreds of copies would cost the training thread some microseconds each.
  at.launch(at.gather, static_cast<unsigned>(count), kSpillRows, 256, at.aside, tables + first, nullptr);
  if (on.spilled == nullptr) on.spilled = at.event();
  at.driver.check(at.driver.cuEventRecord(on.spilled, at.aside), "cuEventRecord");
}

// Places in the region, for the pieces of all captures in the order in which they are consumed.
void Copier::place() {
  bool placed = false;
  for (const auto& capture : captures_) {
    while (capture->placed < capture->pieces.size() && !capture->failed()) {
      Piece& piece = capture->pieces[capture->placed];
      const auto slot = ring_.allocate(piece.bytes);
      if (!slot) {
        if (const std::string problem = region_.problem(); !problem.empty())
          refuse(*capture, "host memory: " + problem);
        if (ring_.empty() && ring_.capacity() >= region_.asked())
          refuse(*capture, "the region is too small for a piece");
        break;
      }
      piece.slot = *slot;
      piece.placed = placed = true;
      ++capture->placed;
    }
    if (capture->placed < capture->pieces.size() && !capture->failed()) break;
  }
  if (!placed) return;
  to_copy_.notify_all();
  to_work_.notify_all();
  changed_.notify_all();  // a fence may wait for it
}

void Copier::wake_all() {
  for (auto* const waiting : {&changed_, &ended_, &to_copy_, &to_work_, &to_put_}) waiting->notify_all();
}

Copier::Fenced Copier::fence(Capture& capture, std::int32_t owner, const Streams& streams, Clock::time_point deadline,
                             bool may_wait) {
  std::unique_lock lock(mutex_);
  try {
    while (!capture.failed() && !capture.released && !advance(capture, owner, may_wait, lock)) {
      if (!may_wait) return Fenced::kWouldWait;
      if (Clock::now() >= deadline) return Fenced::kTooLate;
      changed_.wait_until(lock, deadline);
    }
    if (!capture.failed() && !capture.released) hold_back(capture, owner, streams);
    to_copy_.notify_all();  // copies may be under way that nobody looks at
  } catch (const std::exception& error) {
    refuse(capture, error.what());
  }
  return Fenced::kDone;
}

// Enqueues, spills or copies what is left of an owner. False when something must be waited for.
bool Copier::advance(Capture& capture, std::int32_t owner, bool may_wait, std::unique_lock<std::mutex>& lock) {
  bool done = true;
  for (OnDevice& on : capture.devices) {
    if (on.proved) continue;
    Lane& at = lane(on.device);
    const cuda::InContext current(at.driver, at.context);
    const std::size_t first = capture.tabled;
    for (const std::uint32_t index : on.order) {
      Piece& piece = capture.pieces[index];
      if (!belongs(piece, owner) || piece.spilled || piece.state != State::kPending) continue;
      on.urgent = true;
      if (piece.placed) {
        at.enqueue(capture.shared_from_this(), on, index);
      } else {
        done = spill(capture, on, index) && done;
      }
    }
    launch_spill(capture, on, first);
  }
  std::size_t at_once = may_wait ? ~std::size_t{0} : kAtOnceBytes;
  for (std::size_t index = 0; index < capture.pieces.size() && capture.host_left > 0; ++index) {
    const Piece& piece = capture.pieces[index];
    if (piece.device != kHost || !belongs(piece, owner) || piece.state > State::kUnderWay) continue;
    if (capture.failed()) return true;
    if (piece.bytes > at_once) return false;
    at_once -= piece.bytes;
    if (piece.state == State::kPending && piece.placed) copy_on_host(capture.shared_from_this(), index, lock);
    done = done && piece.state > State::kUnderWay;
  }
  return done;
}

// The training streams wait for the copies, and the second samples behind them; the CPU does not.
void Copier::hold_back(Capture& capture, std::int32_t owner, const Streams& streams) {
  for (OnDevice& on : capture.devices) {
    if (std::none_of(on.owners.begin(), on.owners.end(), [owner](auto one) { return covers(owner, one); })) continue;
    Lane& at = lane(on.device);
    const cuda::InContext current(at.driver, at.context);
    const cuda::Stream stream = stream_of(streams, on.device);
    FenceTiming timing{on.device, owner != kVolatile, at.event(), at.event()};
    at.driver.check(at.driver.cuEventRecord(timing.before, stream), "cuEventRecord");
    if (!on.proved) {
      // What was spilled need not wait behind the copies to the host, unless the last samples are there already.
      const bool aside = on.ended == nullptr && std::all_of(on.order.begin(), on.order.end(), [&](std::uint32_t index) {
                           return capture.pieces[index].spilled || !belongs(capture.pieces[index], owner);
                         });
      const cuda::Stream last = aside ? at.aside : at.copy;
      seal(capture, on, owner, last);
      cuda::Event end = at.event();
      at.driver.check(at.driver.cuEventRecord(end, last), "cuEventRecord");
      at.driver.check(at.driver.cuStreamWaitEvent(stream, end, 0), "cuStreamWaitEvent");
      if (aside) std::swap(on.sealed_aside, end);
      at.recycle(end);
    }
    at.driver.check(at.driver.cuEventRecord(timing.after, stream), "cuEventRecord");
    capture.timings.push_back(timing);
  }
}

// The second samples of an owner's pieces, behind their copies and before anything that the fence holds back.
void Copier::seal(Capture& capture, OnDevice& on, std::int32_t owner, cuda::Stream stream) {
  Lane& at = lane(on.device);
  if (on.spilled != nullptr) {
    at.driver.check(at.driver.cuStreamWaitEvent(stream, on.spilled, 0), "cuStreamWaitEvent");
  }
  const Entry* const tables = reinterpret_cast<const Entry*>(capture.slab.data + capture.shape->tables_at) + on.table;
  for (std::size_t run = 0; run < on.owners.size(); ++run) {
    const std::int32_t one = on.owners[run];
    if (on.sealed[run] || !covers(owner, one)) continue;
    at.launch(at.sample, on.runs[run + 1] - on.runs[run], 1, 256, stream, tables + on.runs[run],
              capture.sample(capture.shape->after_at, 0));
    on.sealed[run] = true;
  }
}

bool Copier::captured(const Capture& capture) const {
  return capture.host_left == 0 &&
         std::all_of(capture.devices.begin(), capture.devices.end(), [](const OnDevice& on) { return on.proved; });
}

// When all is on the host: whether the three samples of each piece agree.
void Copier::settle(Capture& capture) {
  if (capture.captured_s != 0 || capture.failed() || !captured(capture)) return;
  const CaptureShape& shape = *capture.shape;
  for (std::size_t index = 0; index < capture.pieces.size(); ++index) {
    const Piece& piece = capture.pieces[index];
    const std::byte* const seen = capture.sample(shape.captured_at, index);
    const bool kept =
        std::memcmp(capture.sample(shape.before_at, index), seen, kSampleBytes) == 0 &&
        (piece.owner == kPrivate || std::memcmp(capture.sample(shape.after_at, index), seen, kSampleBytes) == 0);
    if (!kept && !capture.torn) capture.torn = static_cast<std::uint32_t>(index);
  }
  capture.captured_s = now_s();
  ended_.notify_all();
}

void Copier::refuse(Capture& capture, std::string reason) {
  if (capture.failure.empty()) capture.failure = reason.empty() ? "refused" : std::move(reason);
  changed_.notify_all();
  ended_.notify_all();
}

void Copier::fail(Capture& capture, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  refuse(capture, reason);
}

void Copier::copy_on_host(const std::shared_ptr<Capture>& capture, std::size_t index,
                          std::unique_lock<std::mutex>& lock) {
  Piece& piece = capture->pieces[index];
  const std::byte* const source = reinterpret_cast<const std::byte*>(piece.source);
  std::byte* const target = region_.data() + piece.slot;
  piece.state = State::kUnderWay;
  piece.began_s = now_s();
  ++capture->under_way;
  lock.unlock();
  std::memcpy(target, source, piece.bytes);
  take_sample(target, piece.bytes, capture->sample(capture->shape->captured_at, index));
  take_sample(source, piece.bytes, capture->sample(capture->shape->after_at, index));
  lock.lock();
  --capture->under_way;
  --capture->host_left;
  note_copied(capture, index);
  settle(*capture);
}

std::optional<std::pair<std::shared_ptr<Capture>, std::size_t>> Copier::next_on_host() {
  for (const auto& capture : captures_) {
    if (capture->failed() || capture->host_left == 0) continue;
    for (std::uint32_t& cursor = capture->host_cursor; cursor < capture->placed; ++cursor) {
      const Piece& piece = capture->pieces[cursor];
      if (piece.device == kHost && piece.state == State::kPending) return std::pair(capture, cursor);
    }
  }
  return std::nullopt;
}

// Its bytes are in the region: the checksums may follow.
void Copier::note_copied(const std::shared_ptr<Capture>& capture, std::size_t index) {
  Piece& piece = capture->pieces[index];
  piece.state = State::kCopied;
  piece.ended_s = now_s();
  to_sum_.emplace_back(capture, index);
  to_work_.notify_one();
  changed_.notify_all();
}

void Copier::checksum(std::unique_lock<std::mutex>& lock) {
  const auto [capture, index] = std::move(to_sum_.front());
  to_sum_.pop_front();
  if (capture->failed() || capture->released) return;
  Piece& piece = capture->pieces[index];
  const CaptureShape& shape = *capture->shape;
  ++capture->under_way;
  if (capture->checksums.empty()) capture->checksums.resize(shape.blocks);  // 60 pages: not on the training thread
  lock.unlock();
  const std::span<const std::byte> bytes(region_.data() + piece.slot, piece.bytes);
  const std::size_t blocks = block_count(piece.bytes, shape.block_bytes);
  crc32c_blocks(bytes, shape.block_bytes, {capture->checksums.data() + shape.first_block[index], blocks});
  lock.lock();
  piece.summed = true;
  --capture->under_way;
  if (capture->output != nullptr && capture->output->pieces[index] != Output::kKept) {
    to_write_.emplace_back(capture, index);
    to_put_.notify_one();
  }
  changed_.notify_all();
}

void Copier::work() {
  // On full cores a woken thread would else take the training thread's turn for milliseconds, inside save().
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kNice);
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (const auto found = next_on_host()) {
      copy_on_host(found->first, found->second, lock);
    } else if (!to_sum_.empty()) {
      checksum(lock);
    } else {
      to_work_.wait(lock);
    }
  }
}

bool Copier::wait(Capture& capture, Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return ended_.wait_until(lock, deadline, [&] { return capture.failed() || capture.captured_s != 0; });
}

std::size_t Copier::await_run(Capture& capture, std::size_t first, std::size_t stop, Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  const std::vector<Piece>& pieces = capture.pieces;
  changed_.wait_until(lock, deadline, [&] { return capture.failed() || capture.released || pieces[first].summed; });
  if (capture.failed() || !pieces[first].summed) return 0;
  std::size_t next = first + 1;
  const auto follows = [&](const Piece& piece, const Piece& last) {
    return piece.summed && piece.slot == last.slot + last.bytes &&
           piece.slot + piece.bytes - pieces[first].slot <= kRunBytes;
  };
  while (next < stop && follows(pieces[next], pieces[next - 1])) ++next;
  return next - first;
}

bool Copier::await_slab(Capture& capture, Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  for (const OnDevice& on : capture.devices) {
    Lane& at = lane(on.device);
    for (;;) {
      if (capture.failed() || on.proved) break;
      const cuda::InContext current(at.driver, at.context);
      const int result = at.driver.cuEventQuery(on.began);
      if (result == 0) break;
      if (result != cuda::kNotReady || Clock::now() >= deadline) return false;
      changed_.wait_for(lock, std::chrono::microseconds(200));
    }
  }
  return !capture.failed();
}

void Copier::free_run(Capture& capture, std::size_t first, std::size_t count) {
  const std::lock_guard lock(mutex_);
  if (capture.released) return;
  for (std::size_t index = first; index < first + count; ++index) {
    Piece& piece = capture.pieces[index];
    if (piece.state != State::kCopied) continue;
    piece.state = State::kGone;
    ring_.free(piece.slot);
  }
  place();
  changed_.notify_all();
}

void Copier::write(Capture& capture, std::shared_ptr<Output> output) {
  const std::lock_guard lock(mutex_);
  while (writers_.size() < std::max<std::size_t>(1, settings_.io_threads)) {
    writers_.emplace_back(&Copier::write_work, this);
  }
  capture.output = std::move(output);
  for (std::size_t index = 0; index < capture.pieces.size(); ++index) {
    if (capture.output->pieces[index] == Output::kKept) continue;
    ++capture.output->left;
    if (capture.pieces[index].summed) to_write_.emplace_back(capture.shared_from_this(), index);
  }
  to_put_.notify_all();
}

void Copier::write_work() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kNice);
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (!to_write_.empty()) {
      write_piece(lock);
    } else {
      to_put_.wait(lock);
    }
  }
}

void Copier::write_piece(std::unique_lock<std::mutex>& lock) {
  const auto [capture, index] = std::move(to_write_.front());
  to_write_.pop_front();
  const std::shared_ptr<Output> output = capture->output;
  if (capture->failed() || capture->released || output->error != 0) return;
  Piece& piece = capture->pieces[index];
  if (const std::uint64_t offset = output->pieces[index]; offset != Output::kDropped) {
    ++capture->under_way;
    piece.write_began_s = now_s();
    lock.unlock();
    const int error = output->file->write({region_.data() + piece.slot, piece.bytes}, offset, output->cancelled);
    lock.lock();
    piece.write_ended_s = now_s();
    --capture->under_way;
    if (error != 0 && output->error == 0) output->error = error;
    changed_.notify_all();
    if (error != 0) ended_.notify_all();
    if (error != 0 || capture->released) return;
  }
  piece.state = State::kGone;
  ring_.free(piece.slot);
  if (--output->left == 0) ended_.notify_all();
  place();
}

bool Copier::await_written(Capture& capture, Clock::time_point deadline) {
  const bool there = await_slab(capture, deadline);
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Output> output = capture.output;
  if (there && !capture.released && output->error == 0) {
    ++capture.under_way;
    lock.unlock();
    const int error = write_smalls(capture, *output);
    lock.lock();
    --capture.under_way;
    if (output->error == 0) output->error = error;
    changed_.notify_all();
  }
  const auto ended = [&] { return capture.failed() || capture.released || output->error != 0 || output->left == 0; };
  ended_.wait_until(lock, deadline, ended);
  return there && !capture.failed() && output->error == 0 && output->left == 0;
}

// Those that lie next to each other in the file are joined, with the zeros between them.
int Copier::write_smalls(const Capture& capture, Output& output) const {
  const CaptureShape& shape = *capture.shape;
  std::vector<std::byte> joined;
  std::uint64_t begin = 0;
  int error = 0;
  const auto flush = [&] {
    if (error == 0) error = output.file->write(joined, begin, output.cancelled);
    joined.clear();
  };
  output.small_checksums.resize(shape.small_blocks);
  for (std::size_t i = 0; i < shape.smalls.size(); ++i) {
    const std::uint64_t offset = output.smalls[i], bytes = shape.smalls[i].bytes, end = begin + joined.size();
    if (offset == Output::kDropped || bytes == 0) continue;
    const std::span data(capture.slab.data + shape.targets[i], bytes);
    crc32c_blocks(data, shape.block_bytes,
                  {output.small_checksums.data() + shape.first_small_block[i], block_count(bytes, shape.block_bytes)});
    if (offset < end || offset - end >= kJoinedGap || joined.size() + bytes > kJoinedBytes) flush();
    if (joined.empty()) begin = offset;
    joined.resize(offset - begin);
    joined.insert(joined.end(), data.begin(), data.end());
  }
  flush();
  return error;
}

bool Copier::release(Capture& capture, Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  if (capture.released) return true;
  if (capture.output != nullptr) capture.output->cancelled = true;
  if (capture.captured_s == 0) refuse(capture, "it was given up");
  if (!changed_.wait_until(lock, deadline, [&capture] { return capture.under_way == 0; })) return false;
  if (capture.captured_s == 0 && !quiet(capture, lock, deadline)) return false;
  discard(capture);
  const std::unique_ptr<OutFile> file = capture.output == nullptr ? nullptr : std::move(capture.output->file);
  lock.unlock();  // to close a file that was deleted takes the time of all its bytes
  return true;
}

// Waits until no kernel of a capture that was not finished writes to its slab any more.
bool Copier::quiet(const Capture& capture, std::unique_lock<std::mutex>& lock, Clock::time_point deadline) {
  for (const OnDevice& on : capture.devices) {
    Lane& at = lane(on.device);
    const cuda::InContext current(at.driver, at.context);
    cuda::Event ends[2] = {at.event(), at.event()};
    at.driver.check(at.driver.cuEventRecord(ends[0], at.copy), "cuEventRecord");
    at.driver.check(at.driver.cuEventRecord(ends[1], at.aside), "cuEventRecord");
    const auto under_way = [&] {
      return at.driver.cuEventQuery(on.began) == cuda::kNotReady ||
             at.driver.cuEventQuery(ends[0]) == cuda::kNotReady || at.driver.cuEventQuery(ends[1]) == cuda::kNotReady;
    };
    while (under_way()) {
      if (Clock::now() >= deadline) return false;
      changed_.wait_for(lock, std::chrono::microseconds(200));
    }
    at.recycle(ends[0]);
    at.recycle(ends[1]);
  }
  return true;
}

void Copier::discard(Capture& capture) {
  capture.released = true;
  for (Piece& piece : capture.pieces) {
    if (piece.spilled && piece.state == State::kPending) lane(piece.device).spill.free(piece.source);
    if (piece.placed && piece.state != State::kGone) ring_.free(piece.slot);
  }
  std::erase_if(captures_, [&capture](const auto& one) { return one.get() == &capture; });
  place();
  to_copy_.notify_all();  // lanes may have spill memory to give back
  changed_.notify_all();  // who still consumes it
  ended_.notify_all();
  forget(capture);
}

// Takes the capture's events and slab back, and learns from its fences how long a window is. Who still reads it, after
// the save was given up, finds memory in it.
void Copier::forget(Capture& capture) {
  for (OnDevice& on : capture.devices) {
    Lane& at = lane(on.device);
    const cuda::InContext current(at.driver, at.context);
    double window_s = now_s() - capture.began_s;
    bool fenced = false;
    float elapsed_ms = 0;
    for (FenceTiming& timing : capture.timings) {
      if (timing.device != on.device) continue;
      if (timing.ends_window && at.driver.cuEventElapsedTime(&elapsed_ms, on.began, timing.before) == 0) {
        window_s = std::min(window_s, elapsed_ms * 1e-3);
        fenced = true;
      }
      if (at.driver.cuEventElapsedTime(&elapsed_ms, timing.before, timing.after) == 0) {
        capture.stalled_s += elapsed_ms * 1e-3;
      }
      at.recycle(timing.before);
      at.recycle(timing.after);
    }
    // Without a fence the window is at least as long as the capture was there.
    if (fenced) at.window_s = at.window_s == 0 ? window_s : std::min(window_s, kGrowth * at.window_s);
    if (!fenced && capture.captured_s != 0) at.window_s = std::max(at.window_s, window_s);
    at.recycle(on.began);
    at.recycle(on.spilled);
    at.recycle(on.sealed_aside);
    at.recycle(on.ended);
  }
  slabs_.push_back(capture.slab);
}

void Copier::hurry() {
  const std::lock_guard lock(mutex_);
  for (const auto& capture : captures_) capture->hurried = true;
  for (const auto& known : lanes_) known->due = {};
  to_copy_.notify_all();
}

bool Copier::has_room(std::size_t bytes, std::size_t longest) const {
  const std::lock_guard lock(mutex_);
  const bool placed = std::all_of(captures_.begin(), captures_.end(),
                                  [](const auto& one) { return one->placed == one->pieces.size(); });
  return placed && (ring_.empty() ? bytes <= region_.asked() : bytes + longest <= ring_.room(region_.asked()));
}

std::optional<std::size_t> Copier::pending(const Capture& capture) const {
  const std::lock_guard lock(mutex_);
  for (std::size_t index = 0; index < capture.pieces.size(); ++index) {
    if (capture.pieces[index].state < State::kCopied) return index;
  }
  return std::nullopt;
}

std::string Copier::failure(const Capture& capture) const {
  const std::lock_guard lock(mutex_);
  return capture.failure;
}

std::optional<std::size_t> Copier::torn(const Capture& capture) const {
  const std::lock_guard lock(mutex_);
  return capture.torn ? std::optional<std::size_t>(*capture.torn) : std::nullopt;
}

std::pair<double, double> Copier::rate_and_window(std::int32_t device) const {
  const std::lock_guard lock(mutex_);
  for (const auto& known : lanes_) {
    if (known->device == device) return {known->rate, known->window_s};
  }
  return {0, 0};
}

std::size_t Copier::spill_bytes(std::int32_t device) const {
  const std::lock_guard lock(mutex_);
  for (const auto& known : lanes_) {
    if (known->device == device) return known->spill.bytes();
  }
  return 0;
}

}  // namespace dscheck
