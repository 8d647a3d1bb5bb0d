// SPDX-License-Identifier: Apache-2.0
// How one warp fills one tile. The kernel (kernels.cu) and its model on the host (model_runtime.cpp) run this
// same code; all that differs is who the lanes are: on the device 32 threads, on the host one loop over 32.
//
// Work is split by destination bytes: a chunk is cut into tiles of kTileBytes, tile t of all chunks belongs
// to warp t modulo the number of warps (counted across blocks first), and a warp finds its chunk and its
// first piece by binary search. So one huge segment and ten thousand tiny ones give every warp the same
// number of bytes.
#pragma once

#include <cstring>

#include "../segment.h"

namespace moetion {

constexpr int kWarpLanes = 32;
constexpr int64_t kVectorBytes = 16;                         // one lane's part of a row
constexpr int64_t kRowBytes = kWarpLanes * kVectorBytes;     // what a warp stores with one instruction
constexpr int64_t kRowsAtOnce = 4;                           // loads in flight on each lane
constexpr int64_t kTileBytes = 4 * kRowsAtOnce * kRowBytes;  // 8 KiB: one atomic addition for each digest

// A chunk, and what the kernel must know beyond it.
struct Work {
  int64_t dst, nbytes, first_piece, num_pieces;
  int64_t at;  // where the chunk begins as its pieces count: their dst. The address, or a place in a plan
  int64_t first_tile;  // number of tiles of all rows before this one
  int64_t stores;      // 0: only digested, a copy engine moves the bytes
};

// One launch. `sums` holds one value for each row of `work`, zero at first. Block b writes the number of its
// multiprocessor to `sms[b]`, unless `sms` is null.
struct Job {
  const Piece* pieces;
  const Work* work;
  uint64_t* sums;
  uint32_t* sms;
  int64_t num_rows, num_tiles;
};

// Blocks of a launch: one on each multiprocessor.
MOETION_HD int64_t blocks_of(int64_t num_tiles, int64_t num_sms) {
  return num_tiles < num_sms ? num_tiles : num_sms;
}

MOETION_HD int64_t tiles_of(int64_t nbytes) {
  return (nbytes + kTileBytes - 1) / kTileBytes;
}

struct alignas(kVectorBytes) Vector {
  uint64_t words[2];
};

template <typename Unit>
MOETION_HD Unit load_unit(const uint8_t* src) {
#if defined(__CUDA_ARCH__)
  return __ldcs(reinterpret_cast<const Unit*>(src));  // read once: first to leave the caches
#else
  Unit unit;
  memcpy(&unit, src, sizeof(unit));
  return unit;
#endif
}

template <typename Unit>
MOETION_HD void store_unit(uint8_t* dst, Unit unit) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<Unit*>(dst), unit);
#else
  memcpy(dst, &unit, sizeof(unit));
#endif
}

// Vectors whole, as the 16-byte instructions want them.
template <>
MOETION_HD Vector load_unit<Vector>(const uint8_t* src) {
#if defined(__CUDA_ARCH__)
  const ulonglong2 pair = __ldcs(reinterpret_cast<const ulonglong2*>(src));
  return {{pair.x, pair.y}};
#else
  Vector vector;
  memcpy(&vector, src, sizeof(vector));
  return vector;
#endif
}

template <>
MOETION_HD void store_unit<Vector>(uint8_t* dst, Vector vector) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<ulonglong2*>(dst), make_ulonglong2(vector.words[0], vector.words[1]));
#else
  memcpy(dst, &vector, sizeof(vector));
#endif
}

template <typename Unit>
MOETION_HD Vector load_by(const uint8_t* src) {
  Vector vector;
  Unit units[kVectorBytes / sizeof(Unit)];
  for (size_t i = 0; i < kVectorBytes / sizeof(Unit); ++i) units[i] = load_unit<Unit>(src + i * sizeof(Unit));
  memcpy(&vector, units, sizeof(vector));
  return vector;
}

template <typename Unit>
MOETION_HD void store_by(uint8_t* dst, const Vector& vector) {
  Unit units[kVectorBytes / sizeof(Unit)];
  memcpy(units, &vector, sizeof(vector));
  for (size_t i = 0; i < kVectorBytes / sizeof(Unit); ++i) store_unit<Unit>(dst + i * sizeof(Unit), units[i]);
}

// 16 bytes by the widest access that the address allows; all lanes of a row share its alignment.
MOETION_HD Vector load_vector(const uint8_t* src) {
  const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(src)) % kVectorBytes;
  if (low == 0) return load_unit<Vector>(src);
  if (low % 8 == 0) return load_by<uint64_t>(src);
  if (low % 4 == 0) return load_by<uint32_t>(src);
  if (low % 2 == 0) return load_by<uint16_t>(src);
  return load_by<uint8_t>(src);
}

MOETION_HD void store_vector(uint8_t* dst, const Vector& vector) {
  const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(dst)) % kVectorBytes;
  if (low == 0) return store_unit<Vector>(dst, vector);
  if (low % 8 == 0) return store_by<uint64_t>(dst, vector);
  if (low % 4 == 0) return store_by<uint32_t>(dst, vector);
  if (low % 2 == 0) return store_by<uint16_t>(dst, vector);
  return store_by<uint8_t>(dst, vector);
}

MOETION_HD const uint8_t* source_of(const Piece& piece, int64_t at) {
  return reinterpret_cast<const uint8_t*>(piece.src + (at - piece.dst));
}

// Up to 16 destination bytes from any number of pieces; zeros where none is.
MOETION_HD Vector vector_from_pieces(const Piece* piece, const Piece* last, int64_t begin, int64_t nbytes) {
  uint64_t low = 0, high = 0;
  for (; piece != last && piece->dst < begin + nbytes; ++piece) {
    const int64_t piece_end = piece->dst + piece->nbytes, vector_end = begin + nbytes;
    const int64_t end = piece_end < vector_end ? piece_end : vector_end;
    for (int64_t at = piece->dst > begin ? piece->dst : begin; at < end; ++at) {
      const uint64_t byte = *source_of(*piece, at);
      const unsigned shift = 8 * static_cast<unsigned>(at - begin);
      if (shift < 64)
        low |= byte << shift;
      else
        high |= byte << (shift - 64);
    }
  }
  return {{low, high}};
}

// The first piece in [first, last) that ends after `at`; pieces are in order.
MOETION_HD const Piece* piece_ending_after(const Piece* first, const Piece* last, int64_t at) {
  while (first != last) {
    const Piece* const middle = first + (last - first) / 2;
    if (middle->dst + middle->nbytes <= at)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

// The row of `work` that a tile belongs to: the last one that begins at or before it.
MOETION_HD int64_t row_of_tile(const Job& job, int64_t tile) {
  int64_t first = 0, last = job.num_rows;
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    if (job.work[middle].first_tile <= tile)
      first = middle;
    else
      last = middle;
  }
  return first;
}

// Digests and stores `nbytes` (16, or fewer at a chunk's end) at byte `offset` of a chunk.
template <bool kDigest>
MOETION_HD void finish_vector(const Work& work, int64_t offset, const Vector& vector, int64_t nbytes,
                              DigestSum& sum) {
  if (kDigest) {
    const uint64_t position = digest_position(static_cast<uint64_t>(offset / kWordBytes));
    sum.add(vector.words[0], position);
    if (nbytes > kWordBytes) sum.add(vector.words[1], position + digest_stride(1));
  }
  if (!work.stores) return;
  uint8_t* const dst = reinterpret_cast<uint8_t*>(work.dst + offset);
  if (nbytes == kVectorBytes) return store_vector(dst, vector);
  uint64_t word = vector.words[0];
  for (int64_t i = 0; i < nbytes; ++i, word >>= 8) {
    if (i == kWordBytes) word = vector.words[1];
    dst[i] = static_cast<uint8_t>(word);
  }
}

// kRows rows that one piece fills: all loads first, so that they are in flight together.
template <typename Lanes, bool kDigest, int64_t kRows>
MOETION_HD void pack_rows(const Work& work, const Piece& piece, int64_t offset, DigestSum& sum) {
  for (int lane = Lanes::first(); lane < kWarpLanes; lane += Lanes::kStep) {
    const int64_t begin = offset + lane * kVectorBytes;
    Vector vectors[kRows];
    for (int64_t row = 0; row < kRows; ++row)
      vectors[row] = load_vector(source_of(piece, work.at + begin + row * kRowBytes));
    for (int64_t row = 0; row < kRows; ++row)
      finish_vector<kDigest>(work, begin + row * kRowBytes, vectors[row], kVectorBytes, sum);
  }
}

// One row, or the chunk's last few bytes, where pieces meet. The pieces of the row lie in [piece, last).
template <typename Lanes, bool kDigest>
MOETION_HD void pack_mixed_row(const Work& work, const Piece* piece, const Piece* last, int64_t offset,
                               DigestSum& sum) {
  for (int lane = Lanes::first(); lane < kWarpLanes; lane += Lanes::kStep) {
    const int64_t begin = offset + lane * kVectorBytes, at = work.at + begin;
    const int64_t nbytes = work.nbytes - begin < kVectorBytes ? work.nbytes - begin : kVectorBytes;
    if (nbytes <= 0) continue;
    const Piece* const own = piece_ending_after(piece, last, at);
    const bool is_whole = own != last && own->dst <= at && own->dst + own->nbytes >= at + kVectorBytes;
    const Vector vector =
        is_whole ? load_vector(source_of(*own, at)) : vector_from_pieces(own, last, at, nbytes);
    finish_vector<kDigest>(work, begin, vector, nbytes, sum);
  }
}

// Fills one tile, adds its words to `sum` and returns the row that they belong to.
template <typename Lanes, bool kDigest>
MOETION_HD int64_t pack_tile(const Job& job, int64_t tile, DigestSum& sum) {
  const int64_t row = row_of_tile(job, tile);
  const Work work = job.work[row];
  int64_t offset = (tile - work.first_tile) * kTileBytes;
  const int64_t end = offset + kTileBytes < work.nbytes ? offset + kTileBytes : work.nbytes;
  const Piece* const all = job.pieces + work.first_piece;
  const Piece* piece = piece_ending_after(all, all + work.num_pieces, work.at + offset);
  // The piece in which the tile's last byte falls, if any, is its last one.
  const Piece* last = piece_ending_after(piece, all + work.num_pieces, work.at + end - 1);
  if (last != all + work.num_pieces) ++last;
  while (offset < end) {
    while (piece != last && piece->dst + piece->nbytes <= work.at + offset) ++piece;
    int64_t covered = 0;
    if (piece != last && piece->dst <= work.at + offset) {
      const int64_t piece_end = piece->dst + piece->nbytes - work.at;
      covered = (piece_end < end ? piece_end : end) - offset;
    }
    if (covered >= kRowsAtOnce * kRowBytes) {
      pack_rows<Lanes, kDigest, kRowsAtOnce>(work, *piece, offset, sum);
      offset += kRowsAtOnce * kRowBytes;
    } else if (covered >= kRowBytes) {
      pack_rows<Lanes, kDigest, 1>(work, *piece, offset, sum);
      offset += kRowBytes;
    } else {
      pack_mixed_row<Lanes, kDigest>(work, piece, last, offset, sum);
      offset += kRowBytes;
    }
  }
  return row;
}

}  // namespace moetion
