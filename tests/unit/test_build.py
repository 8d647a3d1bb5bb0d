# SPDX-License-Identifier: Apache-2.0
"""What was compiled is what this machine can compile."""

from __future__ import annotations

import os
import shutil

import pytest

from megatron_moetion import _C


@pytest.mark.skipif(os.environ.get("MOETION_CUDA") == "0", reason="MOETION_CUDA=0 asks for the host kernels alone")
def test_cuda_kernels_are_compiled_wherever_nvcc_is() -> None:
    """A GPU is not needed for that, so CUDA code cannot rot on machines without one."""
    found = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin") or shutil.which("nvcc")
    assert _C.built_with_cuda() == (found is not None)
