# SPDX-License-Identifier: Apache-2.0
"""Arenas for readers alone: nothing that is done to them reaches the file, and nobody is locked out or waited for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import CorruptArena
from megatron_moetion.store.arena import Arena
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
