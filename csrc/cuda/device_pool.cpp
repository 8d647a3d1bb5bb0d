// SPDX-License-Identifier: Apache-2.0
#include "device_pool.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <sstream>
#include <thread>
#include <utility>

#include "../host/validate.h"

namespace moetion {
namespace {

using Clock = std::chrono::steady_clock;

// Most waits end within a few hundred microseconds: a sleep would let them be seen that much later.
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr auto kFirstPause = std::chrono::microseconds(20);
constexpr auto kLastPause = std::chrono::microseconds(200);
constexpr uint32_t kNoSm = UINT32_MAX;  // of a block that did not run

int64_t table_bytes(int64_t num_rows, int64_t num_pieces, int64_t num_sms) {
  return num_rows * static_cast<int64_t>(sizeof(Work) + sizeof(uint64_t)) +
         num_pieces * static_cast<int64_t>(sizeof(Piece)) + num_sms * static_cast<int64_t>(sizeof(uint32_t));
}

int64_t address_of(const void* memory) {
  return reinterpret_cast<int64_t>(memory);
}

Deadline deadline_in(double timeout_s) {
  constexpr double kYearSeconds = 3e7;  // more would not fit the clock
  const auto time = std::chrono::duration<double>(std::min(timeout_s, kYearSeconds));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(time);
}

std::string is_late(const std::string& what, double timeout_s) {
  std::ostringstream text;
  text << what << " is not done after " << timeout_s << " s";
  return text.str();
}

}  // namespace

template <typename Check>
void DevicePool::require(const Check& check) const {
  try {
    check();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("rank " + std::to_string(options_.rank) + ": " + error.what());
  }
}

template <typename Call>
auto DevicePool::refusable(const std::string& what, const Call& call) const {
  try {
    return call();
  } catch (const DeviceError& error) {
    throw DeviceError(what + " failed: " + error.what());
  }
}

DevicePool::DevicePool(std::shared_ptr<Runtime> runtime, const PoolOptions& options)
    : runtime_(std::move(runtime)),
      options_(options),
      num_sms_(std::min(options.num_sms, runtime_->num_sms())) {
  if (options.max_pieces < 0 || options.max_chunks < 0 || options.num_slots < 1 || options.num_slots > 64 ||
      options.num_sms < 1)
    throw std::invalid_argument("max_pieces=" + std::to_string(options.max_pieces) +
                                ", max_chunks=" + std::to_string(options.max_chunks) +
                                ", num_slots=" + std::to_string(options.num_slots) +
                                ", num_sms=" + std::to_string(options.num_sms) +
                                "; sizes must not be negative, slots in 1..64, SMs at least 1");
  try {
    refusable(on_device("pool of " + std::to_string(options.num_slots) + " slots"),
              [&] { take_resources(); });
  } catch (const DeviceError&) {
    give_back();
    throw;
  }
  copies_.reserve(static_cast<size_t>(options.max_chunks));
  planned_.reserve(static_cast<size_t>(options.max_chunks));
  targets_.reserve(static_cast<size_t>(options.max_chunks));
}

void DevicePool::take_resources() {
  const auto nbytes = static_cast<size_t>(table_bytes(options_.max_chunks, options_.max_pieces, num_sms_));
  order_event_ = runtime_->make_event(false);
  upload_event_ = runtime_->make_event(false);
  copy_stream_ = runtime_->make_stream();
  slots_.resize(static_cast<size_t>(options_.num_slots));
  for (Slot& slot : slots_) {
    slot.host = static_cast<uint8_t*>(runtime_->allocate_pinned(nbytes));
    slot.device = static_cast<uint8_t*>(runtime_->allocate(nbytes));
    if (options_.is_timed) slot.begin = runtime_->make_event(true);
    slot.forked = runtime_->make_event(false);
    slot.launched = runtime_->make_event(false);
    slot.end = runtime_->make_event(options_.is_timed);
  }
}

DevicePool::~DevicePool() {
  give_back();
}

void DevicePool::give_back() noexcept {
  const Deadline deadline = deadline_in(options_.last_wait_s);
  bool is_quiet = !upload_is_open_ || (broken_.empty() && is_seen_by(upload_event_, deadline));
  for (const Slot& slot : slots_) {
    is_quiet &= !slot.was_cut_short && (slot.ticket < 0 || is_seen_by(slot.end, deadline));
    for (const Event event : {slot.begin, slot.forked, slot.launched, slot.end})
      runtime_->destroy_event(event);
  }
  runtime_->destroy_event(upload_event_);
  runtime_->destroy_event(order_event_);
  runtime_->destroy_stream(copy_stream_);
  // Else all memory is leaked, of quiet slots too: freeing any waits for the device, which may hang for ever.
  if (!is_quiet) return;
  for (const Slot& slot : slots_) {
    runtime_->free(slot.device);
    runtime_->free_pinned(slot.host);
  }
  runtime_->free(uploaded_on_device_);
  runtime_->free_pinned(uploaded_);
}

int64_t DevicePool::pack(Table<Piece> pieces, Table<Chunk> chunks, int64_t copy_engine_bytes, Stream stream) {
  require([&] { check_pack(pieces, chunks); });
  std::lock_guard<std::mutex> lock(mutex_);
  Slot& slot = take_slot("pack", pieces.num_rows, chunks.num_rows);
  Work* const work = work_of(slot.host);
  for (int64_t c = 0; c < chunks.num_rows; ++c) {
    const Chunk& chunk = chunks.rows[c];
    work[c] = {chunk.dst, chunk.nbytes, chunk.first_piece, chunk.num_pieces, chunk.dst, 0, 1};
  }
  std::copy_n(pieces.rows, pieces.num_rows, pieces_of(slot, slot.host));
  return submit(slot, copy_engine_bytes, true, stream);
}

void DevicePool::upload_pieces(Table<Piece> pieces, double timeout_s) {
  const std::string what = on_device("upload of " + std::to_string(pieces.num_rows) + " pieces");
  const auto nbytes = static_cast<size_t>(pieces.num_rows) * sizeof(Piece);
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  for (const Slot& slot : slots_)
    if (slot.ticket >= 0) throw std::invalid_argument("finish all tickets before other pieces are uploaded");
  finish_upload(what, timeout_s);  // of an earlier call, which was late
  num_uploaded_ = 0;
  runtime_->free(std::exchange(uploaded_on_device_, nullptr));
  runtime_->free_pinned(std::exchange(uploaded_, nullptr));
  if (nbytes == 0) return;
  refusable(what, [&] {
    uploaded_ = static_cast<Piece*>(runtime_->allocate_pinned(nbytes));
    uploaded_on_device_ = static_cast<Piece*>(runtime_->allocate(nbytes));
  });
  std::copy_n(pieces.rows, pieces.num_rows, uploaded_);
  const CopyRow upload = {address_of(uploaded_on_device_), address_of(uploaded_),
                          static_cast<int64_t>(nbytes)};
  upload_is_open_ = true;
  try {
    runtime_->copy(&upload, 1, copy_stream_);
    runtime_->record(upload_event_, copy_stream_);
  } catch (const DeviceError& error) {
    fail(what, error.what());
  }
  finish_upload(what, timeout_s);
  num_uploaded_ = pieces.num_rows;
}

void DevicePool::finish_upload(const std::string& what, double timeout_s) {
  if (!upload_is_open_) return;
  if (!is_done_within(upload_event_, what, timeout_s)) throw DeviceLate(is_late(what, timeout_s));
  upload_is_open_ = false;
}

int64_t DevicePool::pack_uploaded(Table<UploadedChunk> chunks, int64_t copy_engine_bytes, Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  planned_.clear();
  targets_.clear();
  for (int64_t c = 0; c < chunks.num_rows; ++c) {
    const UploadedChunk& chunk = chunks.rows[c];
    planned_.push_back({chunk.at, chunk.nbytes, chunk.first_piece, chunk.num_pieces});
    targets_.push_back({chunk.dst, chunk.nbytes});
  }
  require([&] {
    check_pack({uploaded_, num_uploaded_}, {planned_.data(), chunks.num_rows});
    check_disjoint_spans({targets_.data(), chunks.num_rows});
  });
  Slot& slot = take_slot("pack", 0, chunks.num_rows);
  Work* const work = work_of(slot.host);
  for (int64_t c = 0; c < chunks.num_rows; ++c) {
    const UploadedChunk& chunk = chunks.rows[c];
    work[c] = {chunk.dst, chunk.nbytes, chunk.first_piece, chunk.num_pieces, chunk.at, 0, 1};
  }
  return submit(slot, uploaded_, uploaded_on_device_, copy_engine_bytes, true, stream);
}

int64_t DevicePool::scatter(Table<Piece> pieces, int64_t copy_engine_bytes, Stream stream) {
  require([&] { check_scatter(pieces); });
  std::lock_guard<std::mutex> lock(mutex_);
  Slot& slot = take_slot("scatter", pieces.num_rows, pieces.num_rows);
  Work* const work = work_of(slot.host);
  for (int64_t p = 0; p < pieces.num_rows; ++p)
    work[p] = {pieces.rows[p].dst, pieces.rows[p].nbytes, p, 1, pieces.rows[p].dst, 0, 1};
  std::copy_n(pieces.rows, pieces.num_rows, pieces_of(slot, slot.host));
  return submit(slot, copy_engine_bytes, false, stream);
}

int64_t DevicePool::num_rows(int64_t ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  return slot_of(ticket).num_rows;
}

bool DevicePool::wait(int64_t ticket, double timeout_s) {
  Event end = 0;
  std::string what;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    require_usable();
    const Slot& slot = slot_of(ticket);
    end = slot.end;
    what = slot.what;
  }
  try {
    return is_done_by(end, deadline_in(timeout_s));  // without the lock: others may enqueue meanwhile
  } catch (const DeviceError& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    fail(what, error.what());
  }
}

void DevicePool::finish(int64_t ticket, uint64_t* digests, double timeout_s) {
  const bool is_done = wait(ticket, timeout_s);
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();  // without the wait of another stream, what was read may have changed
  Slot& slot = slot_of(ticket);
  if (!is_done) throw DeviceLate(is_late(slot.what, timeout_s));
  const Work* const work = work_of(slot.host);
  const uint64_t* const sums = sums_of(slot, slot.host);
  if (digests != nullptr)
    for (int64_t r = 0; r < slot.num_rows; ++r)
      digests[r] = digest_finish(sums[r], static_cast<uint64_t>(work[r].nbytes));
  slot.ticket = -1;
}

double DevicePool::device_seconds(int64_t ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!options_.is_timed) throw std::invalid_argument("this pool was not made with timed");
  const Slot& slot = done_slot(ticket);
  try {
    return runtime_->seconds_between(slot.begin, slot.end);
  } catch (const DeviceError& error) {
    fail(slot.what, error.what());
  }
}

std::vector<uint32_t> DevicePool::multiprocessors(int64_t ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!options_.takes_census) throw std::invalid_argument("this pool was not made with census");
  const Slot& slot = done_slot(ticket);
  std::vector<uint32_t> found;
  std::copy_if(sms_of(slot, slot.host), sms_of(slot, slot.host) + num_sms_, std::back_inserter(found),
               [](uint32_t number) { return number != kNoSm; });
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

DevicePool::Slot& DevicePool::done_slot(int64_t ticket) {
  require_usable();
  Slot& slot = slot_of(ticket);
  if (!is_done_within(slot.end, slot.what, 0))
    throw std::invalid_argument("ticket " + std::to_string(ticket) + " is not done; wait for it first");
  return slot;
}

bool DevicePool::is_done_by(Event event, Deadline deadline) {
  const Deadline spin_end = Clock::now() + kSpin;
  auto pause = kFirstPause;
  while (!runtime_->is_done(event)) {
    const Deadline now = Clock::now();
    if (now >= deadline) return false;
    if (now < spin_end) {
      std::this_thread::yield();
      continue;
    }
    std::this_thread::sleep_until(std::min(deadline, now + pause));
    pause = std::min(2 * pause, kLastPause);
  }
  return true;
}

bool DevicePool::is_done_within(Event event, const std::string& what, double timeout_s) {
  try {
    return is_done_by(event, deadline_in(timeout_s));
  } catch (const DeviceError& error) {
    fail(what, error.what());
  }
}

bool DevicePool::is_seen_by(Event event, Deadline deadline) noexcept {
  try {
    return is_done_by(event, deadline);
  } catch (const DeviceError&) {  // a broken device was reported before
    return false;
  }
}

void DevicePool::order(Stream later, Stream earlier) {
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  try {
    runtime_->record(order_event_, earlier);
    runtime_->wait(later, order_event_);
  } catch (const DeviceError& error) {
    fail(on_device("order of two streams"), error.what());
  }
}

void DevicePool::order_after(Stream later, int64_t ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  for (const Slot& slot : slots_) {
    if (slot.ticket != ticket) continue;
    try {
      runtime_->wait(later, slot.end);
    } catch (const DeviceError& error) {
      fail(slot.what, error.what());
    }
  }
}

void DevicePool::check_spans_are_here(Table<Span> spans) {
  check_spans(spans);
  for (int64_t s = 0; s < spans.num_rows; ++s) {
    const Span& span = spans.rows[s];
    if (span.nbytes == 0) continue;
    const std::string found = refusable(on_device("look-up of a span"),
                                        [&] { return runtime_->misplaced(span.address, span.nbytes); });
    if (found.empty()) continue;
    std::ostringstream text;
    text << "span " << s << ": [" << std::hex << std::showbase << span.address << ", "
         << span.address + span.nbytes << ") is " << found << " and not memory of " << runtime_->name();
    throw std::invalid_argument(text.str());
  }
}

std::unique_ptr<PinnedMemory> DevicePool::pin(int64_t nbytes) {
  return refusable(on_device("pinning of " + std::to_string(nbytes) + " new bytes"),
                   [&] { return std::make_unique<PinnedMemory>(runtime_, nbytes); });
}

std::unique_ptr<Registration> DevicePool::register_host(int64_t address, int64_t nbytes) {
  return refusable(on_device("registration of " + std::to_string(nbytes) + " bytes"),
                   [&] { return std::make_unique<Registration>(runtime_, address, nbytes); });
}

DevicePool::Slot& DevicePool::take_slot(const char* what, int64_t num_pieces, int64_t num_rows) {
  require_usable();
  if (num_pieces > options_.max_pieces || num_rows > options_.max_chunks)
    throw std::invalid_argument(std::string(what) + " of " + std::to_string(num_pieces) + " pieces in " +
                                std::to_string(num_rows) + " rows; this pool was made for " +
                                std::to_string(options_.max_pieces) + " pieces and " +
                                std::to_string(options_.max_chunks) + " rows");
  for (Slot& slot : slots_) {
    if (slot.ticket >= 0) continue;
    slot.num_pieces = num_pieces;
    slot.num_rows = num_rows;
    slot.what = what;
    return slot;
  }
  throw std::invalid_argument("all " + std::to_string(slots_.size()) +
                              " slots of the pool are in use; finish a ticket first");
}

DevicePool::Slot& DevicePool::slot_of(int64_t ticket) {
  for (Slot& slot : slots_)
    if (slot.ticket == ticket && ticket >= 0) return slot;
  throw std::invalid_argument("ticket " + std::to_string(ticket) +
                              " is not one of this pool's, or was finished");
}

// The slot holds work rows, and pieces if they are its own; this fills in the rest and enqueues everything.
int64_t DevicePool::submit(Slot& slot, const Piece* pieces, const Piece* on_gpu, int64_t copy_engine_bytes,
                           bool digest, Stream stream) {
  Work* const work = work_of(slot.host);
  copies_.clear();
  mark_copies(slot, pieces, copy_engine_bytes);
  int64_t num_tiles = 0, num_pieces = 0;
  int64_t src_begin = INT64_MAX, src_end = 0, dst_begin = INT64_MAX, dst_end = 0;
  for (int64_t r = 0; r < slot.num_rows; ++r) {
    work[r].first_tile = num_tiles;
    if (digest || work[r].stores) num_tiles += tiles_of(work[r].nbytes);
    dst_begin = std::min(dst_begin, work[r].dst);
    dst_end = std::max(dst_end, work[r].dst + work[r].nbytes);
    num_pieces += work[r].num_pieces;
    for (const Piece *piece = pieces + work[r].first_piece, *last = piece + work[r].num_pieces; piece != last;
         ++piece) {
      src_begin = std::min(src_begin, piece->src);
      src_end = std::max(src_end, piece->src + piece->nbytes);
    }
  }
  std::ostringstream what;
  what << slot.what << " of " << num_pieces << " pieces from [" << std::hex << std::showbase << src_begin
       << ", " << src_end << ") to [" << dst_begin << ", " << dst_end << ")";
  slot.what = on_device(what.str());
  std::fill_n(sums_of(slot, slot.host), slot.num_rows, 0);
  std::fill_n(sms_of(slot, slot.host), num_sms_, kNoSm);
  const Job job = {on_gpu,
                   work_of(slot.device),
                   sums_of(slot, slot.device),
                   options_.takes_census ? sms_of(slot, slot.device) : nullptr,
                   slot.num_rows,
                   num_tiles};
  try {
    enqueue(slot, job, digest, stream);
  } catch (const DeviceError& error) {
    slot.was_cut_short = true;
    fail(slot.what, error.what());
  }
  slot.ticket = next_ticket_++;
  return slot.ticket;
}

// The copies of a pack, its results too, have a stream of their own, so that the copy engine moves bytes
// while SMs digest them. `stream` itself never waits for a transfer to the host: where all streams share one
// queue (CUDA_DEVICE_MAX_CONNECTIONS=1), training's kernels would stand behind it. A scatter is in order with
// the rest of `stream`, which may be training's and may go on to write what was read.
void DevicePool::enqueue(const Slot& slot, const Job& job, bool digest, Stream stream) {
  const CopyRow table = {address_of(slot.device), address_of(slot.host),
                         table_bytes(slot.num_rows, slot.num_pieces, num_sms_)};
  const CopyRow results = {address_of(sums_of(slot, slot.host)), address_of(job.sums),
                           slot.num_rows * static_cast<int64_t>(sizeof(uint64_t)) +
                               num_sms_ * static_cast<int64_t>(sizeof(uint32_t))};
  const bool launches = job.num_tiles > 0;
  const Stream copy_stream = digest ? copy_stream_ : stream;
  if (options_.is_timed) runtime_->record(slot.begin, stream);
  if (digest && !copies_.empty()) {
    runtime_->record(slot.forked, stream);
    runtime_->wait(copy_stream, slot.forked);
  }
  if (launches) runtime_->copy(&table, 1, stream);  // before the large copies, which may share its engine
  runtime_->copy(copies_.data(), copies_.size(), copy_stream);
  if (launches) runtime_->launch(job, digest, num_sms_, stream);
  if (digest) {
    runtime_->record(slot.launched, stream);
    runtime_->wait(copy_stream, slot.launched);
  }
  if (launches && (digest || options_.takes_census)) runtime_->copy(&results, 1, copy_stream);
  runtime_->record(slot.end, copy_stream);
}

// Finds runs of chunks that a copy engine moves: each filled by one piece, contiguous at source and
// destination.
void DevicePool::mark_copies(const Slot& slot, const Piece* pieces, int64_t min_bytes) {
  if (min_bytes == kNoCopyEngine) return;
  Work* const work = work_of(slot.host);
  const auto is_plain = [&](const Work& row) {
    return row.num_pieces == 1 && row.nbytes > 0 && pieces[row.first_piece].nbytes == row.nbytes;
  };
  for (int64_t begin = 0, end; begin < slot.num_rows; begin = end) {
    end = begin + 1;
    if (!is_plain(work[begin])) continue;
    CopyRow run = {work[begin].dst, pieces[work[begin].first_piece].src, work[begin].nbytes};
    for (; end < slot.num_rows && is_plain(work[end]); ++end) {
      if (work[end].dst != run.dst + run.nbytes || pieces[work[end].first_piece].src != run.src + run.nbytes)
        break;
      run.nbytes += work[end].nbytes;
    }
    if (run.nbytes < min_bytes) continue;
    copies_.push_back(run);
    for (int64_t r = begin; r < end; ++r) work[r].stores = 0;
  }
}

void DevicePool::require_usable() const {
  if (!broken_.empty()) throw DeviceError(broken_);
}

std::string DevicePool::on_device(const std::string& what) const {
  return "rank " + std::to_string(options_.rank) + ": " + what + " on " + runtime_->name();
}

void DevicePool::fail(const std::string& what, const std::string& why) {
  broken_ = what + " failed: " + why;
  throw DeviceError(broken_);
}

}  // namespace moetion
