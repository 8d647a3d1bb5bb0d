# SPDX-License-Identifier: Apache-2.0
"""Carries out a recovery plan: moves captures to where they belong, verifies them, writes them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_moetion.errors import ChannelError, CorruptArena
from megatron_moetion.recover.plan import Choice, RecoveryPlan, Transfer
from megatron_moetion.recover.survey import intact
from megatron_moetion.replicate.channel import Channel, Message
from megatron_moetion.snapshot.digest import is_intact
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import NO_SLOT, Page, Record, Records, in_history
from megatron_moetion.store.retention import Retention, Settled


@dataclass(frozen=True, kw_only=True)
class Mover:
    """One rank's part in moving captures between nodes. ``arenas`` are those that this rank opened, by owner."""

    rank: int
    arenas: Mapping[int, Arena]
    channel: Channel
    pool: HostPool
    plan: RecoveryPlan
    retentions: Mapping[int, Retention]
    """By owner."""

    def make_room(self, transfers: Sequence[Transfer]) -> None:
        """Before receiving: drop from the receiving arenas what neither T nor the last safe iteration needs.

        T may be newer than what replicas hold. Until every replica has T, a node may still be lost, and then
        the safe iteration is what remains.
        """
        for owner in {t.owner for t in transfers if t.target == self.rank}:
            arena = self.arenas[owner]
            wanted = {(c.unit, c.iteration) for c in self.plan.choices[owner]}
            # What is about to arrive is missing here or damaged; a damaged one makes way.
            coming = {(t.unit, t.iteration) for t in transfers if (t.owner, t.target) == (owner, self.rank)}
            there = (r for r in arena.page.records if r.key not in coming)
            live = [r for r in there if in_history(r, self.plan.branches, self.plan.epoch)]
            old = Records.of(r for r in live if r.iteration <= self.plan.safe)
            safe = self.retentions[owner].keep(old, Settled(stable=self.plan.safe))
            arena.edit(partial(_only, {*safe.keys, *(r.key for r in live if r.key in wanted)}))

    def move(self, transfers: Sequence[Transfer]) -> int:
        """Take part in the transfers, in the plan's order, which is the same on all ranks; returns bytes received.

        What has arrived is committed at the end, all of an arena's at once.
        """
        listed = {
            (owner, *record.key): record
            for owner in {t.owner for t in transfers if t.source == self.rank}
            for record in self.arenas[owner].page.records
        }
        coming = {t.owner for t in transfers if t.target == self.rank}
        choices = {(owner, c.unit, c.iteration): c for owner in coming for c in self.plan.choices[owner]}
        arrived: dict[int, list[Record]] = {owner: [] for owner in coming}
        for transfer in transfers:
            key = (transfer.owner, transfer.unit, transfer.iteration)
            if transfer.source == self.rank:
                assert key in listed, f"the plan reads {transfer} from an arena that lacks it"
                self._send(transfer, listed[key])
            elif transfer.target == self.rank:
                arrived[transfer.owner].append(self._receive(transfer, choices[key]))
        for owner, records in arrived.items():
            self.arenas[owner].add(records)
        return sum(r.nbytes for records in arrived.values() for r in records)

    def _send(self, transfer: Transfer, record: Record) -> None:
        parts = [np.array([record.epoch, record.digest], dtype=np.uint64).view(np.uint8)]
        if not record.is_zero:
            arena = self.arenas[transfer.owner]
            parts += [arena.digests(record.slot).view(np.uint8), arena.payload(record.slot)]
        for part in parts:
            self.channel.exchange([Message(peer=transfer.target, data=part)], [])

    def _receive(self, transfer: Transfer, choice: Choice) -> Record:
        arena = self.arenas[transfer.owner]
        nbytes = 0 if choice.is_zero else arena.spec.units[transfer.unit][2]
        slot = NO_SLOT if choice.is_zero else arena.acquire(nbytes)
        assert slot is not None, f"no free slot of {nbytes} bytes in {arena.name}, although room was made"
        head = np.zeros(2, dtype=np.uint64)
        parts = [head.view(np.uint8)]
        if not choice.is_zero:
            parts += [arena.digests(slot).view(np.uint8), arena.payload(slot)]
        for part in parts:
            self.channel.exchange([], [Message(peer=transfer.source, data=part)])
        chunk_bytes = arena.spec.identity.chunk_bytes
        if not choice.is_zero and not is_intact(
            self.pool, chunk_bytes, arena.payload(slot), arena.digests(slot), choice.digest
        ):
            arena.release([slot])
            raise ChannelError(
                f"unit {arena.spec.units[transfer.unit][0]} of rank {transfer.owner} arrived damaged from rank "
                f"{transfer.source}; nothing was loaded, restart to try again"
            )
        return Record(
            unit=transfer.unit,
            iteration=transfer.iteration,
            epoch=int(head[0]),
            slot=slot,
            nbytes=nbytes,
            digest=choice.digest,
            tokens=choice.tokens,
        )

    def begin_epoch(self) -> None:
        """Durably: the new epoch, T stable, and only what T needs, in every arena that stays in use.

        The captures enter the new epoch, so that they outlive any number of recoveries.
        """
        epoch = self.plan.epoch
        for owner, arena in self.arenas.items():
            wanted = {(c.unit, c.iteration) for c in self.plan.choices[owner]}

            def change(page: Page, wanted: set[tuple[int, int]] = wanted) -> dict[str, Any]:
                return {
                    "records": _only(wanted, page)["records"].replace(epoch=epoch),
                    "epoch": epoch,
                    "stable": self.plan.iteration,
                    "branches": self.plan.branches,
                }

            arena.edit(change)


def _only(wanted: set[tuple[int, int]], page: Page) -> dict[str, Any]:
    """The page with no other captures than the wanted ones."""
    is_wanted = np.array([key in wanted for key in page.records.keys], dtype=bool)
    return {"records": page.records.where(is_wanted)}


def verified(pool: HostPool, arena: Arena, choices: Sequence[Choice]) -> Records:
    """The chosen captures, every byte of them verified once more. Nothing has been written yet."""
    places = {key: n for n, key in enumerate(arena.page.records.keys)}
    for choice in choices:
        if (choice.unit, choice.iteration) not in places:
            name = arena.spec.units[choice.unit][0]
            raise CorruptArena(f"{arena.name}: the capture of {name} at iteration {choice.iteration} has gone")
    chosen = np.array([places[c.unit, c.iteration] for c in choices], dtype=np.int64)
    records = Records(arena.page.records.table[chosen])
    surveyed = records.replace(digest=np.array([c.digest for c in choices], dtype=np.uint64))
    damaged = np.flatnonzero(~intact(arena, surveyed, pool))
    if len(damaged):
        name = arena.spec.units[choices[damaged[0]].unit][0]
        raise CorruptArena(f"{arena.name}: the capture of {name} changed after it was surveyed; restart to try again")
    return records
