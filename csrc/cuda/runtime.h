// SPDX-License-Identifier: Apache-2.0
// What the device pool needs of a GPU, as an interface: CUDA has it (cuda_runtime.cpp), and so has a model of
// it in this process's memory (model_runtime.cpp), so that everything but the launch runs and is tested
// anywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "warp_pack.h"

namespace moetion {

using Stream = uint64_t;  // a cudaStream_t; 0 is the default stream
using Event = uint64_t;

// A call that the device or its driver refused, with the driver's words.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Work that is not done in the time that its caller allowed. Nothing is broken, and it may be waited for
// again.
struct DeviceLate : DeviceError {
  using DeviceError::DeviceError;
};

struct CopyRow {
  int64_t dst, src, nbytes;
};

// Methods may be called from any thread, while another thread captures a CUDA graph too. They throw
// DeviceError; those that free are noexcept and take null or 0. `launch`, `copy` and `record` only enqueue.
class Runtime {
 public:
  virtual ~Runtime() = default;

  virtual std::string name() const = 0;
  virtual int num_sms() const = 0;
  virtual std::string copy_engine() const = 0;  // which call moves large runs
  virtual std::string pci_bus_id() const = 0;   // as under /sys/bus/pci/devices; empty where there is none

  virtual void* allocate(size_t nbytes) = 0;
  virtual void free(void* memory) noexcept = 0;
  // Host memory that the device reads and writes at the same address.
  virtual void* allocate_pinned(size_t nbytes) = 0;
  virtual void free_pinned(void* memory) noexcept = 0;
  virtual void register_host(void* memory, size_t nbytes) = 0;
  virtual void unregister_host(void* memory) noexcept = 0;
  // Empty if the span is memory of this device, or pinned; else what it is.
  virtual std::string misplaced(int64_t address, int64_t nbytes) = 0;

  // A stream that waits for no other one unless it is told to.
  virtual Stream make_stream() = 0;
  virtual void destroy_stream(Stream stream) noexcept = 0;
  virtual Event make_event(bool is_timed) = 0;
  virtual void destroy_event(Event event) noexcept = 0;
  virtual void record(Event event, Stream stream) = 0;
  virtual bool is_done(Event event) = 0;
  virtual void wait(Stream stream, Event event) = 0;
  // Between two timed events that are done.
  virtual double seconds_between(Event begin, Event end) = 0;

  virtual void copy(const CopyRow* rows, size_t num_rows, Stream stream) = 0;
  virtual void launch(const Job& job, bool digest, int num_sms, Stream stream) = 0;
};

// Throws DeviceError where this build has no CUDA or the machine no such device.
std::unique_ptr<Runtime> make_cuda_runtime(int device);
bool built_with_cuda();

// For "cuda:N" or "model:N"; `fault` and `seed` are the model's (model_runtime.h). Throws
// std::invalid_argument for another device.
std::shared_ptr<Runtime> make_runtime(const std::string& device, const std::string& fault, uint64_t seed);

}  // namespace moetion
