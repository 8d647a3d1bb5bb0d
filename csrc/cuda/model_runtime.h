// SPDX-License-Identifier: Apache-2.0
// A device for tests: this process's memory is its memory, and its streams are queues.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#include "runtime.h"

namespace moetion {

// With `seed` 0 all that is enqueued happens at once. With another one it stays in its stream's queue until
// somebody asks for an event or a stream. Then some of it happens, in one of the orders that streams and
// events allow; the seed chooses which. So a dependency between streams that was forgotten gives wrong bytes
// for some seed.
//
// `fault` is "" or "NAME" or "NAME:N", where N counts from 1, which is also the default:
//   register  host memory is not registered
//   memory    the N-th allocation and all after it are refused
//   launch    the N-th launch and all after it are refused
//   copy      the N-th call that copies, and all after it, are refused
//   wait      a stream cannot be made to wait, from the N-th time on
//   no-wait   a stream that is made to wait for the N-th time does not wait, and nobody is told
//   sticky    the N-th call of all of these and of events, and all after it, are refused
//   late      nothing happens before the event was asked for N times that somebody waits for (default: 200)
//   gate      a launch does not return before the first byte that it reads is not zero
//
// Ends the process where memory is given back that work still to be done would read or write.
class ModelRuntime final : public Runtime {
 public:
  // Throws std::invalid_argument for another fault.
  ModelRuntime(const std::string& fault, uint64_t seed);
  ~ModelRuntime() override;

  std::string name() const override { return "model"; }
  int num_sms() const override { return 4; }
  std::string copy_engine() const override { return "memcpy"; }
  std::string pci_bus_id() const override { return ""; }

  void* allocate(size_t nbytes) override;
  void free(void* memory) noexcept override;
  void* allocate_pinned(size_t nbytes) override { return allocate(nbytes); }
  void free_pinned(void* memory) noexcept override { free(memory); }
  void register_host(void* memory, size_t nbytes) override;
  void unregister_host(void*) noexcept override {}
  std::string misplaced(int64_t, int64_t) override;

  Stream make_stream() override;
  void destroy_stream(Stream) noexcept override {}
  Event make_event(bool is_timed) override;
  void destroy_event(Event) noexcept override {}
  void record(Event event, Stream stream) override;
  bool is_done(Event event) override;
  void wait(Stream stream, Event event) override;
  double seconds_between(Event begin, Event end) override;

  void copy(const CopyRow* rows, size_t num_rows, Stream stream) override;
  void launch(const Job& job, bool digest, int num_sms, Stream stream) override;

  // What training enqueues on its streams: bytes that change to `value`.
  void fill(Stream stream, int64_t address, uint8_t value, int64_t nbytes);
  // Returns when all that is enqueued on the stream has happened.
  void sync(Stream stream);

 private:
  struct Block {
    int64_t address, nbytes;
  };
  struct Task {
    std::function<void()> run;
    std::vector<Block> memory{};  // what `run` reads or writes, as far as it is known
    int64_t after_mark = 0;       // runs when this mark was reached
  };
  struct EventState {
    int64_t mark = 0;  // of its last record
    int64_t questions = 0;
    double reached_at_s = 0;
  };

  // Counts a call, and throws where it is the fault's turn.
  void count(const std::string& kind, const std::string& call, const std::string& error);
  void enqueue(Stream stream, Task task);
  std::vector<Stream> shuffled_streams();
  // Does the next task of the first of these streams that need not wait; false if all wait or have none.
  bool step(const std::vector<Stream>& order);
  // False where it stopped on its way, which it may only do with `may_stop`, or where nothing can be done.
  template <typename Condition>
  bool run_until(const Condition& is_over, bool may_stop);

  std::string fault_;
  int64_t fault_from_ = 1;
  const bool is_lazy_;

  std::mutex mutex_;  // of all below
  std::mt19937_64 random_;
  std::map<std::string, int64_t> num_calls_;
  std::map<Stream, std::deque<Task>> queues_;
  Stream num_streams_ = 0;
  std::vector<EventState> events_;
  std::vector<bool> reached_;  // by mark, one for each record of an event; mark 0 was reached
  std::map<void*, size_t> memory_;
};

}  // namespace moetion
