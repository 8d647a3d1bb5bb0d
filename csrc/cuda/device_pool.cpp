// SPDX-License-Identifier: Apache-2.0
#include "device_pool.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <thread>
#include <utility>

#include "../host/validate.h"

namespace moetion {
namespace {

constexpr double kLastWaitSeconds = 10;  // of the destructor, for tickets that are still open

int64_t table_bytes(int64_t num_rows, int64_t num_pieces) {
  return num_rows * static_cast<int64_t>(sizeof(Work) + sizeof(uint64_t)) +
         num_pieces * static_cast<int64_t>(sizeof(Piece));
}

int64_t address_of(const void* memory) {
  return reinterpret_cast<int64_t>(memory);
}

}  // namespace

template <typename Check>
void DevicePool::require(const Check& check) const {
  try {
    check();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("rank " + std::to_string(rank_) + ": " + error.what());
  }
}

DevicePool::DevicePool(std::shared_ptr<Runtime> runtime, int rank, int64_t max_pieces, int64_t max_chunks,
                       int num_slots, int num_sms)
    : runtime_(std::move(runtime)),
      rank_(rank),
      max_pieces_(max_pieces),
      max_chunks_(max_chunks),
      num_sms_(std::min(num_sms, runtime_->num_sms())) {
  if (max_pieces < 0 || max_chunks < 0 || num_slots < 1 || num_slots > 64 || num_sms < 1)
    throw std::invalid_argument(
        "max_pieces=" + std::to_string(max_pieces) + ", max_chunks=" + std::to_string(max_chunks) +
        ", num_slots=" + std::to_string(num_slots) + ", num_sms=" + std::to_string(num_sms) +
        "; sizes must not be negative, slots in 1..64, SMs at least 1");
  const auto nbytes = static_cast<size_t>(std::max<int64_t>(table_bytes(max_chunks, max_pieces), 64));
  order_event_ = runtime_->make_event();
  slots_.resize(static_cast<size_t>(num_slots));
  for (Slot& slot : slots_) {
    slot.host = static_cast<uint8_t*>(runtime_->allocate_pinned(nbytes));
    slot.device = static_cast<uint8_t*>(runtime_->allocate(nbytes));
    slot.event = runtime_->make_event();
  }
  copies_.reserve(static_cast<size_t>(max_chunks));
  planned_.reserve(static_cast<size_t>(max_chunks));
  targets_.reserve(static_cast<size_t>(max_chunks));
}

DevicePool::~DevicePool() {
  for (Slot& slot : slots_) {
    try {
      if (slot.ticket >= 0) finish(slot.ticket, nullptr, kLastWaitSeconds);
    } catch (const std::exception&) {  // a broken device was reported before
    }
    runtime_->destroy_event(slot.event);
    runtime_->free(slot.device);
    runtime_->free_pinned(slot.host);
  }
  runtime_->free(uploaded_on_device_);
  runtime_->free_pinned(uploaded_);
  runtime_->destroy_event(order_event_);
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

void DevicePool::upload_pieces(Table<Piece> pieces) {
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  for (const Slot& slot : slots_)
    if (slot.ticket >= 0) throw std::invalid_argument("finish all tickets before other pieces are uploaded");
  const auto nbytes = static_cast<size_t>(pieces.num_rows) * sizeof(Piece);
  runtime_->free(std::exchange(uploaded_on_device_, nullptr));
  runtime_->free_pinned(std::exchange(uploaded_, nullptr));
  num_uploaded_ = 0;
  if (nbytes == 0) return;
  uploaded_ = static_cast<Piece*>(runtime_->allocate_pinned(nbytes));
  uploaded_on_device_ = static_cast<Piece*>(runtime_->allocate(nbytes));
  std::copy_n(pieces.rows, pieces.num_rows, uploaded_);
  const CopyRow upload = {address_of(uploaded_on_device_), address_of(uploaded_),
                          static_cast<int64_t>(nbytes)};
  const std::string what = "upload of " + std::to_string(pieces.num_rows) + " pieces";
  try {
    runtime_->copy(&upload, 1, 0);
    runtime_->record(order_event_, 0);
    if (!is_done_within(order_event_, kLastWaitSeconds)) throw DeviceError("not done in time");
  } catch (const DeviceError& error) {
    fail(what, error.what());
  }
  num_uploaded_ = pieces.num_rows;
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
  Event event = 0;
  std::string what;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    require_usable();
    const Slot& slot = slot_of(ticket);
    event = slot.event;
    what = slot.what;
  }
  try {
    return is_done_within(event, timeout_s);  // without the lock: others may enqueue meanwhile
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
  if (!is_done) {
    std::ostringstream text;
    text << "rank " << rank_ << ": " << slot.what << " on " << runtime_->name() << " is not done after "
         << timeout_s << " s";
    throw DeviceError(text.str());
  }
  const Work* const work = work_of(slot.host);
  const uint64_t* const sums = sums_of(slot, slot.host);
  if (digests != nullptr)
    for (int64_t r = 0; r < slot.num_rows; ++r)
      digests[r] = digest_finish(sums[r], static_cast<uint64_t>(work[r].nbytes));
  slot.ticket = -1;
}

bool DevicePool::is_done_within(Event event, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration<double>(timeout_s);
  auto pause = std::chrono::microseconds(20);
  while (!runtime_->is_done(event)) {
    if (Clock::now() >= deadline) return false;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::microseconds(200));
  }
  return true;
}

void DevicePool::order(Stream later, Stream earlier) {
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  runtime_->record(order_event_, earlier);
  runtime_->wait(later, order_event_);
}

void DevicePool::order_after(Stream later, int64_t ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  require_usable();
  for (const Slot& slot : slots_) {
    if (slot.ticket != ticket) continue;
    try {
      runtime_->wait(later, slot.event);
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
    const std::string found = runtime_->misplaced(span.address, span.nbytes);
    if (found.empty()) continue;
    std::ostringstream text;
    text << "span " << s << ": [" << std::hex << std::showbase << span.address << ", "
         << span.address + span.nbytes << ") is " << found << " and not memory of " << runtime_->name();
    throw std::invalid_argument(text.str());
  }
}

DevicePool::Slot& DevicePool::take_slot(const char* what, int64_t num_pieces, int64_t num_rows) {
  require_usable();
  if (num_pieces > max_pieces_ || num_rows > max_chunks_)
    throw std::invalid_argument(std::string(what) + " of " + std::to_string(num_pieces) + " pieces in " +
                                std::to_string(num_rows) + " rows; this pool was made for " +
                                std::to_string(max_pieces_) + " pieces and " + std::to_string(max_chunks_) +
                                " rows");
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
int64_t DevicePool::submit(Slot& slot, const Piece* pieces, const Piece* on_device, int64_t copy_engine_bytes,
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
  slot.what = what.str();
  std::fill_n(sums_of(slot, slot.host), slot.num_rows, 0);
  const Job job = {on_device, work_of(slot.device), sums_of(slot, slot.device), slot.num_rows, num_tiles};
  const CopyRow table = {address_of(slot.device), address_of(slot.host),
                         table_bytes(slot.num_rows, slot.num_pieces)};
  const CopyRow sums = {address_of(sums_of(slot, slot.host)), address_of(job.sums),
                        slot.num_rows * static_cast<int64_t>(sizeof(uint64_t))};
  try {
    if (num_tiles > 0) {
      runtime_->copy(&table, 1, stream);
      runtime_->launch(job, digest, num_sms_, stream);
    }
    runtime_->copy(copies_.data(), copies_.size(), stream);
    if (num_tiles > 0 && digest) runtime_->copy(&sums, 1, stream);
    runtime_->record(slot.event, stream);
  } catch (const DeviceError& error) {
    fail(slot.what, error.what());
  }
  slot.ticket = next_ticket_++;
  return slot.ticket;
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

void DevicePool::fail(const std::string& what, const std::string& why) {
  broken_ = "rank " + std::to_string(rank_) + ": " + what + " on " + runtime_->name() + " failed: " + why;
  throw DeviceError(broken_);
}

}  // namespace moetion
