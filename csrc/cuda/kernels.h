// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "warp_pack.h"

namespace moetion {

// Enqueues one launch over all rows of the job. The grid stays on at most `num_sms` SMs' worth of blocks.
cudaError_t launch_pack(const Job& job, bool digest, int num_sms, cudaStream_t stream);

}  // namespace moetion
