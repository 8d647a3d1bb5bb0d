# SPDX-License-Identifier: Apache-2.0
"""Captures that travel as fragments while a run starts: to their owner, which rebuilds them, and to its holders again.

They go in rounds of a few bytes a capture, so that no more than that is in memory twice. Which bytes go in which round
follows from the owner's order alone, which all concerned have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_moetion.arrays import Bytes, Int64s
from megatron_moetion.coding import FRAME_BYTES, Part
from megatron_moetion.errors import ChannelError
from megatron_moetion.recover.plan import Key, Leg, Order
from megatron_moetion.replicate.channel import Channel, Message
from megatron_moetion.snapshot.codec import Codec, Span, is_sound, spans_of
from megatron_moetion.snapshot.digest import (
    capture_digests,
    chunk_spans,
    gather_digests,
    num_chunks_of,
    scatter_digests,
    verify,
)
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records

ROUND_BYTES = 16 << 20
"""Of one fragment of each capture of an owner, in a round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """What of one owner's captures travels in each round: ``rows`` of its order, a span of each."""

    rows: Int64s
    batches: list[list[Span]]

    @classmethod
    def of(cls, order: Order, rows: Int64s, parts: Sequence[Part], chunk_bytes: int) -> Rounds:
        """``parts``: of each row, one of those that it is cut into."""
        nbytes = order.records.table["nbytes"][rows].tolist()
        sizes = [part.stored_bytes(size) for part, size in zip(parts, nbytes, strict=True)]
        return cls(rows=rows, batches=spans_of(sizes, chunk_bytes, ROUND_BYTES))

    def batch(self, number: int, leg: Leg) -> list[tuple[int, Span]]:
        """Row and span of what a leg moves in this round."""
        mine = set(leg.rows.tolist())
        batch = self.batches[number] if number < len(self.batches) else []
        rows = self.rows.tolist()
        return [(rows[span.capture], span) for span in batch if rows[span.capture] in mine]


@dataclass(frozen=True, kw_only=True, eq=False)
class FragmentMover:
    """One rank's part. ``arenas`` and ``orders`` as in ``Mover``."""

    rank: int
    arenas: Mapping[Key, Arena]
    orders: Mapping[int, Order]
    channel: Channel
    pool: HostPool
    targets: Mapping[Key, Mapping[int, int]]
    """By arena, and by row of the order: the slot that its bytes go to."""

    def fetch(self, legs: Sequence[Leg]) -> None:
        """Bring fragments to their owners, which rebuild captures from them. ``ChannelError`` where one is damaged."""
        rounds = {owner: self._rebuilt(owner) for owner in {leg.owner for leg in legs}}
        codecs: dict[tuple[int, int], Codec] = {}
        for number in range(max((len(r.batches) for r in rounds.values()), default=0)):
            sends, receives = [], []
            rows: dict[tuple[int, int], dict[int, Bytes]] = defaultdict(dict)
            spans: dict[tuple[int, int], Span] = {}
            parts: dict[tuple[int, int], Part] = {}
            for leg in legs:
                for row, span in rounds[leg.owner].batch(number, leg):
                    piece = np.empty(0, dtype=np.uint8)
                    if leg.source == self.rank:
                        slot = self._places[leg.out_of][self._key(leg.owner, row)]
                        piece = self.arenas[leg.out_of].payload(slot)[span.start : span.start + span.nbytes]
                        if leg.target != self.rank:
                            sends.append(Message(peer=leg.target, data=piece))
                    if leg.target == self.rank:
                        if leg.source != self.rank:
                            piece = np.empty(span.nbytes, dtype=np.uint8)
                            receives.append(Message(peer=leg.source, data=piece))
                        at = (leg.owner, row)
                        spans[at], parts[at] = span, leg.part
                        rows[at][leg.part.number] = piece[FRAME_BYTES if not span.start else 0 :]
            self.channel.exchange(sends, receives)
            for (owner, row), found in rows.items():
                span, part = spans[owner, row], parts[owner, row]
                code = (part.data, part.parity)
                codec = codecs[code] = codecs.get(code) or Codec(*code)
                capture = self._target(owner, row)
                codec.restore(found, max(span.start - FRAME_BYTES, 0), capture)
        for owner in {leg.owner for leg in legs if leg.target == self.rank}:
            self._seal(owner, rounds[owner].rows)

    def copy(self, legs: Sequence[Leg]) -> None:
        """Bring fragments to holders that lack them; their owners make them. ``ChannelError`` where one is damaged."""
        rounds = {owner: self._lacking(owner, legs) for owner in {leg.owner for leg in legs}}
        codecs: dict[tuple[int, int], Codec] = {}
        for number in range(max((len(r.batches) for r in rounds.values()), default=0)):
            sends, receives = [], []
            for leg in legs:
                for row, span in rounds[leg.owner].batch(number, leg):
                    if leg.source == self.rank:
                        code = (leg.part.data, leg.part.parity)
                        codec = codecs[code] = codecs.get(code) or Codec(*code)
                        sends += [Message(peer=leg.target, data=d) for d in self._made(leg, row, span, codec)]
                    else:
                        receives += [Message(peer=leg.source, data=d) for d in self._room(leg, row, span)]
            self.channel.exchange(sends, receives)

    def verified(self, leg: Leg, records: Records) -> Records:
        """The records of fragments that have arrived here, as this arena lists them. ``ChannelError``: damaged."""
        arena, wanted = self.arenas[leg.into], self.orders[leg.owner].records.table[leg.rows]
        stored = ~records.is_zero
        slots = records.table["slot"][stored].astype(np.int64)
        addresses, sizes = arena.payload_addresses(slots), arena.slot_bytes(slots)
        chunk_bytes = arena.spec.identity.chunk_bytes
        counts = num_chunks_of(sizes, chunk_bytes)
        digests = gather_digests(self.pool, addresses + sizes, counts)
        captures = capture_digests(self.pool, addresses + sizes, counts)
        found = records.table["digest"].copy()
        found[stored] = captures
        nbytes = np.zeros(len(records), dtype=np.int64)
        nbytes[stored] = sizes
        here = records.replace(digest=found, nbytes=nbytes)
        is_sound_here = verify(self.pool, chunk_bytes, addresses, sizes, digests, captures)
        if not is_sound_here.all() or (arena.whole_records(here).table["digest"] != wanted["digest"]).any():
            raise _damaged(leg.owner, leg.source)
        return here

    def _rebuilt(self, owner: int) -> Rounds:
        """The rows that an owner rebuilds."""
        order = self.orders[owner]
        rows = np.flatnonzero(order.is_rebuilt)
        masks = order.table["sources"][rows].tolist()
        parts = [order.places[(mask & -mask).bit_length() - 1].part for mask in masks]
        return Rounds.of(order, rows, parts, self._chunk_bytes)

    def _lacking(self, owner: int, legs: Sequence[Leg]) -> Rounds:
        """The rows of which some holder lacks its fragment; all holders' are of one code."""
        order = self.orders[owner]
        rows = np.flatnonzero((order.table["lacking"] != 0) & ~order.records.is_zero)
        part = next(leg.part for leg in legs if leg.owner == owner)
        return Rounds.of(order, rows, [part] * len(rows), self._chunk_bytes)

    def _made(self, leg: Leg, row: int, span: Span, codec: Codec) -> tuple[Bytes, Bytes]:
        """Chunk digests and bytes of a part of a fragment, from the capture in this rank's own arena."""
        arena, record = self.arenas[leg.out_of], self.orders[leg.owner].records[row]
        slot = self._places[leg.out_of][record.key]
        capture = arena.payload(slot)
        data = np.empty(span.nbytes, dtype=np.uint8)
        codec.fragment(leg.part.number, capture, record.digest, span.start, data)
        is_last = span.start + span.nbytes == leg.part.stored_bytes(len(capture))
        if is_last and not is_sound(
            self.pool, self._chunk_bytes, leg.part, capture, arena.digests(slot), record.digest
        ):
            raise ChannelError(f"{arena.name}: a capture changed after it was surveyed; restart to try again")
        spans = chunk_spans(np.array([data.ctypes.data]), np.array([data.nbytes]), self._chunk_bytes)
        digests = np.empty(len(spans), dtype=np.uint64)
        self.pool.digest(spans, digests)
        return digests.view(np.uint8), data

    def _room(self, leg: Leg, row: int, span: Span) -> tuple[Bytes, Bytes]:
        """Where these go in this rank's arena."""
        arena, slot = self.arenas[leg.into], self.targets[leg.into][row]
        first = span.start // self._chunk_bytes
        count = -(-span.nbytes // self._chunk_bytes)
        digests = arena.digests(slot)[first : first + count].view(np.uint8)
        return digests, arena.payload(slot)[span.start : span.start + span.nbytes]

    def _seal(self, owner: int, rows: Int64s) -> None:
        """Put chunk digests behind rebuilt captures. ``ChannelError`` where one is not what was captured."""
        if not len(rows):
            return
        arena = self.arenas[self.orders[owner].whole]
        slots = np.array([self.targets[self.orders[owner].whole][row] for row in rows.tolist()], dtype=np.int64)
        addresses, sizes = arena.payload_addresses(slots), arena.slot_bytes(slots)
        spans = chunk_spans(addresses, sizes, self._chunk_bytes)
        digests = np.empty(len(spans), dtype=np.uint64)
        self.pool.digest(spans, digests)
        counts = num_chunks_of(sizes, self._chunk_bytes)
        scatter_digests(self.pool, digests, addresses + sizes, counts)
        found = capture_digests(self.pool, addresses + sizes, counts)
        if (found != self.orders[owner].records.table["digest"][rows]).any():
            raise _damaged(owner, None)

    def _target(self, owner: int, row: int) -> Bytes:
        whole = self.orders[owner].whole
        return self.arenas[whole].payload(self.targets[whole][row])

    def _key(self, owner: int, row: int) -> tuple[int, int]:
        return self.orders[owner].records[row].key

    @cached_property
    def _places(self) -> Mapping[Key, Mapping[tuple[int, int], int]]:
        """By arena, unit and iteration: the slot."""
        return {
            key: dict(zip(arena.page.records.keys, arena.page.records.table["slot"].tolist(), strict=True))
            for key, arena in self.arenas.items()
        }

    @cached_property
    def _chunk_bytes(self) -> int:
        return next(iter(self.arenas.values())).spec.identity.chunk_bytes


def _damaged(owner: int, source: int | None) -> ChannelError:
    where = f"fragments of rank {owner} arrived damaged from rank {source}"
    rebuilt = f"a capture of rank {owner} that was rebuilt from fragments is not what was captured"
    return ChannelError(f"{rebuilt if source is None else where}; nothing was loaded, restart to try again")
