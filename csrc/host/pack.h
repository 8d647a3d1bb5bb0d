// SPDX-License-Identifier: Apache-2.0
// Gather, scatter and digest over host memory. The tables' memory must stay unchanged during a call.
#pragma once

#include <atomic>
#include <string>

#include "../segment.h"
#include "../transform.h"
#include "kernels.h"
#include "table.h"
#include "thread_pool.h"

namespace moetion {

class HostPool {
 public:
  HostPool(int num_threads, const std::string& isa) : kernels_(kernels_for(isa)), threads_(num_threads) {}

  const char* isa() const { return kernels_.isa; }
  int num_threads() const { return threads_.num_threads(); }

  // Fills each chunk from its pieces, zeros between them, and writes one digest per chunk. False when
  // `cancel` was seen set before the last slice: chunks and digests are then garbage. Every method throws
  // std::invalid_argument, before any byte moves, that names the row at fault. `op` other than kCopy turns
  // fp32 elements into what it says, times `scale`; a piece's nbytes counts what is written.
  bool pack(Table<Piece> pieces, Table<Chunk> chunks, uint64_t* digests, const std::atomic<bool>* cancel,
            Op op = Op::kCopy, float scale = 1.0f);

  // One digest for each span, without a copy.
  void digest(Table<Span> spans, uint64_t* digests);

  // Copies each piece; destinations must not overlap.
  void scatter(Table<Piece> pieces);

  // What `pack` moves, by memcpy or by streaming stores alone: the benchmark's baseline. Gaps stay as they
  // are.
  void copy(Table<Piece> pieces, Table<Chunk> chunks, bool streaming);

  // Makes every page of the span present and writable; its contents stay, also under concurrent writers.
  void prefault(Span span);

 private:
  const Kernels& kernels_;
  ThreadPool threads_;
};

}  // namespace moetion
