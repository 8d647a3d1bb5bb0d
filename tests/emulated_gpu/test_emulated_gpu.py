# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels and the project's own CUDA code on the emulated GPU. Not covered: SASS, timing, real drivers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted(path.name for path in (HERE / "inside").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first one waits for the build
@pytest.mark.parametrize("name", FILES)
def test_on_the_emulated_gpu(package: Path, name: str) -> None:
    """Each file of ``inside/`` in a process of its own, which ends alone if it crashes."""
    paths = f"pythonpath={package} {ROOT / 'scripts'}"  # the package's kernels are others; conftest.py needs a script
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", paths]
    done = subprocess.run(
        [*command, str(HERE / "inside" / name)],
        cwd=ROOT,
        env={**os.environ, "MOETION_TEST_ON_EMULATED_GPU": "1", "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
