// SPDX-License-Identifier: Apache-2.0
// The launch. What a warp does is in warp_pack.h.
#include <algorithm>

#include "kernels.h"

namespace moetion {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 3;  // 24 warps with kRowsAtOnce rows each: 48 KiB of loads in flight on an SM

struct DeviceLanes {
  static constexpr int kStep = kWarpLanes;
  static __device__ int first() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
};

template <bool kDigest>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) pack_kernel(const Job job) {
  const int64_t num_warps = int64_t{gridDim.x} * (kThreads / kWarpLanes);
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
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
  constexpr int64_t kTilesPerBlock = kThreads / kWarpLanes;
  const int64_t wanted = (job.num_tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  const auto num_blocks = static_cast<unsigned>(std::min<int64_t>(wanted, int64_t{num_sms} * kBlocksPerSm));
  if (num_blocks == 0) return cudaSuccess;
  if (digest)
    pack_kernel<true><<<num_blocks, kThreads, 0, stream>>>(job);
  else
    pack_kernel<false><<<num_blocks, kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace moetion
