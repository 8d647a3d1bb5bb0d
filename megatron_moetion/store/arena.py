# SPDX-License-Identifier: Apache-2.0
"""One rank's captures in a shared-memory file that outlives the process.

A file holds a header (who it belongs to, how it is laid out), two manifest pages and fixed slots. It is
allocated whole when it is made, so memory cannot run out later. Who may write to it is settled by the lock on its
folder (``store/lock.py``): an arena has one writer because a rank of the node has one process.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moetion.errors import CorruptArena, IdentityMismatch, StoreError
from megatron_moetion.store.files import open_regular
from megatron_moetion.store.manifest import (
    NO_SLOT,
    Page,
    Record,
    current_page,
    decode_page,
    encode_page,
    successor,
)
from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.store.spec import FORMAT_VERSION, HEADER_PREFIX_BYTES, ArenaSpec, Layout, num_chunks

_NAME = b"MOETION"
_MAGIC = _NAME + str(FORMAT_VERSION).encode()
"""Every version begins with the name and one digit for the version, whatever follows."""
Bytes = npt.NDArray[np.uint8]
Digests = npt.NDArray[np.uint64]


class Arena:
    """An open arena. All methods may be called from any thread of the process that opened it.

    Views returned by ``payload`` and ``digests`` live as long as the arena is open.
    """

    def __init__(
        self, path: Path, spec: ArenaSpec, mapping: MappedFile, inode: int, pages: Sequence[Page | None], page: Page
    ) -> None:
        self.path = path
        self.spec = spec
        self._mapping: MappedFile | None = mapping
        self._inode = inode
        self._view: Bytes = mapping.array()
        self._layout = Layout.of(spec)
        self._lock = threading.RLock()
        self._page = page
        self._next_page = 1 - pages.index(page)
        older = pages[self._next_page]
        # A crash between the two writes of an edit leaves an older page that refers to more.
        self._only_older = _slots(older) - _slots(page) if older else set()
        self._taken = _slots(page) | self._only_older
        self._free: dict[int, list[int]] = defaultdict(list)
        for slot in reversed(range(spec.num_slots)):
            if slot not in self._taken:
                self._free[self._layout.slot_sizes[slot]].append(slot)

    # -- making and opening ---------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, spec: ArenaSpec, page: Page) -> Arena:
        """Make and allocate a new arena; the file appears under its name only when it is complete.

        ``page`` is its first manifest page and must list no captures. Raises ``StoreError`` where memory is short.
        """
        assert not page.records, "a new arena holds no captures"
        document = spec.to_json()
        prefix = _MAGIC + len(document).to_bytes(8, "little") + _digest(document)
        for left in path.parent.glob(f"{path.stem}.*.tmp"):
            left.unlink(missing_ok=True)  # a process was killed while it made this arena; its file holds memory

        def make(fd: int) -> MappedFile:
            mapping = MappedFile(fd, spec.nbytes)
            view = mapping.array()
            first = encode_page(page, spec.num_records)
            for start, data in ((0, prefix + document), (Layout.of(spec).page_starts[0], first)):
                view[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
            return mapping

        mapping, inode = _new_file(path, spec.nbytes, make)
        return cls(path, spec, mapping, inode, (page, None), page)

    @classmethod
    def open(cls, path: Path) -> Arena:
        """Open an arena for writing.

        Raises ``CorruptArena`` where it is no readable file of this user, or header or both pages fail to verify;
        ``IdentityMismatch`` where another version of the format wrote it.
        """
        fd = open_regular(path, os.O_RDWR)
        try:
            spec = _read_spec(fd, path)
            status = os.fstat(fd)
            if status.st_size != spec.nbytes:
                raise CorruptArena(f"{path} has {status.st_size} bytes; its header says {spec.nbytes}")
            mapping = MappedFile(fd, spec.nbytes)
            layout, view = Layout.of(spec), mapping.array()
            pages, page = _newest([view[s : s + layout.page_area].tobytes() for s in layout.page_starts], path)
        finally:
            os.close(fd)
        return cls(path, spec, mapping, status.st_ino, pages, page)

    def close(self) -> None:
        """Let go of the file; it stays. Views of it stay good for as long as they are referred to."""
        with self._lock:
            self._mapping, self._view = None, self._view[:0].copy()

    def remove(self) -> None:
        """Delete the file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.close()

    @property
    def has_file(self) -> bool:
        """Whether the file still stands under its name. Without it the arena cannot be found after a restart."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def make_file_again(self) -> None:
        """Write all that the arena holds to a new file, which takes the place of one that was deleted.

        Addresses stay good, the memory behind them is another one. Nobody else may use the arena meanwhile. Raises
        ``StoreError`` where memory is short: the deleted file's memory is only given back afterwards.
        """

        def take(fd: int) -> MappedFile:
            assert self._mapping is not None, f"{self.path} is closed"
            left = self._view.data
            while left:
                left = left[os.write(fd, left[: 1 << 30]) :]
            self._mapping.replace(fd)
            return self._mapping

        with self._lock:
            self._mapping, self._inode = _new_file(self.path, self.nbytes, take)

    # -- reading --------------------------------------------------------------------------------------

    @property
    def page(self) -> Page:
        """The current manifest page."""
        with self._lock:
            return self._page

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._layout.nbytes

    @property
    def memory(self) -> Bytes:
        """The whole file, writable: for pinning it."""
        return self._view

    def payload(self, slot: int) -> Bytes:
        """The slot's capture bytes, writable."""
        start = self._layout.slot_starts[slot]
        return self._view[start : start + self._layout.slot_sizes[slot]]

    def digests(self, slot: int) -> Digests:
        """The slot's chunk digests, writable."""
        size = self._layout.slot_sizes[slot]
        start = self._layout.slot_starts[slot] + size
        return self._view[start : start + 8 * num_chunks(size, self.spec.identity.chunk_bytes)].view(np.uint64)

    def find(self, unit: int, iteration: int) -> Record | None:
        """The whole capture of one unit at one iteration."""
        return next((r for r in self.page.records if r.key == (unit, iteration)), None)

    # -- writing --------------------------------------------------------------------------------------

    def acquire(self, nbytes: int) -> int | None:
        """A free slot for a capture of exactly ``nbytes``, or None. It stays taken until released or dropped."""
        with self._lock:
            if not self._free[nbytes]:
                return None
            slot = self._free[nbytes].pop()
            self._taken.add(slot)
            return slot

    def can_list(self, count: int) -> bool:
        """Whether a page has room for so many more records."""
        return len(self.page.records) + count <= self.spec.num_records

    def release(self, slots: Iterable[int]) -> None:
        """Give back slots that were acquired and never committed."""
        with self._lock:
            listed = _slots(self._page)
            for slot in slots:
                if slot in listed:
                    raise AssertionError(f"slot {slot} of {self.path} holds a whole capture; drop it by an edit")
                self._put_back(slot)

    def add(self, records: Sequence[Record]) -> None:
        """Make captures visible, all of them or none. A capture of the same unit and iteration is replaced."""
        new = {r.key for r in records}
        self.edit(lambda page: {"records": (*(r for r in page.records if r.key not in new), *records)})

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        """Write the page that follows the current one, with the fields that ``change`` returns; then make it current.

        Where captures are dropped, the other page is written too, so that no valid page refers to their slots
        when these are handed out again.
        """
        with self._lock:
            before = _slots(self._page) | self._only_older
            self._write(successor(self._page, **change(self._page)))
            dropped = before - _slots(self._page)
            if dropped:
                self._write(successor(self._page))
                self._only_older = set()
                for slot in dropped:
                    self._put_back(slot)

    def _put_back(self, slot: int) -> None:
        if slot in self._taken:
            self._taken.remove(slot)
            self._free[self._layout.slot_sizes[slot]].append(slot)

    def _write(self, page: Page) -> None:
        start = self._layout.page_starts[self._next_page]
        data = encode_page(page, self.spec.num_records)
        self._view[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        self._page = page
        self._next_page = 1 - self._next_page


def _slots(page: Page) -> set[int]:
    return {r.slot for r in page.records} - {NO_SLOT}


def peek(path: Path) -> tuple[ArenaSpec, Page]:
    """Header and manifest of an arena file, also while another process writes to it. Raises as ``Arena.open``."""
    fd = open_regular(path, os.O_RDONLY)
    try:
        spec = _read_spec(fd, path)
        if os.fstat(fd).st_size != spec.nbytes:
            raise CorruptArena(f"{path} has {os.fstat(fd).st_size} bytes; its header says {spec.nbytes}")
        layout = Layout.of(spec)
        return spec, _newest([os.pread(fd, layout.page_area, start) for start in layout.page_starts], path)[1]
    finally:
        os.close(fd)


def _newest(areas: Sequence[bytes], path: Path) -> tuple[list[Page | None], Page]:
    """Both manifest pages, None where one does not verify, and the current one."""
    pages = [decode_page(area) for area in areas]
    page = current_page(pages)
    if page is None:
        raise CorruptArena(f"{path}: neither manifest page verifies")
    return pages, page


def _read_spec(fd: int, path: Path) -> ArenaSpec:
    """The header, its version first: what another version wrote is not damaged, and not ours to judge."""
    prefix = os.pread(fd, HEADER_PREFIX_BYTES, 0)
    if prefix.startswith(_NAME) and prefix[7:8].isdigit() and prefix[:8] != _MAGIC:
        raise _other_version(path, prefix[7:8].decode())
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < HEADER_PREFIX_BYTES or prefix[:8] != _MAGIC or length > os.fstat(fd).st_size:
        raise CorruptArena(f"{path} is not an arena, or its header is damaged")
    document = os.pread(fd, length, HEADER_PREFIX_BYTES)
    if _digest(document) != prefix[16:]:
        raise CorruptArena(f"{path}: the header does not verify")
    try:
        return ArenaSpec.from_json(document)
    except CorruptArena as error:  # it verifies, so this is what was written
        raise _other_version(path, f"{FORMAT_VERSION} with other fields") from error


def _other_version(path: Path, version: str) -> IdentityMismatch:
    return IdentityMismatch(
        f"{path} was written by another version of MoEtion: its format is {version!r}, this version reads "
        f"{FORMAT_VERSION}. It is left as it is: go on with that version, give another --moetion-run-id, or delete the "
        f"folder if its state is no longer wanted"
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def free_bytes(folder: Path) -> int:
    """Room that the file system of a folder has left; for one in memory, memory."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def _no_space(folder: Path, need: int) -> StoreError:
    have = free_bytes(folder)
    return StoreError(
        f"the store {folder} has {have / 2**20:,.1f} MiB free and this arena needs {need / 2**20:,.1f} MiB: "
        f"enlarge shared memory, point --moetion-store elsewhere, or lower --moetion-replicas, in mode 'popularity' "
        f"--moetion-max-experts-per-snapshot, in mode 'exact' --moetion-period"
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
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            raise _no_space(path.parent, nbytes) from error
        mapping = make(fd)
        os.rename(scratch, path)
        return mapping, os.fstat(fd).st_ino
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
