# SPDX-License-Identifier: Apache-2.0
"""One rank's captures in a shared-memory file that outlives the process.

A file holds a header (who it belongs to, how it is laid out), two manifest pages and fixed slots. It is
allocated whole when it is made, so memory cannot run out later. Who may write to it is settled by the lock on its
folder (``store/lock.py``): an arena has one writer because a rank of the node has one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
    page_bytes,
    successor,
)
from megatron_moetion.store.mapping import MappedFile
from megatron_moetion.units import Inventory, UnitKind, align_up

FORMAT_VERSION = 1
_NAME = b"MOETION"
_MAGIC = _NAME + str(FORMAT_VERSION).encode()
"""Every version begins with the name and one digit for the version, whatever follows."""
_HEADER_PREFIX_BYTES = 8 + 8 + 16  # magic, JSON length, BLAKE2b-128 of the JSON
_BLOCK_BYTES = 4096
_SPELLED = {name: f"--moetion-{name.replace('_', '-')}" for name in ("run_id", "mode", "chunk_bytes", "period")}
"""Fields of the identity that are flags."""

Bytes = npt.NDArray[np.uint8]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class ArenaIdentity:
    """Whose state an arena holds. Arenas of one run differ in ``owner`` and, with it, ``layout``."""

    run_id: str
    owner: int
    world_size: int
    topology: str
    layout: str
    mode: str
    chunk_bytes: int
    period: int = 0
    """Of mode ``exact``; 0 in others."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class ArenaSpec:
    """All that is needed to make an arena: identity, the owner's units, and slots as (bytes, count)."""

    identity: ArenaIdentity
    units: tuple[tuple[str, int, int], ...]
    """Name, kind and capture bytes of each unit, by unit number."""
    slots: tuple[tuple[int, int], ...]
    experts: int = 0
    """Of the owner's experts, how many a snapshot may hold: what the number of slots comes from. For messages."""

    @classmethod
    def of(
        cls, identity: ArenaIdentity, inventory: Inventory, copies: Mapping[str, int], experts: int = 0
    ) -> ArenaSpec:
        """Slots for ``copies[unit name]`` captures of each unit, pooled by size."""
        pools: Counter[int] = Counter()
        for unit in inventory.units:
            pools[unit.nbytes] += copies[unit.name]
        return cls(
            identity=identity,
            units=tuple((u.name, int(u.kind), u.nbytes) for u in inventory.units),
            slots=tuple(sorted(pools.items())),
            experts=experts,
        )

    @property
    def num_slots(self) -> int:
        """Slots in total."""
        return sum(count for _, count in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        chunk_bytes = self.identity.chunk_bytes
        return _slots_start(self) + sum(count * _stride(size, chunk_bytes) for size, count in self.slots)

    @property
    def num_records(self) -> int:
        """The most records a page can need: one a slot; with gradient logs as many again, of captures of zeros."""
        return self.num_slots * (2 if any(kind == UnitKind.LOG for _, kind, _ in self.units) else 1)

    def to_json(self) -> bytes:
        """The header's document."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ArenaSpec:
        """Inverse of ``to_json``; raises ``CorruptArena`` on a document of another shape."""
        try:
            raw: dict[str, Any] = json.loads(data)
            found = cls(
                identity=ArenaIdentity(**raw["identity"]),
                units=tuple((str(n), int(UnitKind(k)), int(b)) for n, k, b in raw["units"]),
                slots=tuple((int(b), int(c)) for b, c in raw["slots"]),
                experts=int(raw.get("experts", 0)),
            )
            for field in fields(ArenaIdentity):
                value = getattr(found.identity, field.name)
                if type(value).__name__ != field.type:
                    raise ValueError(f"{field.name} is {value!r}")
            sizes = [b for _, _, b in found.units] + [n for slot in found.slots for n in slot]
            if min(sizes, default=0) < 0 or found.identity.chunk_bytes < 1:
                raise ValueError("a size is negative")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArena(f"the arena header is not one of format {FORMAT_VERSION}: {error}") from error
        return found


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Byte offsets inside the file."""

    page_starts: tuple[int, int]
    page_area: int
    slot_starts: tuple[int, ...]
    slot_sizes: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, spec: ArenaSpec) -> _Layout:
        cursor = _slots_start(spec)
        area = _round(page_bytes(spec.num_records))
        header = cursor - 2 * area
        starts, sizes = [], []
        for size, count in spec.slots:
            stride = _stride(size, spec.identity.chunk_bytes)
            for _ in range(count):
                starts.append(cursor)
                sizes.append(size)
                cursor += stride
        return cls(
            page_starts=(header, header + area),
            page_area=area,
            slot_starts=tuple(starts),
            slot_sizes=tuple(sizes),
            nbytes=cursor,
        )


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
        self._layout = _Layout.of(spec)
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
            for start, data in ((0, prefix + document), (_Layout.of(spec).page_starts[0], first)):
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
            layout, view = _Layout.of(spec), mapping.array()
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


def arena_name(owner: int) -> str:
    """File name of one rank's arena inside a node's store."""
    return f"rank{owner:05d}.arena"


def num_chunks(nbytes: int, chunk_bytes: int) -> int:
    """Chunks of a capture."""
    return -(-nbytes // chunk_bytes)


def peek(path: Path) -> tuple[ArenaSpec, Page]:
    """Header and manifest of an arena file, also while another process writes to it. Raises as ``Arena.open``."""
    fd = open_regular(path, os.O_RDONLY)
    try:
        spec = _read_spec(fd, path)
        if os.fstat(fd).st_size != spec.nbytes:
            raise CorruptArena(f"{path} has {os.fstat(fd).st_size} bytes; its header says {spec.nbytes}")
        layout = _Layout.of(spec)
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
    prefix = os.pread(fd, _HEADER_PREFIX_BYTES, 0)
    if prefix.startswith(_NAME) and prefix[7:8].isdigit() and prefix[:8] != _MAGIC:
        raise _other_version(path, prefix[7:8].decode())
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < _HEADER_PREFIX_BYTES or prefix[:8] != _MAGIC or length > os.fstat(fd).st_size:
        raise CorruptArena(f"{path} is not an arena, or its header is damaged")
    document = os.pread(fd, length, _HEADER_PREFIX_BYTES)
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


def check_identity(found: ArenaSpec, expected: ArenaSpec, path: Path) -> None:
    """Raise ``IdentityMismatch``, naming both sides, unless the two belong together.

    Arenas of different owners differ in layout and slots; those are compared only where the owner is the same.
    """
    ours, theirs = asdict(expected.identity), asdict(found.identity)
    sides = [
        f"{_SPELLED.get(k, k)}: the arena has {theirs[k]!r}, this run has {ours[k]!r}"
        for k in ours
        if k not in ("owner", "layout") and ours[k] != theirs[k]
    ]
    if not sides and found.identity.owner == expected.identity.owner:
        sides = _other_shape(found, expected)  # where settings differ, this follows from them
    if sides:
        raise IdentityMismatch(
            f"{path} belongs to something else ({'; '.join(sides)}). Go back to what it was made with, take another "
            f"--moetion-run-id, or delete it"
        )


def _slots_start(spec: ArenaSpec) -> int:
    return _round(_HEADER_PREFIX_BYTES + len(spec.to_json())) + 2 * _round(page_bytes(spec.num_records))


def _stride(nbytes: int, chunk_bytes: int) -> int:
    """Bytes of a slot: a capture and its chunk digests."""
    return _round(nbytes + 8 * num_chunks(nbytes, chunk_bytes))


def _other_shape(found: ArenaSpec, expected: ArenaSpec) -> list[str]:
    """How two arenas of one owner differ, by what a user may have changed."""
    if found.identity.layout != expected.identity.layout:
        return ["layout: the model, or how it is spread over ranks, is another one"]
    if found.slots == expected.slots:
        return []
    if found.experts != expected.experts:
        return [
            f"room for {found.experts} experts a snapshot, this run wants {expected.experts}; one of "
            f"--moetion-[max-]experts-per-snapshot, -snapshot-bytes, -lost-token-budget differs"
        ]
    return ["slots: room for other captures than this run makes"]


def _round(nbytes: int) -> int:
    return -(-align_up(nbytes) // _BLOCK_BYTES) * _BLOCK_BYTES


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
