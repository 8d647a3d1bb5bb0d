// SPDX-License-Identifier: Apache-2.0
// What translated kernels see (ptx_to_cpp.py): who they are, memory, the warp, and PTX's instructions on
// bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace emulator {

class Warp;

// One thread of a grid. PTX's special registers, the kernel's parameters, and its warp.
struct Lane {
  uint32_t thread, num_threads, block, num_blocks, sm;
  const uint8_t* parameters;
  Warp* warp;
  int number;  // in the warp
};

struct Kernel {
  const char* variant;  // which translation: a file may be translated for several architectures
  const char* name;
  void (*run)(Lane& lane);
  unsigned max_threads;  // of a block
};

// Called while the module is loaded. The result has no meaning: it lets a constant call this.
bool register_kernels(const std::vector<Kernel>& kernels);
// Whether a translation is linked: an old nvcc does not know all architectures.
bool has_kernels(const std::string& variant);

enum class Access { kRead, kWrite };

// These two throw IllegalAccess (grid.h).
void check_access(Lane& lane, uint64_t address, uint64_t nbytes, uint64_t alignment, Access access);
// Meets the other lanes of the warp and returns the value of the one whose number differs by `distance`.
uint32_t shuffle_butterfly(Lane& lane, int site, uint32_t value, uint32_t distance, uint32_t mask);

template <typename T>
T parameter(const Lane& lane, int offset) {
  T value;
  memcpy(&value, lane.parameters + offset, sizeof(value));
  return value;
}

template <typename T>
T load(Lane& lane, uint64_t address) {
  check_access(lane, address, sizeof(T), sizeof(T), Access::kRead);
  T value;
  memcpy(&value, reinterpret_cast<const void*>(address), sizeof(value));
  return value;
}

template <typename T>
void store(Lane& lane, uint64_t address, T value) {
  check_access(lane, address, sizeof(T), sizeof(T), Access::kWrite);
  memcpy(reinterpret_cast<void*>(address), &value, sizeof(value));
}

template <typename T>
void load_pair(Lane& lane, uint64_t address, T& first, T& second) {
  check_access(lane, address, 2 * sizeof(T), 2 * sizeof(T), Access::kRead);
  memcpy(&first, reinterpret_cast<const void*>(address), sizeof(T));
  memcpy(&second, reinterpret_cast<const void*>(address + sizeof(T)), sizeof(T));
}

template <typename T>
void store_pair(Lane& lane, uint64_t address, T first, T second) {
  check_access(lane, address, 2 * sizeof(T), 2 * sizeof(T), Access::kWrite);
  memcpy(reinterpret_cast<void*>(address), &first, sizeof(T));
  memcpy(reinterpret_cast<void*>(address + sizeof(T)), &second, sizeof(T));
}

// Lanes run one after the other, so nothing comes in between. What may be written may be added to.
inline uint64_t atomic_add(Lane& lane, uint64_t address, uint64_t addend) {
  check_access(lane, address, sizeof(addend), sizeof(addend), Access::kWrite);
  uint64_t before;
  memcpy(&before, reinterpret_cast<const void*>(address), sizeof(before));
  const uint64_t after = before + addend;
  memcpy(reinterpret_cast<void*>(address), &after, sizeof(after));
  return before;
}

// PTX clamps what a shift of C++ leaves undefined.
template <typename T>
T shift_left(T value, uint32_t by, uint32_t bits) {
  return by >= bits ? T{0} : static_cast<T>(value << by);
}
template <typename T>
T shift_right(T value, uint32_t by, uint32_t bits) {
  if (by >= bits) return value < T{0} ? static_cast<T>(-1) : T{0};
  return static_cast<T>(value >> by);
}

// prmt: each half byte of `selector` chooses one of the eight bytes of b:a, or that byte's sign eight times.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = (selector >> (4 * i)) & 15;
    uint32_t byte = static_cast<uint8_t>(bytes >> (8 * (chosen & 7)));
    if (chosen & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// bfi: the low `length` bits of `field` replace those of `into` from bit `start` on.
template <typename T>
T insert_bits(T field, T into, uint32_t start, uint32_t length) {
  const uint32_t bits = 8 * sizeof(T);
  start &= 255, length = std::min(length & 255, bits);
  if (start >= bits || length == 0) return into;
  const T low = length == bits ? static_cast<T>(-1) : static_cast<T>((T{1} << length) - 1);
  return static_cast<T>((into & ~(low << start)) | ((field & low) << start));
}

}  // namespace emulator
