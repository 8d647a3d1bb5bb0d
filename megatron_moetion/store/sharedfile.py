# SPDX-License-Identifier: Apache-2.0
"""The memory of arenas: files in shared memory, which outlive the process.

A file gets all of its memory when it is made, so that memory cannot run out later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import CorruptArena, StoreError
from megatron_moetion.store.arena import Arena, first_bytes, read_arena
from megatron_moetion.store.files import open_regular
from megatron_moetion.store.groups import left_by_groups
from megatron_moetion.store.hostmemory import PLAIN, HostMemory, OverLimit
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.store.population import Population
from megatron_moetion.store.spec import ArenaSpec


class SharedFile:
    """A file that is mapped into this process. See ``Memory``."""

    def __init__(self, path: Path, mapping: MappedFile, inode: int) -> None:
        self.name = str(path)
        self._path = path
        self._mapping: MappedFile | None = mapping
        self._inode = inode

    @classmethod
    def create(
        cls, path: Path, nbytes: int, contents: Iterable[tuple[int, bytes]], memory: HostMemory = PLAIN
    ) -> SharedFile:
        """Make a file of allocated memory, zeroed except for ``contents`` (offset, bytes).

        It appears under its name only when it is complete. Raises ``StoreError`` where memory is short.
        """
        for left in path.parent.glob(f"{path.stem}.*.tmp"):
            left.unlink(missing_ok=True)  # a process was killed while it made this file, which holds memory

        def fill(fd: int) -> MappedFile:
            mapping = MappedFile(fd, nbytes, memory)
            view = mapping.array()
            for start, data in contents:
                view[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
            return mapping

        return cls(path, *_new_file(path, nbytes, fill))

    @classmethod
    def open(cls, path: Path, memory: HostMemory = PLAIN) -> SharedFile:
        """Map an existing file.

        Raises ``CorruptArena`` where it is no file of this user with anything in it, or has holes that find no memory.
        """
        fd = open_regular(path, os.O_RDWR)
        try:
            status = os.fstat(fd)
            if not status.st_size:
                raise CorruptArena(f"{path} is empty")
            return cls(path, MappedFile(fd, status.st_size, memory), status.st_ino)
        except OSError as error:
            raise CorruptArena(f"{path} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    @property
    def array(self) -> Bytes:
        """See ``Memory``."""
        assert self._mapping is not None, f"{self.name} is closed"
        return self._mapping.array()

    @property
    def population(self) -> Population:
        """See ``Memory``."""
        assert self._mapping is not None, f"{self.name} is closed"
        return self._mapping.population

    @property
    def has_file(self) -> bool:
        """See ``Memory``."""
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def make_file_again(self) -> None:
        """See ``Memory``. The memory of the deleted file is given back only afterwards."""
        mapping = self._mapping
        assert mapping is not None, f"{self.name} is closed"

        def copy(fd: int) -> MappedFile:
            mapping.replace(fd)
            return mapping

        _, self._inode = _new_file(self._path, mapping.nbytes, copy)

    def remove(self) -> None:
        """See ``Memory``."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """See ``Memory``."""
        self._mapping = None


def create_arena(path: Path, spec: ArenaSpec, page: Page, memory: HostMemory = PLAIN) -> Arena:
    """Make a new, empty arena whose first manifest page is ``page``. ``StoreError`` where memory is short."""
    return Arena(SharedFile.create(path, spec.nbytes, first_bytes(spec, page), memory))


def open_arena(path: Path, memory: HostMemory = PLAIN) -> Arena:
    """Open an arena for writing.

    Raises ``CorruptArena`` where it is no readable file of this user, or header or both pages fail to verify;
    ``IdentityMismatch`` where another version of the format wrote it.
    """
    return Arena(SharedFile.open(path, memory))


def peek_arena(path: Path) -> tuple[ArenaSpec, Page]:
    """Header and current manifest page of an arena, also while another process writes to it. Errors as for opening."""
    fd = open_regular(path, os.O_RDONLY)
    try:
        spec, _, page = read_arena_file(fd, path)
        return spec, page
    finally:
        os.close(fd)


def read_arena_file(fd: int, path: Path) -> tuple[ArenaSpec, list[Page | None], Page]:
    """``read_arena`` of an open file. It is read and not mapped, so whoever cuts it short meanwhile does no harm."""
    return read_arena(lambda start, n: os.pread(fd, n, start), os.fstat(fd).st_size, str(path))


def free_bytes(folder: Path) -> int:
    """Room that the file system of a folder has left; for one in memory, memory."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that may be taken without another process losing its own: the kernel's word, and ``left_by_groups``."""
    lines = (proc / "meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min(free, left_by_groups(proc, cgroup))


def _no_space(folder: Path, need: int, error: OSError | None = None) -> StoreError:
    have = free_bytes(folder)
    limit = f", {error.strerror}," if isinstance(error, OverLimit) else ""
    return StoreError(
        f"the store {folder} has {have / 2**20:,.1f} MiB free{limit} and this arena needs {need / 2**20:,.1f} MiB: "
        f"enlarge {'the limit' if limit else 'shared memory'}, point --moetion-store elsewhere, or lower "
        f"--moetion-replicas, in mode 'popularity' --moetion-max-experts-per-snapshot, in mode 'exact' --moetion-period"
    )


def _new_file(path: Path, nbytes: int, make: Callable[[int], MappedFile]) -> tuple[MappedFile, int]:
    """A file of allocated memory, mapped, and its inode; it appears under its name only when ``make`` is done with it.

    Raises ``StoreError`` where memory is short.
    """
    if free_bytes(path.parent) < nbytes:
        raise _no_space(path.parent, nbytes)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.ftruncate(fd, nbytes)
            mapping = make(fd)
        except OSError as error:
            raise _no_space(path.parent, nbytes, error) from error
        os.rename(scratch, path)
        return mapping, os.fstat(fd).st_ino
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
