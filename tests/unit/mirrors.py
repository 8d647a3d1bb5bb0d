# SPDX-License-Identifier: Apache-2.0
"""Ranks on a node each, with real arenas and real sockets between them, that replicate and do nothing else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fabrics import Faults, loopback_fabrics
from support import POOL, ToyState, capture, find, make_arena, make_packer, no_probe, node_folder, scheduler

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import SystemClock
from megatron_moetion.recover.survey import intact
from megatron_moetion.replicate.frames import PURPOSE
from megatron_moetion.replicate.holder import Holder
from megatron_moetion.replicate.link import Timing
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.replicate.replication import Replication
from megatron_moetion.replicate.worker import SystemThreads, Threads
from megatron_moetion.snapshot.codec import Codec
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.open import OpenArenas
from megatron_moetion.store.retention import Newest, Retention, Settled

TIMING = Timing(answer_s=2.0, dial_s=0.3, pause_min_s=0.01, pause_max_s=0.05, away_s=0.2)
"""Bounds that tests can wait for."""
LONG_S = 20.0
"""The most that a test waits for what must come."""


def eventually(what: Callable[[], bool], timeout_s: float = LONG_S) -> bool:
    """Whether it comes about in time."""
    until = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


class Wires(Faults):
    """Faults, and whatever else a test does to what is sent for replication."""

    def __init__(self) -> None:
        super().__init__()
        self.change: Callable[[int, int, Sequence[Bytes]], Sequence[Bytes]] = lambda rank, peer, parts: parts
        """Of sender, receiver and what is sent to what is sent in its place; may raise ``ChannelError``."""
        self.sent: dict[tuple[int, int], int] = defaultdict(int)
        """Bytes by sender and receiver."""

    def sending(self, rank: int, peer: int, purpose: str, parts: Sequence[Bytes]) -> Sequence[Bytes]:
        parts = super().sending(rank, peer, purpose, parts)
        if purpose == PURPOSE and parts:
            parts = self.change(rank, peer, parts)
            self.sent[rank, peer] += sum(p.nbytes for p in parts)
        return parts

    def damage(self, rank: int, number: int, position: int) -> None:
        """Of what this rank sends from now on, a byte of the n-th message is damaged; of its header or its body."""
        count = 0

        def change(sender: int, receiver: int, parts: Sequence[Bytes]) -> Sequence[Bytes]:
            nonlocal count
            if sender != rank:
                return parts
            count += 1
            if count != number + 1:
                return parts
            self.met += 1
            damaged = np.concatenate(parts)
            damaged[position % damaged.nbytes] ^= 1
            return [damaged]

        self.change = change


class Ranks:
    """As many ranks as nodes. ``room``: ranks whose nodes have room for others' arenas."""

    def __init__(
        self,
        folder: Path,
        num_ranks: int = 2,
        replicas: int = 1,
        *,
        coding_nodes: int = 0,
        copies: int = 3,
        held_copies: int | None = None,
        patience: int = 1000,
        room: Sequence[int] = (),
        timing: Timing = TIMING,
        retention: Retention | None = None,
        probe: Callable[[str, int], None] = no_probe,
        held_probe: Callable[[str, int], None] = no_probe,
        states: Sequence[ToyState] | None = None,
        threads: Threads | None = None,
        **network: Any,
    ) -> None:
        self.faults = Wires()
        self.threads = threads or SystemThreads()
        self.fabrics = loopback_fabrics(num_ranks, cuts=self.faults, **network)
        self.states = list(states or [ToyState(num_experts=2, seed=r) for r in range(num_ranks)])
        self.packers = [make_packer(s.inventory()) for s in self.states]
        self.placement: Placement = place([f"node{r}" for r in range(num_ranks)], replicas, (), coding_nodes)
        self.folders = [folder / f"node{r}" for r in range(num_ranks)]
        self.arenas: list[OpenArenas] = []
        self.replications: list[Replication] = []
        self.patience, self.room, self.timing = patience, room, timing
        self.probe, self.held_probe = probe, held_probe
        for rank in range(num_ranks):
            held = {
                o: make_arena(
                    self.folders[rank], self.states[o], o, held_copies or copies, self.placement.part_at(rank, o)
                )
                for o in self.placement.owners_held_by(rank)
            }
            own = make_arena(self.folders[rank], self.states[rank], rank, copies)
            self.arenas.append(OpenArenas(own=own, held=held, retention=retention or Newest()))
        for rank in range(num_ranks):
            self.replications.append(self._replication(rank))

    def _replication(self, rank: int) -> Replication:
        mesh = self.fabrics[rank].mesh
        holder = Holder(
            mesh=mesh,
            arenas=self.arenas[rank],
            node=Node.like(node_folder(self.folders[rank]), has_room=rank in self.room),
            pool=POOL,
            probe=self.held_probe,
            threads=SystemThreads(),
            timeout_s=self.timing.answer_s,
        )
        return Replication(
            mesh=mesh,
            own=self.arenas[rank].own,
            holder=holder,
            placement=self.placement,
            pool=POOL,
            probe=self.probe,
            pacing=scheduler(),
            patience=self.patience,
            timeout_s=LONG_S,
            clock=SystemClock(),
            threads=self.threads,
            timing=self.timing,
        )

    def own(self, rank: int) -> Arena:
        return self.arenas[rank].own

    def held(self, holder: int, owner: int) -> Arena:
        return self.arenas[holder].held[owner]

    def commit(self, rank: int, iteration: int, units: Sequence[int] | None = None) -> Records:
        """Capture and offer."""
        records = capture(self.packers[rank], self.own(rank), iteration, units)
        self.replications[rank].offer(iteration, is_there=True)
        return records

    def take(self, rank: int, iteration: int, units: Sequence[int] | None = None) -> bool:
        """As ``commit``; False where there is no room, as in a run."""
        own = self.own(rank)
        sizes = own.unit_bytes if units is None else own.unit_bytes[list(units)]
        slots = own.acquire_all(sizes) if own.can_list(len(sizes)) else None
        if slots is not None:
            own.release(slots)
            self.commit(rank, iteration, units)
            return True
        self.replications[rank].offer(iteration, is_there=False)
        return False

    def settle(self, rank: int, stable: int, given_up: Collection[int] = ()) -> None:
        """All ranks have agreed on this iteration, and to give some up."""
        self.arenas[rank].release(Settled(stable=stable, whole=dict.fromkeys(given_up, False)))

    def step(self, iteration: int) -> None:
        """Every rank takes one snapshot; all wait until it is whole, and make it stable."""
        for rank, state in enumerate(self.states):
            state.step(iteration)
            self.commit(rank, iteration)
        for rank in range(len(self.states)):
            assert self.becomes_whole(rank, iteration), self.replications[rank].states()
            self.settle(rank, iteration)

    def becomes_whole(self, rank: int, iteration: int, timeout_s: float = LONG_S) -> bool:
        return eventually(lambda: iteration in self.replications[rank].whole, timeout_s)

    def listed(self, holder: int, owner: int) -> set[int]:
        return {r.iteration for r in self.held(holder, owner).page.records}

    def is_mirror(self, holder: int, owner: int) -> bool:
        """Whether the holder's arena lists exactly what the owner's does, byte for byte, or fragments of that."""
        own, copy = self.own(owner), self.held(holder, owner)
        ours = {(r.unit, r.iteration, r.epoch, r.digest, r.tokens) for r in own.page.records}
        theirs = {(r.unit, r.iteration, r.epoch, r.digest, r.tokens) for r in copy.whole_records(copy.page.records)}
        if ours != theirs:
            return False
        for record in own.page.records:
            found = find(copy, record.unit, record.iteration)
            assert found is not None
            if not record.is_zero and not copy.spec.part.is_whole:
                part = copy.spec.part
                expected = np.empty(part.stored_bytes(record.nbytes), dtype=np.uint8)
                codec = Codec(part.data, part.parity)
                codec.fragment(part.number, own.payload(record.slot), record.digest, 0, expected)
                assert copy.payload(found.slot).tobytes() == expected.tobytes()
                assert intact(copy, copy.page.records, POOL).all()
            elif not record.is_zero:
                assert copy.payload(found.slot).tobytes() == own.payload(record.slot).tobytes()
                assert copy.digests(found.slot).tolist() == own.digests(record.slot).tolist()
        return True

    def close(self) -> None:
        for replication in self.replications:
            replication.close()
        self.fabrics.close()


class Node(NodeFolder):
    """A node that says whether it has room; without, it has that of the arenas it once had."""

    has_room = True
    had_bytes = 0

    @classmethod
    def like(cls, node: NodeFolder, *, has_room: bool) -> Node:
        found = cls(
            path=node.path, key=node.key, position=node.position, num_ranks=node.num_ranks, clock=node.clock
        )  # fmt: skip
        object.__setattr__(found, "has_room", has_room)
        object.__setattr__(found, "had_bytes", found.bytes_here())
        return found

    def spare_bytes(self) -> int:
        return 1 << 40 if self.has_room else self.had_bytes - self.bytes_here()


@contextmanager
def running(folder: Path, *arguments: Any, **options: Any) -> Iterator[Ranks]:
    """``Ranks`` that are closed at the end."""
    ranks = Ranks(folder, *arguments, **options)
    try:
        yield ranks
    finally:
        ranks.close()
