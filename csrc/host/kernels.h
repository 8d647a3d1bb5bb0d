// SPDX-License-Identifier: Apache-2.0
// The inner loops over whole 64-byte lines, once per instruction set.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../segment.h"

namespace moetion {

// A run of whole lines of one chunk.
struct Lines {
  uint8_t* dst;
  const uint8_t* src;  // any alignment
  size_t num_lines;
  uint64_t first_word;  // position in the chunk
  const uint8_t* next;  // what will be read after this run: fetched ahead. Never null, need not be readable
};

// Copies the run and adds its words to `sum`. `digest` does not copy, `copy_stream` does not add.
using LineKernel = void (*)(const Lines& lines, DigestSum& sum);

struct Kernels {
  const char* isa;
  LineKernel digest;
  LineKernel pack;         // ordinary stores, `dst` at any alignment
  LineKernel pack_stream;  // stores that bypass the caches; `dst` must be a multiple of 64
  LineKernel copy_stream;  // the same without the digest: what it costs is the difference
};

// "auto" gives the best this machine can run. Throws std::invalid_argument for an unknown or unavailable one.
const Kernels& kernels_for(const std::string& isa);
std::vector<std::string> available_isas();

// Orders streaming stores before whatever publishes the data. To be called by each thread that stored.
void store_fence();

}  // namespace moetion
