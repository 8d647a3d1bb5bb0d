# SPDX-License-Identifier: Apache-2.0
"""The environment in which the same training computes the same bits, on a GPU as on a CPU."""

ENVIRONMENT = {
    # Attention kernels, cuBLAS with several streams, and NCCL's trees may add in another order each time.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "OMP_NUM_THREADS": "1",
}
