# SPDX-License-Identifier: Apache-2.0
"""How arenas get their memory: all of it when it is mapped, by several threads, on the right NUMA node.

Memory that is short is an error then. Later nothing can be short, and no page fault waits in the first snapshots.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_moetion.clock import Clock, SystemClock
from megatron_moetion.store.groups import left_by_groups
from megatron_moetion.store.hugepages import is_in_memory, mapped_bytes, why_not_offered
from megatron_moetion.store.numa import ANYWHERE, LinuxNuma, NumaCalls, NumaNode
from megatron_moetion.store.population import Population

PART_BYTES = 1 << 27
"""What one thread populates at a time; a multiple of a huge page's usual size."""
# Since Linux 5.14; the module mmap does not name them.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_SAMPLES = 64
"""Pages that are looked at to tell where memory came from."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OverLimit(OSError):
    """The limits of this process's control groups leave too little memory."""


class Kernel(Protocol):
    """What the kernel does for memory."""

    numa: NumaCalls

    def left_bytes(self, fd: int) -> int:
        """What the limits of this process's control groups leave for pages of this file; very much without a limit."""
        ...

    def advise(self, address: int, nbytes: int, advice: int) -> None:
        """``madvise``. ``OSError``."""
        ...

    def run_on(self, cpus: Collection[int]) -> None:
        """Have the calling thread run on these CPUs only. ``OSError``."""
        ...

    def why_no_huge_pages(self, fd: int) -> str | None:
        """See ``why_not_offered``."""
        ...

    def huge_bytes(self, address: int, nbytes: int) -> int:
        """Bytes of a mapping that huge pages back. ``OSError``."""
        ...


class Linux:
    """The real one."""

    def __init__(self) -> None:
        self.numa: NumaCalls = LinuxNuma()

    def left_bytes(self, fd: int) -> int:
        """See ``Kernel``. Pages of a file on disk can be written there."""
        return left_by_groups() if is_in_memory(fd) else sys.maxsize

    def advise(self, address: int, nbytes: int, advice: int) -> None:
        """See ``Kernel``."""
        if _libc.madvise(address, nbytes, advice):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def run_on(self, cpus: Collection[int]) -> None:
        """See ``Kernel``."""
        os.sched_setaffinity(0, cpus)

    def why_no_huge_pages(self, fd: int) -> str | None:
        """See ``Kernel``."""
        return why_not_offered(fd)

    def huge_bytes(self, address: int, nbytes: int) -> int:
        """See ``Kernel``."""
        with Path("/proc/self/smaps").open() as smaps:
            return mapped_bytes(address, nbytes, smaps)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Populates mappings, with so many threads, from this NUMA node."""

    num_threads: int = 1
    node: NumaNode = ANYWHERE
    kernel: Kernel = field(default_factory=Linux)
    clock: Clock = field(default_factory=SystemClock)
    part_bytes: int = PART_BYTES

    def populate(self, fd: int, address: int, nbytes: int) -> Population:
        """Back every page of a mapping of the whole file ``fd``, which keeps what it holds.

        ``OSError`` where memory is short. After that no access to the mapping can fail while the file keeps its size.
        A file that has all its memory is as good where the kernel refuses to map it ahead: that is a note.
        """
        began = self.clock.monotonic()
        problem = self._prefer(address, nbytes)
        with suppress(OSError):  # a kernel without huge pages
            self.kernel.advise(address, nbytes, mmap.MADV_HUGEPAGE)
        has_memory = _is_allocated(fd)
        if not has_memory and (left := self.kernel.left_bytes(fd)) < nbytes:
            what = f"of which the limits of this process's control groups leave {left / 2**20:,.1f} MiB"
            raise OverLimit(errno.ENOMEM, what)
        parts = [(address + at, min(self.part_bytes, nbytes - at)) for at in range(0, nbytes, self.part_bytes)]
        try:
            # Reading maps many pages a fault. Only writing makes new ones stay, even if nobody ever writes to them.
            self._run(parts, partial(self._advise, _MADV_POPULATE_READ if has_memory else _MADV_POPULATE_WRITE))
        except OSError as error:
            if error.errno == errno.EFAULT:  # what would be a SIGBUS in an access
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if error.errno == errno.EINVAL:  # a kernel from before 5.14
                os.posix_fallocate(fd, 0, nbytes)
                self._run(parts, _touch)
            elif has_memory:
                problem = "; ".join(filter(None, (problem, f"its pages are not mapped ahead: {error.strerror}")))
            else:
                raise
        if not _is_allocated(fd):  # a file system that puts it off
            os.posix_fallocate(fd, 0, nbytes)
        seconds = self.clock.monotonic() - began
        no_huge = self.kernel.why_no_huge_pages(fd)
        return Population(
            nbytes=nbytes,
            seconds=seconds,
            num_threads=self.num_threads,
            huge_bytes=0 if no_huge else self._huge_bytes(address, nbytes),
            no_huge=no_huge,
            numa=self._where(address, nbytes),
            problem=problem,
        )

    def _prefer(self, address: int, nbytes: int) -> str | None:
        """Ask for the node; why that was refused."""
        if self.node.number is None:
            return None
        try:
            self.kernel.numa.prefer(address, nbytes, self.node.number)
        except OSError as error:
            return f"the kernel does not let this process choose NUMA node {self.node.number}: {error.strerror}"
        return None

    def _run(self, parts: Sequence[tuple[int, int]], call: Callable[[int, int], None]) -> None:
        """Call it with every part, in threads on the node's CPUs: memory also comes from there by default."""

        def settle() -> None:
            with suppress(OSError):  # none of them is for this process
                if self.node.cpus:
                    self.kernel.run_on(self.node.cpus)

        try:
            with ThreadPoolExecutor(self.num_threads, "moetion-populate", settle) as threads:
                for _ in threads.map(call, *zip(*parts, strict=True)):
                    pass
        except RuntimeError:  # this process may start no more threads
            for part in parts:
                call(*part)

    def _advise(self, advice: int, address: int, nbytes: int) -> None:
        self.kernel.advise(address, nbytes, advice)

    def _huge_bytes(self, address: int, nbytes: int) -> int:
        try:
            return self.kernel.huge_bytes(address, nbytes)
        except OSError:
            return 0

    def _where(self, address: int, nbytes: int) -> str:
        """Where the memory is, from a sample of its pages."""
        if self.node.number is None:
            return self.node.note
        step = max(nbytes // _SAMPLES, 1)
        try:
            found = self.kernel.numa.nodes_of([address + at for at in range(0, nbytes, step)])
        except OSError:
            return f"{self.node.note} asked for"
        share = found.count(self.node.number) / len(found)
        return self.node.note if share == 1 else f"{self.node.note} for {share:.0%}"


def _is_allocated(fd: int) -> bool:
    """Whether a file has no holes."""
    status = os.fstat(fd)
    return status.st_blocks * 512 >= status.st_size


def _touch(address: int, nbytes: int) -> None:
    """Read a byte of every page."""
    np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))[:: mmap.PAGESIZE].max()


PLAIN = HostMemory()
"""One thread, no node."""
