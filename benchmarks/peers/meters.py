# SPDX-License-Identifier: Apache-2.0
"""What a rank and its helper processes use: processor, memory, network."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from pathlib import Path
from types import TracebackType

import psutil


def cpu_seconds() -> float:
    """Of this process and all that it has started, those that have ended included."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def sent_bytes(interface: str = "eth0") -> int:
    """Over this host's link so far, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == interface:
            return int(rest.split()[8])
    raise RuntimeError(f"this host has no {interface}: run it on the testbed")


def private_bytes() -> int:
    """Anonymous memory of this process and its children; pages that they share count once."""
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    total = 0
    for pid in processes:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:")), 0)
    return total


def shared_bytes(folder: str = "/dev/shm") -> int:
    """What this host's files in memory take, those without a name included."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


class Peak:
    """The most private memory that is seen inside the ``with``, and the most in files; looked at all the time."""

    INTERVAL_S = 0.05

    def __init__(self) -> None:
        self.private = self.shared = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.is_set():
            self.private = max(self.private, private_bytes())
            self.shared = max(self.shared, shared_bytes())
            self._end.wait(self.INTERVAL_S)
