# SPDX-License-Identifier: Apache-2.0
"""The table that says which captures of an arena are whole: pages to bytes and back. Pure.

An arena holds two pages. A commit encodes a new page over the older one; the page with the higher
sequence number whose digest verifies is the current one. A write cut short at any byte therefore leaves
the other page in force. Byte layout: ``docs/snapshot_format.md``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megatron_moetion.arrays import Flags

PAGE_MAGIC = b"MOEPAGE1"
_HEAD = struct.Struct("<8sQIIqI4xQ")  # magic, sequence, epoch, records, stable, branches, lineage
_BRANCH = struct.Struct("<IIq")  # epoch, nonce, iteration that it branched off at
_DIGEST_BYTES = 16
MAX_BRANCHES = 32
"""Recoveries remembered. Captures of a history that branched off earlier are refused."""

NO_SLOT = 0xFFFFFFFF
"""In place of a slot: every byte of the capture is zero, so it needs none."""

_LAST = (1 << 63) - 1
"""No iteration is later."""
ITERATIONS_MAX = 1 << 40
"""No run comes so far."""
_EPOCHS_MAX = 1 << 31

RECORD = np.dtype(
    [
        ("unit", "<u4"),
        ("epoch", "<u4"),
        ("iteration", "<i8"),
        ("slot", "<u4"),
        ("reserved", "<u4"),
        ("nbytes", "<u8"),
        ("digest", "<u8"),
        ("tokens", "<u8"),
    ]
)


@dataclass(frozen=True, kw_only=True, order=True)
class Record:
    """One whole capture: the bytes in ``slot`` are unit ``unit`` as of the end of ``iteration``.

    ``digest`` is the digest of the capture's chunk digests. ``tokens`` counts what this rank's shard of the
    expert had processed up to the capture since the run began (0 for other units). A capture of nothing but zeros is
    represented by its record alone: ``slot`` is ``NO_SLOT``, ``nbytes`` and ``digest`` are 0.
    """

    unit: int
    iteration: int
    epoch: int
    slot: int
    nbytes: int
    digest: int
    tokens: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What a capture is identified by inside one history."""
        return (self.unit, self.iteration)

    @property
    def is_zero(self) -> bool:
        """Whether all bytes are zero, and none of them in a slot."""
        return self.slot == NO_SLOT


class Records(Sequence[Record]):
    """Captures in a fixed order, no two of one unit and iteration, as the table in which they are stored and sent.

    ``table`` is a read-only array of ``RECORD``. Iteration makes ``Record`` objects, for code that is not hot.
    """

    __slots__ = ("table",)

    def __init__(self, table: npt.NDArray[np.void] = np.empty(0, dtype=RECORD)) -> None:  # noqa: B008  # read-only
        self.table = table.view()
        self.table.flags.writeable = False

    @classmethod
    def of(cls, records: Iterable[Record]) -> Records:
        """These records."""
        if isinstance(records, Records):
            return records
        rows = [(r.unit, r.epoch, r.iteration, r.slot, 0, r.nbytes, r.digest, r.tokens) for r in records]
        return cls(np.array(rows, dtype=RECORD))

    @classmethod
    def make(cls, count: int, **columns: Any) -> Records:
        """``count`` records with these fields, each one value or one a record; others are 0."""
        return cls(np.zeros(count, dtype=RECORD)).replace(**columns)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview | npt.NDArray[np.uint8]) -> Records:
        """The records of a table that was stored or sent."""
        table: npt.NDArray[np.void] = np.frombuffer(data, dtype=RECORD).copy()
        table["reserved"] = 0
        return cls(table)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        return Records(self.table[index]) if isinstance(index, slice) else _record(self.table[index].item())

    def __iter__(self) -> Iterator[Record]:
        return map(_record, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return np.array_equal(self.table, other.table) if isinstance(other, Records) else list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Records({list(self)})"

    def __add__(self, later: Records) -> Records:
        return Records(np.concatenate([self.table, later.table]))

    def where(self, wanted: Flags) -> Records:
        """Those for which ``wanted``, bool[n], says so."""
        return Records(self.table[wanted])

    def replace(self, **columns: Any) -> Records:
        """The same records with other values in these fields."""
        table = self.table.copy()
        for name, values in columns.items():
            table[name] = values
        return Records(table)

    def followed_by(self, later: Records) -> Records:
        """These records except those that ``later`` has too, then those of ``later``."""
        maybe = np.isin(self.table["iteration"], later.table["iteration"])
        if maybe.any():
            keys = set(later.keys)
            maybe[maybe] = [key in keys for key in self.where(maybe).keys]
        return self.where(~maybe) + later

    def sorted(self) -> Records:
        """By unit, then by iteration."""
        return Records(self.table[np.lexsort((self.table["iteration"], self.table["unit"]))])

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Unit and iteration of each."""
        return list(zip(self.table["unit"].tolist(), self.table["iteration"].tolist(), strict=True))

    @property
    def is_zero(self) -> Flags:
        """Of each, whether all bytes are zero, and none of them in a slot; bool[n]."""
        found: Flags = self.table["slot"] == NO_SLOT
        return found


NO_RECORDS = Records()


def _record(row: tuple[int, ...]) -> Record:
    unit, epoch, iteration, slot, _, nbytes, digest, tokens = row
    return Record(unit=unit, iteration=iteration, epoch=epoch, slot=slot, nbytes=nbytes, digest=digest, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Recovery number ``epoch`` went back to ``iteration``: older captures beyond it are a dead history.

    The random ``nonce`` tells two recoveries of one number apart: one may have been cut short on a node that then
    was away while the other took place.
    """

    epoch: int
    iteration: int
    nonce: int = 0


@dataclass(frozen=True, kw_only=True)
class Page:
    """One state of the manifest. ``stable`` is -1 while no iteration is."""

    sequence: int = 0
    epoch: int = 0
    stable: int = -1
    lineage: int = 0
    """When the run last began from nothing or from disk (Unix time, ns). Older lineages are dead altogether."""
    branches: tuple[Branch, ...] = ()
    records: Records = NO_RECORDS
    """Any sequence of ``Record`` is taken."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", Records.of(self.records))


def page_bytes(max_records: int) -> int:
    """Bytes that a page for so many records takes."""
    return _HEAD.size + MAX_BRANCHES * _BRANCH.size + max_records * RECORD.itemsize + _DIGEST_BYTES


def encode_page(page: Page, max_records: int) -> bytes:
    """The page's bytes: head, branches, records, digest. The rest of the page area keeps what it held."""
    if len(page.records) > max_records:
        raise ValueError(f"{len(page.records)} records do not fit in a page for {max_records}")
    branches = page.branches[-MAX_BRANCHES:]
    head = (page.sequence, page.epoch, len(page.records), page.stable, len(branches), page.lineage)
    body = _HEAD.pack(PAGE_MAGIC, *head)
    body += b"".join(_BRANCH.pack(b.epoch, b.nonce, b.iteration) for b in branches)
    table: bytes = page.records.table.tobytes()
    body += table
    return body + _digest(body)


def decode_page(data: bytes | memoryview) -> Page | None:
    """The page in ``data``, or None where it is torn, damaged, was never written, or none that a run could write."""
    if len(data) < _HEAD.size + _DIGEST_BYTES:
        return None
    magic, sequence, epoch, num_records, stable, num_branches, lineage = _HEAD.unpack_from(data, 0)
    end = _HEAD.size + num_branches * _BRANCH.size + num_records * RECORD.itemsize
    if magic != PAGE_MAGIC or num_branches > MAX_BRANCHES or end + _DIGEST_BYTES > len(data):
        return None
    if _digest(data[:end]) != bytes(data[end : end + _DIGEST_BYTES]):
        return None
    branches = tuple(
        Branch(epoch=e, iteration=i, nonce=n)
        for e, n, i in (_BRANCH.unpack_from(data, _HEAD.size + n * _BRANCH.size) for n in range(num_branches))
    )
    page = Page(
        sequence=sequence,
        epoch=epoch,
        stable=stable,
        lineage=lineage,
        branches=branches,
        records=Records.from_bytes(data[end - num_records * RECORD.itemsize : end]),
    )
    return page if is_possible(page) else None


def is_possible(page: Page) -> bool:
    """Whether a run can have come to this page, and can go on from it: a later one must fit the format too."""
    numbers = (page.sequence, page.lineage, page.epoch, *(b.nonce for b in page.branches))
    limits = (_LAST, _LAST, _EPOCHS_MAX, *[1 << 32] * len(page.branches))
    iteration, epochs = page.records.table["iteration"], [b.epoch for b in page.branches]
    return (
        all(0 <= number < limit for number, limit in zip(numbers, limits, strict=True))
        and -1 <= page.stable < ITERATIONS_MAX
        and all(0 <= b.iteration < ITERATIONS_MAX and 0 < b.epoch <= page.epoch for b in page.branches)
        and all(one < other for one, other in pairwise(epochs))
        and bool(((iteration >= 0) & (iteration < ITERATIONS_MAX)).all())
        and bool((page.records.table["epoch"] <= page.epoch).all())
    )


def current_page(pages: Iterable[Page | None]) -> Page | None:
    """The valid page with the highest sequence number."""
    return max((p for p in pages if p is not None), key=lambda p: p.sequence, default=None)


def in_history(records: Records, branches: Sequence[Branch], epoch: int) -> Flags:
    """Whether each capture belongs to the history of ``epoch``, whose recoveries are ``branches``; bool[n].

    A capture of an older epoch survives the later recoveries only if none of them went back to before it.
    """
    found = np.zeros(len(records), dtype=bool)
    for old in np.unique(records.table["epoch"]).tolist():
        later = [b.iteration for b in branches if old < b.epoch <= epoch]
        if old <= epoch and len(later) >= epoch - old:  # else recoveries in between are no longer remembered
            is_old = records.table["epoch"] == old
            found[is_old] = records.table["iteration"][is_old] <= min(later, default=_LAST)
    return found


def successor(page: Page, **changes: object) -> Page:
    """The page that follows ``page``."""
    return replace(page, sequence=page.sequence + 1, **changes)  # type: ignore[arg-type]  # fields of Page


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
