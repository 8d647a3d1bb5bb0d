# SPDX-License-Identifier: Apache-2.0
"""Tests of the real device. Without one they are skipped, unless ``MOETION_REQUIRE_GPU=1`` makes that a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_moetion import _C

HERE = Path(__file__).parent


def what_is_missing() -> str:
    """Why these tests cannot run here; empty if they can."""
    if not _C.built_with_cuda():
        return "this build has no CUDA kernels (nvcc was not found)"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU that torch can use"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    missing = what_is_missing() if mine else ""
    if missing and os.environ.get("MOETION_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"MOETION_REQUIRE_GPU=1, but {missing}")
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if missing:  # said in the summary (-ra); on a machine that must have a GPU it was an error above
            item.add_marker(pytest.mark.skip(reason=missing))
