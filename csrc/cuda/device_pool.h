// SPDX-License-Identifier: Apache-2.0
// Gather, scatter and digest by a GPU: the device's twin of HostPool. Calls enqueue work on a given stream
// and return a ticket; `finish` waits for it. All memory is taken in the constructor, nothing per call.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../host/table.h"
#include "runtime.h"

namespace moetion {

struct PackOptions {
  Op op = Op::kCopy;
  float scale = 1.0f;
  // Runs of whole chunks, contiguous at both ends, of at least so many bytes are moved by a copy engine, and
  // the kernel only digests them. kNever: the kernel moves everything.
  int64_t copy_engine_bytes = kNever;
  static constexpr int64_t kNever = INT64_MAX;
};

// Thread-safe. After a DeviceError the pool is not used again: every later call repeats the error, because
// memory that enqueued work still reads may not be written.
class DevicePool {
 public:
  DevicePool(std::shared_ptr<Runtime> runtime, int rank, int64_t max_pieces, int64_t max_chunks,
             int num_slots, int num_sms);
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  const std::shared_ptr<Runtime>& runtime() const { return runtime_; }
  int num_sms() const { return num_sms_; }
  int num_slots() const { return static_cast<int>(slots_.size()); }

  // Tables are as HostPool's and may be reused as soon as the call returns; the memory that they point to
  // must stay until `finish`. Each throws std::invalid_argument for a bad table, or where all slots are
  // taken.
  int64_t pack(Table<Piece> pieces, Table<Chunk> chunks, const PackOptions& options, Stream stream);
  int64_t scatter(Table<Piece> pieces, int64_t copy_engine_bytes, Stream stream);
  int64_t digest(Table<Span> spans, Stream stream);

  bool is_done(int64_t ticket);
  // Waits at most `timeout_s` and frees the slot; `digests` takes one value for each chunk or span and may be
  // null. Throws DeviceError where the work failed or is not done in time.
  void finish(int64_t ticket, uint64_t* digests, double timeout_s);
  // Rows of the call behind a ticket: how many digests `finish` writes.
  int64_t num_rows(int64_t ticket);

  // What is enqueued on `later` from now on waits for all that `earlier` was given so far.
  void order(Stream later, Stream earlier);
  // Throws std::invalid_argument, with the row, for a span that is not memory of this device.
  void check_spans_are_here(Table<Span> spans);

 private:
  struct Slot {
    int64_t ticket = -1;  // -1: free
    uint8_t* host = nullptr;
    uint8_t* device = nullptr;
    Event event = 0;
    int64_t num_rows = 0;
    const char* what = "";
    int64_t num_pieces = 0, src_begin = 0, src_end = 0, dst_begin = 0, dst_end = 0;
  };

  Slot& take_slot(const char* what, int64_t num_pieces, int64_t num_rows);
  Slot& slot_of(int64_t ticket);
  int64_t submit(Slot& slot, const PackOptions& options, bool digest, Stream stream);
  void mark_copies(const Slot& slot, int64_t min_bytes);
  void require_usable() const;
  [[noreturn]] void fail(const Slot& slot, const std::string& why);

  // A slot's table, on the host and on the device alike: work rows, pieces, sums.
  static Work* work_of(uint8_t* table) { return reinterpret_cast<Work*>(table); }
  static Piece* pieces_of(const Slot& slot, uint8_t* table) {
    return reinterpret_cast<Piece*>(work_of(table) + slot.num_rows);
  }
  static uint64_t* sums_of(const Slot& slot, uint8_t* table) {
    return reinterpret_cast<uint64_t*>(pieces_of(slot, table) + slot.num_pieces);
  }

  const std::shared_ptr<Runtime> runtime_;
  const int rank_;
  const int64_t max_pieces_, max_chunks_;
  const int num_sms_;
  std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<CopyRow> copies_;
  Event order_event_ = 0;
  int64_t next_ticket_ = 0;
  std::string broken_;
};

}  // namespace moetion
