# SPDX-License-Identifier: Apache-2.0
"""Huge pages (2 MiB) of files in shared memory: whether the kernel offers them, and how many came."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_PMD_MAPPED = ("ShmemPmdMapped:", "FilePmdMapped:")


def why_not_offered(fd: int) -> str | None:
    """Why this file cannot have huge pages; None where it can."""
    device = os.fstat(fd).st_dev
    try:
        switch = _SHMEM_ENABLED.read_text()
    except OSError:
        switch = ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        mounts = []
    return reason(f"{os.major(device)}:{os.minor(device)}", mounts, switch)


def is_in_memory(fd: int) -> bool:
    """Whether this file is in a tmpfs."""
    device = os.fstat(fd).st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2:3] == [name] and " - tmpfs " in line for line in mounts)


def reason(device: str, mounts: Iterable[str], switch: str) -> str | None:
    """Why a file on ``device`` (major:minor) cannot have huge pages.

    ``mounts``: lines of ``/proc/self/mountinfo``; ``switch``: ``shmem_enabled`` of the kernel, "" where it has none. Of
    that, only ``deny`` and ``force`` hold for a mounted file system: else its own option ``huge`` decides.
    """
    if not switch:
        return "the kernel has none for shared memory"
    if "[deny]" in switch:
        return "the kernel denies them to shared memory"
    for line in mounts:
        fields, _, after = line.partition(" - ")
        of_mount, of_file_system = fields.split(), after.split()
        if len(of_mount) < 5 or of_mount[2] != device or not of_file_system:
            continue
        if of_file_system[0] != "tmpfs":
            return f"{of_mount[4]} is no tmpfs"
        options = of_file_system[-1].split(",")
        if "[force]" in switch or any(f"huge={how}" in options for how in ("always", "within_size", "advise")):
            return None
        return f"{of_mount[4]} is mounted without huge=advise"
    return "its mount is not known"


def mapped_bytes(address: int, nbytes: int, smaps: Iterable[str]) -> int:
    """Bytes of a mapping that huge pages back, from the lines of ``/proc/self/smaps``."""
    is_ours, total = False, 0
    for line in smaps:
        if header := _HEADER.match(line):
            start, end = (int(part, 16) for part in header.groups())
            is_ours = start < address + nbytes and address < end
        elif is_ours and line.startswith(_PMD_MAPPED):
            total += int(line.split()[1]) << 10
    return min(total, nbytes)
