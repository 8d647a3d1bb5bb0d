# SPDX-License-Identifier: Apache-2.0
"""What to copy where, as plain arrays of addresses. Pure: nothing here touches memory.

A *piece* is the part of a region that falls into one chunk: ``(source, destination, nbytes)``. A *chunk* is
what one digest covers: ``(destination, nbytes, first piece, number of pieces)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moetion.arrays import Flags, Int64s, counted
from megatron_moetion.units import Unit

BATCH_BYTES = 32 << 20
"""Captures per call into a pool: small enough that a dropped snapshot stops soon."""
DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """The pieces and chunks of one unit's capture, destinations counted from the capture's first byte."""

    nbytes: int
    pieces: Int64s
    """int64[n, 3]: source address, offset in the capture, nbytes."""
    chunks: Int64s
    """int64[m, 4]: offset in the capture, nbytes, first piece, number of pieces."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Templates:
    """The templates of all units, by unit number, in tables that batches are cut from."""

    nbytes: Int64s
    """int64[units]: bytes of a capture."""
    pieces: Int64s
    """int64[n, 3]: of all units, see ``Template``."""
    first_piece: Int64s
    num_pieces: Int64s
    chunks: Int64s
    """int64[m, 4]: of all units, the first piece counted from the unit's own; see ``Template``."""
    first_chunk: Int64s
    num_chunks: Int64s

    @classmethod
    def of(cls, templates: Sequence[Template]) -> Templates:
        """One behind the other."""
        num_pieces = np.array([len(t.pieces) for t in templates], dtype=np.int64)
        num_chunks = np.array([len(t.chunks) for t in templates], dtype=np.int64)
        return cls(
            nbytes=np.array([t.nbytes for t in templates], dtype=np.int64),
            pieces=np.concatenate([np.empty((0, 3), dtype=np.int64), *(t.pieces for t in templates)]),
            first_piece=np.cumsum(num_pieces) - num_pieces,
            num_pieces=num_pieces,
            chunks=np.concatenate([np.empty((0, 4), dtype=np.int64), *(t.chunks for t in templates)]),
            first_chunk=np.cumsum(num_chunks) - num_chunks,
            num_chunks=num_chunks,
        )

    def rows_of_pieces(self, units: Int64s) -> Int64s:
        """Rows of ``pieces`` that belong to these units, unit by unit."""
        return np.repeat(self.first_piece[units], self.num_pieces[units]) + counted(self.num_pieces[units])

    def rows_of_chunks(self, units: Int64s) -> Int64s:
        """Rows of ``chunks`` that belong to these units, unit by unit."""
        return np.repeat(self.first_chunk[units], self.num_chunks[units]) + counted(self.num_chunks[units])


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Where captures go. One row a capture."""

    units: Int64s
    addresses: Int64s
    """Of the first byte of each capture."""
    digests: Int64s
    """Addresses of the chunk digests, one uint64 a chunk."""

    @classmethod
    def in_slots(cls, units: Int64s, addresses: Int64s, nbytes: Int64s) -> Targets:
        """Slots of an arena, where chunk digests follow the ``nbytes`` of a capture."""
        return cls(units=units, addresses=addresses, digests=addresses + nbytes)

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, rows: slice | Flags) -> Targets:
        return Targets(units=self.units[rows], addresses=self.addresses[rows], digests=self.digests[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Captures that are packed by one call. Validated when made."""

    pieces: Int64s
    chunks: Int64s
    nbytes: int

    def __post_init__(self) -> None:
        ends = self.chunks[:, 0] + self.chunks[:, 1]
        order = np.argsort(self.chunks[:, 0])
        if (self.chunks[order][1:, 0] < ends[order][:-1]).any():
            raise AssertionError("two chunks of one batch overlap in the arena")
        if self.pieces[:, 2].sum() > self.nbytes:
            raise AssertionError("a batch copies more bytes than its captures hold")


def template(unit: Unit, chunk_bytes: int, sources: Mapping[int, int]) -> Template:
    """Cut one unit's regions at chunk boundaries.

    ``sources`` replaces the address of regions (by position) whose bytes were staged elsewhere. A unit without
    regions (host state) is one staged region, number 0, of ``reserved_bytes``.
    """
    spans = (
        [(r.address, o, r.nbytes) for r, o in zip(unit.regions, unit.offsets, strict=True)]
        if unit.regions
        else [(0, 0, unit.reserved_bytes)]
    )
    pieces: list[tuple[int, int, int]] = []
    owner: list[int] = []
    for number, (address, offset, nbytes) in enumerate(spans):
        source = sources.get(number, address)
        done = 0
        while done < nbytes:
            chunk = (offset + done) // chunk_bytes
            take = min(nbytes - done, (chunk + 1) * chunk_bytes - offset - done)
            pieces.append((source + done, offset + done, take))
            owner.append(chunk)
            done += take
    starts = np.arange(0, unit.nbytes, chunk_bytes, dtype=np.int64)
    first = np.searchsorted(owner, np.arange(len(starts)), side="left")
    last = np.searchsorted(owner, np.arange(len(starts)), side="right")
    chunks = np.stack([starts, np.minimum(chunk_bytes, unit.nbytes - starts), first, last - first], axis=1)
    return Template(
        nbytes=unit.nbytes,
        pieces=np.array(pieces, dtype=np.int64).reshape(-1, 3),
        chunks=np.ascontiguousarray(chunks, dtype=np.int64),
    )


def groups(templates: Templates, targets: Targets, batch_bytes: int) -> list[Targets]:
    """Captures, in order, in groups of at most ``batch_bytes`` (at least one capture each)."""
    return [targets[first:end] for first, end in cuts(templates.nbytes[targets.units], batch_bytes)]


def cuts(nbytes: Int64s, batch_bytes: int) -> Iterator[tuple[int, int]]:
    """First and end row of parts of at most ``batch_bytes``, at least one row each."""
    ends = np.cumsum(nbytes)
    first = done = 0
    while first < len(nbytes):
        end = max(first + 1, int(np.searchsorted(ends, done + batch_bytes, side="right")))
        yield first, end
        first, done = end, int(ends[end - 1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """Consecutive chunks of captures, the unit that a device packs in. One row a chunk."""

    rows: Int64s
    """Of ``Templates.chunks``."""
    nbytes: Int64s
    addresses: Int64s
    """Of the first byte of the capture that the chunk belongs to."""
    digests: Int64s
    """Addresses of the chunks' digests."""

    @classmethod
    def of(cls, templates: Templates, targets: Targets) -> Chunks:
        """All chunks of these captures, capture by capture."""
        counts = templates.num_chunks[targets.units]
        rows = templates.rows_of_chunks(targets.units)
        return cls(
            rows=rows,
            nbytes=templates.chunks[rows, 1],
            addresses=np.repeat(targets.addresses, counts),
            digests=np.repeat(targets.digests, counts) + DIGEST_BYTES * counted(counts),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Chunks:
        return Chunks(
            rows=self.rows[part],
            nbytes=self.nbytes[part],
            addresses=self.addresses[part],
            digests=self.digests[part],
        )

    def batches(self, batch_bytes: int) -> list[Chunks]:
        """Cut into parts of at most ``batch_bytes``, at least one chunk each."""
        return [self[first:end] for first, end in cuts(self.nbytes, batch_bytes)]

    def digest_runs(self) -> tuple[Int64s, Int64s]:
        """Address and number of digests of each run that lies together, which is what one capture has here."""
        begins = np.flatnonzero(np.diff(self.digests, prepend=-1) != DIGEST_BYTES)
        return self.digests[begins], np.diff(begins, append=len(self.digests))


def batch_of(templates: Templates, targets: Targets) -> Batch:
    """The tables for one call that packs all these captures."""
    units = targets.units
    num_pieces, num_chunks = templates.num_pieces[units], templates.num_chunks[units]
    pieces = templates.pieces[templates.rows_of_pieces(units)]
    pieces[:, 1] += np.repeat(targets.addresses, num_pieces)
    chunks = templates.chunks[templates.rows_of_chunks(units)]
    chunks[:, 0] += np.repeat(targets.addresses, num_chunks)
    chunks[:, 2] += np.repeat(np.cumsum(num_pieces) - num_pieces, num_chunks)
    return Batch(pieces=pieces, chunks=chunks, nbytes=int(templates.nbytes[units].sum()))
