#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that only a machine with an NVIDIA GPU can show: builds the CUDA kernels, runs their tests, the sanitizer and
# the benchmarks, trains on the GPU, kills the training and resumes it. Ends in a table.
#
#   scripts/gpu_check.sh RESULTS [--quick] [--only STEP]...
#
# RESULTS is a folder for logs, figures and summary.json. --without-gpu, for trying the script itself, trains on the CPU and
# skips what needs a GPU.
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"
if [[ " $* " != *" --without-gpu "* ]]; then
  has_gpu || die "no NVIDIA GPU (nvidia-smi -L shows none); --without-gpu tries the script itself"
  export MOETION_CUDA=1
fi
set_up dev
exec "$VENV_PYTHON" scripts/gpu_check.py "$@"
