# SPDX-License-Identifier: Apache-2.0
"""Replication over queues: what arrives is bit-equal, listed only if it verifies, and both sides stay in step."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import CHUNK_BYTES, POOL, Network, ToyState, capture, make_arena, no_probe, scheduler, together

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.replicator import Replicator
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Record


class Ranks:
    """Ranks on a node each: their state, packer, arenas and replicators."""

    def __init__(self, folder: Path, num_ranks: int, replicas: int = 1, held_copies: int = 3) -> None:
        self.network = Network(num_ranks, timeout_s=5)
        self.states = [ToyState(num_experts=2, seed=r) for r in range(num_ranks)]
        self.packers = [Packer(s.inventory(), CHUNK_BYTES, 1) for s in self.states]
        placement = place([f"node{r}" for r in range(num_ranks)], replicas)
        self.own = [make_arena(folder / f"node{r}", s, owner=r) for r, s in enumerate(self.states)]
        self.held: list[dict[int, Arena]] = [
            {o: make_arena(folder / f"node{r}", self.states[o], o, held_copies) for o in placement.owners_held_by(r)}
            for r in range(num_ranks)
        ]
        self.replicators = [
            Replicator(
                channel=self.network.channel(r),
                own=self.own[r],
                holders=placement.holders[r],
                held=self.held[r],
                pool=POOL,
                epoch=0,
                probe=no_probe,
                pacing=scheduler(),
            )
            for r in range(num_ranks)
        ]

    def commit(self, rank: int, iteration: int) -> tuple[Record, ...]:
        return capture(self.packers[rank], self.own[rank], iteration)

    def round(self, iteration: int, records: list[tuple[Record, ...]]) -> list[bool]:
        return together(
            *(lambda r=r: self.replicators[r].replicate(iteration, records[r]) for r in range(len(self.own)))  # type: ignore[misc]
        )

    def listed(self, holder: int, owner: int) -> set[int]:
        return {r.iteration for r in self.held[holder][owner].page.records}

    def assert_equal(self, holder: int, owner: int, iteration: int) -> None:
        """The holder's copy of the owner's snapshot is the owner's, byte for byte."""
        ours = [r for r in self.own[owner].page.records if r.iteration == iteration]
        assert len(ours) == len(self.own[owner].spec.units)
        for record in ours:
            copy = self.held[holder][owner].find(record.unit, iteration)
            assert copy is not None
            assert (copy.digest, copy.tokens, copy.epoch) == (record.digest, record.tokens, record.epoch)
            theirs = self.held[holder][owner]
            assert theirs.payload(copy.slot).tobytes() == self.own[owner].payload(record.slot).tobytes()
            assert theirs.digests(copy.slot).tolist() == self.own[owner].digests(record.slot).tolist()


@pytest.mark.parametrize(("num_ranks", "replicas"), [(2, 1), (3, 1), (3, 2)])
def test_replicas_are_bit_equal_and_listed(tmp_path: Path, num_ranks: int, replicas: int) -> None:
    ranks = Ranks(tmp_path, num_ranks, replicas)
    for iteration in range(1, 3):
        for state in ranks.states:
            state.step(iteration)
        records = [ranks.commit(r, iteration) for r in range(num_ranks)]
        assert ranks.round(iteration, records) == [True] * num_ranks
        for holder in range(num_ranks):
            for owner in ranks.held[holder]:
                ranks.assert_equal(holder, owner, iteration)
    sent = sum(r.nbytes for r in ranks.own[0].page.records)
    assert [r.bytes_sent for r in ranks.replicators] == [sent * replicas] * num_ranks
    assert [r.refused for r in ranks.replicators] == [0] * num_ranks


def test_an_empty_round_keeps_both_sides_in_step(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    assert ranks.round(1, [(), ()]) == [False, False]
    assert ranks.round(2, [ranks.commit(0, 2), ()]) == [True, False]
    assert ranks.round(3, [ranks.commit(0, 3), ranks.commit(1, 3)]) == [True, True]
    assert ranks.listed(1, 0) == {2, 3}
    assert ranks.listed(0, 1) == {3}
    assert [r.refused for r in ranks.replicators] == [0, 0]


def test_a_buddy_without_room_refuses_and_both_stay_in_step(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, held_copies=1)
    assert ranks.round(1, [ranks.commit(0, 1), ranks.commit(1, 1)]) == [True, True]
    assert ranks.round(2, [ranks.commit(0, 2), ()]) == [False, False]
    assert [r.refused for r in ranks.replicators] == [1, 0]
    assert ranks.listed(1, 0) == {1}
    ranks.held[1][0].edit(lambda page: {"records": ()})
    assert ranks.round(3, [ranks.commit(0, 3), ()]) == [True, False]
    assert ranks.listed(1, 0) == {3}
    ranks.assert_equal(1, 0, 3)


def test_a_damaged_payload_is_refused_and_not_listed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    largest = max(nbytes for _, _, nbytes in ranks.own[0].spec.units)
    free_before = len(ranks.held[1][0].page.records)
    ranks.network.damage = lambda source, target, size: size // 2 if (source, size) == (0, largest) else None
    assert ranks.round(1, [ranks.commit(0, 1), ranks.commit(1, 1)]) == [False, True]
    assert ranks.listed(1, 0) == set()
    assert [r.refused for r in ranks.replicators] == [1, 0]
    ranks.network.damage = lambda source, target, size: None
    for iteration in (2, 3):  # the slots of the refused snapshot are free again
        assert ranks.round(iteration, [ranks.commit(0, iteration), ()]) == [True, False]
    assert ranks.listed(1, 0) == {2, 3}
    assert free_before == 0


def test_a_damaged_table_lists_nothing_wrong(tmp_path: Path) -> None:
    """Where a record names the wrong iteration or unit, its bytes still verify: the table needs its own check."""
    ranks = Ranks(tmp_path, 2)
    first = ranks.commit(0, 1)
    chunks = sum(ranks.own[0].digests(r.slot).size for r in first)
    table = 48 * len(first) + 8 * chunks
    for position in range(48):
        ranks.network.damage = lambda _, __, size, at=position: at if size == table else None  # type: ignore[misc]
        records = first if position == 0 else ranks.commit(0, position + 1)
        together(
            lambda i=position + 1, r=records: ranks.replicators[0].replicate(i, r),  # type: ignore[misc]
            lambda i=position + 1: ranks.replicators[1].replicate(i, ()),  # type: ignore[misc]
        )
        for listed in ranks.held[1][0].page.records:
            truth = next(r for r in records if r.unit == listed.unit)
            assert (listed.iteration, listed.epoch, listed.digest, listed.tokens) == (
                truth.iteration, truth.epoch, truth.digest, truth.tokens,
            ), f"byte {position} of the table was damaged"  # fmt: skip
        for arena in (ranks.own[0], ranks.held[1][0]):
            arena.edit(lambda page: {"records": ()})


def test_a_dead_buddy_is_a_channel_error(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.network.dead.add(1)
    with pytest.raises(ChannelError):
        ranks.replicators[0].replicate(1, ranks.commit(0, 1))


def test_ranks_out_of_step_stop_replicating(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    with pytest.raises(ChannelError, match=r"replicates iteration \d of epoch 0; here it is iteration \d"):
        together(
            lambda: ranks.replicators[0].replicate(1, ()),
            lambda: ranks.replicators[1].replicate(2, ()),
        )
