// SPDX-License-Identifier: Apache-2.0
// Owners of host memory that the device reads and writes.
#pragma once

#include <memory>

#include "runtime.h"

namespace moetion {

// New pinned memory. Ends with the object; the runtime stays as long.
class PinnedMemory {
 public:
  // Throws std::invalid_argument unless `nbytes` is positive, and DeviceError where the driver refuses.
  PinnedMemory(std::shared_ptr<Runtime> runtime, int64_t nbytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(memory_); }

 private:
  const std::shared_ptr<Runtime> runtime_;
  void* const memory_;
};

// Memory that exists already, pinned until `close`. Throws DeviceError where the driver refuses.
class Registration {
 public:
  Registration(std::shared_ptr<Runtime> runtime, int64_t address, int64_t nbytes);
  ~Registration();
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  void close();

 private:
  const std::shared_ptr<Runtime> runtime_;
  void* memory_;
};

}  // namespace moetion
