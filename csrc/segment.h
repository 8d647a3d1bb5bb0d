// SPDX-License-Identifier: Apache-2.0
// The tables of the pack kernels, and the digest of the bytes that they move. Host and device share this
// file.
//
// The digest is part of the snapshot format (docs/snapshot_format.md); its reference in Python is
// megatron_moetion/snapshot/reference.py. A change of any value below is a new kDigestVersion.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOETION_HD __host__ __device__ __forceinline__
#else
#define MOETION_HD inline __attribute__((always_inline))
#endif

namespace moetion {

// Rows of the tables that Python passes: plain 64-bit integers, addresses included.
struct Piece {
  int64_t src, dst, nbytes;
};
struct Chunk {
  int64_t dst, nbytes, first_piece, num_pieces;
};
struct Span {
  int64_t address, nbytes;
};

constexpr int64_t kDigestVersion = 1;
constexpr int64_t kWordBytes = 8;
constexpr int64_t kLineBytes = 64;  // one cache line: the unit of the vector paths and of streaming stores
constexpr int64_t kLineWords = kLineBytes / kWordBytes;

constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15;    // 2^64 / golden ratio, odd: positions spread evenly
constexpr uint64_t kLength = 0xD6E8FEB86659FD93;  // odd, so that lengths map to distinct values
constexpr uint64_t kSeed = 0x243F6A8885A308D3;    // pi; the digest of nothing is not 0
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9;    // finaliser: Stafford's variant 13 of MurmurHash3's, as in
constexpr uint64_t kMix2 = 0x94D049BB133111EB;    // SplitMix64; each step is a bijection of 64-bit integers

MOETION_HD uint64_t low32(uint64_t x) {
  return static_cast<uint32_t>(x);
}

// One 32 x 32 -> 64 bit multiply: vpmuludq on a CPU, IMAD.WIDE.U32 (which also adds) on a GPU.
MOETION_HD uint64_t half_product(uint64_t x) {
  return low32(x) * (x >> 32);
}

// Halves swapped, plus their product.
MOETION_HD uint64_t digest_stir(uint64_t x) {
  return ((x << 32) | (x >> 32)) + half_product(x);
}

// Additive in the position, so that a lane steps through its words with one addition. The low half is odd and
// does not repeat within 2^31 words.
MOETION_HD uint64_t digest_stride(uint64_t num_words) {
  return 2 * num_words * kWeyl;
}
MOETION_HD uint64_t digest_position(uint64_t word) {
  return digest_stride(word) + kWeyl;
}

// Additive keys would not do: the differences of two swapped blocks then sum to signs times one constant,
// which cancels (a quarter of swapped 16-byte blocks of int64 zeros and ones went unseen). One stir still
// left keys quadratic in the position, whose third differences cancel; two leave nothing that we could find.
MOETION_HD uint64_t digest_key(uint64_t position) {
  return digest_stir(digest_stir(position));
}

// Sums over words in any order and any split; `linear` counts in units of 2^32. `product` is UMAC's NH;
// `linear` makes any change within one half of a word certain to show.
struct DigestSum {
  uint64_t product = 0;
  uint32_t linear = 0;

  MOETION_HD void add(uint64_t word, uint64_t position) {
    const uint64_t key = digest_key(position);
    product += low32(word + key) * low32((word >> 32) + (key >> 32));
    linear += static_cast<uint32_t>(word) + static_cast<uint32_t>(word >> 32);
  }
  MOETION_HD void merge(const DigestSum& other) {
    product += other.product;
    linear += other.linear;
  }
  MOETION_HD uint64_t value() const { return product + (static_cast<uint64_t>(linear) << 32); }
};

// `sum` is the sum of DigestSum::value() over all words of the chunk, `nbytes` the chunk's length.
MOETION_HD uint64_t digest_finish(uint64_t sum, uint64_t nbytes) {
  uint64_t x = sum + kSeed + nbytes * kLength;
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  return x ^ (x >> 31);
}

}  // namespace moetion
