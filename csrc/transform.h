// SPDX-License-Identifier: Apache-2.0
// What may happen to elements on their way: nothing, a scale, or a scale and a cast. Host and device share
// it.
#pragma once

#include <cstring>

#include "segment.h"

namespace moetion {

enum class Op : int { kCopy = 0, kScale = 1, kBf16 = 2 };

// Bytes of one element at the source and at the destination. A piece's `nbytes` counts destination bytes.
template <Op kOp>
struct Element {
  static constexpr int64_t kSrcBytes = kOp == Op::kCopy ? 1 : 4;
  static constexpr int64_t kDstBytes = kOp == Op::kCopy ? 1 : (kOp == Op::kScale ? 4 : 2);
};

MOETION_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
MOETION_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Round to nearest, ties to even; NaNs become 0x7FFF, which is what __float2bfloat16_rn gives.
MOETION_HD uint16_t bf16_bits(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// One element at `src`, at any alignment, as the low bits of a word.
template <Op kOp>
MOETION_HD uint32_t transform_element(const uint8_t* src, float scale) {
  if (kOp == Op::kCopy) return *src;
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(src[i]) << (8 * i);
  const float scaled = bits_float(bits) * scale;
  return kOp == Op::kScale ? float_bits(scaled) : bf16_bits(scaled);
}

}  // namespace moetion
