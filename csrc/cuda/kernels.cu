// SPDX-License-Identifier: Apache-2.0
// The launch. What a warp does is in warp_pack.h.
#include "kernels.h"

namespace moetion {
namespace {

// One block fills an SM, so that a grid of N blocks is on N SMs at most and all others stay whole for
// training: a GEMM block that needs nearly all registers of an SM does not fit beside even a small block. 24
// warps with kRowsAtOnce rows each are 48 KiB of loads in flight on an SM.
constexpr int kThreads = 768;
constexpr int kWarps = kThreads / kWarpLanes;

struct DeviceLanes {
  static constexpr int kStep = kWarpLanes;
  static __device__ int first() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
};

__device__ uint32_t this_sm() {
  uint32_t number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

template <bool kDigest>
__global__ void __launch_bounds__(kThreads, 1) pack_kernel(const Job job) {
  if (job.sms != nullptr && threadIdx.x == 0) job.sms[blockIdx.x] = this_sm();
  const int64_t num_warps = int64_t{gridDim.x} * kWarps;
  const int64_t warp = int64_t{threadIdx.x / kWarpLanes} * gridDim.x + blockIdx.x;  // few tiles: on many SMs
  for (int64_t tile = warp; tile < job.num_tiles; tile += num_warps) {
    DigestSum sum;
    const int64_t row = pack_tile<DeviceLanes, kDigest>(job, tile, sum);
    if (!kDigest) continue;
    unsigned long long value = sum.value();
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
    if (threadIdx.x % kWarpLanes == 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(&job.sums[row]), value);
  }
}

}  // namespace

cudaError_t launch_pack(const Job& job, bool digest, int num_sms, cudaStream_t stream) {
  const auto num_blocks = static_cast<unsigned>(blocks_of(job.num_tiles, num_sms));
  if (num_blocks == 0) return cudaSuccess;
  if (digest)
    pack_kernel<true><<<num_blocks, kThreads, 0, stream>>>(job);
  else
    pack_kernel<false><<<num_blocks, kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace moetion
