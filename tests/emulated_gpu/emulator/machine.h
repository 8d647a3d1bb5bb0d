// SPDX-License-Identifier: Apache-2.0
// The emulated machine behind the emulated CUDA runtime: devices, memory, streams, events, and faults to
// order.
//
// Nothing that is enqueued happens before somebody asks for an event, a stream or memory. Then some of it
// happens, in one of the orders that streams and events allow; the seed chooses which.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "grid.h"

namespace emulator {

constexpr int kNumDevices = 2;
constexpr int kNumSms = 132;  // of each device

enum class Place { kDevice, kPinned, kRegistered };

struct Block {
  uint64_t end;
  Place place;
  int device;
};

struct Event {
  int device;
  bool is_timed;
  size_t mark = 0;  // of its last record
  double reached_at_s = 0;
};

// There is one, as there is one driver. Callers hold `mutex` and call nothing else that does.
class Machine {
 public:
  static Machine& get();

  std::mutex mutex;

  // -- what every call of the runtime does
  // The error that the call returns at once, or cudaSuccess. Notes a call from a thread that set no device,
  // and a capture of a graph that the call ends.
  cudaError_t enter(const std::string& call);
  cudaError_t set_device(int device);
  int device() const;  // of this thread
  cudaError_t remember(cudaError_t error);
  cudaError_t take_last_error();
  cudaStreamCaptureMode exchange_capture_mode(cudaStreamCaptureMode mode);

  // -- memory
  uint64_t allocate(uint64_t nbytes, Place place, int device);
  cudaError_t free(uint64_t address, Place place);
  cudaError_t register_memory(uint64_t address, uint64_t nbytes);
  cudaError_t unregister_memory(uint64_t address);
  // The block that holds the whole span; null where none does.
  const Block* find(Span span) const;

  // -- streams and events
  uint64_t make_stream(int device);
  cudaError_t destroy_stream(uint64_t stream);
  cudaError_t enqueue(uint64_t stream, std::function<cudaError_t()> work);
  Event* make_event(bool is_timed);
  cudaError_t destroy_event(Event* event);
  cudaError_t record(Event* event, uint64_t stream);
  cudaError_t wait(uint64_t stream, Event* event);
  cudaError_t query(Event* event);
  cudaError_t elapsed_ms(Event* begin, Event* end, float* milliseconds);
  cudaError_t copy(uint64_t stream, uint64_t dst, uint64_t src, uint64_t nbytes);
  cudaError_t launch(uint64_t stream, const Launch& launch);
  // 0 to n - 1, shuffled.
  std::vector<size_t> any_order(size_t n);
  // Does all that is enqueued on a stream, and what it waits for; false where it cannot be done.
  bool drain(uint64_t stream);

  // -- controls of tests
  // Forgets all work, faults, violations and counts. Memory, streams and events stay.
  void reset(unsigned seed);
  void choose_kernels(const std::string& variant) { variant_ = variant; }
  const std::string& variant() const { return variant_; }
  // The n-th call from now on, and those after it, return an error; n is 1 at least.
  void fail_call(const std::string& call, int64_t nth, cudaError_t error);
  // The n-th kernel from now on fails while it runs, and after it every call.
  void fail_kernel(int64_t nth) { failing_kernel_ = num_kernels_ + nth; }
  // The n-th wait of a stream for an event, from now on, does nothing.
  void skip_wait(int64_t nth) { skipped_wait_ = num_calls_["cudaStreamWaitEvent"] + nth; }
  void stall(bool is_stalled) { is_stalled_ = is_stalled; }
  void begin_capture() { is_capturing_ = is_capture_valid_ = true; }
  bool end_capture();
  const std::vector<std::string>& violations() const { return violations_; }
  void violate(const std::string& what) { violations_.push_back(what); }

 private:
  struct Task {
    std::function<cudaError_t()> run;
    size_t after_mark = 0;  // runs when this mark was reached
  };
  struct Stream {
    int device;
    bool is_destroyed = false;
    std::deque<Task> tasks;
  };
  struct Fault {
    int64_t from;
    cudaError_t error;
  };

  Machine();
  Stream* find_stream(uint64_t stream);
  bool is_usable(const Event* event, const char* call);
  bool step(const std::vector<Stream*>& order);
  std::vector<Stream*> shuffled_streams();
  // False where nothing more can be done; with `may_stop`, also at any moment.
  bool run_until(const std::function<bool()>& is_over, bool may_stop);
  cudaError_t run_kernel(const Launch& launch, int device);

  std::mt19937 random_;
  std::map<uint64_t, Stream> streams_;
  uint64_t next_stream_ = 0x1000;
  std::map<Event*, std::shared_ptr<Event>> events_;
  std::vector<bool> reached_;  // by mark, one for each record of an event; mark 0 was reached
  std::map<uint64_t, Block> blocks_;
  std::map<std::string, int64_t> num_calls_;
  std::map<std::string, Fault> faults_;
  int64_t num_kernels_ = 0, failing_kernel_ = 0, skipped_wait_ = 0;
  cudaError_t sticky_ = cudaSuccess;
  bool is_stalled_ = false, is_capturing_ = false, is_capture_valid_ = false;
  std::string variant_ = "compute_90";
  std::vector<std::string> violations_;
};

}  // namespace emulator
