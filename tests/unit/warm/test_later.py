# SPDX-License-Identifier: Apache-2.0
"""What a parent imports for its forks is what these would import one by one."""

from __future__ import annotations

import subprocess
import sys

from megatron_moetion.warm.later import LATER


def test_numpy_imports_nothing_more_in_a_recovery() -> None:
    program = (
        "import importlib, sys, numpy\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "before = set(sys.modules)\n"
        "numpy.unique(numpy.arange(3), return_inverse=True)\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    of_numpy = [name for name in LATER if name.startswith("numpy")]
    done = subprocess.run([sys.executable, "-c", program, *of_numpy], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
