// SPDX-License-Identifier: Apache-2.0
// Gather, scatter and digest over host memory. The tables' memory must stay unchanged during a call.
#pragma once

#include <atomic>
#include <string>

#include "../segment.h"
#include "kernels.h"
#include "table.h"
#include "thread_pool.h"

namespace moetion {

class HostPool {
 public:
  HostPool(int num_threads, const std::string& isa) : kernels_(kernels_for(isa)), threads_(num_threads) {}

  const char* isa() const { return kernels_.isa; }

  // Fills each chunk from its pieces, zeros between them, and writes one digest per chunk. False when
  // `cancel` was seen set before the last slice: chunks and digests are then garbage. Every method throws
  // std::invalid_argument, before any byte moves, that names the row at fault.
  bool pack(Table<Piece> pieces, Table<Chunk> chunks, uint64_t* digests, const std::atomic<bool>* cancel);

  // One digest for each span, without a copy.
  void digest(Table<Span> spans, uint64_t* digests);

  // Copies each piece; destinations must not overlap.
  void scatter(Table<Piece> pieces);

  // What `pack` moves, by memcpy or by streaming stores alone: the baseline that says what the digest costs
  // (benchmarks/host_pack.py). Gaps stay as they are.
  void copy(Table<Piece> pieces, Table<Chunk> chunks, bool streaming);

 private:
  const Kernels& kernels_;
  ThreadPool threads_;
};

}  // namespace moetion
