# SPDX-License-Identifier: Apache-2.0
"""This process, as the machine knows it."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_start() -> float:
    """Unix time at which this process was started, to a clock tick; psutil's is up to a second early."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
