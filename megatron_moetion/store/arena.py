# SPDX-License-Identifier: Apache-2.0
"""One rank's captures in memory that outlives the process.

An arena holds a header (who it belongs to, how it is laid out), two manifest pages and fixed slots. Who may write to it
is settled by the lock on its folder (``store/lock.py``): an arena has one writer because a rank of the node has one
process. Where its memory comes from is the matter of ``Memory``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_moetion.arrays import Bytes, Digests, Flags, Int64s
from megatron_moetion.errors import CorruptArena, IdentityMismatch
from megatron_moetion.store.manifest import (
    Page,
    Record,
    Records,
    current_page,
    decode_page,
    encode_page,
    successor,
)
from megatron_moetion.store.population import Population
from megatron_moetion.store.spec import FORMAT_VERSION, HEADER_PREFIX_BYTES, ArenaSpec, Layout, num_chunks

_NAME = b"MOETION"
_MAGIC = _NAME + str(FORMAT_VERSION).encode()
"""Every version begins with the name and one digit for the version, whatever follows."""
Read = Callable[[int, int], bytes]
"""From where on, and how many bytes; fewer at the end."""


class Memory(Protocol):
    """The memory of one arena, which a restarted process finds again by its name."""

    name: str
    """For messages."""

    @property
    def array(self) -> Bytes:
        """All bytes, writable. Arrays over them stay good for as long as they are referred to."""
        ...

    @property
    def has_file(self) -> bool:
        """Whether the memory still stands under its name, so that a restart would find it."""
        ...

    @property
    def population(self) -> Population:
        """How it got its pages."""
        ...

    def make_file_again(self) -> None:
        """Put all bytes under the name again, at the same addresses. ``StoreError`` where memory is short."""
        ...

    def remove(self) -> None:
        """Free the name."""
        ...

    def close(self) -> None:
        """Let go of the bytes; they stay under the name."""
        ...


class Arena:
    """An open arena. All methods may be called from any thread of the process that opened it.

    Views returned by ``payload`` and ``digests`` live as long as the arena is open; so do addresses.
    """

    def __init__(self, memory: Memory, write: Callable[[Bytes, bytes], None] | None = None) -> None:
        """Open what stands in ``memory``. Errors as ``read_arena``. ``write`` puts a page in its place."""
        view = memory.array

        def read(start: int, nbytes: int) -> bytes:
            return view[start : start + nbytes].tobytes()

        self.spec, pages, self._page = read_arena(read, len(view), memory.name)
        self._memory = memory
        self._view = view
        self._put = write or _put
        self._layout = Layout.of(self.spec)
        self._max_records = self.spec.num_records
        self._unit_bytes = self.spec.stored_bytes
        self._lock = threading.RLock()
        self._next_page = 1 - pages.index(self._page)
        older = pages[self._next_page]
        self._listed = self._slots_of(self._page)
        # A crash between the two writes of an edit leaves an older page that refers to more.
        self._only_older = self._slots_of(older) & ~self._listed if older else np.zeros_like(self._listed)
        self._taken = self._listed | self._only_older

    def close(self) -> None:
        """Let go of the memory; it stays under its name. Views of it stay good for as long as they are referred to."""
        with self._lock:
            self._view = self._view[:0].copy()
            self._memory.close()

    def remove(self) -> None:
        """Let go of the memory and free its name."""
        self._memory.remove()
        self.close()

    @property
    def name(self) -> str:
        """Of the memory, for messages."""
        return self._memory.name

    @property
    def has_file(self) -> bool:
        """See ``Memory``."""
        return self._memory.has_file

    @property
    def population(self) -> Population:
        """See ``Memory``."""
        return self._memory.population

    def make_file_again(self) -> None:
        """See ``Memory``. Nobody else may use the arena meanwhile."""
        with self._lock:
            self._memory.make_file_again()

    # -- reading --------------------------------------------------------------------------------------

    @property
    def page(self) -> Page:
        """The current manifest page."""
        with self._lock:
            return self._page

    @property
    def nbytes(self) -> int:
        """Size of the whole arena."""
        return self._layout.nbytes

    @property
    def memory(self) -> Bytes:
        """The whole arena, writable: for pinning it."""
        return self._view

    @property
    def unit_bytes(self) -> Int64s:
        """Bytes that a capture takes here, by unit."""
        return self._unit_bytes

    def payload(self, slot: int) -> Bytes:
        """The slot's capture bytes, writable."""
        start = self._layout.slot_starts[slot]
        return self._view[start : start + self._layout.slot_sizes[slot]]

    def digests(self, slot: int) -> Digests:
        """The slot's chunk digests, writable."""
        size = int(self._layout.slot_sizes[slot])
        start = self._layout.slot_starts[slot] + size
        return self._view[start : start + 8 * num_chunks(size, self.spec.identity.chunk_bytes)].view(np.uint64)

    def payloads(self, slots: Int64s) -> list[Bytes]:
        """The capture bytes of each slot, writable."""
        starts = self._layout.slot_starts[slots]
        ends = starts + self._layout.slot_sizes[slots]
        return [self._view[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]

    def payload_addresses(self, slots: Int64s) -> Int64s:
        """Where the capture bytes of each slot begin. The chunk digests follow them."""
        assert self._view.size, f"{self.name} is closed"
        return self._layout.slot_starts[slots] + self._view.ctypes.data

    def slot_bytes(self, slots: Int64s) -> Int64s:
        """The capture bytes of each slot."""
        return self._layout.slot_sizes[slots]

    def whole_records(self, records: Records) -> Records:
        """The captures that these records of the arena are of, as their owner lists them: size and digest of the whole.

        Slots are those of this arena. The fragments must be sound: what they are of stands before their bytes.
        """
        if self.spec.part.is_whole or not records:
            return records
        stored = ~records.is_zero
        starts = self._layout.slot_starts[records.table["slot"][stored].astype(np.int64)]
        digests = records.table["digest"].copy()
        digests[stored] = self._view[starts[:, None] + np.arange(8)].copy().view("<u8").ravel()
        sizes = np.array([nbytes for _, _, nbytes in self.spec.units], dtype=np.int64)[records.table["unit"]]
        return records.replace(digest=digests, nbytes=np.where(stored, sizes, 0))

    # -- writing --------------------------------------------------------------------------------------

    def acquire(self, nbytes: int) -> int | None:
        """A free slot for a capture of exactly ``nbytes``, or None. It stays taken until released or dropped."""
        slots = self.acquire_all(np.array([nbytes], dtype=np.int64))
        return None if slots is None else int(slots[0])

    def acquire_all(self, sizes: Int64s) -> Int64s | None:
        """A free slot for each capture of exactly so many bytes, int64[n]; None, and no slot, where one is missing."""
        slots = np.empty(len(sizes), dtype=np.int64)
        with self._lock:
            for nbytes in np.unique(sizes).tolist():
                wanted = sizes == nbytes
                first, count = self._layout.pools.get(nbytes, (0, 0))
                free = np.flatnonzero(~self._taken[first : first + count])
                number = int(np.count_nonzero(wanted))
                if len(free) < number:
                    return None
                slots[wanted] = first + free[:number]
            self._taken[slots] = True
            return slots

    def can_list(self, count: int) -> bool:
        """Whether a page has room for so many more records."""
        return len(self.page.records) + count <= self._max_records

    def release(self, slots: Iterable[int] | Int64s) -> None:
        """Give back slots that were acquired and never committed; ``NO_SLOT`` is passed over."""
        found = np.fromiter(slots, dtype=np.int64)
        found = found[found < self.spec.num_slots]
        with self._lock:
            listed = found[self._listed[found]]
            if len(listed):
                raise AssertionError(f"slot {listed[0]} of {self.name} holds a whole capture; drop it by an edit")
            self._taken[found] = False

    def add(self, records: Sequence[Record]) -> None:
        """Make captures visible, all of them or none. A capture of the same unit and iteration is replaced."""
        new = Records.of(records)
        self.edit(lambda page: {"records": page.records.followed_by(new)})

    def edit(self, change: Callable[[Page], Mapping[str, Any]]) -> None:
        """Write the page that follows the current one, with the fields that ``change`` returns; then make it current.

        Where captures are dropped, the other page is written too, so that no valid page refers to their slots
        when these are handed out again.
        """
        with self._lock:
            before = self._listed | self._only_older
            self._write(successor(self._page, **change(self._page)))
            dropped = before & ~self._listed
            if dropped.any():
                self._write(successor(self._page))
                self._only_older = np.zeros_like(dropped)
                self._taken &= ~dropped

    def _write(self, page: Page) -> None:
        start = self._layout.page_starts[self._next_page]
        data = encode_page(page, self._max_records)
        self._put(self._view[start : start + len(data)], data)
        self._page = page
        self._listed = self._slots_of(page)
        self._next_page = 1 - self._next_page

    def _slots_of(self, page: Page) -> Flags:
        """Of each slot, whether a page refers to it."""
        slots = page.records.table["slot"]
        found = np.zeros(self.spec.num_slots, dtype=bool)
        found[slots[slots < self.spec.num_slots]] = True
        return found


def _put(place: Bytes, data: bytes) -> None:
    place[:] = np.frombuffer(data, dtype=np.uint8)


def first_bytes(spec: ArenaSpec, page: Page) -> tuple[tuple[int, bytes], ...]:
    """What must stand in new, zeroed memory before it is an arena: offsets and bytes.

    ``page`` is the first manifest page and must list no captures.
    """
    assert not page.records, "a new arena holds no captures"
    document = spec.to_json()
    header = _MAGIC + len(document).to_bytes(8, "little") + _digest(document) + document
    return (0, header), (Layout.of(spec).page_starts[0], encode_page(page, spec.num_records))


def read_arena(read: Read, nbytes: int, name: str) -> tuple[ArenaSpec, list[Page | None], Page]:
    """The header; both manifest pages, None where one does not verify; and of them the current one.

    ``read`` reads from all ``nbytes`` of the arena, also while another process writes to it. Raises ``CorruptArena``
    where header or both pages fail to verify; ``IdentityMismatch`` where another version of the format wrote it.
    """
    spec = _read_spec(read, nbytes, name)
    if nbytes != spec.nbytes:
        raise CorruptArena(f"{name} has {nbytes} bytes; its header says {spec.nbytes}")
    layout = Layout.of(spec)
    pages = [decode_page(read(start, layout.page_area)) for start in layout.page_starts]
    page = current_page(pages)
    if page is None:
        raise CorruptArena(f"{name}: neither manifest page verifies")
    return spec, pages, page


def _read_spec(read: Read, nbytes: int, name: str) -> ArenaSpec:
    """The header, its version first: what another version wrote is not damaged, and not ours to judge."""
    prefix = read(0, HEADER_PREFIX_BYTES)
    if prefix.startswith(_NAME) and prefix[7:8].isdigit() and prefix[:8] != _MAGIC:
        raise _other_version(name, prefix[7:8].decode())
    length = int.from_bytes(prefix[8:16], "little")
    if len(prefix) < HEADER_PREFIX_BYTES or prefix[:8] != _MAGIC or length > nbytes:
        raise CorruptArena(f"{name} is not an arena, or its header is damaged")
    document = read(HEADER_PREFIX_BYTES, length)
    if _digest(document) != prefix[16:]:
        raise CorruptArena(f"{name}: the header does not verify")
    try:
        return ArenaSpec.from_json(document)
    except CorruptArena as error:  # it verifies, so this is what was written
        raise _other_version(name, f"{FORMAT_VERSION} with other fields") from error


def _other_version(name: str, version: str) -> IdentityMismatch:
    return IdentityMismatch(
        f"{name} was written by another version of MoEtion: its format is {version!r}, this version reads "
        f"{FORMAT_VERSION}. It is left as it is: go on with that version, give another --moetion-run-id, or delete the "
        f"folder if its state is no longer wanted"
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
