# SPDX-License-Identifier: Apache-2.0
"""Where there is no nvcc, or are no headers, nothing is built and the tests on the emulated GPU are skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from builder import Toolkit, find_toolkit


def test_without_nvcc_there_is_no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert find_toolkit() is None


def test_the_headers_are_those_of_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc, header = tmp_path / "bin" / "nvcc", tmp_path / "include" / "cuda_runtime_api.h"
    for file in (nvcc, header):
        file.parent.mkdir()
        file.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_toolkit() == Toolkit(nvcc=nvcc, include=header.parent)
