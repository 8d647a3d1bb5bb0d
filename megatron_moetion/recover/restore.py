# SPDX-License-Identifier: Apache-2.0
"""Carries out a recovery plan: moves captures to where they belong, verifies them, writes them back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_moetion.arrays import Bytes, Int64s
from megatron_moetion.errors import ChannelError, CorruptArena
from megatron_moetion.recover.fragments import FragmentMover
from megatron_moetion.recover.plan import Key, Leg, Order, RecoveryPlan
from megatron_moetion.recover.survey import intact
from megatron_moetion.replicate.channel import Channel, Message
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_SLOT, Page, Records, in_history
from megatron_moetion.store.retention import Retention, Settled


@dataclass(frozen=True, kw_only=True)
class Mover:
    """One rank's part in moving captures between nodes. ``arenas``: those that this rank opened, by owner and part."""

    rank: int
    arenas: Mapping[Key, Arena]
    channel: Channel
    pool: HostPool
    plan: RecoveryPlan
    orders: Mapping[int, Order]
    """By owner, as for all below."""
    retentions: Mapping[int, Retention]

    def make_room(self, legs: Sequence[Leg]) -> None:
        """Before receiving: drop from the receiving arenas what neither T nor the last safe iteration needs.

        T may be newer than what replicas hold. Until every replica has T, a node may still be lost, and then
        the safe iteration is what remains.
        """
        for into in {leg.into for leg in legs if leg.target == self.rank}:
            owner = into[0]
            order = self.orders[owner]
            here = [leg for leg in legs if (leg.into, leg.target) == (into, self.rank)]
            # What is about to arrive is missing here or damaged; a damaged one makes way.
            coming = {key for leg in here for key in self._records(leg).keys}
            wanted = set(order.records.keys)

            def change(
                page: Page,
                owner: int = owner,
                coming: set[tuple[int, int]] = coming,
                wanted: set[tuple[int, int]] = wanted,
            ) -> dict[str, Any]:
                there = _among(page.records, coming, but=True)
                live = there.where(in_history(there, self.plan.branches, self.plan.epoch))
                old = live.where(live.table["iteration"] <= self.plan.safe)
                safe = self.retentions[owner].keep(old, Settled(stable=self.plan.safe))
                return {"records": _among(live, {*safe.keys, *wanted})}

            self.arenas[into].edit(change)

    def move(self, legs: Sequence[Leg]) -> int:
        """Take part in these legs, all at once; returns bytes received.

        ``legs`` are in the order of their keys, which is the same on all ranks. What has arrived is committed at the
        end, if all of it is whole: all of an arena's at once. Else ``ChannelError``.
        """
        of_whole = [leg for leg in legs if leg.part.is_whole]
        coming = [(leg, self._targets(leg.into, leg.rows)) for leg in of_whole if leg.target == self.rank]
        sends = [
            Message(peer=leg.target, data=part)
            for leg in of_whole
            if leg.source == self.rank
            for part in self._parts(leg.out_of, self._sources(leg))
        ]
        receives = [
            Message(peer=leg.source, data=part) for leg, records in coming for part in self._parts(leg.into, records)
        ]
        self.channel.exchange(sends, receives)
        for leg, records in coming:
            self._require_intact(leg, records)
        arrived = [(leg.into, records) for leg, records in coming]
        arrived += self._move_fragments([leg for leg in legs if not leg.part.is_whole])
        for into in {into for into, _ in arrived}:
            self.arenas[into].add(Records(np.concatenate([r.table for where, r in arrived if where == into])))
        return sum(int(records.table["nbytes"].sum()) for _, records in arrived)

    def _move_fragments(self, legs: Sequence[Leg]) -> list[tuple[Key, Records]]:
        """The same for fragments: to owners, or to holders. What has arrived is not committed yet."""
        here = [leg for leg in legs if leg.target == self.rank]
        rows: dict[Key, set[int]] = {}
        for leg in here:
            rows.setdefault(leg.into, set()).update(leg.rows.tolist())
        coming = {into: self._targets(into, np.array(sorted(its), dtype=np.int64)) for into, its in rows.items()}
        slots = {
            into: dict(zip(sorted(rows[into]), records.table["slot"].tolist(), strict=True))
            for into, records in coming.items()
        }
        mover = FragmentMover(
            rank=self.rank, arenas=self.arenas, orders=self.orders, channel=self.channel, pool=self.pool, targets=slots
        )
        mover.fetch([leg for leg in legs if leg.target == leg.owner])
        to_holders = [leg for leg in legs if leg.target != leg.owner]
        mover.copy(to_holders)
        for leg in to_holders:
            if leg.target == self.rank:
                coming[leg.into] = mover.verified(leg, coming[leg.into])
        return list(coming.items())

    def begin_epoch(self) -> None:
        """Durably: the new epoch, T stable, and only what T needs, in every arena that stays in use.

        The captures enter the new epoch, so that they outlive any number of recoveries.
        """
        for (owner, _), arena in self.arenas.items():
            wanted = set(self.orders[owner].records.keys)

            def change(page: Page, wanted: set[tuple[int, int]] = wanted) -> dict[str, Any]:
                return {
                    "records": _among(page.records, wanted).replace(epoch=self.plan.epoch),
                    "epoch": self.plan.epoch,
                    "stable": self.plan.iteration,
                    "branches": self.plan.branches,
                }

            arena.edit(change)

    def _records(self, leg: Leg) -> Records:
        """What a leg moves, as its owner lists it."""
        return Records(self.orders[leg.owner].records.table[leg.rows])

    def _sources(self, leg: Leg) -> Records:
        """The records of a leg in this rank's arena."""
        listed = self.arenas[leg.out_of].page.records
        places = {key: row for row, key in enumerate(listed.keys)}
        wanted = self._records(leg).keys
        missing = [key for key in wanted if key not in places]
        assert not missing, f"rank {leg.owner} has {missing[:3]} fetched from an arena that lacks it"
        return Records(listed.table[[places[key] for key in wanted]])

    def _targets(self, into: Key, rows: Int64s) -> Records:
        """Rows of the order of this arena's owner, each in a free slot of the arena."""
        arena, records = self.arenas[into], Records(self.orders[into[0]].records.table[rows])
        stored = ~records.is_zero
        sizes = arena.unit_bytes[records.table["unit"][stored]]
        part = arena.spec.part
        expected = [part.stored_bytes(nbytes) for nbytes in records.table["nbytes"][stored].tolist()]
        assert sizes.tolist() == expected, f"{arena.name}: sizes of other units"
        slots = arena.acquire_all(sizes)
        assert slots is not None, f"no free slots for {len(sizes)} captures in {arena.name}, although room was made"
        found = np.full(len(records), NO_SLOT, dtype=np.int64)
        found[stored] = slots
        return records.replace(slot=found)

    def _parts(self, key: Key, records: Records) -> list[Bytes]:
        """The chunk digests and the bytes of each capture that is not zero."""
        arena = self.arenas[key]
        slots = records.table["slot"][~records.is_zero].tolist()
        return [part for slot in slots for part in (arena.digests(slot).view(np.uint8), arena.payload(slot))]

    def _require_intact(self, leg: Leg, records: Records) -> None:
        arena = self.arenas[leg.into]
        damaged = np.flatnonzero(~intact(arena, records, self.pool))
        if len(damaged):
            name = arena.spec.units[records[int(damaged[0])].unit][0]
            raise ChannelError(
                f"unit {name} of rank {leg.owner} arrived damaged from rank {leg.source}; nothing was loaded, restart "
                f"to try again"
            )


def _among(records: Records, keys: Collection[tuple[int, int]], *, but: bool = False) -> Records:
    """The records with these units and iterations; ``but``: all others."""
    return records.where(np.array([(key in keys) is not but for key in records.keys], dtype=bool))


def verified(pool: HostPool, arena: Arena, order: Order) -> Records:
    """The captures that an order names, every byte of them verified once more. Nothing has been written yet."""
    places = {key: n for n, key in enumerate(arena.page.records.keys)}
    wanted = order.records
    for unit, iteration in wanted.keys:
        if (unit, iteration) not in places:
            name = arena.spec.units[unit][0]
            raise CorruptArena(f"{arena.name}: the capture of {name} at iteration {iteration} has gone")
    records = Records(arena.page.records.table[[places[key] for key in wanted.keys]])
    damaged = np.flatnonzero(~intact(arena, records.replace(digest=wanted.table["digest"]), pool))
    if len(damaged):
        name = arena.spec.units[wanted[int(damaged[0])].unit][0]
        raise CorruptArena(f"{arena.name}: the capture of {name} changed after it was surveyed; restart to try again")
    return records
