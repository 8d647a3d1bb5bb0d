# SPDX-License-Identifier: Apache-2.0
"""Carries a rank's snapshots to its buddies and receives those of the ranks that it is a buddy of.

All ranks call ``replicate`` for the same iterations in the same order. Each round has five small steps, each
one exchange: header, table of captures, acceptance, payload, acknowledgement. A round in which one side has
nothing, or no room, still takes place, so that both sides stay in step.

What comes over the wire is believed only where a digest says so. A damaged header or answer ends replication, because
the two sides can no longer be in step; a damaged table or payload costs the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Gate, Message
from megatron_moetion.snapshot.packer import HostPool, verify
from megatron_moetion.snapshot.reference import capture_digest
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_SLOT, RECORD, Record, record_table, records_of
from megatron_moetion.store.spec import num_chunks

Bytes = npt.NDArray[np.uint8]
_HEADER_WORDS = 7  # epoch, iteration, captures, table bytes, table digest, bytes of a payload's slices, their digest
_SLICE_BYTES_MAX = 1 << 30
_YES, _NO = 0x9D2C5680EFC60000, 0x62D3A97F1039FFFF
"""Answers, as 64-bit words of which each is the other's complement."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Header:
    """What an owner announces of a snapshot, as far as it can be right."""

    owner: int
    count: int
    table_bytes: int
    table_digest: int
    slice_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Incoming:
    """One owner's announcement of a snapshot."""

    owner: int
    slice_bytes: int
    records: tuple[Record, ...] = ()
    digests: tuple[npt.NDArray[np.uint64], ...] = ()


class Pacing(Protocol):
    """Who decides when a snapshot's bytes go."""

    gate: Gate
    """What the channel asks before each slice."""

    def transfer(self, nbytes: int) -> AbstractContextManager[None]:
        """Wraps the transfer of a snapshot, from its first byte until the buddies have acknowledged it."""
        ...


class Replicator:
    """One rank's side of replication. Runs in one background thread; ``ChannelError`` ends its use."""

    def __init__(
        self,
        *,
        channel: Channel,
        own: Arena,
        holders: Sequence[int],
        held: Mapping[int, Arena],
        pool: HostPool,
        epoch: int,
        probe: Callable[[str, int], None],
        pacing: Pacing,
    ) -> None:
        self._pacing = pacing
        self._channel = channel
        self._own = own
        self._holders = tuple(holders)
        self._held = dict(sorted(held.items()))
        self._pool = pool
        self._epoch = epoch
        self._probe = probe
        self._slice_bytes = 0
        self.bytes_sent = 0
        self.refused = 0
        """Rounds in which a buddy had no room, or received damaged bytes."""

    def replicate(self, iteration: int, records: Sequence[Record]) -> bool:
        """Send one committed snapshot (empty: dropped here); True once it is whole on every buddy."""
        incoming = self._announce(iteration, records)
        accepted_here, slots = self._make_room(incoming)
        accepted = self._swap_flags(accepted_here)
        self._probe("mid-replication", iteration)
        sends = [h for h in self._holders if accepted[h]]
        with self._pacing.transfer(len(sends) * sum(r.nbytes for r in records)):
            self._transfer(records, sends, incoming, slots)
            whole_here = {
                owner: bool(slots.get(owner)) and self._keep(incoming[owner], slots[owner]) for owner in self._held
            }
            whole = self._swap_flags(whole_here)
        if records and not all(whole.values()):
            self.refused += 1
        return bool(records) and all(whole.values())

    def _announce(self, iteration: int, records: Sequence[Record]) -> dict[int, _Incoming]:
        table = _table(self._own, records)
        self._slice_bytes = self._pacing.gate.slice_bytes()
        words = [self._epoch, iteration, len(records), table.nbytes, _digest(table), self._slice_bytes]
        header = np.array([*words, capture_digest(np.array(words, dtype=np.uint64))], dtype=np.uint64)
        arrived = {owner: np.zeros(_HEADER_WORDS, dtype=np.uint64) for owner in self._held}
        self._channel.exchange(
            [Message(peer=h, data=header.view(np.uint8)) for h in self._holders],
            [Message(peer=o, data=data.view(np.uint8)) for o, data in arrived.items()],
        )
        headers = {owner: self._checked(owner, data, iteration) for owner, data in arrived.items()}
        tables = {owner: np.zeros(header.table_bytes, dtype=np.uint8) for owner, header in headers.items()}
        self._channel.exchange(
            [Message(peer=h, data=table) for h in self._holders],
            [Message(peer=o, data=data) for o, data in tables.items()],
        )
        return {o: self._parse(headers[o], tables[o], iteration) for o in self._held}

    def _checked(self, owner: int, words: npt.NDArray[np.uint64], iteration: int) -> _Header:
        """The header that came from ``owner``. ``ChannelError`` for one that its arena here cannot have caused."""
        epoch, theirs, count, table_bytes, table_digest, slice_bytes, digest = words.tolist()
        if capture_digest(words[:-1]) != digest:
            raise ChannelError(f"the header of rank {owner} for iteration {iteration} was damaged on the way")
        if (epoch, theirs) != (self._epoch, iteration):
            raise ChannelError(
                f"rank {owner} replicates iteration {theirs} of epoch {epoch}; "
                f"here it is iteration {iteration} of epoch {self._epoch}"
            )
        spec = self._held[owner].spec
        chunks = sum(num_chunks(nbytes, spec.identity.chunk_bytes) for _, _, nbytes in spec.units)
        spare = table_bytes - count * RECORD.itemsize
        if count > len(spec.units) or not 0 <= spare <= 8 * chunks or spare % 8:
            raise ChannelError(
                f"rank {owner} announces {count} captures in {table_bytes} bytes; its arena here is for "
                f"{len(spec.units)} units of {chunks} chunks"
            )
        if not 0 < slice_bytes <= _SLICE_BYTES_MAX:
            raise ChannelError(
                f"rank {owner} announces slices of {slice_bytes} bytes; they must have 1 to {_SLICE_BYTES_MAX}"
            )
        return _Header(
            owner=owner, count=count, table_bytes=table_bytes, table_digest=table_digest, slice_bytes=slice_bytes
        )

    def _parse(self, header: _Header, table: Bytes, iteration: int) -> _Incoming:
        """The snapshot that a table announces; an empty one if the table was damaged on the way."""
        owner, spec = header.owner, self._held[header.owner].spec
        if _digest(table) != header.table_digest:  # refused like a lack of room
            return _Incoming(owner=owner, slice_bytes=header.slice_bytes)
        cursor = header.count * RECORD.itemsize
        records, digests = records_of(table[:cursor].view(RECORD)), []
        for record in records:
            nbytes = spec.units[record.unit][2] if record.unit < len(spec.units) else -1
            expected = (iteration, self._epoch, 0 if record.is_zero else nbytes)
            if nbytes < 0 or (record.iteration, record.epoch, record.nbytes) != expected:
                raise ChannelError(
                    f"rank {owner} announces {record}; here it is iteration {iteration} of epoch {self._epoch}, and "
                    f"that unit of {len(spec.units)} has {nbytes} bytes"
                )
            end = cursor + 8 * num_chunks(record.nbytes, spec.identity.chunk_bytes)
            digests.append(table[cursor:end].view(np.uint64))
            cursor = end
        if cursor != table.nbytes or len({r.unit for r in records}) != len(records):
            raise ChannelError(
                f"rank {owner} announces {len(records)} captures in {table.nbytes} bytes; they need {cursor}, and each "
                f"unit comes once"
            )
        return _Incoming(owner=owner, slice_bytes=header.slice_bytes, records=records, digests=tuple(digests))

    def _make_room(self, incoming: Mapping[int, _Incoming]) -> tuple[dict[int, bool], dict[int, list[int]]]:
        slots: dict[int, list[int]] = {}
        for owner, announced in incoming.items():
            taken: list[int] = []
            listable = self._held[owner].can_list(len(announced.records))
            for record in announced.records if listable else ():
                if record.is_zero:
                    taken.append(NO_SLOT)
                    continue
                slot = self._held[owner].acquire(record.nbytes)
                if slot is None:
                    self._held[owner].release(taken)
                    taken = []
                    break
                taken.append(slot)
            slots[owner] = taken
        return {owner: bool(taken) for owner, taken in slots.items()}, slots

    def _swap_flags(self, to_owners: Mapping[int, bool]) -> dict[int, bool]:
        """Tell each owner yes or no, hear the same from each holder."""
        outgoing = {o: np.array([_YES if flag else _NO], dtype=np.uint64) for o, flag in to_owners.items()}
        answers = {h: np.zeros(1, dtype=np.uint64) for h in self._holders}
        self._channel.exchange(
            [Message(peer=o, data=data.view(np.uint8)) for o, data in outgoing.items()],
            [Message(peer=h, data=data.view(np.uint8)) for h, data in answers.items()],
        )
        for holder, answer in answers.items():
            if answer[0] not in (_YES, _NO):
                raise ChannelError(f"the answer of rank {holder} was damaged on the way: {answer[0]:#x}")
        return {h: bool(a[0] == _YES) for h, a in answers.items()}

    def _transfer(
        self,
        records: Sequence[Record],
        holders: Sequence[int],
        incoming: Mapping[int, _Incoming],
        slots: Mapping[int, Sequence[int]],
    ) -> None:
        sends = [
            Message(peer=h, data=self._own.payload(r.slot), slice_bytes=self._slice_bytes)
            for h in holders
            for r in records
            if not r.is_zero
        ]
        receives = [
            Message(peer=owner, data=self._held[owner].payload(slot), slice_bytes=announced.slice_bytes)
            for owner, announced in incoming.items()
            for slot in slots[owner]
            if slot != NO_SLOT
        ]
        self._channel.exchange(sends, receives)
        self.bytes_sent += sum(m.data.nbytes for m in sends)

    def _keep(self, announced: _Incoming, slots: Sequence[int]) -> bool:
        """Verify what arrived and commit it; damaged bytes are given up, all of the snapshot."""
        arena = self._held[announced.owner]
        chunk_bytes = arena.spec.identity.chunk_bytes
        placed = []
        for record, digests, slot in zip(announced.records, announced.digests, slots, strict=True):
            if record.is_zero:
                placed.append(record)
                continue
            if not verify(self._pool, chunk_bytes, arena.payload(slot), digests, record.digest):
                arena.release(slots)
                return False
            arena.digests(slot)[:] = digests
            placed.append(replace(record, slot=slot))
        arena.add(placed)
        return True


def _table(arena: Arena, records: Sequence[Record]) -> Bytes:
    """The records, then their chunk digests, as bytes."""
    digests = (arena.digests(r.slot).view(np.uint8) for r in records if not r.is_zero)
    return np.concatenate([record_table(records).view(np.uint8), *digests])


def _digest(table: Bytes) -> int:
    return capture_digest(table.view(np.uint64))
