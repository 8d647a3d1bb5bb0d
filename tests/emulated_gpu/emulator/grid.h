// SPDX-License-Identifier: Apache-2.0
// Runs a launch of a kernel: warp by warp in any order, the lanes of a warp as fibers that meet at shuffles.
#pragma once

#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/warp_pack.h"
#include "lane.h"

namespace emulator {

// What a real device reports as an illegal or a misaligned address; for the kernel it is the end.
struct IllegalAccess : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Span {
  uint64_t begin, end;
};

struct Launch {
  const Kernel* kernel;
  unsigned num_blocks, num_threads;
  moetion::Job job;
};

// What one launch may read and write: its tables, and the bytes that its pieces and rows name. Stricter than
// a device, which knows allocations only.
class JobMemory {
 public:
  // `is_on_device` tells whether the device sees all of a span. Throws IllegalAccess for one that it does
  // not.
  JobMemory(const Launch& launch, const std::function<bool(Span)>& is_on_device);

  bool allows(uint64_t address, uint64_t nbytes, Access access);

 private:
  void add(std::vector<Span>& to, const void* begin, int64_t nbytes, const char* what);

  const std::function<bool(Span)>& is_on_device_;
  std::vector<Span> reads_, writes_;
  size_t last_read_ = 0, last_written_ = 0;  // where the last access fell: so does the next, mostly
};

// Throws IllegalAccess. One block lies on each of the device's SMs, or more where there are more blocks.
void run_grid(const Launch& launch, int num_sms, JobMemory& memory, std::mt19937& random);

}  // namespace emulator
