// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "validate.h"

namespace moetion {
namespace {

// One task: enough bytes to hide a wake-up, few enough to balance threads and to cancel soon. Whole lines.
constexpr int64_t kSliceBytes = 256 << 10;

// Streaming stores leave the caches to training; below this a call's bytes are better read back from them.
constexpr int64_t kStreamMinBytes = 1 << 20;

alignas(kLineBytes) constexpr uint8_t kZeros[4096] = {};

uint8_t* pointer(int64_t address) {
  return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(address));
}

void no_op() {}

// Row r has slices [first[r], first[r + 1]).
class Slices {
 public:
  template <typename Row>
  explicit Slices(Table<Row> table) : first_(1, 0) {
    first_.reserve(static_cast<size_t>(table.num_rows) + 1);
    for (int64_t r = 0; r < table.num_rows; ++r) {
      num_bytes_ += table.rows[r].nbytes;
      first_.push_back(first_.back() + (table.rows[r].nbytes + kSliceBytes - 1) / kSliceBytes);
    }
  }
  int64_t count() const { return first_.back(); }
  int64_t num_bytes() const { return num_bytes_; }
  // The row that a slice belongs to, and where in that row it begins.
  std::pair<int64_t, int64_t> locate(int64_t slice) const {
    const auto next = std::upper_bound(first_.begin(), first_.end(), slice);
    return {next - first_.begin() - 1, (slice - *(next - 1)) * kSliceBytes};
  }

 private:
  std::vector<int64_t> first_;
  int64_t num_bytes_ = 0;
};

// The first piece of a chunk that ends after `address`.
const Piece* first_piece_after(const Piece* first, const Piece* last, int64_t address) {
  return std::partition_point(first, last, [&](const Piece& p) { return p.dst + p.nbytes <= address; });
}

// One line, or the chunk's last few bytes, put together from parts of pieces and zeros.
void pack_mixed_line(const Piece* piece, const Piece* last, int64_t at, int64_t nbytes, uint64_t first_word,
                     DigestSum& sum) {
  uint64_t line[kLineWords] = {};
  for (; piece != last && piece->dst < at + nbytes; ++piece) {
    const int64_t begin = std::max(at, piece->dst), end = std::min(at + nbytes, piece->dst + piece->nbytes);
    if (begin < end)
      std::memcpy(reinterpret_cast<uint8_t*>(line) + (begin - at), pointer(piece->src) + (begin - piece->dst),
                  static_cast<size_t>(end - begin));
  }
  for (int64_t i = 0; i * kWordBytes < nbytes; ++i)
    sum.add(line[i], digest_position(first_word + static_cast<uint64_t>(i)));
  std::memcpy(pointer(at), line, static_cast<size_t>(nbytes));
}

// Fills addresses [at, end) of a chunk: whole lines straight from a piece or from zeros, others by parts.
DigestSum pack_slice(const Chunk& chunk, const Piece* pieces, int64_t at, int64_t end, const Kernels& kernels,
                     bool streaming) {
  const LineKernel kernel = streaming && chunk.dst % kLineBytes == 0 ? kernels.pack_stream : kernels.pack;
  const Piece* const last = pieces + chunk.first_piece + chunk.num_pieces;
  const Piece* piece = first_piece_after(pieces + chunk.first_piece, last, at);
  DigestSum sum;
  while (at < end) {
    while (piece != last && piece->dst + piece->nbytes <= at) ++piece;
    const uint64_t first_word = static_cast<uint64_t>(at - chunk.dst) / kWordBytes;
    const uint8_t* src = kZeros;
    const uint8_t* next = kZeros;
    int64_t nbytes = std::min<int64_t>(end - at, sizeof(kZeros));
    if (piece != last && piece->dst <= at) {
      src = pointer(piece->src) + (at - piece->dst);
      nbytes = std::min(end, piece->dst + piece->nbytes) - at;
      if (piece + 1 != last) next = pointer(piece[1].src);
    } else if (piece != last) {
      nbytes = std::min(nbytes, piece->dst - at);
    }
    if (nbytes >= kLineBytes) {
      nbytes -= nbytes % kLineBytes;
      kernel({pointer(at), src, static_cast<size_t>(nbytes / kLineBytes), first_word, next}, sum);
    } else {
      nbytes = std::min(kLineBytes, end - at);
      pack_mixed_line(piece, last, at, nbytes, first_word, sum);
    }
    at += nbytes;
  }
  return sum;
}

DigestSum digest_slice(const uint8_t* bytes, int64_t nbytes, uint64_t first_word, const Kernels& kernels) {
  DigestSum sum;
  const int64_t whole = nbytes - nbytes % kLineBytes;
  kernels.digest({nullptr, bytes, static_cast<size_t>(whole / kLineBytes), first_word, kZeros}, sum);
  for (int64_t at = whole; at < nbytes; at += kWordBytes) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, static_cast<size_t>(std::min(kWordBytes, nbytes - at)));
    sum.add(word, digest_position(first_word + static_cast<uint64_t>(at / kWordBytes)));
  }
  return sum;
}

void copy_bytes(uint8_t* dst, const uint8_t* src, int64_t nbytes, const uint8_t* next, LineKernel stream) {
  if (stream) {
    const int64_t misalignment = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kLineBytes);
    const int64_t head = std::min(nbytes, (kLineBytes - misalignment) % kLineBytes);
    std::memcpy(dst, src, static_cast<size_t>(head));
    const int64_t whole = (nbytes - head) / kLineBytes * kLineBytes;
    DigestSum unused;
    stream({dst + head, src + head, static_cast<size_t>(whole / kLineBytes), 0, next}, unused);
    dst += head + whole, src += head + whole, nbytes -= head + whole;
  }
  std::memcpy(dst, src, static_cast<size_t>(nbytes));
}

// Slices add their sums to the chunk's digest in any order; this turns the sums into digests.
template <typename Row>
void finish(Table<Row> table, uint64_t* digests) {
  for (int64_t r = 0; r < table.num_rows; ++r)
    digests[r] = digest_finish(digests[r], static_cast<uint64_t>(table.rows[r].nbytes));
}

}  // namespace

bool HostPool::pack(Table<Piece> pieces, Table<Chunk> chunks, uint64_t* digests,
                    const std::atomic<bool>* cancel) {
  check_pack(pieces, chunks);
  const Slices slices(chunks);
  const bool streaming = slices.num_bytes() >= kStreamMinBytes;
  std::atomic<bool> cancelled{false};
  std::fill_n(digests, chunks.num_rows, 0);
  threads_.run(
      slices.count(),
      [&](int64_t slice) {
        if (cancel && cancel->load(std::memory_order_relaxed)) {
          cancelled.store(true, std::memory_order_relaxed);
          return;
        }
        const auto [row, offset] = slices.locate(slice);
        const Chunk& chunk = chunks.rows[row];
        const int64_t at = chunk.dst + offset, end = chunk.dst + std::min(offset + kSliceBytes, chunk.nbytes);
        const DigestSum sum = pack_slice(chunk, pieces.rows, at, end, kernels_, streaming);
        __atomic_fetch_add(&digests[row], sum.value(), __ATOMIC_RELAXED);
      },
      store_fence);
  finish(chunks, digests);
  return !cancelled.load(std::memory_order_relaxed);
}

void HostPool::digest(Table<Span> spans, uint64_t* digests) {
  check_spans(spans);
  const Slices slices(spans);
  std::fill_n(digests, spans.num_rows, 0);
  threads_.run(
      slices.count(),
      [&](int64_t slice) {
        const auto [row, offset] = slices.locate(slice);
        const Span& span = spans.rows[row];
        const DigestSum sum =
            digest_slice(pointer(span.address) + offset, std::min(kSliceBytes, span.nbytes - offset),
                         static_cast<uint64_t>(offset / kWordBytes), kernels_);
        __atomic_fetch_add(&digests[row], sum.value(), __ATOMIC_RELAXED);
      },
      no_op);
  finish(spans, digests);
}

void HostPool::scatter(Table<Piece> pieces) {
  check_scatter(pieces);
  const Slices slices(pieces);
  threads_.run(
      slices.count(),
      [&](int64_t slice) {
        const auto [row, offset] = slices.locate(slice);
        const Piece& piece = pieces.rows[row];
        std::memcpy(pointer(piece.dst) + offset, pointer(piece.src) + offset,
                    static_cast<size_t>(std::min(kSliceBytes, piece.nbytes - offset)));
      },
      no_op);
}

void HostPool::copy(Table<Piece> pieces, Table<Chunk> chunks, bool streaming) {
  check_pack(pieces, chunks);
  const Slices slices(chunks);
  const LineKernel stream = streaming ? kernels_.copy_stream : nullptr;
  threads_.run(
      slices.count(),
      [&](int64_t slice) {
        const auto [row, offset] = slices.locate(slice);
        const Chunk& chunk = chunks.rows[row];
        const int64_t at = chunk.dst + offset, end = std::min(at + kSliceBytes, chunk.dst + chunk.nbytes);
        const Piece* const last = pieces.rows + chunk.first_piece + chunk.num_pieces;
        for (const Piece* piece = first_piece_after(pieces.rows + chunk.first_piece, last, at);
             piece != last && piece->dst < end; ++piece) {
          const int64_t from = std::max(at, piece->dst), to = std::min(end, piece->dst + piece->nbytes);
          const uint8_t* const next = piece + 1 != last ? pointer(piece[1].src) : kZeros;
          if (from < to)
            copy_bytes(pointer(from), pointer(piece->src) + (from - piece->dst), to - from, next, stream);
        }
      },
      store_fence);
}

}  // namespace moetion
