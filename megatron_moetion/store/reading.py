# SPDX-License-Identifier: Apache-2.0
"""Arenas for readers alone: nothing that is done to them reaches the file, and nobody is locked out or waited for."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import CorruptArena
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.population import Population


class PrivateFile:
    """A file that is mapped copy-on-write. See ``Memory``; what would change the file is refused."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        try:
            self._bytes: Bytes = np.memmap(path, dtype=np.uint8, mode="c")
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CorruptArena(f"{path} cannot be read: {error}") from error

    @property
    def array(self) -> Bytes:
        """See ``Memory``."""
        return self._bytes

    @property
    def has_file(self) -> bool:
        """See ``Memory``."""
        return self._path.is_file()

    @property
    def population(self) -> Population:
        """Never populated."""
        raise AssertionError(f"{self.name} is only read")

    def make_file_again(self) -> None:
        """Refused."""
        raise AssertionError(f"{self.name} is only read")

    def remove(self) -> None:
        """Refused."""
        raise AssertionError(f"{self.name} is only read")

    def close(self) -> None:
        """See ``Memory``."""
        self._bytes = self._bytes[:0].copy()


def read_only(path: Path) -> Arena:
    """Open an arena for reading. Its writer, if it has one, may go on. Errors as ``open_arena``."""
    return Arena(PrivateFile(path))


def take_over(arena: Arena, records: Records, num_threads: int) -> None:
    """Make the bytes of these captures this process's own, where ``read_only`` opened the arena.

    The kernel copies a page when something is written to it, so every page is written to as it is. What a writer does
    meanwhile is in the copy or not: verify the captures afterwards. The memory is this process's until the arena is
    closed and no view of it is left.
    """
    slots = [record.slot for record in records if not record.is_zero]

    def own(slot: int) -> None:
        for view in (arena.payload(slot), arena.digests(slot).view(np.uint8)):
            view[:: mmap.PAGESIZE] |= 0
            view[-1:] |= 0

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(own, slots))
