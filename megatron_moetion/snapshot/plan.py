# SPDX-License-Identifier: Apache-2.0
"""What to copy where, as plain arrays of addresses. Pure: nothing here touches memory.

A *piece* is the part of a region that falls into one chunk: ``(source, destination, nbytes)``. A *chunk* is
what one digest covers: ``(destination, nbytes, first piece, number of pieces)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_moetion.units import Unit

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """The pieces and chunks of one unit's capture, destinations counted from the capture's first byte."""

    nbytes: int
    pieces: Int64s
    """int64[n, 3]: source address, offset in the capture, nbytes."""
    chunks: Int64s
    """int64[m, 4]: offset in the capture, nbytes, first piece, number of pieces."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Where one capture goes: the addresses of a slot's payload and of its chunk digests."""

    unit: int
    address: int
    digests: Digests


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Captures that are packed by one call. Validated when made."""

    targets: tuple[Target, ...]
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


def groups(templates: Sequence[Template], targets: Sequence[Target], batch_bytes: int) -> list[list[Target]]:
    """Captures, in order, in groups of about ``batch_bytes`` (at least one capture each)."""
    found: list[list[Target]] = []
    room = 0
    for target in targets:
        nbytes = templates[target.unit].nbytes
        if not found or room < nbytes:
            found.append([])
            room = batch_bytes
        found[-1].append(target)
        room -= nbytes
    return found


def batch_of(templates: Sequence[Template], targets: Sequence[Target]) -> Batch:
    """The tables for one call that packs all these captures."""
    pieces, chunks, count = [], [], 0
    for target in targets:
        unit = templates[target.unit]
        pieces.append(unit.pieces + np.array([0, target.address, 0], dtype=np.int64))
        chunks.append(unit.chunks + np.array([target.address, 0, count, 0], dtype=np.int64))
        count += len(unit.pieces)
    return Batch(
        targets=tuple(targets),
        pieces=np.concatenate(pieces),
        chunks=np.concatenate(chunks),
        nbytes=sum(templates[t.unit].nbytes for t in targets),
    )


def share(digests: Digests, targets: Sequence[Target]) -> None:
    """Give each target its part of the digests of all chunks."""
    done = 0
    for target in targets:
        target.digests[:] = digests[done : done + len(target.digests)]
        done += len(target.digests)
