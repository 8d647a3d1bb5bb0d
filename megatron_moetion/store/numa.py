# SPDX-License-Identifier: Apache-2.0
"""The NUMA node that a GPU is attached to, and memory on it.

A transfer between a GPU and memory of another socket crosses the link between the sockets, which all GPUs share.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}
"""By machine: the numbers of ``mbind`` and ``move_pages``, for which the C library has no functions."""
_MPOL_PREFERRED = 1
_MASK_WORDS = 16
"""Of 64 bits: Linux has at most 1024 nodes."""


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    """Where a GPU's host memory belongs."""

    number: int | None
    """None where there is no choice to make, or no reason for one."""
    cpus: frozenset[int] = frozenset()
    """CPUs of the node; empty where they are not known."""
    note: str = ""
    """For a person."""


ANYWHERE = NumaNode(number=None)


def numa_node(pci_bus_id: str, sysfs: Path = Path("/sys")) -> NumaNode:
    """The node of the GPU with this address on the PCI bus, such as ``0000:17:00.0``; ``ANYWHERE`` for no GPU ("")."""
    if not pci_bus_id:
        return ANYWHERE
    nodes = sysfs / "devices/system/node"
    try:
        if len(_numbers((nodes / "has_memory").read_text())) < 2:
            return NumaNode(number=None, note="one NUMA node")
        number = int((sysfs / "bus/pci/devices" / pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        number = -1
    if number < 0:  # firmware that does not say says -1
        return NumaNode(number=None, note="NUMA node of the GPU not known")
    try:
        cpus = _numbers((nodes / f"node{number}" / "cpulist").read_text())
    except (OSError, ValueError):
        cpus = frozenset()
    return NumaNode(number=number, cpus=cpus, note=f"NUMA node {number}")


class NumaCalls(Protocol):
    """What the kernel is asked for."""

    def prefer(self, address: int, nbytes: int, node: int) -> None:
        """Have the pages of a mapping that are not there yet come from this node while it has room. ``OSError``."""
        ...

    def nodes_of(self, addresses: Sequence[int]) -> list[int]:
        """The node of each page, negative where it has none. ``OSError``."""
        ...


class LinuxNuma:
    """The kernel's. On other machines than x86-64 and AArch64 each call is an ``OSError``."""

    def __init__(self, machine: str = platform.machine()) -> None:
        self._mbind, self._move_pages = _SYSCALLS.get(machine, (-1, -1))

    def prefer(self, address: int, nbytes: int, node: int) -> None:
        """See ``NumaCalls``. Preferred, not bound: a node that is full must not end the process."""
        mask = (ctypes.c_uint64 * _MASK_WORDS)()
        mask[node // 64] = 1 << node % 64
        self._call(self._mbind, address, nbytes, _MPOL_PREFERRED, ctypes.addressof(mask), 64 * _MASK_WORDS, 0)

    def nodes_of(self, addresses: Sequence[int]) -> list[int]:
        """See ``NumaCalls``."""
        pages = (ctypes.c_void_p * len(addresses))(*addresses)
        found = (ctypes.c_int * len(addresses))()
        self._call(
            self._move_pages, 0, len(addresses), ctypes.addressof(pages), 0, ctypes.addressof(found), 0
        )  # without nodes to move to, it tells where pages are
        return list(found)

    def _call(self, number: int, *arguments: int) -> None:
        if _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments)) == -1:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _numbers(listed: str) -> frozenset[int]:
    """What the kernel lists as ``0-2,5``."""
    found: set[int] = set()
    for part in filter(None, listed.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)
