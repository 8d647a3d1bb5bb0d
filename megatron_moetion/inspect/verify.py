# SPDX-License-Identifier: Apache-2.0
"""Whether the captures of arenas are, byte for byte, what was captured. Nothing is written, and nobody is waited for.

Files are read in pieces and not mapped: a file that is cut short meanwhile does no harm, and memory is bounded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moetion.arrays import Bytes, Digests, Flags
from megatron_moetion.errors import CorruptArena
from megatron_moetion.inspect.look import ArenaFile, look_at_arena
from megatron_moetion.snapshot.digest import chunk_spans, digest_of, num_chunks_of
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.files import open_regular
from megatron_moetion.store.manifest import NO_RECORDS, Record, Records
from megatron_moetion.store.spec import ArenaSpec, Layout

PIECE_BYTES = 8 << 20
"""Read at once by a thread, about: a chunk is never divided."""

Progress = Callable[[int], None]
"""Told of bytes that have been read; called from any thread."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verified:
    """One arena after all of its captures have been read."""

    file: ArenaFile
    sound: Records
    damaged: Records
    released: int = 0
    """Captures that the run gave up while they were read."""

    @property
    def nbytes(self) -> int:
        """Bytes of the captures."""
        return int(sum(int(part.table["nbytes"].sum()) for part in (self.sound, self.damaged)))


class Verifier:
    """Reads captures in ``threads`` threads; ``progress`` is told of every piece. Close it."""

    def __init__(self, threads: int, progress: Progress = lambda nbytes: None) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="moetion-verify")
        self._own = threading.local()
        self._progress = progress

    def close(self) -> None:
        """End the threads; what they have not begun is given up."""
        self._threads.shutdown(cancel_futures=True)

    def verify(self, file: ArenaFile) -> Verified | None:
        """All captures that the arena's current page lists; None where the arena has gone. Errors are in the result."""
        if file.page is None or file.spec is None:
            return Verified(file=file, sound=NO_RECORDS, damaged=NO_RECORDS)
        try:
            fd = open_regular(file.path, os.O_RDONLY, of_anyone=True)
        except CorruptArena:
            return None
        try:
            records = file.page.records
            whole = self._intact(fd, file.spec, records)
            suspects = _still_listed(records.where(~whole), file.path, fd)
            again = self._intact(fd, file.spec, suspects)  # it may have been given up and taken again meanwhile
            suspects = _still_listed(suspects.where(~again), file.path, fd)
        finally:
            os.close(fd)
        sound = records.where(whole)
        return Verified(file=file, sound=sound, damaged=suspects, released=len(records) - len(sound) - len(suspects))

    def _intact(self, fd: int, spec: ArenaSpec, records: Records) -> Flags:
        """Whether each capture is as it was captured; bool[n]."""
        layout, unit_bytes = Layout.of(spec), spec.stored_bytes.tolist()

        def check(record: Record) -> bool:
            if record.unit >= len(spec.units):
                return False
            if record.is_zero:
                return record.nbytes == 0
            if record.slot >= spec.num_slots or record.nbytes <= 0:
                return False
            size = int(layout.slot_sizes[record.slot])
            if not record.nbytes == size == unit_bytes[record.unit]:
                return False
            return self._is_intact(fd, int(layout.slot_starts[record.slot]), size, spec, record.digest)

        return np.array(list(self._threads.map(check, records)), dtype=bool)

    def _is_intact(self, fd: int, start: int, nbytes: int, spec: ArenaSpec, digest: int) -> bool:
        chunk = spec.identity.chunk_bytes
        reader = self._reader(max(chunk, PIECE_BYTES // chunk * chunk, 1), nbytes)
        stored = reader.read_digests(fd, start + nbytes, int(num_chunks_of(np.array([nbytes]), chunk)[0]))
        if stored is None or digest_of(reader.pool, stored.view(np.uint8)) != digest:
            return False
        done = 0
        piece = max(chunk, PIECE_BYTES // chunk * chunk)
        while done < nbytes:
            size = min(piece, nbytes - done)
            found = reader.digests(fd, start + done, size, chunk)
            self._progress(size)
            first = done // chunk
            if found is None or not np.array_equal(found, stored[first : first + len(found)]):
                return False
            done += size
        return True

    def _reader(self, piece: int, largest: int) -> _Reader:
        """This thread's own, with room for a piece."""
        need = min(piece, largest)
        reader: _Reader | None = getattr(self._own, "reader", None)
        if reader is None or len(reader.buffer) < need:
            reader = self._own.reader = _Reader(need)
        return reader


class _Reader:
    """A buffer, and what makes digests of it."""

    def __init__(self, nbytes: int) -> None:
        self.buffer: Bytes = np.empty(nbytes, dtype=np.uint8)
        self.pool = HostPool(1)

    def digests(self, fd: int, start: int, nbytes: int, chunk: int) -> Digests | None:
        """Of each chunk of these bytes; None where the file has ended."""
        if not _read(fd, start, self.buffer[:nbytes]):
            return None
        address, size = (np.array([n], dtype=np.int64) for n in (self.buffer.ctypes.data, nbytes))
        spans = chunk_spans(address, size, chunk)
        found = np.empty(len(spans), dtype=np.uint64)
        self.pool.digest(spans, found)
        return found

    def read_digests(self, fd: int, start: int, count: int) -> Digests | None:
        """Chunk digests as they are kept; None where the file has ended."""
        found = np.empty(count, dtype=np.uint64)
        return found if _read(fd, start, found.view(np.uint8)) else None


def whole_copies(damaged: Record, spec: ArenaSpec, others: Iterable[Verified]) -> list[Path]:
    """The arenas that have the same capture, and it is whole. ``spec``: of the arena that has it damaged.

    What a damaged fragment is a part of does not show: one of its owner's whole captures is taken for it.
    """
    return [
        other.file.path
        for other in others
        if other.file.spec is not None
        and other.file.spec.identity.owner == spec.identity.owner
        and other.file.spec.part.is_whole
        and any(
            record.key == damaged.key and (record.digest == damaged.digest or not spec.part.is_whole)
            for record in other.sound
        )
    ]


def _read(fd: int, start: int, into: Bytes) -> bool:
    """Fill an array from a file; False where the file has ended or cannot be read."""
    view = into.data
    while view:
        try:
            got = os.preadv(fd, [view], start)
        except OSError:
            return False
        if not got:
            return False
        view, start = view[got:], start + got
    return True


def _still_listed(records: Records, path: Path, fd: int) -> Records:
    """Those of the captures that the arena under this name, if it still is the same one, lists where they were."""
    if not records:
        return records
    again = look_at_arena(path, living=True)
    try:
        is_same = again is not None and os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        is_same = False
    if not is_same or again is None:
        return NO_RECORDS
    if again.page is None:  # it is damaged as a whole
        return records
    listed = set(again.page.records.table.tolist())
    return records.where(np.array([row in listed for row in records.table.tolist()], dtype=bool))
