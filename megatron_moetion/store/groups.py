# SPDX-License-Identifier: Apache-2.0
"""What the limits of memory of this process's control groups leave it: those of a container, a pod or a job."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
"""Limit, use, and what of it are files on disk, which the group can drop: that counts as free."""


def left_by_groups(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the control groups (v1 and v2) of this process and all above them leave; very much without a limit.

    Data in shared memory counts in them like any other.
    """
    return min((_free_in(*group) for group in _groups(proc, cgroup)), default=sys.maxsize)


def _groups(proc: Path, cgroup: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """The folder of each group, and the names of its files. Inside a container its own group is the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = {_V2: "", _V1: ""}
    for controllers, _, path in (line.partition(":")[2].partition(":") for line in lines):
        if not controllers or "memory" in controllers.split(","):
            own[_V1 if controllers else _V2] = path.strip("/")
    for names, root in ((_V2, cgroup), (_V1, cgroup / "memory")):
        folder = root / own[names]
        yield from ((group, names) for group in (folder, *folder.parents) if group.is_relative_to(root))


def _free_in(group: Path, names: tuple[str, str, tuple[str, str]]) -> int:
    """What a control group may still take; very much without a limit."""
    try:
        most, used = ((group / name).read_text().strip() for name in names[:2])
    except OSError:
        return sys.maxsize
    cached = 0
    with suppress(OSError):
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(nbytes) for name, nbytes in lines if name in names[2])
    return sys.maxsize if most == "max" else max(0, int(most) - int(used) + cached)
