// SPDX-License-Identifier: Apache-2.0
// Gather and scatter by a GPU: the device's twin of HostPool. Calls enqueue work on a given stream
// and return a ticket; `wait` and `finish` wait for it. No device or pinned memory is taken per call.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../host/table.h"
#include "host_memory.h"
#include "runtime.h"

namespace moetion {

// A chunk of the uploaded pieces; their destinations count from where `at` does.
struct UploadedChunk {
  int64_t dst, nbytes, first_piece, num_pieces, at;
};

// For `copy_engine_bytes`: the kernel moves everything.
constexpr int64_t kNoCopyEngine = INT64_MAX;

using Deadline = std::chrono::steady_clock::time_point;

struct PoolOptions {
  int rank = 0;  // for errors
  int64_t max_pieces = 0, max_chunks = 0;
  int num_slots = 2, num_sms = 4;
  bool is_timed = false;      // for `device_seconds`
  bool takes_census = false;  // for `multiprocessors`
  double last_wait_s = 10;    // of the destructor, for all work that is not done
};

// Thread-safe. All errors name rank, work and device. After the device has failed in something that was
// enqueued the pool is not used again: every later call repeats the error, because memory that enqueued work
// still reads may not be written. Memory that was refused breaks nothing, and work that is late neither: its
// ticket stays open, and its slot taken, until it is finished.
class DevicePool {
 public:
  DevicePool(std::shared_ptr<Runtime> runtime, const PoolOptions& options);
  // Waits for work that is not done. What the device may still write after that is leaked.
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  const std::shared_ptr<Runtime>& runtime() const { return runtime_; }
  int num_sms() const { return num_sms_; }

  // Tables are as HostPool's and may be reused as soon as the call returns; the memory that they point to
  // must stay until `finish`. Each throws std::invalid_argument for a bad table, or where all slots are
  // taken. Runs of whole chunks, contiguous at both ends, of at least `copy_engine_bytes` are moved by a copy
  // engine, on a stream of its own, while the kernel only digests them.
  int64_t pack(Table<Piece> pieces, Table<Chunk> chunks, int64_t copy_engine_bytes, Stream stream);
  // Keeps pieces on the device, so that `pack_uploaded` need not bring them: what is packed again and again
  // changes only where it goes. Replaces the pieces uploaded before. Waits for the upload; throws DeviceLate
  // where that takes longer, and then there are no uploaded pieces.
  void upload_pieces(Table<Piece> pieces, double timeout_s);
  int64_t pack_uploaded(Table<UploadedChunk> chunks, int64_t copy_engine_bytes, Stream stream);
  int64_t scatter(Table<Piece> pieces, int64_t copy_engine_bytes, Stream stream);

  // Waits at most `timeout_s`; whether the work is done. Throws DeviceError where it failed.
  bool wait(int64_t ticket, double timeout_s);
  // Waits as well, and frees the slot; `digests` takes one value for each chunk or span and may be null.
  // Throws DeviceError where the work failed, and DeviceLate where it is not done in time.
  void finish(int64_t ticket, uint64_t* digests, double timeout_s);
  // Rows of the call behind a ticket: how many digests `finish` writes.
  int64_t num_rows(int64_t ticket);
  // On the device, between the begin and the end of a ticket's work. This and the next one throw
  // std::invalid_argument for a pool that was not made for it, and for work that is not done.
  double device_seconds(int64_t ticket);
  // Numbers of the multiprocessors that ran a ticket's kernel, ascending.
  std::vector<uint32_t> multiprocessors(int64_t ticket);

  // What is enqueued on `later` from now on waits for all that is enqueued on `earlier`.
  void order(Stream later, Stream earlier);
  // The same for the work behind a ticket and all that was enqueued on its stream before. A ticket that was
  // finished is not waited for.
  void order_after(Stream later, int64_t ticket);
  // Throws std::invalid_argument, with the row, for a span that is not memory of this device.
  void check_spans_are_here(Table<Span> spans);

  std::unique_ptr<PinnedMemory> pin(int64_t nbytes);
  std::unique_ptr<Registration> register_host(int64_t address, int64_t nbytes);

 private:
  struct Slot {
    int64_t ticket = -1;  // -1: free
    uint8_t* host = nullptr;
    uint8_t* device = nullptr;
    Event begin = 0;                       // of a pool that is timed
    Event forked = 0, copied = 0;          // between the ticket's stream and that of the copies
    Event end = 0;                         // of all work
    bool was_cut_short = false;            // enqueued in part: `end` tells nothing
    int64_t num_rows = 0, num_pieces = 0;  // of the slot's own tables
    std::string what;                      // for errors, with rank and device
  };

  void take_resources();
  void give_back() noexcept;
  Slot& take_slot(const char* what, int64_t num_pieces, int64_t num_rows);
  Slot& slot_of(int64_t ticket);
  // `pieces` is what the rows refer to: the slot's own, or the uploaded ones; once on the host and once on
  // the device.
  int64_t submit(Slot& slot, const Piece* pieces, const Piece* on_gpu, int64_t copy_engine_bytes, bool digest,
                 Stream stream);
  int64_t submit(Slot& slot, int64_t copy_engine_bytes, bool digest, Stream stream) {
    return submit(slot, pieces_of(slot, slot.host), pieces_of(slot, slot.device), copy_engine_bytes, digest,
                  stream);
  }
  void mark_copies(const Slot& slot, const Piece* pieces, int64_t min_bytes);
  void enqueue(const Slot& slot, const Job& job, bool digest, Stream stream);
  Slot& done_slot(int64_t ticket);
  void finish_upload(const std::string& what, double timeout_s);
  bool is_done_by(Event event, Deadline deadline);
  bool is_seen_by(Event event, Deadline deadline) noexcept;  // false where the device fails
  // Breaks the pool where the device fails.
  bool is_done_within(Event event, const std::string& what, double timeout_s);
  void require_usable() const;
  // Runs a check of tables; its errors name the rank.
  template <typename Check>
  void require(const Check& check) const;
  // Names rank and device: `what` of the calls around it is such a text.
  std::string on_device(const std::string& what) const;
  [[noreturn]] void fail(const std::string& what, const std::string& why);
  // Runs a call that breaks nothing where it is refused.
  template <typename Call>
  auto refusable(const std::string& what, const Call& call) const;

  // A slot's table, on the host and on the device alike: work rows, pieces, sums, multiprocessors.
  static Work* work_of(uint8_t* table) { return reinterpret_cast<Work*>(table); }
  static Piece* pieces_of(const Slot& slot, uint8_t* table) {
    return reinterpret_cast<Piece*>(work_of(table) + slot.num_rows);
  }
  static uint64_t* sums_of(const Slot& slot, uint8_t* table) {
    return reinterpret_cast<uint64_t*>(pieces_of(slot, table) + slot.num_pieces);
  }
  static uint32_t* sms_of(const Slot& slot, uint8_t* table) {
    return reinterpret_cast<uint32_t*>(sums_of(slot, table) + slot.num_rows);
  }

  const std::shared_ptr<Runtime> runtime_;
  const PoolOptions options_;
  const int num_sms_;
  std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<CopyRow> copies_;
  std::vector<Chunk> planned_;
  std::vector<Span> targets_;
  Piece* uploaded_ = nullptr;
  Piece* uploaded_on_device_ = nullptr;
  int64_t num_uploaded_ = 0;
  bool upload_is_open_ = false;  // not known to be done
  Event upload_event_ = 0;
  Event order_event_ = 0;
  Stream copy_stream_ = 0;
  int64_t next_ticket_ = 0;
  std::string broken_;
};

}  // namespace moetion
