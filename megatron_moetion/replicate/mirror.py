# SPDX-License-Identifier: Apache-2.0
"""What a mirror lacks of an arena, and the messages that bring it there. Pure.

A mirror is a holder's copy of an owner's arena: after each update it lists captures that the owner's page lists, of
equal bytes, in slots of its own. Captures are compared by all that a record says except the slot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_moetion.arrays import Bytes, Digests, Flags, Int64s
from megatron_moetion.errors import ChannelError
from megatron_moetion.snapshot.digest import num_chunks_of
from megatron_moetion.store.manifest import ITERATIONS_MAX, NO_RECORDS, NO_SLOT, RECORD, Branch, Records, in_history
from megatron_moetion.store.spec import ArenaSpec

_ADDED = np.dtype([("unit", "<u4"), ("is_zero", "<u4"), ("epoch", "<u4"), ("digest", "<u8"), ("tokens", "<u8")])
_DROPPED = np.dtype([("unit", "<u4"), ("iteration", "<i8")])


def plain(records: Records) -> Records:
    """The same captures by unit and iteration, wherever their bytes are; of slots it stays whether there is one."""
    table = records.table
    order = np.argsort(keys_of(records), kind="stable")
    return _without_slots(Records(table[order]))


def among(records: Records, others: Records) -> Flags:
    """Of each record whether the others have its equal, bool[n]. Both are ``plain``."""
    found = np.zeros(len(records), dtype=bool)
    if not len(others):
        return found
    places = np.minimum(np.searchsorted(keys_of(others), keys_of(records)), len(others) - 1)
    equal: Flags = (_words(records) == _words(others)[places]).all(axis=1)
    return equal


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """How a mirror differs from an owner's page."""

    missing: Records
    """Of the page, as the page has them."""
    stale: Records
    """Of the mirror: the page no longer has them, or has others in their place."""
    whole: frozenset[int]
    """Iterations of the page up to which the mirror has everything."""

    @property
    def is_empty(self) -> bool:
        """Whether page and mirror list the same captures."""
        return not self.missing and not self.stale

    @property
    def iterations(self) -> list[int]:
        """Iterations that something is missing of, the oldest first."""
        found: list[int] = np.unique(self.missing.table["iteration"]).tolist()
        return found


def difference(page: Records, mirror: Records) -> Difference:
    """``page``: what the owner lists; ``mirror``: what the holder lists, ``plain``."""
    order = np.argsort(keys_of(page), kind="stable")
    wanted = Records(page.table[order])
    comparable = _without_slots(wanted)
    there = among(comparable, mirror)
    missing = wanted.where(~there)
    iterations = np.unique(wanted.table["iteration"])
    if missing:
        iterations = iterations[iterations < missing.table["iteration"].min()]
    return Difference(
        missing=missing,
        stale=mirror.where(~among(mirror, comparable)),
        whole=frozenset(iterations.tolist()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """One step of a mirror: captures that it drops, then captures of one iteration that it gets."""

    dropped: Records
    added: Records
    """All of one iteration."""
    digests: Digests
    """The chunk digests of all added captures that are not zero, one behind the other."""

    def encode(self) -> Bytes:
        """The body of its frame."""
        dropped = np.zeros(len(self.dropped), dtype=_DROPPED)
        for name in ("unit", "iteration"):
            dropped[name] = self.dropped.table[name]
        added = np.zeros(len(self.added), dtype=_ADDED)
        for name in ("unit", "epoch", "digest", "tokens"):
            added[name] = self.added.table[name]
        added["is_zero"] = self.added.is_zero
        return np.concatenate([part.view(np.uint8) for part in (dropped, added, self.digests)])


def update_bytes_max(spec: ArenaSpec) -> int:
    """The largest body of an update of such an arena."""
    chunks = int(num_chunks_of(spec.stored_bytes, spec.identity.chunk_bytes).sum())
    return spec.num_records * _DROPPED.itemsize + len(spec.units) * _ADDED.itemsize + 8 * chunks


@dataclass(frozen=True, kw_only=True, eq=False)
class Received:
    """An update as a holder understands it."""

    dropped: Int64s
    """``keys_of`` what is dropped."""
    added: Records
    digests: Digests
    num_late: int = 0
    """Chunk digests that follow the captures' bytes."""

    def kept(self, records: Records) -> Records:
        """Those of ``records`` that are not dropped."""
        return records.where(~np.isin(keys_of(records), self.dropped)) if len(self.dropped) else records

    def completed(self, body: Bytes) -> Received | None:
        """With the digests of fragments, which ``encode_digests`` made; None for bytes that are not those."""
        stored = ~self.added.is_zero
        count = int(stored.sum())
        words = body.copy().view(np.uint64) if body.nbytes == 8 * (count + self.num_late) else np.empty(0, np.uint64)
        if not len(words):
            return None
        digests = self.added.table["digest"].copy()
        digests[stored] = words[:count]
        return replace(self, added=self.added.replace(digest=digests), digests=words[count:], num_late=0)


def encode_digests(captures: Digests, chunks: Digests) -> Bytes:
    """The body of ``DIGESTS``: of each fragment that is not zero its digest, then the chunk digests of all of them."""
    return np.concatenate([captures, chunks]).view(np.uint8)


def decode_update(
    body: Bytes, *, dropped: int, added: int, iteration: int, unit_bytes: Int64s, chunk_bytes: int,
    epoch: int, branches: tuple[Branch, ...], is_late: bool = False,
) -> Received:  # fmt: skip
    """What ``Update.encode`` made, checked against the arena: bytes of a capture by unit, epoch and recoveries.

    ``is_late``: digests follow the captures' bytes. ``ChannelError`` where an arena like this cannot have caused it.
    """
    first, second = dropped * _DROPPED.itemsize, added * _ADDED.itemsize
    if first + second > body.nbytes or not 0 <= iteration < ITERATIONS_MAX:
        raise ChannelError(
            f"{dropped} dropped and {added} added captures of iteration {iteration} do not fit {body.nbytes} bytes"
        )
    gone = body[:first].view(_DROPPED)
    table = body[first : first + second].view(_ADDED)
    units, is_zero = table["unit"].astype(np.int64), table["is_zero"] != 0
    sizes = np.append(unit_bytes, -1)[np.minimum(units, len(unit_bytes))]
    if (sizes < 0).any() or len(np.unique(units)) != len(units) or (table["epoch"] > epoch).any():
        raise ChannelError(
            f"{len(units)} captures of iteration {iteration} are announced of which some are of no unit, of a later "
            f"epoch than {epoch}, or come twice"
        )
    sizes = np.where(is_zero, 0, sizes)
    num_digests = int(num_chunks_of(sizes, chunk_bytes).sum())
    if first + second + (0 if is_late else 8 * num_digests) != body.nbytes:
        raise ChannelError(f"{body.nbytes} bytes announce captures that need {num_digests} chunk digests")
    records = Records.make(
        added,
        unit=units,
        iteration=iteration,
        epoch=table["epoch"],
        slot=np.where(is_zero, NO_SLOT, 0),
        nbytes=sizes,
        digest=table["digest"],
        tokens=table["tokens"],
    )
    if not in_history(records, branches, epoch).all():
        raise ChannelError(f"captures of iteration {iteration} belong to a history that a recovery has ended")
    keys = gone["unit"].astype(np.int64) * ITERATIONS_MAX + gone["iteration"]
    digests = body[first + second :].copy().view(np.uint64)
    return Received(dropped=keys, added=records, digests=digests, num_late=num_digests if is_late else 0)


def records_of(data: bytes | Bytes) -> Records:
    """The records that another rank lists; ``ChannelError`` for bytes that are none."""
    if len(data) % RECORD.itemsize:
        raise ChannelError(f"{len(data)} bytes are no table of records")
    return Records.from_bytes(data) if len(data) else NO_RECORDS


def table_of(data: Bytes) -> Records:
    """The records that a holder lists, ``plain``; ``ChannelError`` for bytes that are none."""
    return plain(records_of(data))


def keys_of(records: Records) -> Int64s:
    """One number for unit and iteration, by which both are in order; int64[n]."""
    keys: Int64s = records.table["unit"].astype(np.int64) * ITERATIONS_MAX + records.table["iteration"]
    return keys


def _without_slots(records: Records) -> Records:
    return records.replace(slot=np.where(records.is_zero, NO_SLOT, 0), reserved=0)


def _words(records: Records) -> Digests:
    """The table's bytes, uint64[n, 6]."""
    words: Digests = np.ascontiguousarray(records.table).view(np.uint64).reshape(len(records), RECORD.itemsize // 8)
    return words
