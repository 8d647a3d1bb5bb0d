# SPDX-License-Identifier: Apache-2.0
"""The exit code of a run reaches who started it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("code", "expected"), [(0, -signal.SIGABRT), (2, 2), (3, 3)])
def test_an_error_keeps_its_exit_code_whatever_the_teardown_would_do(code: int, expected: int) -> None:
    """A teardown that aborts, as with threads of a process group that still run. Without an error it takes place."""
    script = (
        "import atexit, os\n"
        "from megatron_moetion.pretrain.launch import leave\n"
        "atexit.register(os.abort)\n"
        "print('said')\n"
        f"leave({code})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == expected
    assert "said" in done.stdout or not code
