# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU, built once. What runs on it is in ``inside/``: it needs a process with another ``_C``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from builder import Toolkit, build, find_toolkit  # noqa: E402

INSIDE = "MOETION_TEST_ON_EMULATED_GPU"
collect_ignore = [] if INSIDE in os.environ else ["inside"]


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    found = find_toolkit()
    if found is None:
        pytest.skip("nvcc or its headers are not here (neither on PATH nor in CUDA_HOME)")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    return found


@pytest.fixture(scope="session")
def package(toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path to import ``megatron_moetion`` from, on the emulated GPU."""
    return build(toolkit, tmp_path_factory.mktemp("emulated_gpu"))
