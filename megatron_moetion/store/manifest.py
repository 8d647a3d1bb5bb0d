# SPDX-License-Identifier: Apache-2.0
"""The table that says which captures of an arena are whole: pages to bytes and back. Pure.

An arena holds two pages. A commit encodes a new page over the older one; the page with the higher
sequence number whose digest verifies is the current one. A write cut short at any byte therefore leaves
the other page in force. Byte layout: ``docs/snapshot_format.md``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

PAGE_MAGIC = b"MOEPAGE1"
_HEAD = struct.Struct("<8sQIIqI4xQ")  # magic, sequence, epoch, records, stable, branches, lineage
_BRANCH = struct.Struct("<IIq")  # epoch, nonce, iteration that it branched off at
_DIGEST_BYTES = 16
MAX_BRANCHES = 32
"""Recoveries remembered. Captures of a history that branched off earlier are refused."""

NO_SLOT = 0xFFFFFFFF
"""In place of a slot: every byte of the capture is zero, so it needs none."""

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
    told by its record alone: ``slot`` is ``NO_SLOT``, ``nbytes`` and ``digest`` are 0.
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
    records: tuple[Record, ...] = ()


def record_table(records: Sequence[Record]) -> npt.NDArray[np.void]:
    """The records as a structured array, the form in which they are stored and sent."""
    rows = [(r.unit, r.epoch, r.iteration, r.slot, 0, r.nbytes, r.digest, r.tokens) for r in records]
    return np.array(rows, dtype=RECORD)


def records_of(table: npt.NDArray[np.void]) -> tuple[Record, ...]:
    """Inverse of ``record_table``."""
    return tuple(
        Record(unit=u, epoch=e, iteration=i, slot=s, nbytes=n, digest=d, tokens=t)
        for u, e, i, s, _, n, d, t in table.tolist()
    )


def page_bytes(max_records: int) -> int:
    """Bytes that a page for so many records takes."""
    return _HEAD.size + MAX_BRANCHES * _BRANCH.size + max_records * RECORD.itemsize + _DIGEST_BYTES


def encode_page(page: Page, max_records: int) -> bytes:
    """The page's bytes: head, branches, records, digest. The rest of the page area keeps what it held."""
    if len(page.records) > max_records:
        raise ValueError(f"{len(page.records)} records do not fit in a page for {max_records}")
    branches = page.branches[-MAX_BRANCHES:]
    table = record_table(page.records)
    head = (page.sequence, page.epoch, len(page.records), page.stable, len(branches), page.lineage)
    body = _HEAD.pack(PAGE_MAGIC, *head)
    body += b"".join(_BRANCH.pack(b.epoch, b.nonce, b.iteration) for b in branches)
    body += table.tobytes()
    return body + _digest(body)


def decode_page(data: bytes | memoryview) -> Page | None:
    """The page in ``data``, or None where it is torn, damaged or was never written."""
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
    table: npt.NDArray[np.void] = np.frombuffer(data[end - num_records * RECORD.itemsize : end], dtype=RECORD)
    return Page(
        sequence=sequence,
        epoch=epoch,
        stable=stable,
        lineage=lineage,
        branches=branches,
        records=records_of(table),
    )


def current_page(pages: Iterable[Page | None]) -> Page | None:
    """The valid page with the highest sequence number."""
    return max((p for p in pages if p is not None), key=lambda p: p.sequence, default=None)


def in_history(record: Record, branches: Iterable[Branch], epoch: int) -> bool:
    """Whether a capture belongs to the history of ``epoch``, whose recoveries are ``branches``.

    A capture of an older epoch survives the later recoveries only if none of them went back to before it.
    """
    if record.epoch > epoch:
        return False
    later = [b for b in branches if record.epoch < b.epoch <= epoch]
    if len(later) < epoch - record.epoch:
        return False  # recoveries in between are no longer remembered
    return all(record.iteration <= b.iteration for b in later)


def retain(records: Iterable[Record], stable: int, whole: Mapping[int, bool]) -> tuple[Record, ...]:
    """The records that recovery may still need once ``stable`` is stable.

    ``whole[i]`` tells, for iterations up to ``stable``, whether i was whole on every rank; a capture of an
    iteration that was not is worth nothing, because other ranks miss their part of it. Iterations that the
    mapping does not name were settled before. Of each unit stay: all captures newer than ``stable``, and
    the newest one at or before it.
    """
    newest: dict[int, Record] = {}
    kept: list[Record] = []
    for record in records:
        if record.iteration > stable:
            kept.append(record)
        elif whole.get(record.iteration, True):
            best = newest.get(record.unit)
            if best is None or record.iteration > best.iteration:
                newest[record.unit] = record
    return tuple(sorted([*kept, *newest.values()], key=lambda r: r.key))


def successor(page: Page, **changes: object) -> Page:
    """The page that follows ``page``."""
    return replace(page, sequence=page.sequence + 1, **changes)  # type: ignore[arg-type]  # fields of Page


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
