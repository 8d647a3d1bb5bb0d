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
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_moetion.arrays import Bytes, Digests, Int64s
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Gate, Message
from megatron_moetion.snapshot.digest import digest_of, gather_digests, num_chunks_of, scatter_digests, verify
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_RECORDS, NO_SLOT, RECORD, Records
from megatron_moetion.store.spec import num_chunks

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
    records: Records
    digests: Digests
    """The chunk digests of all captures that are not zero, one behind the other."""


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

    def replicate(self, iteration: int, records: Records) -> bool:
        """Send one committed snapshot (empty: dropped here); True once it is whole on every buddy."""
        incoming = self._announce(iteration, records)
        slots = self._make_room(incoming)
        accepted = self._swap_flags({owner: owner in slots for owner in incoming})
        self._probe("mid-replication", iteration)
        sends = [h for h in self._holders if accepted[h]]
        with self._pacing.transfer(len(sends) * int(records.table["nbytes"].sum())):
            self._transfer(records, sends, incoming, slots)
            whole_here = {owner: owner in slots and self._keep(incoming[owner], slots[owner]) for owner in self._held}
            whole = self._swap_flags(whole_here)
        return bool(records) and all(whole.values())

    def _announce(self, iteration: int, records: Records) -> dict[int, _Incoming]:
        table = self._table(records)
        self._slice_bytes = self._pacing.gate.slice_bytes()
        words = [self._epoch, iteration, len(records), table.nbytes, self._digest(table), self._slice_bytes]
        header = np.array([*words, self._digest(np.array(words, dtype=np.uint64).view(np.uint8))], dtype=np.uint64)
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
        if self._digest(words[:-1].view(np.uint8)) != digest:
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
        owner, arena = header.owner, self._held[header.owner]
        if self._digest(table) != header.table_digest:  # refused like a lack of room
            nothing = np.empty(0, dtype=np.uint64)
            return _Incoming(owner=owner, slice_bytes=header.slice_bytes, records=NO_RECORDS, digests=nothing)
        cursor = header.count * RECORD.itemsize
        records, digests = Records.from_bytes(table[:cursor]), table[cursor:].view(np.uint64)
        units, num_units = records.table["unit"], len(arena.unit_bytes)
        nbytes = np.append(arena.unit_bytes, -1)[np.minimum(units, num_units)]
        wrong = (
            (nbytes < 0)
            | (records.table["iteration"] != iteration)
            | (records.table["epoch"] != self._epoch)
            | (records.table["nbytes"].astype(np.int64) != np.where(records.is_zero, 0, nbytes))
        )
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ChannelError(
                f"rank {owner} announces {records[first]}; here it is iteration {iteration} of epoch {self._epoch}, "
                f"and that unit of {num_units} has {nbytes[first]} bytes"
            )
        sizes = records.table["nbytes"].astype(np.int64)
        needed = cursor + 8 * int(num_chunks_of(sizes, arena.spec.identity.chunk_bytes).sum())
        if needed != table.nbytes or len(np.unique(units)) != len(records):
            raise ChannelError(
                f"rank {owner} announces {len(records)} captures in {table.nbytes} bytes; they need {needed}, and each "
                f"unit comes once"
            )
        return _Incoming(owner=owner, slice_bytes=header.slice_bytes, records=records, digests=digests)

    def _make_room(self, incoming: Mapping[int, _Incoming]) -> dict[int, Int64s]:
        """By owner, where there is something to receive and room for it: a slot for each capture."""
        found = {}
        for owner, announced in incoming.items():
            records, arena = announced.records, self._held[owner]
            if not records or not arena.can_list(len(records)):
                continue
            slots = np.full(len(records), NO_SLOT, dtype=np.int64)
            taken = arena.acquire_all(records.table["nbytes"][~records.is_zero].astype(np.int64))
            if taken is not None:
                slots[~records.is_zero] = taken
                found[owner] = slots
        return found

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
        records: Records,
        holders: Sequence[int],
        incoming: Mapping[int, _Incoming],
        slots: Mapping[int, Int64s],
    ) -> None:
        stored = self._own.payloads(_stored(records.table["slot"]))
        sends = [Message(peer=h, data=data, slice_bytes=self._slice_bytes) for h in holders for data in stored]
        receives = [
            Message(peer=owner, data=data, slice_bytes=incoming[owner].slice_bytes)
            for owner, taken in slots.items()
            for data in self._held[owner].payloads(_stored(taken))
        ]
        self._channel.exchange(sends, receives)

    def _keep(self, announced: _Incoming, slots: Int64s) -> bool:
        """Verify what arrived and commit it; damaged bytes are given up, all of the snapshot."""
        arena, records, stored = self._held[announced.owner], announced.records, _stored(slots)
        chunk_bytes = arena.spec.identity.chunk_bytes
        addresses, sizes = arena.payload_addresses(stored), arena.slot_bytes(stored)
        expected = records.table["digest"][~records.is_zero]
        if not verify(self._pool, chunk_bytes, addresses, sizes, announced.digests, expected).all():
            arena.release(slots)
            return False
        scatter_digests(self._pool, announced.digests, addresses + sizes, num_chunks_of(sizes, chunk_bytes))
        arena.add(records.replace(slot=slots))
        return True

    def _table(self, records: Records) -> Bytes:
        """The records, then their chunk digests, as bytes."""
        slots = _stored(records.table["slot"])
        sizes = self._own.slot_bytes(slots)
        places = self._own.payload_addresses(slots) + sizes
        digests = gather_digests(self._pool, places, num_chunks_of(sizes, self._own.spec.identity.chunk_bytes))
        return np.concatenate([records.table.view(np.uint8), digests.view(np.uint8)])

    def _digest(self, data: Bytes) -> int:
        return digest_of(self._pool, data)


def _stored(slots: npt.NDArray[Any]) -> Int64s:
    """Of captures' slots those that are slots: captures of zeros have none."""
    found: Int64s = slots[slots != NO_SLOT].astype(np.int64)
    return found
