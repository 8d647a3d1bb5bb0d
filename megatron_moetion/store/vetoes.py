# SPDX-License-Identifier: Apache-2.0
"""The iterations that ranks have called unhealthy, in small files beside the arenas: they outlive the processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_moetion.errors import NOT_OURS, StoreError
from megatron_moetion.store.files import open_regular

VETOES_MAX = 32
"""Iterations that a rank remembers: more than agreements can still be about."""
_SUFFIX = ".vetoed.json"
_NOTE_BYTES_MAX = 1 << 12


class Vetoes:
    """One rank's vetoes since an epoch began. Iterations mean something in that history alone, so it is named too."""

    def __init__(self, folder: Path, rank: int, lineage: int, epoch: int) -> None:
        self._path = folder / f"rank{rank:05d}{_SUFFIX}"
        self._lineage = lineage
        self._epoch = epoch
        self._iterations: set[int] = set()

    def add(self, iterations: Iterable[int]) -> str | None:
        """Write these down with the last ones before; returns why that failed, None if it did not."""
        self._iterations = set(sorted(self._iterations.union(iterations))[-VETOES_MAX:])
        note = {"lineage": self._lineage, "epoch": self._epoch, "iterations": sorted(self._iterations)}
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            scratch.write_text(json.dumps(note))
            scratch.rename(self._path)
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}"
        return None


def vetoed_in(folder: Path, lineage: int, epoch: int) -> set[int]:
    """What any rank has vetoed on this node, in that history since that epoch began. Damaged notes are passed over."""
    return {i for path in folder.glob(f"rank*{_SUFFIX}") for i in _read(path, lineage, epoch)}


def _read(path: Path, lineage: int, epoch: int) -> list[int]:
    try:
        with open(open_regular(path, os.O_RDONLY)) as note:
            found = json.loads(note.read(_NOTE_BYTES_MAX))
        is_current = (found["lineage"], found["epoch"]) == (lineage, epoch)
        return [int(i) for i in found["iterations"]] if is_current else []
    except (OSError, StoreError, *NOT_OURS):
        return []
